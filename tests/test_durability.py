"""Variants of a model: measured in 4 bits and relearnt, under its own name, and nothing left."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from mergekit_bayes import ranks
from mergekit_bayes.checkpoint.identity import checkpoint_identity
from mergekit_bayes.compare import CompareConfig
from mergekit_bayes.compare import relearn as relearning
from mergekit_bayes.compare import run as running
from mergekit_bayes.compare.relearn import relearn
from mergekit_bayes.compare.run import run_compare
from mergekit_bayes.compare.variants import refuse_variants, variants_of
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate import run as evaluating
from mergekit_bayes.evaluate.files import write_report
from mergekit_bayes.evaluate.inputs import read_inputs
from mergekit_bayes.evaluate.run import evaluate_model, run_evaluate
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.hub.facts import read_facts
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.rounding import round_to_four_bits
from tests import tiny_models
from tests.two_ranks import found_by_two

TEXTS = ["the cat sat on the mat .", "a dull film , not good", "a bird saw a tree"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_models.tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder of texts and labels in which the test runs."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": t, "label": i % 2, "is": "removed"} for i, t in enumerate(TEXTS)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(*models, **settings):
    settings = {"perplexity": {"texts": "rows.jsonl"}, "bootstrap": 0, "device": "cpu"} | settings
    return CompareConfig(models=[str(m) for m in models], **settings)


def measured(chosen):
    """The reports of the variants of the first model, by name."""
    refuse_variants(chosen)
    inputs = read_inputs(chosen.evaluation(chosen.models[0]))
    return {
        variant: evaluate_model(evaluation, inputs, lambda *_: None, change).report
        for variant, evaluation, change in variants_of(chosen, chosen.models[0])
    }


def weights(loaded):
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters()}


def test_each_variant_is_measured_under_the_name_of_its_model_and_leaves_nothing(model, world):
    chosen = config(
        model, four_bits=True, relearn="rows.jsonl", relearn_steps=3, relearn_rate=0.01, output="o"
    )
    identity = checkpoint_identity(model)
    reports = measured(chosen)
    assert list(reports) == ["as it is", "in 4 bits", "relearnt"]
    assert {p.name for p in world.iterdir()} == {"rows.jsonl"}
    assert checkpoint_identity(model) == identity
    for variant, report in reports.items():
        assert report.variant == variant
        assert report.model == report.settings["model"] == str(model)
    assert reports["as it is"].model_identity == identity
    assert len({report.model_identity for report in reports.values()}) == 3
    assert reports["as it is"] == run_evaluate(chosen.evaluation(str(model)))

    def loss(report):
        return report.perplexity["texts"].loss.value

    assert loss(reports["relearnt"]) < loss(reports["as it is"]) - 0.1
    rounded = load_model(str(model))
    round_to_four_bits(rounded)
    stored = world / "rounded"
    rounded.model.save_pretrained(stored)
    rounded.tokenizer.save_pretrained(stored)
    by_hand = run_evaluate(chosen.evaluation(str(stored)))
    assert loss(reports["in 4 bits"]) == loss(by_hand) != loss(reports["as it is"])


def test_variants_are_not_averaged_over_a_posterior_which_is_the_stored_models(model, world):
    chosen = config(model, four_bits=True, samples=2, prior=3.0, precision="p", seed=7)
    _, (_, rounded, _) = variants_of(chosen, str(model))
    assert (rounded.samples, rounded.prior, rounded.precision) == (None, None, None)
    assert rounded.seed == 7
    assert config(model).evaluation(str(model)).samples is None
    assert [name for name, *_ in variants_of(config(model), str(model))] == ["as it is"]


def test_relearning_is_a_fine_tune_of_the_removed_rows(model, world, monkeypatch):
    seen = []

    def watched(settings, *, quiet):
        seen.append(settings)
        return run_finetune(settings, quiet=quiet)

    monkeypatch.setattr(relearning, "run_finetune", watched)
    chosen = config(model, relearn="rows.jsonl", relearn_steps=2, relearn_where={"is": "removed"})
    chosen = chosen.model_copy(update={"seed": 2**40 + 3, "output": "new/o"})
    loaded = load_model(str(model))
    relearn(chosen, str(model), loaded)
    (settings,) = seen
    expected = {
        "model": str(model),
        "where": {"is": "removed"},
        "max_rows": 100,
        "optimizer": "adamw",
        "learning_rate": 1e-4,
        "scheduler": "constant",
        "max_steps": 2,
        "batch_size": 16,
        "posterior": "none",
        "seed": 3,
    }
    dumped = settings.model_dump()
    assert {name: dumped[name] for name in expected} == expected
    assert settings.paths == ("rows.jsonl",)
    assert Path(settings.output).parent.parent.parent.resolve() == (world / "new").resolve()
    assert not list((world / "new").iterdir())
    run_finetune(settings.model_copy(update={"output": "again"}), quiet=True)
    again = weights(load_model("again"))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, again[name])
    name = "transformer.wte.weight"
    assert not torch.equal(again[name], weights(load_model(str(model)))[name])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError("no")])
@pytest.mark.parametrize("output", ["o", None])
def test_a_relearning_that_fails_or_is_stopped_leaves_nothing(
    model, world, monkeypatch, error, output
):
    made = []

    def stopped(settings, *, quiet):
        folder = Path(settings.output)
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
        made.append(folder)
        raise error

    (world / "tmp").mkdir()
    monkeypatch.setattr(relearning.tempfile, "gettempdir", lambda: str(world / "tmp"))
    monkeypatch.setattr(relearning, "run_finetune", stopped)
    chosen = config(model, relearn="rows.jsonl", output=output)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        relearn(chosen, str(model), load_model(str(model)))
    beside = world if output else world / "tmp"
    assert made[0].parent.parent.parent.resolve() == beside.resolve()
    assert {p.name for p in world.iterdir()} == {"rows.jsonl", "tmp"}
    assert not list((world / "tmp").iterdir())


@pytest.mark.slow
def test_an_adapter_is_relearnt_as_its_merged_model(model, world):
    from peft import LoraConfig, get_peft_model

    base = load_model(str(model))
    before = weights(base)
    settings = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    made = get_peft_model(base.model, settings)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    made.peft_config["default"].base_model_name_or_path = str(model)
    made.save_pretrained("adapter")
    ids, rows = torch.tensor([[0, 5, 6, 7]]), {"relearn": "rows.jsonl", "relearn_steps": 1}
    with torch.no_grad():
        expected = load_model("adapter").model.merge_and_unload()(input_ids=ids).logits
        for rate, is_same in ((1e-30, True), (1e-2, False)):
            loaded = load_model("adapter")
            with torch.enable_grad():
                relearn(config("adapter", relearn_rate=rate, **rows), "adapter", loaded)
            found = loaded.model(input_ids=ids).logits
            assert torch.equal(found, expected) == is_same
    # All weights are trained, not only those that the adapter changes.
    name = "transformer.wte.weight"
    assert not torch.equal(weights(loaded)[f"base_model.model.{name}"], before[name])


@pytest.mark.slow
def test_a_classifier_relearns_its_labels(world):
    model = tiny_models.tiny_bert(world / "bert")
    chosen = config(
        model,
        classify={"rows": "rows.jsonl"},
        perplexity={},
        relearn="rows.jsonl",
        relearn_steps=40,
    )
    # At 0.02 so few steps leap over the minimum of so small a model.
    chosen = chosen.model_copy(update={"relearn_rate": 1e-3})
    reports = measured(chosen)
    losses = [reports[v].classification["rows"].nll.value for v in ("as it is", "relearnt")]
    assert losses[1] < losses[0] / 4


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"relearn_steps": 5}, ConfigError, "--relearn-steps: about --relearn, which is not"),
        (
            {"relearn_rate": 1.0, "relearn_where": {"a": "b"}},
            ConfigError,
            "--relearn-where, --relearn-rate: about",
        ),
        ({"relearn": "absent.jsonl"}, CheckpointError, "absent.jsonl"),
        ({"relearn": "rows.jsonl", "text_column": "body"}, MismatchError, "body"),
        ({"relearn": "rows.jsonl", "relearn_where": {"is": "kept"}}, MismatchError, "no row"),
        (
            {"relearn": "rows.jsonl", "classify": {"a": "rows.jsonl"}, "label_column": "class"},
            MismatchError,
            "class",
        ),
        ({"relearn": "o/rows.jsonl", "output": "o"}, CheckpointError, "would replace"),
    ],
)
def test_what_cannot_be_relearnt_is_refused_before_a_model_is_loaded(
    world, settings, error, message
):
    (world / "o").mkdir()
    (world / "o" / "rows.jsonl").write_bytes((world / "rows.jsonl").read_bytes())
    with pytest.raises(error, match=message):
        refuse_variants(config("no-such-model", **settings))


def test_a_model_without_variants_is_refused_before_any_is_measured(model, world, monkeypatch):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    monkeypatch.setattr(running, "evaluate_model", lambda *_: pytest.fail("a model is measured"))
    shutil.copytree(model, "coded")
    written = json.loads(Path("coded/config.json").read_text())
    Path("coded/config.json").write_text(json.dumps(written | {"quantization_config": {}}))
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    prompts.base_model_name_or_path = str(model)
    get_peft_model(load_model(str(model)).model, prompts).save_pretrained("prompts")
    loaded = load_model(str(model))
    low_rank = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    get_peft_model(loaded.model, low_rank).save_pretrained("lora")
    written = json.loads(Path("lora/adapter_config.json").read_text())
    written["base_model_name_or_path"] = "coded"
    Path("lora/adapter_config.json").write_text(json.dumps(written))
    messages = {
        "coded": "'coded' is quantised already",
        "prompts": "no weights",
        "lora": "'lora' is quantised already",
    }
    for name, message in messages.items():
        for settings in ({"four_bits": True}, {"relearn": "rows.jsonl"}):
            with pytest.raises(ConfigError, match=message):
                run_compare(config(model, name, **settings))


def test_a_weight_without_4_bits_is_refused_before_its_model_is_measured(model, world, monkeypatch):
    monkeypatch.setattr(evaluating, "predict", lambda *_: pytest.fail("the model is measured"))
    loaded = load_model(str(model))
    with torch.no_grad():
        loaded.model.transformer.wte.weight[3, 4] = float("inf")
    loaded.model.save_pretrained("infinite")
    loaded.tokenizer.save_pretrained("infinite")
    with pytest.raises(CheckpointError, match=r"'transformer.wte.weight' holds a weight"):
        measured(config("infinite", four_bits=True))


def test_a_label_that_the_model_lacks_is_refused_before_it_is_measured(world, monkeypatch):
    monkeypatch.setattr(evaluating, "predict", lambda *_: pytest.fail("the model is measured"))
    Path("odd.jsonl").write_text(json.dumps({"text": TEXTS[0], "label": 9}))
    bert = tiny_models.tiny_bert(world / "bert")
    chosen = config(bert, classify={"a": "rows.jsonl"}, perplexity={}, relearn="odd.jsonl")
    with pytest.raises(MismatchError, match=r"'odd\.jsonl': label 9 .* LABEL_0, LABEL_1"):
        measured(chosen)


def test_relearning_trains_on_the_device_of_the_model(model, world, monkeypatch):
    def watched(device, work, settings, *, quiet):
        raise ConfigError(f"{work.__name__} on {device}")

    monkeypatch.setattr(relearning, "on_device", watched)
    with pytest.raises(ConfigError, match="run_finetune on cpu"):
        relearn(config(model, relearn="rows.jsonl"), str(model), load_model(str(model)))


def test_a_rate_that_leaves_no_finite_weights_is_refused_by_its_name(model, world):
    chosen = config(model, relearn="rows.jsonl", relearn_steps=2, relearn_rate=1e38)
    with pytest.raises(ConfigError, match=r"after 2 steps at 1e\+38 .* Lower --relearn-rate"):
        relearn(chosen, str(model), load_model(str(model)))


@pytest.mark.slow
def test_two_processes_relearn_what_one_does(model, world, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(model, "m")
    # 100 rows and 16 a step: several processes would fill up the last step of an epoch otherwise.
    rows = [{"text": f"{TEXTS[i % 3]} {'and ate ' * (i % 7)}"} for i in range(20)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = relearnt_loss()
    assert [found["loss"] for found in found_by_two("tests.test_durability", world)] == [
        expected
    ] * 2


def relearnt_loss():
    chosen = config("m", relearn="rows.jsonl", relearn_steps=4, relearn_rate=0.01)
    return run_compare(chosen).evaluations[1].report.perplexity["texts"].loss.value


def child(folder):
    os.chdir(folder)
    ranks.join(2)
    result = {"world": ranks.world(), "loss": relearnt_loss()}
    results = [None, None]
    torch.distributed.all_gather_object(results, result)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(results))


def test_a_card_shows_no_numbers_of_a_variant(model, world):
    shutil.copytree(model, "m")
    chosen = config("m", four_bits=True)
    inputs = read_inputs(chosen.evaluation("m"))
    for variant, evaluation, change in variants_of(chosen, "m"):
        name = variant.replace(" ", "-")
        write_report(
            Path("m", name),
            *evaluate_model(evaluation, inputs, lambda *_: None, change),
            force=False,
        )
    facts = read_facts(Path("m"), "org/m", posterior=False, only_posterior=False)
    (shown,) = facts.evaluations
    assert shown["variant"] == "as it is"
    assert any("in-4-bits/report.json evaluates other weights" in note for note in facts.notes)


def test_rows_without_a_word_are_not_relearnt(model, world, monkeypatch):
    monkeypatch.setattr("mergekit_bayes.compare.run.evaluate_model", pytest.fail)
    (world / "blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    with pytest.raises(MismatchError, match="no row of blank"):
        run_compare(config(model, relearn="blank.jsonl"))
