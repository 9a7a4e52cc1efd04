"""Settings are loaded, chosen and documented, and the chosen values are reported."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from mergekit_bayes.configs import load_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune import FinetuneConfig, LoraSettings
from mergekit_bayes.finetune.choices import choose
from mergekit_bayes.finetune.rates import learning_rate, optimizer_rate
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from tests import finetuning
from tests.finetuning import config, info_of
from tests.tiny_models import tiny_gpt2

data = finetuning.data


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs" / "finetune").glob("*.yaml"))
)
def test_the_shipped_settings_load(path):
    load_config(FinetuneConfig, path)


def test_beta2_follows_from_the_steps_that_are_really_made(tmp_path, data):
    """Ragged epochs: 48 rows in batches of 5, two of them a step, are five steps an epoch."""
    settings = config(
        tmp_path, data, batch_size=5, gradient_accumulation=2, epochs=12, curvature="price"
    )
    report = run_finetune(settings, quiet=True)
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert posterior.info.training["steps"] == report.steps == 60
        assert posterior.info.training["beta2"] == pytest.approx(1 - 5 / 60)
        assert report.health["init_fraction"] == pytest.approx((1 - 5 / 60) ** 60)


def test_the_settings_that_were_chosen_are_told_before_training(tmp_path, data, capfd):
    run_finetune(config(tmp_path, data, max_steps=80))
    info = info_of(tmp_path / "out")
    (line,) = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("80 steps of ")
    ]
    training = info.training
    chosen = f", ess {training['ess']:.3g}, beta2 0.5, damping {training['damping']:.3g}, curvature"
    assert f"{chosen} ggn every 8 steps" in line
    run_finetune(
        config(tmp_path, data, max_steps=2, optimizer="adamw", posterior="none", force=True)
    )
    assert "tokens, adamw: learning_rate 0.0001, weight_decay 1e-06\n" in capfd.readouterr().err


# In the order of the record, which the loss ends; `initial_A` of an adapter stands between the two.
ALWAYS = (
    *("optimizer", "learning_rate", "lr", "weight_decay", "scheduler", "steps", "batch_size"),
    *("processes", "loss_reduction"),
)
WITH_IVON = (
    *("ess", "hess_init", "beta1", "beta2", "clip_radius", "rescale_lr", "mc_samples"),
    *("antithetic", "rank_noise", "curvature", "curvature_every", "damping"),
)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, [*ALWAYS, *WITH_IVON]),
        ({"optimizer": "adamw"}, [*ALWAYS]),
        ({"lora": {"r": 2}}, [*ALWAYS, "initial_A", *WITH_IVON]),
    ],
)
def test_a_posterior_stores_the_settings_of_its_run_under_these_names(
    tmp_path, data, changes, names
):
    run_finetune(config(tmp_path, data, max_steps=1, flush_batches=1, **changes), quiet=True)
    assert list(info_of(tmp_path / "out").training) == [*names, "loss"]


def test_a_length_above_the_models_context_is_said(tmp_path, data, caplog):
    for length in (None, 16, 5000):
        told = {} if length is None else {"max_length": length}
        run_finetune(
            config(tmp_path, data, max_steps=1, posterior="none", force=True, **told), quiet=True
        )
        assert ("so rows are cut there and not at 5000" in caplog.text) == (length == 5000)


def test_noise_that_drowns_the_weights_is_said_once_while_there_is_time(tmp_path, data, caplog):
    run_finetune(
        config(tmp_path, data, logging_steps=1, max_steps=4, ess=1e3, damping=0, posterior="none"),
        quiet=True,
    )
    assert sum("as large as the weights; raise damping" in r.message for r in caplog.records) == 1
    caplog.clear()
    settings = config(
        tmp_path,
        data,
        max_steps=4,
        ess=1e8,
        beta2=0.9,
        posterior="ivon",
        curvature="price",
        force=True,
    )
    run_finetune(settings, quiet=True)
    (kappa,) = {r.message for r in caplog.records if r.message.startswith("kappa is")}
    assert "store posterior: flush" in kappa
    assert "lower ess" not in kappa  # that leaves the noise of other weights
    assert "of hess_init is still in the Hessian" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"curvature": "price", "antithetic": True}, {"curvature_every": 2}]
)
def test_variants_of_ivon_are_settings(tmp_path, data, changes):
    kept = {"posterior": "ivon", "save_steps": 4, "keep_checkpoints": True, **changes}
    run_finetune(config(tmp_path, data, **kept), quiet=True)
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert {k: posterior.info.training[k] for k in changes} == changes
        assert posterior.info.training["mc_samples"] == (2 if "antithetic" in changes else 1)
        # h of the root-GGN draws may be merged with a flush, that of the published form may not.
        assert posterior.info.estimator == ("ivon" if "curvature" in changes else "ggn")
    (tmp_path / "out").rename(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out.checkpoints" / "checkpoint-12")
    run_finetune(config(tmp_path, data, resume=True, **kept), quiet=True)
    for file in ("model.safetensors", "posterior/precision.posterior"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.fixture
def guide(tmp_path, data, monkeypatch):
    """Blocks of the guide by language, with a tiny model and few steps."""
    monkeypatch.chdir(tmp_path)
    tiny_gpt2(tmp_path / "base")
    Path(data).rename("mine.jsonl")
    text = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
    for word, here in (
        ("openai-community/gpt2", "base"),
        ("max_steps=200", "max_steps=2"),
        ("max_steps=100)", "max_steps=4, report_to=[], use_cpu=True)"),
    ):
        assert word in text
        text = text.replace(word, here)
    return lambda language: re.findall(rf"```{language}\n(.*?)```", text, re.S)


def test_the_guide_s_first_settings_and_its_call_train(guide):
    (settings,) = guide("yaml")
    Path("tuned.yaml").write_text(settings)
    config = load_config(FinetuneConfig, Path("tuned.yaml"))
    # The guide says that these three are all that is required.
    required = {n for n, f in FinetuneConfig.model_fields.items() if f.is_required()}
    assert config.model_fields_set == required == {"model", "data", "output"}
    names = {}
    exec(guide("python")[0], names)
    assert names["report"].steps == 2
    assert names["config"].model_copy(update={"max_steps": None}) == config
    assert info_of("tuned").estimator == "ggn"


def test_the_guide_s_way_to_measure_a_stored_model_is_the_evaluation_of_training(guide, capsys):
    settings = {"model": "base", "data": "mine.jsonl", "output": "chat-tuned", "max_steps": 2}
    report = run_finetune(FinetuneConfig(**settings, eval_data="mine.jsonl"), quiet=True)
    Path("mine.jsonl").rename("test.jsonl")
    exec(guide("python")[1], {})
    found = ast.literal_eval(capsys.readouterr().out)
    assert found == pytest.approx(report.evaluation, rel=1e-5)


def test_the_script_of_the_guide_chooses_as_a_fine_tune(guide):
    _, _, coded, script = guide("python")
    assert "BitsAndBytesConfig" in coded  # it is run where bitsandbytes is (tests/test_finetune.py)
    exec(script, {})
    load_model("tuned")
    run_finetune(FinetuneConfig(model="base", data="mine.jsonl", output="ours", max_steps=4))
    chosen, taken = info_of("ours").training, info_of("tuned").training
    for name in ("batch_size", "processes", "loss_reduction", "scheduler"):
        chosen.pop(name)  # the Trainer knows these
    for name in ("hess_init", "rescale_lr"):
        chosen.pop(name)  # without effect under ggn
    assert {name: taken[name] for name in chosen} == chosen


@pytest.mark.parametrize(
    ("steps", "changes", "beta2"),
    [
        (4, {}, 0.5),
        (400, {}, 0.9),
        (4, {"curvature": "price"}, 0.9),
        (500, {"curvature": "price"}, 0.99),
        (10**7, {}, 0.99999),
    ],
)
def test_beta2_is_chosen_within_the_bounds_that_the_guide_states(
    tmp_path, data, steps, changes, beta2
):
    settings = config(tmp_path, data, max_steps=steps, **changes)
    loaded = load_model(settings.model)
    examples = encode_rows({"text": ["the cat sat"]}, loaded)
    assert choose(settings, loaded, examples, 1).ivon.beta2 == pytest.approx(beta2)


def test_an_adapters_default_rate_is_ten_times_that_of_whole_weights(tmp_path, data):
    for optimizer, lr in (("ivon", 0.1), ("adamw", 1e-4)):
        whole = config(tmp_path, data, optimizer=optimizer)
        adapter = whole.model_copy(update={"lora": LoraSettings()})
        assert (learning_rate(whole), learning_rate(adapter)) == (1e-4, 1e-3)
        assert (optimizer_rate(whole), optimizer_rate(adapter)) == (lr, 10 * lr)


def test_numbers_at_the_edges_of_a_setting_are_used_or_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="weight_decay > 0"):
        run_finetune(config(tmp_path, data, weight_decay=1e-320), quiet=True)
    with pytest.raises(ConfigError, match=r"num_labels: expected .* at most 1000000"):
        config(tmp_path, data, num_labels=10**12)
