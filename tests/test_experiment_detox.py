"""The experiment on removal: its parts, and all of it at its smallest."""

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
    """The script and the modules that it is made of, on the path of workers, too."""
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("world", "methods", "measure", "curves", "jobs", "report")
        modules = {n: importlib.import_module(f"detox_{n}") for n in names}
        yield SimpleNamespace(script=importlib.import_module("detox"), **modules)
    finally:
        sys.path.remove(str(SCRIPTS))


def stored(experiment, world, method, condition, seed, looks, *, lasts=None):
    """Write looks of a curve: (look, share of every prompt, nats a token)."""
    folder = world.looks(method, condition, seed)
    documents = {"tokens": [10] * 20}
    for look, share, nats in looks:
        content = {
            "test": {
                "shares": {s: [share] * 30 for s in experiment.world.SCORERS[condition]},
                "distinct": 0.5,
            },
            "seconds": 2.0 * look,
        }
        for text in (*experiment.world.TEXTS, "removed", "kl"):
            content[text] = {"nats": [10 * nats] * 20, **documents}
        experiment.jobs.written(folder / f"{look:g}.json", content)
    if lasts is not None:
        content = {"look": lasts[0]}
        for what, share in zip(("bits", "relearnt"), lasts[1:], strict=True):
            content[what] = {"shares": {s: [share] * 30 for s in ("davidson", "olid")}}
        experiment.jobs.written(folder / experiment.jobs.LASTS, content)


@pytest.fixture
def known(experiment, tmp_path):
    """A world of three seeds in which everything is known: shares and nats are linear in looks."""
    world = experiment.world.World(tmp_path, experiment.world.SIZES["small"])
    for seed in world.size.seeds:
        stored(experiment, world, "base", "trained", seed, [(0, 0.3, 5.0)])
        rival = [(s, 0.3 - 0.08 * s, 5 + 0.2 * s) for s in (0.5, 1, 1.5, 2, 3)]
        stored(experiment, world, "task_arithmetic", "trained", seed, rival, lasts=(2, 0.2, 0.14))
        steps = experiment.methods.STEPS
        ours = [(s, 0.3 - 0.0012 * s, 5 + (0.0002 + 0.0001 * seed) * s) for s in steps]
        stored(experiment, world, "adapt", "trained", seed, ours, lasts=(steps[3], 0.12, 0.12))
    curves = experiment.curves.read_curves(world, "trained")
    return experiment.curves.Resampled(world, "trained", curves)


def test_payments_are_read_where_the_share_is_reached(experiment, known):
    paid = known.paid_interval("task_arithmetic", "related", 1 / 3)
    assert paid.value == pytest.approx(0.2 * 2.5, abs=1e-4)  # the share is .1 at 2.5
    assert paid.high - paid.low < 1e-4  # all prompts, documents and seeds are alike
    ours = known.paid_interval("adapt", "related", 1 / 3)
    at = 0.2 / 0.0012
    assert ours.value == pytest.approx(0.0003 * at, abs=1e-3)
    assert ours.low == pytest.approx(0.0002 * at, abs=2e-3)  # the smallest seed three times
    assert ours.high == pytest.approx(0.0004 * at, abs=2e-3)
    assert known.paid_interval("task_arithmetic", "related", 1 / 10) is None
    assert np.isnan(known.paid("task_arithmetic", "related", 1 / 10)[0])


def test_what_is_left_of_a_removal_is_counted_from_the_base(known):
    rival = known.kept("task_arithmetic", "bits")
    assert rival["before"][0] == pytest.approx(0.14)
    assert rival["kept"][0] == pytest.approx((0.3 - 0.2) / (0.3 - 0.14))
    assert known.kept("task_arithmetic", "relearnt")["kept"][0] == pytest.approx(1)


def test_the_chosen_look_pays_what_it_pays_at_that_look(known):
    paid = known.chosen("task_arithmetic", "unrelated")
    assert paid == pytest.approx(np.full(len(paid), 0.2 * 2))


def test_goals_say_what_is_met_and_what_is_missed(experiment, known):
    verdicts = {g.text: g.verdict for g in experiment.report.goals(known)}
    assert verdicts["at 1/3 at most +0.01 nats on comments"] == "MISSED"
    assert verdicts["where task arithmetic pays at least +0.1 on comments"] == "met"
    assert verdicts["at least 0.8 of the removal is left at 4 bits"] == "met"
    kl = "KL(oracle || model) at 1/3 at most 0.1 of task arithmetic's"
    assert verdicts[kl] == "MISSED"
    assert verdicts[f"{kl}, both less the base's"] == "met, but not by the whole interval"


def test_a_level_that_is_not_reached_is_a_missed_goal_and_no_number(experiment, known):
    for seed in known.world.size.seeds:
        looks = [(s, 0.29, 5.0) for s in known.curves["adapt"].method.looks_of(known.world)]
        stored(experiment, known.world, "adapt", "trained", seed, looks)
    curves = experiment.curves.read_curves(known.world, "trained")
    found = experiment.curves.Resampled(known.world, "trained", curves)
    text = experiment.report.payments(found, 1 / 3)
    assert "| correction, memory | 3 | not reached (lowest 29.0%) |" in text
    verdicts = {g.text: g.verdict for g in experiment.report.goals(found)}
    assert verdicts["at 1/3 at most +0.01 nats on wiki sentences"] == "MISSED"


def test_the_chosen_look_is_the_first_that_is_low_enough_on_valid(experiment, tmp_path):
    world = experiment.world.World(tmp_path, experiment.world.SIZES["tiny"])

    def valid(method, look, share):
        content = {"valid": {"shares": {"civil": [share] * 4}}}
        experiment.jobs.written(world.looks(method, "other", 0) / f"{look:g}.json", content)

    valid("base", 0, 0.3)
    for look, share in ((1, 0.2), (2, 0.09), (3, 0.02)):
        valid("m", look, share)
    assert experiment.jobs.chosen_look(world, "m", "other", 0, (1, 2, 3)) == 2
    assert experiment.jobs.chosen_look(world, "m", "other", 0, (1,)) == 1


def record(world, name):
    """A job that leaves a file, or fails."""
    assert name != "bad"
    (world.work / name).write_text("made")


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_are_done_once_and_what_needs_a_failed_one_is_left_out(
    experiment, tmp_path, workers, capsys
):
    world = experiment.world.World(tmp_path, experiment.world.SIZES["tiny"])

    def job(name, *needs):
        return experiment.jobs.Job(name, record, (name,), (tmp_path / name,), needs)

    (tmp_path / "before").write_text("kept")
    todo = [job("before"), job("bad"), job("after", "bad"), job("last", "after"), job("good")]
    failed = experiment.jobs.carry_out(world, todo, workers)
    assert set(failed) == {"bad", "after", "last"}
    assert (tmp_path / "before").read_text() == "kept"
    assert (tmp_path / "good").read_text() == "made"
    assert experiment.jobs.seconds_of(world, "good") >= 0
    assert "bad FAILED" in capsys.readouterr().out


def test_the_experiment_runs_at_its_smallest_and_is_done_once(experiment, tmp_path, capsys):
    if not experiment.world.DATA.exists():
        pytest.skip(f"there is no {experiment.world.DATA}")
    given = ["--size", "tiny", "-o", str(tmp_path / "work"), "--workers", "1"]
    assert experiment.script.main(given) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "work/report.json").read_text())
    world = experiment.world.World(tmp_path, experiment.world.SIZES["tiny"])
    for condition in experiment.world.CONDITIONS:
        found = report["conditions"][condition]["methods"]
        methods = experiment.methods.all_methods(world)
        assert set(found) == {m.name for m in methods if m.seeds(world, condition)}
        for name, curve in found.items():
            assert np.isfinite(curve["losses"]["related"]).all(), name
            moved = np.abs(np.diff(curve["losses"]["related"]))
            assert moved.max() > 0, name
    assert (tmp_path / "work/removal.png").stat().st_size > 10_000
    assert not list((tmp_path / "work/models").glob("*"))
    capsys.readouterr()
    assert experiment.script.main(given) == 0
    first = capsys.readouterr().out.splitlines()[0].split()
    assert first[0] == first[2]  # N jobs, N done before
