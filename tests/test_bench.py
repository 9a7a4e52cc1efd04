"""Benchmarks run at a tiny size and judge their goals; that of a merge removes only its files."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import read

from mergekit_bayes.posterior import open_posterior

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
TINY = 0.002


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("merge")
    sys.path.remove(str(BENCH))
    for name in ("merge", "merge_rows", "merge_models"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def models(bench):
    return importlib.import_module("merge_models")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The finished process, its JSON, and its folders, each with a file that is not its own."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("work", "out"):
        (folder / name).mkdir()
        (folder / name / "mine.txt").write_text("keep")
    command = [
        sys.executable,
        str(BENCH / "merge.py"),
        "--sizes",
        str(TINY),
        "--repeats",
        "1",
        "--warm-up",
        "0",
    ]
    command += [
        "--work",
        str(folder / "work"),
        "--out",
        str(folder / "out"),
        "--json",
        str(folder / "merge.json"),
    ]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    return process, json.loads((folder / "merge.json").read_text()), folder


def test_every_row_is_measured_and_compared_to_its_io(bench, result):
    process, report, folder = result
    plan = list(bench.rows(TINY, folder / "work", folder / "out", None))
    assert [r["row"] for r in report["rows"]] == [r.name for r in plan]
    by = {r["row"]: r for r in report["rows"]}
    for row in plan:
        assert by[row.name]["cpu_s"] > 0
        assert by[row.name]["anonymous_mib"] > 1
        assert f"| {row.name} |" in process.stdout
        if row.io is not None:
            assert by[row.name]["ratio"] == pytest.approx(
                by[row.name]["cpu_s"] / by[row.io]["cpu_s"]
            )


def test_mergekit_is_measured_by_its_command_and_by_its_api(bench, tmp_path):
    plan = {
        row.name: row for row in bench.rows(TINY, tmp_path, tmp_path / "out", tmp_path / "venv")
    }
    for inside in ("bfloat16", "float32"):
        row = plan[f"mergekit merge_state_dicts, {inside}"]
        assert row.command[0].startswith(str(tmp_path / "venv"))
        assert inside in row.command
        assert row.io == plan["mergekit task_arithmetic"].io == plan["task arithmetic"].io
        compile(row.command[2], "the row", "exec")


def test_the_json_says_on_what_it_was_measured(result):
    assert {
        "date",
        "commit",
        "cpu",
        "cores",
        "memory_gib",
        "python",
        "numpy",
        "numba",
        "load",
    } <= set(result[1]["machine"])


def test_nothing_is_left_and_nothing_of_others_is_removed(result):
    folder = result[2]
    for name in ("work", "out"):
        assert [p.name for p in (folder / name).iterdir()] == ["mine.txt"]


def test_the_checkpoints_are_whole_posteriors(models, tmp_path):
    shape = models.SHAPES[TINY]
    models.make(tmp_path / "models", shape, "BF16")
    entries = sum(int(np.prod(s)) for s in models.tensors(shape).values())
    for model in models.MODELS:
        mean, precision = (
            read(tmp_path / "models" / model),
            open_posterior(str(tmp_path / "models" / model)),
        )
        assert sum(t.size for t in mean.values()) == entries
        assert precision.has_precision
        precision.close()
    assert not list(tmp_path.glob("*.partial"))


def rows_of(ratio=1.0, anonymous=50.0, mergekit=40.0, start_up=0.3):
    names = ("average", "task arithmetic", "gradient matching", "--shrink 0.3", "ties")
    records = [
        {"size": s, "row": n, "ratio": ratio, "anonymous_mib": anonymous, "cpu_s": 4.0}
        for s in (0.5, 1.5)
        for n in names
    ]
    return [
        *records,
        {"size": 0.5, "row": "start-up: a dry run", "cpu_s": start_up},
        {"size": 0.5, "row": "mergekit task_arithmetic", "ratio": 9.0, "cpu_s": mergekit},
    ]


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ({}, 0),
        ({"ratio": 1.8}, 3),  # at 1.5 B: average, task arithmetic, gradient matching
        ({"ratio": 2.1}, 8),  # all but ties
        ({"ratio": 4.1}, 10),
        ({"anonymous": 128}, 2),
        ({"mergekit": 31.9}, 1),
        ({"start_up": 0.41}, 1),
    ],
)
def test_a_missed_target_is_seen(bench, values, missed):
    measured = bench.targets(rows_of(**values))
    assert sum(not met for *_, met in measured) == missed


def test_targets_take_any_choice_of_rows(bench):
    only = [r for r in rows_of() if r["row"] == "gradient matching"]
    assert len(bench.targets(only)) == 4
    assert bench.targets([]) == []


@pytest.mark.parametrize(
    "flags",
    [("--sizes", "0.7"), ("--sizes", "big"), ("--repeats", "0"), ("--keep",)],
    ids=lambda f: "=".join(f),
)
def test_wrong_options_are_refused_before_anything_is_made(bench, flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merge.py", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    assert "error" in capsys.readouterr().err


@pytest.fixture(scope="module")
def evaluation():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("evaluate")
    sys.path.remove(str(BENCH))
    del sys.modules["evaluate"]


def measured(cpu, tokens=100, value=5.0):
    return {"tokens": tokens, "value": value, "cpu": cpu, "wall": 1.0, "mib": 9.0}


@pytest.mark.parametrize(
    ("size", "task", "cpu", "missed"),
    [
        ("2", "sample", 0.27, False),
        ("2", "sample", 0.29, True),
        ("124", "sample", 0.99, False),
        ("124", "sample", 1.01, True),
        ("2", "perplexity", 0.66, False),
        ("124", "perplexity", 0.67, True),
    ],
)
def test_the_median_of_the_ratios_of_rounds_decides(evaluation, size, task, cpu, missed):
    line = evaluation.Workload(task, "mixed", 8, 4)
    rounds = [(measured(cpu * busy), measured(busy)) for busy in (1.0, 3.0)]
    rounds.append((measured(9.0), measured(1.0)))
    assert evaluation.summary(size, line, rounds)["missed"] is missed


@pytest.mark.parametrize("other", [{"tokens": 99}, {"value": 5.001}])
def test_sides_that_do_not_do_the_same_are_not_compared(evaluation, other):
    line = evaluation.Workload("perplexity", "as given", 8, 4)
    with pytest.raises(SystemExit, match="ours gives"):
        evaluation.summary("2", line, [(measured(1.0), measured(1.0, **other))])


def test_all_goals_have_a_line_at_every_batch_size(evaluation):
    for size in evaluation.SHAPES:
        lines = list(evaluation.workloads(size, [1, 8, 64, 256], quick=False))
        assert {w.batch for w in lines if w.task == "sample"} == {1, 8, 64, 256}
        assert {w.kind for w in lines if w.task == "perplexity"} == {"as given", "longest first"}
        for w in lines:  # both sides draw whole batches
            assert w.task == "perplexity" or w.items * w.continuations % w.batch == 0


@pytest.mark.slow
def test_both_sides_sample_and_score_the_same_number_of_tokens(tmp_path):
    pytest.importorskip("lm_eval", reason="a test dependency")
    command = [sys.executable, str(BENCH / "evaluate.py"), "--quick", "--sizes", "2"]
    command += ["--batches", "8,64", "--json", str(tmp_path / "table.json")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    table = json.loads((tmp_path / "table.json").read_text())
    assert process.returncode == any(row["missed"] for row in table), process.stderr
    assert len(table) == 10
    for row in table:
        assert row["tokens"] > 0
        assert min(row["cpu"]) > 0
        assert min(row["mib"]) > 100
        assert f"| {row['size']} | {row['batch']} | {row['kind']} | {row['tokens']:,} |" in (
            process.stdout
        )


@pytest.mark.slow
def test_a_preview_is_measured_beside_merges_and_evaluations(tmp_path):
    out = tmp_path / "preview.json"
    command = [sys.executable, str(BENCH / "preview.py"), "--parameters", "0.03", "--rounds", "1"]
    command += ["--vectors", "40", "--method", "task_arithmetic", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (costs,) = json.loads(out.read_text()).values()
    total = 2 * costs["merge"] + 40 * costs["evaluation"]
    assert done.returncode == (costs["preview"] > total), done.stderr
    assert 0 < costs["forming"] < costs["preview"]
    assert 0 < costs["scoring"] < costs["evaluation"]
    assert "| 0.03 M |" in done.stdout
