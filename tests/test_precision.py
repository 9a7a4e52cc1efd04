"""A precision for an existing checkpoint: what it stands for, where it goes, and that it can be
used.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers
import typer
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bmerge_cli import finetune, precision
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.models.encode import Collate, batches, encode_rows, observations
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig, passes
from mergekit_bayes.precision.run import run_precision
from tests import tiny
from tests.tiny_models import tiny_bert, tiny_gpt2


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "t.jsonl"
    rows = [
        {"text": t, "label": i % 2}
        for i, t in enumerate(("the cat sat .", "a good film", "dull tree", "dog ran on"))
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows * 3))
    return str(file)


def test_the_precision_stands_for_all_of_the_data(tmp_path, data):
    model = tiny_gpt2(tmp_path / "m")
    report = run_precision(
        PrecisionConfig(model=str(model), data=data, examples=5, batch_size=1, seed=4, prior=0.5)
    )
    loaded = load_model(str(model))
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    examples = encode_rows({"text": texts}, loaded)
    total = observations(examples, "causal-lm")
    with open_posterior(str(model)) as posterior:
        info = posterior.info
        assert report.path == model / "posterior"
        assert (info.estimator, info.unit, info.observations, info.ess, info.sampled) == (
            "ggn",
            "token",
            total,
            total,
            5,
        )
        assert (info.prior.kind, info.prior.precision) == ("isotropic", 0.5)
        import torch

        order = torch.randperm(12, generator=torch.Generator().manual_seed(4)).tolist()[:5]
        curvature = ggn_diagonal(
            loaded.model, batches([examples[i] for i in order], 1, Collate(2)), seed=4
        )
        for name, value in tiny.read(model / "posterior" / "precision.posterior").items():
            expected = curvature.total[name].numpy() * (total / curvature.observations) + 0.5
            np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_classifier_needs_no_labels_and_counts_rows(tmp_path, data):
    model = tiny_bert(tmp_path / "m")
    run_precision(PrecisionConfig(model=str(model), data=data, where={"label": 1}))
    with open_posterior(str(model)) as posterior:
        assert (posterior.info.unit, posterior.info.observations) == ("example", 6)


def test_the_model_is_not_touched_and_a_second_run_needs_force(tmp_path, data):
    model = tiny_gpt2(tmp_path / "m")
    before = (model / "model.safetensors").read_bytes()
    run_precision(PrecisionConfig(model=str(model), data=data))
    with pytest.raises(CheckpointError, match="--force"):
        run_precision(PrecisionConfig(model=str(model), data=data))
    run_precision(PrecisionConfig(model=str(model), data=data, force=True))
    assert (model / "model.safetensors").read_bytes() == before


def test_weights_that_change_while_their_curvature_is_taken_are_refused(
    tmp_path, data, monkeypatch
):
    model = tiny_gpt2(tmp_path / "m")
    real = passes.estimate_curvature

    def estimate(*arguments, **options):
        with (model / "model.safetensors").open("r+b") as file:
            file.seek(-64, 2)
            file.write(bytes(64))
        return real(*arguments, **options)

    monkeypatch.setattr(passes, "estimate_curvature", estimate)
    with pytest.raises(ChangedError, match=r"m/model\.safetensors: was changed"):
        run_precision(PrecisionConfig(model=str(model), data=data))
    assert not (model / "posterior").exists()


def test_it_may_be_written_elsewhere_and_named_in_a_merge(tmp_path, data):
    from mergekit_bayes.merge import MergeConfig, run_merge

    a, b = tiny_gpt2(tmp_path / "a", seed=1), tiny_gpt2(tmp_path / "b", seed=2)
    places = {}
    for model in (a, b):
        out = tmp_path / f"{model.name}.fisher.safetensors"
        run_precision(PrecisionConfig(model=str(model), data=data, output=str(out)))
        places[str(model)] = str(out)
    run_merge(
        MergeConfig(
            models=(str(a), str(b)), weights="precision", precision=places, out=str(tmp_path / "ab")
        )
    )
    assert (tmp_path / "ab" / "posterior" / "precision.posterior").exists()
    assert not (a / "posterior").exists()


def test_mistakes_are_named(tmp_path, data):
    with pytest.raises(ConfigError, match="-o"):
        run_precision(PrecisionConfig(model="org/name", data=data))
    model = str(tiny_gpt2(tmp_path / "m"))
    with pytest.raises(ConfigError, match=r"at least 0 and of at most 1e\+30, found -1"):
        run_precision(PrecisionConfig(model=model, data=data, prior=-1))
    with pytest.raises(MismatchError, match="it has text, label"):
        run_precision(PrecisionConfig(model=model, data=data, text_column="body"))


def test_a_file_without_the_common_prefix_keeps_its_own_names(tmp_path, data):
    """As GPT-2 lies on the Hub: `h.0...` in the file, `transformer.h.0...` in memory."""
    model = tiny_gpt2(tmp_path / "m")
    run_precision(PrecisionConfig(model=str(model), data=data))
    expected = tiny.read(model / "posterior" / "precision.posterior")
    short = tmp_path / "short"
    shutil.copytree(model, short, ignore=shutil.ignore_patterns("posterior"))
    tensors = {n.removeprefix("transformer."): v for n, v in tiny.read(model).items()}
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    run_precision(PrecisionConfig(model=str(short), data=data))
    stored = tiny.read(short / "posterior" / "precision.posterior")
    assert set(stored) == set(tensors)
    for name, value in stored.items():
        np.testing.assert_array_equal(value, expected[f"transformer.{name}"])
    with open_posterior(str(short)) as posterior:
        assert posterior.info.aliases == {"lm_head.weight": "wte.weight"}


def test_a_head_that_the_file_does_not_hold_has_no_precision(tmp_path, data):
    encoder = tmp_path / "encoder"
    transformers.AutoModel.from_pretrained(tiny_bert(tmp_path / "m")).save_pretrained(encoder)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "m").save_pretrained(encoder)
    with pytest.raises(MismatchError, match="made up"):
        run_precision(PrecisionConfig(model=str(encoder), data=data, task="classification"))
    assert not (encoder / "posterior").exists()


def run(module, *arguments):
    app = typer.Typer()
    app.command()(module.command)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_two_commands_print_one_document_or_one_path(tmp_path, data):
    settings = tmp_path / "f.yaml"
    model = tiny_gpt2(tmp_path / "m")
    settings.write_text(
        f"model: {model}\ndata: {data}\noutput: {tmp_path / 'out'}\nmax_steps: 2\nflush_batches: "
        "2\n"
    )
    done = run(finetune, settings, "--set", "batch_size=3", "--json", "-q")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["path"], report["steps"], done.stderr) == (str(tmp_path / "out"), 2, "")
    done = run(
        precision,
        model,
        "--data",
        data,
        "--data",
        data,
        "--where",
        "label=1",
        "--examples",
        "4",
        "--json",
        "-q",
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["path"], report["sampled"], done.stderr) == (str(model / "posterior"), 4, "")
    done = run(precision, model, "--data", data, "--force")
    assert done.stdout == f"{model / 'posterior'}\n"


def test_what_the_user_can_correct_is_one_message_and_exit_code_two(tmp_path, data):
    settings = tmp_path / "f.yaml"
    model = tiny_gpt2(tmp_path / "m")
    settings.write_text(f"model: {model}\ndata: {data}\noutput: {model}\n")
    for arguments, message in (
        ((finetune, settings), f"'{model}' exists"),
        ((finetune, settings, "--set", "learning_rat=1"), "did you mean 'learning_rate'"),
        ((finetune, tmp_path / "none.yaml"), "none.yaml: cannot be read"),
        (
            (finetune, settings, "--force", "--set", "output=x", "--set", "data=absent.csv"),
            "'absent.csv': no such file",
        ),
        ((precision, "org/name", "--data", data), "name a place with -o"),
        ((precision, model, "--data", data, "--where", "label"), "--where"),
        ((precision, tmp_path / "absent", "--data", data), "no such file or folder"),
        ((precision, f"{model}+{model}", "--data", data), f"Name the adapter's, '{model}', whose"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in done.stderr
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.yaml", "m", "t.jsonl"]
