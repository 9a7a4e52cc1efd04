"""A model that is sharded over two processes has the precision that one process gives it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from mergekit_bayes import ranks
from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.state import State
from mergekit_bayes.curvature.sums import Sums
from mergekit_bayes.errors import CheckpointError
from tests import adapters, tiny, tiny_models
from tests.test_spread import TEXTS, failing_third_time, run_line
from tests.two_ranks import ROOT, found_by_two

pytestmark = pytest.mark.slow
LINES = {
    "fisher": ["lm", "--estimator", "fisher"],
    "fisher-empirical": ["experts", "--estimator", "fisher-empirical", "--sums", "cpu"],
    "one output": ["judge", "--pool", "row"],  # whose row is not on the second process
    "adapter": ["adapter"],
    "bfloat16": ["lm", "--dtype", "bfloat16"],
}
COMMON = ["--data", "t.jsonl", "--batch-size", "2"]
WHOLE = ["precision", "lm", *COMMON, "--device", "auto", "-o", "whole.safetensors"]
STOPPED = [*WHOLE[:-1], "stopped.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tiny_models.tiny_gpt2(folder / "lm")
    tiny_models.tiny_mixtral(folder / "experts", tied=True)
    tiny_models.tiny_bert(folder / "judge", labels=1, problem_type="regression")
    adapters.peft_adapter(folder / "adapter", folder / "lm", r=3, target_modules=["c_attn"])
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return found_by_two("tests.test_sharded_precision", folder)


def child(folder):
    ranks.join(2)
    os.chdir(folder)
    result = {"world": ranks.world()}
    for name, line in LINES.items():
        out = ["--device", "auto", "-o", f"{name}.safetensors"]
        result[name] = run_line("precision", *line, *COMMON, *out)
    result["whole"] = run_line(*WHOLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "after_round", stopped_third_time())
        result["stopped"] = run_line(*STOPPED, "--save-every", "0")
    result["parts"] = sorted(path.name for path in folder.glob("stopped*/part-*/*"))
    result["resumed"] = run_line(*STOPPED, "--resume")
    results = [None, None]
    torch.distributed.all_gather_object(results, result)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(results))


def stopped_third_time():
    after, rounds = State.after_round, []

    def stopping(self, observations):
        rounds.append(observations)
        if len(rounds) > 2:
            raise CheckpointError("stopped")
        after(self, observations)

    return stopping


def square_two_batches_together(patch):
    """Have one process square the sum of each two batches' gradients, the last one's alone."""
    add, waiting = Sums.add, {}

    def held(self, name, gradient):
        if name in waiting:
            add(self, name, waiting.pop(name)[1] + gradient)
        else:
            waiting[name] = (self, gradient.clone())

    def at_the_end(*found):
        for name, (sums, gradient) in waiting.items():
            add(sums, name, gradient)
        return Curvature(*found)

    patch.setattr(Sums, "add", held)
    patch.setattr("mergekit_bayes.curvature.squares.Curvature", at_the_end)


@pytest.mark.parametrize("name", LINES)
def test_the_draws_are_those_of_one_process_and_the_squares_of_both_batches(
    found, folder, monkeypatch, name
):
    first, second = (result[name] for result in found)
    assert (first["code"], second["code"]) == (0, 0), first["stderr"]
    monkeypatch.chdir(folder)
    square_two_batches_together(monkeypatch)
    told = run_line("precision", *LINES[name], *COMMON, "-o", "one.safetensors", "--force")
    assert told["code"] == 0, told["stderr"]
    theirs, ours = (json.loads(output["stdout"]) for output in (first, told))
    assert theirs["observations"] == ours["observations"]
    sharded, expected = (tiny.read(folder / f) for f in (f"{name}.safetensors", "one.safetensors"))
    assert set(sharded) == set(expected)
    error = 2e-2 if name == "bfloat16" else 2e-5
    for tensor, value in expected.items():
        atol = error * value.max() / 20
        np.testing.assert_allclose(sharded[tensor], value, rtol=error, atol=atol)
        assert value.max() > 0


def test_processes_with_a_part_of_the_model_go_on_where_they_were_stopped(found, folder):
    first, second = found
    assert first["parts"] == second["parts"] == ["rank-0-of-2", "rank-1-of-2"]
    assert (first["stopped"]["code"], first["resumed"]["code"]) == (2, 0)
    resumed, whole = (folder / f"{name}.safetensors" for name in ("stopped", "whole"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("stopped*.partial"))


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_a_process_that_fails_alone_says_so_and_ends_all(folder, failing):
    """The others wait for it inside of torch, where no process can tell them."""
    code = f"from tests.test_sharded_precision import fail; fail({str(folder)!r}, {failing!r})"
    program = (
        "import sys; from mergekit_bayes import launcher; "
        f"sys.exit(launcher.launch([sys.executable, '-c', {code!r}], 2))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("a batch of the second process") == 1, done.stderr
    assert f"CheckpointError: process {failing[0]}: " in done.stderr
    assert not (folder / "failed.safetensors").exists()


def fail(folder, failing):
    ranks.join(2)
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        if str(ranks.own_number()) in failing:
            patch.setattr("mergekit_bayes.curvature.squares.outputs_of", failing_third_time())
        run_line(*WHOLE[:-1], "failed.safetensors")
