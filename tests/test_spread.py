"""Evaluations over several processes: a batch runs on one rank, and all get its result."""

import json
import os
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import launcher, ranks
from mergekit_bayes.adapt.checks import Checks
from mergekit_bayes.adapt.data import load_run
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.teacher import FrozenCopy
from mergekit_bayes.curvature import ggn
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.evaluate import EvaluateConfig
from mergekit_bayes.evaluate.refusals import refuse_settings
from mergekit_bayes.generation import Sampling, sample_continuations
from mergekit_bayes.libraries import outputs_of
from mergekit_bayes.metrics.classification import measure_classification
from mergekit_bayes.metrics.conditional import conditional_nats
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model
from tests import tiny, tiny_models
from tests.two_ranks import found_by_two

# It may be asked for all texts at once, and by one process alone.
HOOK = """import os
def score(texts):
    open("calls", "a").write(f"{os.environ.get('RANK')} {len(texts)}\\n")
    if os.path.exists("broken") and len(texts) > 1:
        raise RuntimeError("no service")
    return [len(text) % 7 / 7 for text in texts]
"""
SCORERS = ("words:words.txt", "model:judge#LABEL_1=softmax", "bmerge_spread_hook:score")
LINE = ["evaluate", "lm", "--perplexity", "t.jsonl", "--toxicity", "t.jsonl", "--samples", "2"]
LINE += [word for scorer in SCORERS for word in ("--scorer", scorer)]
LINE += ["--continuations", "7", "--sampling-batch", "4", "--batch-size", "2", "--new-tokens", "9"]
TEXTS = [f"the cat sat on the mat {'and ate ' * i}" for i in range(13)]


def test_one_process_works_through_the_items():
    assert ranks.spread([3, 1, 2], lambda x: x + 1) == [4, 2, 3]


def test_a_rank_without_other_processes_is_the_one_that_speaks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")  # as a cluster may set it for its own purposes
    assert ranks.is_main()


ESTIMATES = {
    "entries": ["precision", "lm", "--data", "t.jsonl", "--batch-size", "2", "--sums", "disk"],
    "rows": ["precision", "judge", "--data", "t.jsonl", "--batch-size", "3", "--pool", "row"],
}


# With a part of the model in each process, which square the gradients of two batches together.
SHARDED = {
    "sharded entries": ["precision", "lm", "--data", "t.jsonl", "--sums", "disk"],
    "sharded rows": ["precision", "experts", "--data", "t.jsonl", "--pool", "row"],
    "sharded tensors": ["precision", "experts", "--data", "t.jsonl", "--pool", "tensor"],
}
STOPPED = [*ESTIMATES["entries"], "-o", "stopped.safetensors"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tiny_models.tiny_gpt2(folder / "lm")
    tiny_models.give_posterior(folder / "lm")
    tiny_models.tiny_bert(folder / "judge")
    tiny_models.tiny_mixtral(folder / "experts", tied=True)
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (folder / "words.txt").write_text("cat\nbad\n")
    (folder / "bmerge_spread_hook.py").write_text(HOOK)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return found_by_two("tests.test_spread", folder), measured(folder)


def test_two_processes_measure_the_numbers_of_one_to_the_bit(found):
    two, one = found
    assert [result["measured"] for result in two] == [one, one]


def test_each_batch_runs_on_one_rank(found):
    first, second = (result["worked"] for result in found[0])
    assert first == [0, 2, 4]
    assert second == [1, 3]


def test_an_error_on_one_rank_is_the_same_error_on_all(found):
    assert [result["error"] for result in found[0]] == ["item 3", "item 3"]


def test_work_of_the_main_rank_alone_does_not_wait_for_the_others(found):
    assert [result["alone"] for result in found[0]] == [[0, 1, 2], [0, 1, 2]]


def test_the_command_writes_under_a_launcher_what_one_process_writes(found, folder, monkeypatch):
    monkeypatch.chdir(folder)
    told = run_line(*LINE, "-o", "one")
    assert told["code"] == 0
    theirs, ours = (json.loads((folder / name / "report.json").read_text()) for name in OUTPUTS)
    for report in (theirs, ours):
        del report["path"], report["settings"]["output"]
    assert theirs.pop("settings") | {"num_processes": None} == ours.pop("settings")
    assert theirs == ours
    assert set(ours["toxicity"]) == set(SCORERS)
    assert ours["sampled"]
    for name in ("documents.jsonl", "continuations.jsonl"):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()


def test_the_command_starts_as_many_processes_as_it_is_told(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "launch", lambda *line: started.append(line) or 3)
    monkeypatch.setattr("sys.argv", ["bmerge", *LINE, "--num-processes", "2"])
    assert run_line(*LINE, "--num-processes", "2")["code"] == 3
    line = [sys.executable, "-m", "bmerge_cli.main", *LINE, "--num-processes", "2"]
    assert started == [(line, 2)]


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = EvaluateConfig(model="m", perplexity={"t": "t"}, device="cuda:0")
    refuse_settings(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda:0: 2 processes would run on this one GPU"):
        refuse_settings(config)


def test_the_first_process_prints_and_the_others_are_silent(found):
    first, second = (result["command"] for result in found[0])
    assert (first["code"], second["code"]) == (0, 0)
    assert json.loads(first["stdout"])["path"] == "two"
    assert second["stdout"] + second["stderr"] == ""


def test_a_function_scores_in_the_first_process_alone(found):
    calls = found[0][0]["calls"]
    assert [call for call in calls if not call.endswith(" 1")] == [f"0 {7 * len(TEXTS)}"]


def test_all_ranks_do_the_jobs_that_the_first_comes_to(found):
    first, second = (result["led"] for result in found[0])
    assert first == {"did": [1, 3, 4, 2], "alone": [1, 1], "result": "done, without item 3"}
    assert second == {"did": [1, 3, 4, 2], "alone": [], "result": "done, without item 3"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fails", "no service"),
        ("exists", "'two' exists"),
        ("too many", "num_processes: 3 were asked for and 2 run"),
    ],
)
def test_an_error_is_printed_once_and_leaves_nothing(found, folder, line, message):
    first, second = (result[line] for result in found[0])
    assert (first["code"], second["code"]) == (2, 2)
    assert message in first["stderr"]
    assert "Traceback" not in first["stderr"]
    assert second["stdout"] + second["stderr"] == ""
    assert not [path for path in folder.iterdir() if "nothing" in path.name]


def test_the_checks_of_an_adaptation_and_the_texts_of_its_memory_are_those_of_one(found, folder):
    one = adapted(folder)
    assert [result["adapted"] for result in found[0]] == [one, one]
    texts, start, check = one
    assert len(texts) == 9
    assert check["memory_kl"] > start["memory_kl"] == 0
    assert check["held_out_rise"] != start["held_out_rise"] == 0
    assert 0 < check["toxic_share"] < 1


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_precision_of_two_processes_is_that_of_one(found, folder, monkeypatch, name):
    """They add the same squares in another order; the draws are the same."""
    first, second = (result[name] for result in found[0])
    assert (first["code"], second["code"]) == (0, 0)
    assert second["stdout"] + second["stderr"] == ""
    monkeypatch.chdir(folder)
    told = run_line(*ESTIMATES[name], "-o", "alone.safetensors", "--force")
    theirs, ours = (json.loads(output["stdout"]) for output in (first, told))
    for key in ("loss", "observations", "rows", "sampled", "unit"):
        assert theirs[key] == ours[key]
    found, expected = (tiny.read(folder / f) for f in (f"{name}.safetensors", "alone.safetensors"))
    assert set(found) == set(expected)
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor], value, rtol=1e-5, atol=1e-7 * value.max())


@pytest.mark.parametrize("name", SHARDED)
def test_a_precision_of_a_sharded_model_is_that_of_one_process_with_both_batches(
    found, folder, monkeypatch, name
):
    """Parameters are tied, rows are uneven, and in the last round one process has no batch."""
    first, second = (result[name] for result in found[0])
    assert (first["code"], second["code"]) == (0, 0), first["stderr"]
    assert second["stdout"] + second["stderr"] == ""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(ggn, "random_signs", ggn._signs_of_words)
    told = run_line(*SHARDED[name], "--batch-size", "4", "-o", "whole.safetensors", "--force")
    theirs, ours = (json.loads(output["stdout"]) for output in (first, told))
    for key in ("loss", "observations", "rows", "sampled", "unit"):
        assert theirs[key] == ours[key]
    layers, expected = (
        [layer["relative_error"] for layer in of["stability"]["layers"]] for of in (theirs, ours)
    )
    assert layers == pytest.approx(expected, rel=1e-2)  # some rows are rounding alone
    found, expected = (tiny.read(folder / f) for f in (f"{name}.safetensors", "whole.safetensors"))
    assert set(found) == set(expected)
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor], value, rtol=2e-5, atol=1e-6 * value.max())


def test_an_error_of_one_process_in_a_pass_is_the_same_error_on_both(found, folder):
    first, second = (result["broken"] for result in found[0])
    assert (first["code"], second["code"]) == (2, 2)
    assert "a batch of the second process" in first["stderr"]
    assert second["stdout"] + second["stderr"] == ""


def test_two_processes_go_on_where_they_were_stopped(found, folder):
    first, second = found[0]
    assert first["parts"] == second["parts"] == ["rank-0-of-2", "rank-1-of-2"]
    assert (first["resumed"]["code"], second["resumed"]["code"]) == (0, 0)
    resumed, whole = (folder / f"{name}.safetensors" for name in ("stopped", "entries"))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("stopped*.partial"))


OUTPUTS = ("two", "one")


def run_line(*words):
    """What a command answers, in this process."""
    done = CliRunner().invoke(app, [*words, "--json"])
    return {"code": done.exit_code, "stdout": done.stdout, "stderr": done.stderr}


def measured(folder):
    """All that an evaluation measures of two models, without its intervals."""
    lm, judge = load_model(str(folder / "lm")), load_model(str(folder / "judge"))
    common = {"start": lm.start}
    samples = sample_continuations(
        lm.model,
        lm.tokenizer,
        TEXTS[:5],
        context=lm.context,
        sampling=Sampling(continuations=3, new_tokens=6),
        batch_size=4,
        **common,
    )
    perplexity = measure_perplexity(
        lm.model, lm.tokenizer, TEXTS, window=8, batch_size=2, bootstrap=0, **common
    )
    pairs = list(pairwise(TEXTS))
    judged = conditional_nats(lm.model, lm.tokenizer, pairs, window=16, batch_size=2, **common)
    classes = measure_classification(
        judge.model,
        judge.tokenizer,
        TEXTS,
        [i % 2 for i in range(len(TEXTS))],
        max_length=16,
        batch_size=3,
        bootstrap=0,
    )
    nats = (perplexity.document_nats, judged.nats, classes.example_nats)
    return [samples.texts, *map(list, nats)]


def adapted(folder):
    """What the model writes for a memory, and two checks: of the start, and of other weights."""
    config = AdaptConfig(
        model=str(folder / "lm"),
        output=str(folder / "adapted"),
        remove={"data": str(folder / "t.jsonl")},
        memory_self_generated=9,
        memory_held_out=0.6,
        base_observations=1000,
        prior="none",
        prompts=str(folder / "t.jsonl"),
        scorer=f"model:{folder / 'judge'}#LABEL_1=softmax",
        threshold=0.24,
        until={"held_out_rise": 1.0, "toxic_share": 0.01},
        max_length=16,
        batch_size=2,
        new_tokens=4,
        continuations=20,
    )
    run = load_run(config)
    checks = Checks(run, FrozenCopy(run.loaded.model))
    start = checks(0)
    with torch.no_grad():
        run.loaded.model.transformer.wte.weight.mul_(1.5)
    return [run.memory.texts, start.model_dump(), checks(1).model_dump()]


def child(folder):
    ranks.join(2)
    worked = []
    ranks.spread([0, 1, 2, 3, 4], worked.append)
    try:
        ranks.spread([0, 1, 2, 3], refuse_three)
        error = None
    except ConfigError as raised:
        error = str(raised)
    result = {
        "world": ranks.world(),
        "measured": measured(folder),
        "worked": worked,
        "error": error,
        "adapted": adapted(folder),
        "led": led(),
        "alone": ranks.on_main(lambda: ranks.spread([0, 1, 2], int)),
    }
    os.chdir(folder)
    result["command"] = run_line(*LINE, "-o", "two", "--num-processes", "2")
    result["calls"] = (folder / "calls").read_text().split("\n")[:-1]
    result["exists"] = run_line(*LINE, "-o", "two")
    result["too many"] = run_line(*LINE, "-o", "nothing", "--num-processes", "3")
    for name, line in ESTIMATES.items():
        result[name] = run_line(*line, "-o", f"{name}.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        # Of two batches one after the other these are the signs of one batch, on any processor.
        patch.setattr(ggn, "random_signs", ggn._signs_of_words)
        for name, line in SHARDED.items():
            options = ("--batch-size", "2", "--device", "auto", "-o", f"{name}.safetensors")
            result[name] = run_line(*line, *options)
    with pytest.MonkeyPatch.context() as patch:
        if not ranks.is_main():
            patch.setattr("mergekit_bayes.curvature.squares.outputs_of", failing_third_time())
        result["broken"] = run_line(*STOPPED, "--save-every", "0")
    result["parts"] = sorted(path.name for path in folder.glob("stopped*/part-*/*"))
    result["resumed"] = run_line(*STOPPED, "--resume")
    if ranks.is_main():
        (folder / "broken").touch()
    result["fails"] = run_line(*LINE, "-o", "nothing")
    if ranks.is_main():
        (folder / "broken").unlink()
    results = [None, None]
    torch.distributed.all_gather_object(results, result)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(results))


def failing_third_time():
    """The outputs of a model, for two batches."""
    batches = []

    def outputs(model, **inputs):
        batches.append(1)
        if len(batches) > 2:
            raise CheckpointError("a batch of the second process")
        return outputs_of(model, **inputs)

    return outputs


def led():
    """What a rank did where rank 0 leads, and how many worked with it between the jobs."""
    did, alone = [], []

    def job(item):
        did.extend(set(ranks.spread([item, item], lambda item: item)))
        ranks.spread([item], refuse_three)

    def work(together):
        alone.append(ranks.world())
        together(1)
        try:
            together(3)
        except ConfigError as error:
            refused = f"done, without {error}"
        with pytest.raises(ValueError, match="a bug"):
            together(4)
        alone.append(ranks.world())
        together(2)
        return refused

    result = ranks.lead(work, job)
    return {"did": did, "alone": alone, "result": result}


def refuse_three(item):
    if item == 4:
        raise ValueError("a bug")
    if item == 3:
        raise ConfigError(f"item {item}")
