"""`--device` and `--dtype`: where a model runs and in which format, and what is refused."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests import finetuning, tiny
from tests.tiny_models import tiny_gpt2

data = finetuning.data
DTYPES = {"float32": 0.0, "bfloat16": 2e-2, "float16": 3e-3}  # with the error that is allowed


@pytest.fixture
def model(tmp_path):
    return str(tiny_gpt2(tmp_path / "m"))


def test_a_precision_is_the_same_in_every_dtype_up_to_rounding(tmp_path, model, data):
    precisions = {}
    for dtype in DTYPES:
        out = str(tmp_path / f"{dtype}.safetensors")
        report = run_precision(PrecisionConfig(model=model, data=data, dtype=dtype, output=out))
        assert (report.device, report.dtype) == (choose_device(None).type, dtype)
        tensors = tiny.read(out)
        precisions[dtype] = np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
    expected = precisions["float32"]
    large = expected > np.median(expected)
    for dtype, error in DTYPES.items():
        relative = abs(precisions[dtype][large] / expected[large] - 1)
        assert np.median(relative) <= error, dtype
        assert (np.median(relative) > 0) == (dtype != "float32"), dtype  # it did run in that dtype


def test_a_stored_precision_says_what_it_ran_in_and_what_its_mean_is_stored_in(model, data):
    run_precision(PrecisionConfig(model=model, data=data, device="cpu", dtype="bfloat16"))
    with open_posterior(model) as posterior:
        assert posterior.info.dtype == "float32"  # the file's
        training = posterior.info.training
        assert (training["device"], training["dtype"]) == ("cpu", "bfloat16")


def test_an_evaluation_runs_in_the_dtype_and_on_the_device_that_it_reports(model, data):
    results = {}
    for dtype in DTYPES:
        config = EvaluateConfig(
            model=model, perplexity={"t": data}, bootstrap=0, device="cpu", dtype=dtype
        )
        report = run_evaluate(config)
        assert (report.device, report.dtype) == ("cpu", dtype)
        assert (report.settings["device"], report.settings["dtype"]) == ("cpu", dtype)
        results[dtype] = report.perplexity["t"].nats
    for dtype, error in DTYPES.items():
        assert results[dtype] == pytest.approx(results["float32"], rel=error)
        assert (results[dtype] != results["float32"]) == (dtype != "float32")


@pytest.mark.parametrize("verb", ["precision", "evaluate"])
def test_a_device_or_dtype_that_is_none_is_refused_before_anything_is_read(verb, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    data = "--data" if verb == "precision" else "--perplexity"
    for flags, message in (
        (("--device", "gpu"), "--device: 'gpu' is not cpu, cuda, cuda:N or mps."),
        (("--device", "cuda"), "--device cuda: torch .* sees no GPU. Choose another, or cpu."),
        (("--device", "cuda:1"), "--device cuda:1: torch .* sees no GPU"),
        (("--device", "meta"), "--device: 'meta' is not"),
        (("--dtype", "float8"), "--dtype: 'float8' is not 'float32', .*Did you mean 'float"),
    ):
        done = CliRunner().invoke(app, [verb, "absent", data, "absent.jsonl", *flags])
        assert done.exit_code == 2, done.output
        assert done.output.startswith("ConfigError: ")
        assert __import__("re").search(message, done.output), done.output
        assert len(done.output.splitlines()) == 1


def test_a_gpu_is_chosen_by_number_among_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="sees 2 GPUs, cuda:0 to cuda:1"):
        choose_device("cuda:2")


def test_the_commands_take_both_flags(tmp_path, model, data):
    flags = ["--device", "cpu", "--dtype", "bfloat16", "--json"]
    done = CliRunner().invoke(app, ["precision", model, "--data", data, *flags])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["device"], report["dtype"]) == ("cpu", "bfloat16")
    done = CliRunner().invoke(app, ["evaluate", model, "--perplexity", data, *flags])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert (report["device"], report["dtype"]) == ("cpu", "bfloat16")
