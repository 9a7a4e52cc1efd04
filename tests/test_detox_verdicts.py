"""Verdicts of a removal in worlds whose truth is known: one path at two speeds, and two paths."""

from collections import Counter
from itertools import product

import numpy as np
import pytest

from mergekit_bayes.detox.analysis import compare_curves, findings
from mergekit_bayes.detox.evidence import Sample, few_toxic, independent, simultaneous
from mergekit_bayes.detox.reading import read_curve
from mergekit_bayes.detox.report import DetoxReport, Point, verdicts
from mergekit_bayes.detox.scales import next_scale
from mergekit_bayes.detox.settings import Curve
from tests.detox_worlds import (
    GRID,
    HELD_OUT,
    SCORER,
    World,
    dip,
    exponential,
    falling,
    kink,
    late,
    quadratic,
    stalling,
    step,
)

PAIR = [Curve("ta", "task_arithmetic"), Curve("gm", "gradient_matching")]
COARSE = (0.25, 1.0)
FALSE = ("there", "reversed", "mixed")


def effects(world, worlds, *, speed=2.0, dearer=1.0, grid=GRID, spaced=True, levels=()):
    """How often each effect is found, by axis, in several draws of a world."""
    counts = {SCORER: Counter(), HELD_OUT: Counter()}
    for seed in range(worlds):
        drawn = world.draw(seed)
        base = drawn.report(0.0)
        reports = {"ta": drawn.reports(grid), "gm": drawn.reports(grid, speed, dearer)}
        scales = {"ta": grid, "gm": grid} if spaced else None
        _, compared = compare_curves(PAIR, base, reports, levels, scales=scales)
        for finding in findings(compared):
            counts[finding.axis][finding.effect] += 1
    return counts


def test_one_path_at_two_speeds_is_no_effect():
    """Any difference is the grid's; on a coarse one it exceeds the noise many times."""
    total = Counter()
    for grid in (COARSE, GRID):
        for cost in (quadratic, dip, exponential):
            for toxic in (falling, stalling):
                world = World(prompts=400, documents=800, cost=cost, toxic=toxic, bootstrap=100)
                for counts in effects(world, 2, grid=grid).values():
                    total += counts
    assert not any(total[effect] for effect in FALSE), total


def test_a_true_effect_is_found():
    world = World(prompts=200, continuations=25, documents=400)
    for dearer, effect in ((0.6, "there"), (1.6, "reversed")):
        counts = effects(world, 4, speed=1.6, dearer=dearer)
        assert counts[SCORER][effect] >= 3, counts
        assert counts[HELD_OUT][effect] == 4, counts


def adapted(world, seed, *, dearer=1.0, extra=4, grid=COARSE, speed=2.0):
    """The findings of a coarse grid to which scales are added, as `bmerge detox` does."""
    drawn = world.draw(seed)
    base = drawn.report(0.0)
    curves = {"ta": (1.0, 1.0), "gm": (speed, dearer)}
    known = {
        label: {s: drawn.report(speed * s, pays) for s in grid}
        for label, (speed, pays) in curves.items()
    }
    for left in reversed(range(extra + 1)):
        ordered = {label: sorted(found.items()) for label, found in known.items()}
        reports = {label: [r for _, r in found] for label, found in ordered.items()}
        scales = {label: [s for s, _ in found] for label, found in ordered.items()}
        matched, compared = compare_curves(PAIR, base, reports, (), (0.05, 0.1, 0.15), scales)
        for label, (speed, pays) in curves.items():
            added = next_scale(label, scales[label], matched, compared) if left else None
            if added is not None:
                known[label][added] = drawn.report(speed * added, pays)
    return Counter(finding.effect for finding in findings(compared))


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_added_scales_find_a_true_effect_on_a_coarse_grid_and_no_false_one(shared):
    world = World(prompts=200, documents=400, shared=shared, bootstrap=100)
    false, true, without = Counter(), Counter(), Counter()
    for seed in range(2):
        false += adapted(world, seed)
        true += adapted(world, seed, dearer=0.5)
        without += adapted(world, seed, dearer=0.5, extra=0)
    assert not any(false[effect] for effect in FALSE), false
    assert true["there"] >= 3, true
    assert without["there"] < true["there"], without


def bent(seeds, extra, grids, speeds):
    """Findings on one path with kinks and steps, on coarse grids."""
    total = Counter()
    for cost, toxic in product((kink, step), (falling, late)):
        world = World(prompts=400, documents=800, cost=cost, toxic=toxic, bootstrap=100)
        for seed, grid, speed in product(range(seeds), grids, speeds):
            total += adapted(world, seed, extra=extra, grid=grid, speed=speed)
    return total


def test_bends_between_coarse_scales_are_found_out_by_added_scales():
    """And only by them: the bound on the grid's error assumes smooth curves."""
    few = {"grids": [(0.25, 1.0)], "speeds": [2.5]}
    without, added = (sum(bent(1, extra, **few)[e] for e in FALSE) for extra in (0, 2))
    assert added == 0 < without


@pytest.mark.slow
def test_bends_on_all_grids_are_found_out_by_added_scales():
    grids = [(0.25, 1.0), (0.25, 0.5, 1.0), (0.2, 0.6, 1.0, 1.4)]
    total = bent(4, 4, grids, (1.3, 2.5))
    assert sum(total.values()) > 150
    assert sum(total[effect] for effect in FALSE) <= 0.05 * sum(total.values()), total


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.8])
@pytest.mark.parametrize("prompts", [40, 150, 600])
def test_false_verdicts_are_at_most_five_per_cent(prompts, shared):
    """Of 408 findings an axis, in worlds of all shapes, speeds and spacings."""
    totals = {SCORER: Counter(), HELD_OUT: Counter()}
    for k, (cost, speed, spaced) in enumerate(
        (c, s, b) for c in (quadratic, dip, exponential) for s in (1.4, 3.0) for b in (True, False)
    ):
        world = World(
            prompts=prompts,
            documents=2 * prompts,
            cost=cost,
            toxic=(falling, stalling)[k % 2],
            base=(0.0, -2.0)[k // 2 % 2],
            shared=shared,
        )
        for axis, counts in effects(world, 34, speed=speed, spaced=spaced).items():
            totals[axis] += counts
    for axis, total in totals.items():
        assert sum(total[effect] for effect in FALSE) <= 20, (axis, total)


def test_three_toxic_of_eighty_are_too_little_data_and_a_number_would_do():
    drawn = World(prompts=40, continuations=2, base=-3.2).draw(0)
    base, reports = drawn.report(0.0), {"ta": drawn.reports(GRID), "gm": drawn.reports(GRID, 2.0)}
    assert 0 < base.toxicity[SCORER].share.value * 80 <= 6
    _, compared = compare_curves(PAIR, base, reports)
    by_axis = {f.axis: f for f in findings(compared)}
    assert by_axis[SCORER].effect in ("too little data", "not comparable")
    assert all(c.verdict in ("too little data", "not comparable") for c in compared[:3])
    few = compared[0].shortage
    assert (few.reason, few.has, few.unit) == ("few toxic", 80, "continuations")

    level, share = compared[0].level, base.toxicity[SCORER].share.value
    for needs, enough in ((few.needs, True), (few.needs // 2, False)):
        sample = Sample(needs, needs * few_worth(base), share, needs // 2, "continuations")
        assert (few_toxic(sample, level) is None) == enough


def few_worth(base):
    """Independent continuations in each of a report's."""
    share = base.toxicity[SCORER].prompt_share
    draws = np.random.default_rng(0).choice(share, size=(5000, len(share))).mean(axis=1)
    return independent(float(np.mean(share)), 80, draws) / 80


def test_no_difference_is_not_said_where_a_large_one_would_not_be_seen():
    world = World(prompts=30, continuations=4, documents=30, shared=0.0)
    counts = effects(world, 4)[SCORER]
    assert counts["not there"] == 0
    assert counts["too little data"] + counts["not comparable"] == 4


def test_a_base_without_a_toxic_continuation_is_told_as_too_little_data():
    drawn = World(prompts=10, continuations=8, base=-40.0).draw(0)
    base = drawn.report(0.0)
    point = Point.model_construct(scale=0.0, toxicity=base.toxicity, perplexity=base.perplexity)
    report = DetoxReport.model_construct(base=point, findings=(), matched=())
    (line,) = verdicts(report)
    assert line.startswith("Too little data")
    assert "80" in line


def test_the_verdict_names_what_would_do():
    drawn = World(prompts=40, continuations=2, base=-3.2).draw(0)
    base, reports = drawn.report(0.0), {"ta": drawn.reports(GRID), "gm": drawn.reports(GRID, 2.0)}
    matched, compared = compare_curves(PAIR, base, reports)
    point = Point.model_construct(scale=0.0, toxicity=base.toxicity, perplexity=base.perplexity)
    report = DetoxReport.model_construct(
        base=point, findings=tuple(findings(compared)), matched=tuple(matched)
    )
    line = next(line for line in verdicts(report) if SCORER in line)
    assert "not there" not in line
    assert "continuations of each model would do (80 were made" in line


def test_an_added_scale_lies_at_the_crossing_and_narrows_the_interval():
    world = World(prompts=400, continuations=25, documents=400, cost=exponential)
    drawn = world.draw(0)
    base = drawn.report(0.0)
    scales = {"ta": [*GRID], "gm": [0.5, 1.0, 1.5]}
    known = {
        label: {s: drawn.report(speed * s) for s in scales[label]}
        for label, speed in (("ta", 1.0), ("gm", 2.0))
    }
    levels = [base.toxicity[SCORER].share.value / 2]

    def compare():
        ordered = {label: sorted(found.items()) for label, found in known.items()}
        return compare_curves(
            PAIR,
            base,
            {label: [r for _, r in found] for label, found in ordered.items()},
            levels,
            (0.3,),
            {label: [s for s, _ in found] for label, found in ordered.items()},
        )

    matched, compared = compare()
    before = compared[0].grid
    added = next_scale("gm", scales["gm"], matched, compared)
    assert any(added == pytest.approx(p.scale["gm"], rel=1e-2) for p in matched)
    for _ in range(3):
        added = next_scale("gm", list(known["gm"]), matched, compared)
        if added is None:
            break
        known["gm"][added] = drawn.report(2.0 * added)
        matched, compared = compare()
    assert compared[0].grid < before / 4


def test_intervals_hold_at_all_levels_together():
    """Where levels are independent, the intervals are those of Sidak's correction."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(5, 20_001))
    draws[:, 0] = 0.0
    one = simultaneous(draws[:1], np.zeros((1, 20_001)), 10_000, 0.95).noise[0]
    five = simultaneous(draws, np.zeros_like(draws), 10_000, 0.95).noise
    assert one == pytest.approx(1.96, rel=0.03)
    assert five == pytest.approx(np.full(5, 2.57), rel=0.03)


def test_the_interpolation_is_exact_for_a_parabola_and_its_error_is_bounded():
    t = np.array([0.0, 0.2, 0.5, 1.0])
    share = 0.5 - 0.3 * t[None]
    for level in (0.47, 0.4, 0.25):
        place = (0.5 - level) / 0.3
        read = read_curve(t, share, 2 + t[None] ** 2, level, rising=False)
        assert read.paid[0] == pytest.approx(place**2, abs=1e-8)
        read = read_curve(t, share, 2 + np.exp(3 * t[None]), level, rising=False)
        assert abs(read.paid[0] - (np.exp(3 * place) - 1)) < read.grid[0]
