"""The experiment on addition with language models: its parts, and all of it at its smallest."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment():
    """The script and the modules that it is made of."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("sentiment_columns", "sentiment_looks", "sentiment_resampled")
        names += ("language_world", "language_report")
        modules = {n.partition("_")[2]: importlib.import_module(n) for n in names}
        yield SimpleNamespace(script=importlib.import_module("language_merge"), **modules)
    finally:
        sys.path.remove(str(SCRIPTS))


def stored(experiment, file, nats, texts, **facts):
    """Write a look at texts of 4 and 12 tokens by turns that all lose the same nats a token."""
    tokens = np.array([4, 12] * (texts // 2))
    content = {f"nats {t}": tokens * nats[t] for t in nats} | {f"tokens {t}": tokens for t in nats}
    experiment.looks.save(file, {"seconds": 1.0, "forming": 2.0} | content | facts)


@pytest.fixture
def worlds(experiment, tmp_path, monkeypatch):
    """Two sizes of two seeds, whose looks are there and whose models are not."""
    made = []
    for parameters, gain in (("1M", 0.2), ("2M", 0.15)):
        tasks = ("a", "b")
        (size,) = (s for s in experiment.world.SIZES["tiny"] if s.width == 16)
        size = experiment.world.replaced(size, parameters=parameters, tasks=tasks, seeds=(0, 1))
        world = experiment.world.LanguageWorld(tmp_path / parameters, size, tmp_path)
        monkeypatch.setattr(type(world), "rows", lambda self, name, part: (["x"] * 20, []))
        columns = {column.name: column for column in experiment.columns.LANGUAGE}
        for seed in (0, 1):
            for name, nats in (("base", 5.0), ("joint", 4.0)):
                file = experiment.looks.look_file(world, name, seed)
                stored(experiment, file, dict.fromkeys(tasks, nats), 20)
            for task in tasks:
                file = experiment.looks.look_file(world, task, seed)
                stored(experiment, file, {task: 3.9}, 20)
            facts = {"distance": 1.0} | {f"predicted {t}": np.array([0.1, 0.2]) for t in tasks}
            for name, mean in (("task_arithmetic", 4.5), ("gm_constant", 4.6), ("gm", 4.6 - gain)):
                place = experiment.looks.Place.of(world, columns[name], seed)
                for scale in columns[name].looks:
                    away = 0.01 * abs(scale - 0.5) if name == "task_arithmetic" else 0.0
                    nats = {"a": mean + 0.1, "b": mean - 0.1 + away}
                    stored(experiment, place.valid(scale), nats, 20)
                    stored(experiment, place.test(scale), nats, 20, **facts)
        made.append(world)
    return made


def test_the_trend_is_told_in_nats_a_token(experiment, worlds):
    rows = {line.split(" | ")[0]: line for line in lines_of(experiment, worlds)}
    assert rows["| entries - constant, untuned"].endswith(
        "-0.2000 [-0.2000, -0.2000] | -0.1500 [-0.1500, -0.1500] |"
    )
    assert rows["| joint training"].endswith(" | 4.0000 | 4.0000 |")
    assert rows["| tuned task arithmetic"].endswith(" | 4.5000 | 4.5000 |")  # at its best scale
    share = rows["| share of the gap: gradient matching, root-GGN, untuned"]
    assert share.endswith(" | 20% [20%, 20%] | 10% [10%, 10%] |")
    assert rows["| entries - best control, untuned"].count("(control: one constant)") == 2


def test_the_report_is_made_of_what_is_there(experiment, worlds):
    columns = {column.name: column for column in experiment.columns.LANGUAGE}
    place = experiment.looks.Place.of(worlds[0], columns["gm"], 1)
    place.valid(1.0).unlink()  # so that one seed is not tuned
    for task in worlds[1].size.tasks:
        for seed in (0, 1):
            experiment.looks.look_file(worlds[1], task, seed).unlink()
    text, content = experiment.report.make_report(worlds, {"1M": {"gm-1": "an error"}})
    assert "gm-1: an error" in text
    assert list(content["1M"]["scales"]["gm tuned"]) == [0]
    assert "specialists untuned" not in content["2M"]["scores"]


def lines_of(experiment, worlds):
    """The lines of the table over the sizes."""
    found = [experiment.resampled.Resampled(world, experiment.columns.LANGUAGE) for world in worlds]
    return experiment.report.trend(found).splitlines()


def test_all_of_it_at_its_smallest(experiment, tmp_path, capsys):
    if not experiment.script.DATA.exists():
        pytest.skip(f"there is no {experiment.script.DATA.parent}")
    chosen = ["task_arithmetic", "gm", "gm_permuted_rest", "gm_inputs", "gm_adam", "gm_self"]
    arguments = ["--size", "tiny", "-o", str(tmp_path), "--only", *chosen]
    assert experiment.script.main(arguments) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert set(content) == {"0.02M", "0.06M"}
    for size in content.values():
        assert not size["failed"]
        names = {name.split()[0] for name in size["scores"]}
        assert names == {*chosen, "base", "specialists", "joint"}
        assert {"gm tuned", "gm_inputs matched"} <= set(size["scales"])
    worlds = [
        experiment.world.LanguageWorld(tmp_path / size.parameters, size, tmp_path / "bases")
        for size in experiment.world.SIZES["tiny"]
    ]
    held_out_is_other_text(worlds[0])
    counts_are_of_tokens(experiment, worlds[0])
    the_rest_alone_is_permuted(experiment, worlds[0])
    # A second run makes nothing.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert experiment.script.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    changed = {path.name for path, when in again.items() if files.get(path) != when}
    assert changed == {"report.md", "report.json"}
    assert "## The trend with size" in capsys.readouterr().out


def held_out_is_other_text(world):
    """Joint training reads what the specialists read, and nobody what they are tested on."""
    from language_world import PIECES, ROWS, read

    trained = {task: read(world.text(task).folder / ROWS) for task in world.size.tasks}
    joint = read(world.text("joint").folder / ROWS)
    assert sorted(joint) == sorted(text for rows in trained.values() for text in rows)
    for task, rows in trained.items():
        tests = world.rows(task, "test")[0]
        assert not [text for text in tests if any(row.startswith(text) for row in rows)]
        pieces = read(world.text(task).folder / PIECES)
        assert "".join(rows).startswith("".join(pieces)[:2000])
        tokens = sum(len(ids) for ids in world._tokenizer(rows).input_ids)
        assert world.size.task_steps * 1024 <= tokens < world.size.task_steps * 1024 + 2000


def counts_are_of_tokens(experiment, world):
    """Precisions stand for the tokens of the same training, about; looks count every token."""
    columns = {column.name: column for column in experiment.columns.LANGUAGE}
    steps = columns["gm"].steps(world, 0)
    for step in steps[len(world.size.tasks) :]:
        info = json.loads((step.precision / "posterior.json").read_text())
        assert info["observations"] == pytest.approx(world.size.task_steps * 1024, rel=0.2)
    look = experiment.looks.load(experiment.looks.look_file(world, "base", 0))
    for task in world.size.tasks:
        texts = world.rows(task, "test")[0]
        assert look[f"tokens {task}"].tolist() == [
            len(ids) for ids in world._tokenizer(texts).input_ids
        ]


def the_rest_alone_is_permuted(experiment, world):
    """Entries of the embeddings stay where they are, all others change places in their tensor."""
    columns = {column.name: column for column in experiment.columns.LANGUAGE}
    model = world.tuned("novels", 0)
    kept, permuted = (
        experiment.looks.per_observation(model.model, step.precision)
        for name in ("gm", "gm_permuted_rest")
        for step in columns[name].steps(world, 0)
        if step.name.endswith("precision-ggn-novels-adamw-0")
    )
    for name, tensor in kept.items():
        assert np.array_equal(tensor, permuted[name]) == ("wte" in name), name
        assert np.array_equal(
            tensor.flatten().sort().values, permuted[name].flatten().sort().values
        )
