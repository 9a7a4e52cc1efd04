"""Every method against a restatement of its paper, alone and through the engine."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Numbers, keyed_draws, task_key
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, settings_of
from mergekit_bayes.methods.base import FactInputs
from mergekit_bayes.methods.histogram import BINS, bin_of, edge, threshold
from mergekit_bayes.posterior import open_posterior
from tests import tiny
from tests.facts import facts_of
from tests.reference import methods as twin

ELEMENTWISE = {n for n, m in METHODS.items() if m.tensor is None}
SHAPES = {
    "wte.weight": (300, 40),
    "h.0.attn.weight": (50, 60),
    "h.0.ln.bias": (50,),
    "h.0.scalar": (),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = tiny.arrays(0, SHAPES)
    found = {"base": base}
    for i, name in enumerate("abc"):
        rng = np.random.default_rng(i + 10)
        change = {
            n: (rng.normal(size=s) * 0.1 * (rng.random(s) < 0.7)).astype(np.float32)
            for n, s in SHAPES.items()
        }
        found[name] = {n: base[n] + change[n] for n in SHAPES}
    for i, (name, mean) in enumerate(found.items()):
        tiny.posterior(
            folder / f"{name}.safetensors",
            mean,
            tiny.precisions(i, SHAPES, low=1e-5),
            observations=50 + i,
        )
    return folder, found


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(world, names, *, base=True, out="out.safetensors", **settings):
    models = tuple(str(world[0] / f"{n}.safetensors") for n in names)
    given = {"base": str(world[0] / "base.safetensors")} if base else {}
    run_merge(MergeConfig(models=models, out=out, force=True, **given, **settings))
    return tiny.read(out)


def combined(
    name,
    base,
    tasks,
    scales,
    *,
    draws=None,
    precisions=None,
    base_precision=None,
    guard=0.2,
    **given,
):
    """The means of one tensor merged without the engine: the first pass in numpy, then the rule."""
    method = METHODS[name]
    ones = [np.ones_like(t) for t in tasks]
    posteriors = tuple(Gaussian(t, p) for t, p in zip(tasks, precisions or ones, strict=True))
    prior = None
    if base is not None:
        prior = Gaussian(base, np.ones_like(base) if base_precision is None else base_precision)
    settings, first, totals = settings_of(method, given), method.reduction, np.zeros(0)
    if first is not None:
        values = [first.statistic(prior, posteriors, k) for k in range(first.count(len(tasks)))]
        if first.kind == "histogram":
            totals = np.stack([np.bincount(bin_of(v), minlength=BINS) for v in values])
        else:
            totals = np.array([v.sum(dtype=np.float64) for v in values])
    facts = None
    if method.facts is not None:
        facts = method.facts(FactInputs(settings, guard, (1.0,) * len(tasks), totals))
    numbers = Numbers(tuple(scales), facts, *[()] * 8).cast(tasks[0].dtype.type)
    scales, facts = numbers.scales, numbers.facts
    return method.combine(
        prior, posteriors, scales, facts, *([draws] if method.random else [])
    ).mean


def changes(tasks, seed=0, n=4000, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=n) * (rng.random(n) < 0.8)).astype(dtype) for _ in range(tasks)]


def assert_close(merged, expected, share=0.0):
    """Equal up to rounding, but for a share of entries."""
    apart = entries = 0
    for name, value in merged.items():
        wrong = ~np.isclose(value, expected[name], rtol=2e-5, atol=2e-6)
        apart += np.count_nonzero(wrong)
        entries += value.size
    assert apart <= share * entries, f"{apart} of {entries} entries differ"


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize(("scales", "density"), [((1.0, 1.0, 1.0), 0.2), ((0.5, 1.5, -0.3), 0.45)])
def test_ties_is_the_papers(world, scope, scales, density):
    merged = merge(
        world, "abc", method="ties", scale=scales, param={"density": density, "scope": scope}
    )
    expected = twin.ties(world[1]["base"], [world[1][n] for n in "abc"], scales, density, scope)
    # The threshold is known to one part in 2,048: a few entries next to it fall on its other side.
    assert_close(merged, expected, share=0.002)
    plain = twin.ties(world[1]["base"], [world[1][n] for n in "abc"], scales, 1.0)
    with pytest.raises(AssertionError):
        assert_close(merged, plain, share=0.1)


def test_ties_that_keeps_everything_is_exact(world):
    merged = merge(world, "abc", method="ties", param={"density": 1})
    assert_close(merged, twin.ties(world[1]["base"], [world[1][n] for n in "abc"], (1, 1, 1), 1.0))
    one = merge(world, "a", method="ties", param={"density": "1"})
    assert_close(one, world[1]["a"])


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_is_the_papers_with_the_same_drops(world, name):
    scales, density = (1.0, 0.5, -0.2), 0.3
    merged = merge(world, "abc", method=name, scale=scales, param={"density": density, "seed": 7})
    kept = []
    for n in "abc":
        who = open_posterior(str(world[0] / f"{n}.safetensors")).identity
        kept.append(
            {
                k: (
                    keyed_draws(task_key(7, k, who), 0, int(np.prod(s))) < np.float32(density)
                ).reshape(s)
                for k, s in SHAPES.items()
            }
        )
    share = np.mean(np.concatenate([np.ravel(m) for masks in kept for m in masks.values()]))
    assert share == pytest.approx(density, abs=0.01)
    expected = twin.dare(
        world[1]["base"], [world[1][n] for n in "abc"], scales, density, kept, elect="ties" in name
    )
    assert_close(merged, expected)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_drops_depend_on_seed_and_model_and_on_nothing_else(world, name):
    first = merge(world, "ab", method=name, param={"seed": 1})
    other = merge(world, "ab", method=name, param={"seed": 2})
    assert any((first[n] != other[n]).any() for n in first)
    turned = merge(world, "ba", method=name, param={"seed": 1})
    for n in first:
        np.testing.assert_allclose(first[n], turned[n], rtol=1e-5, atol=1e-6)
    models = tuple(str(world[0] / f"{n}.safetensors") for n in "ab")
    config = MergeConfig(
        models=models, base=str(world[0] / "base.safetensors"), method=name, param={"seed": 1}
    )
    before = None
    for threads, chunk in ((1, 100_000), (3, 777)):
        run_merge(
            config.model_copy(update={"out": f"{threads}.safetensors"}),
            threads=threads,
            chunk=chunk,
        )
        data = Path(f"{threads}.safetensors").read_bytes()
        assert before in (None, data)
        before = data


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(world, scope, t):
    merged = merge(world, ["a", "b"], base=False, method="slerp", param={"t": t, "scope": scope})
    assert_close(merged, twin.slerp(world[1]["a"], world[1]["b"], t, scope))


def test_slerp_between_unlike_models_bends_and_between_parallel_ones_is_a_line():
    def arc(totals, t):
        return facts_of(METHODS["slerp"], 2, totals=np.array(totals), t=t)

    assert arc([1.0, 0.0, 1.0], 0.5) == pytest.approx((2**-0.5, 2**-0.5))
    assert arc([1.0, 2.0, 4.0], 0.25) == (0.75, 0.25)
    assert arc([0.0, 0.0, 4.0], 0.25) == (0.75, 0.25)


@pytest.mark.parametrize("floor", [1e-6, 0.0, 0.02])
def test_fisher_merging_is_the_papers(world, floor):
    scales = (1.0, 2.0)
    merged = merge(world, "ab", base=False, method="fisher", scale=scales, param={"floor": floor})
    fishers = [
        {n: np.float64(p) / count for n, p in tiny.precisions(i, SHAPES, low=1e-5).items()}
        for i, count in ((1, 51), (2, 52))
    ]
    assert_close(merged, twin.fisher([world[1]["a"], world[1]["b"]], fishers, scales, floor))
    assert not Path("out.posterior").exists()  # its weights are no precision
    assert any((f < 0.02).any() for f in fishers[0].values())  # the largest floor really acts


@pytest.mark.parametrize(("given", "k"), [({}, 1), ({"observations": {"BASE": "3x"}}, 3)])
def test_fisher_negation_weighs_curvatures_per_observation(world, given, k):
    scales = (-1.0, 0.5)
    merged = merge(world, "ab", method="fisher_negation", scale=scales, **given)
    # The counts that the world's files record, and what they hold of so many observations.
    retain, *forget = (
        {n: np.float64(p) / count for n, p in tiny.precisions(i, SHAPES, low=1e-5).items()}
        for i, count in ((0, 50), (1, 51), (2, 52))
    )
    retain = {n: k * f for n, f in retain.items()}
    totals = [{n: retain[n] + f[n] for n in f} for f in forget]
    tasks = [world[1][n] for n in "ab"]
    assert_close(merged, twin.fisher_negation(world[1]["base"], tasks, scales, retain, totals))
    assert not Path("out.posterior").exists()


@pytest.mark.parametrize("setting", [{"guard": 0.5}, {"anchor": "none"}])
def test_a_setting_that_a_method_has_no_use_for_is_refused(world, setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"--{name}: fisher_negation has no use for it"):
        merge(world, "a", method="fisher_negation", **setting)


@pytest.mark.parametrize(
    ("scales", "param"), [((1.0, 0.5, -0.3), {}), ((1.0, 1.0, 0.0), {"k": 2, "lambda": 0.7})]
)
def test_consensus_is_the_papers(world, scales, param):
    merged = merge(world, "abc", method="consensus", scale=scales, param=param)
    tasks = [world[1][n] for n in "abc"]
    least, threshold = param.get("k", 2), param.get("lambda", 0.4)
    expected = twin.consensus(world[1]["base"], tasks, scales, least, threshold)
    # An entry on the edge of a mask may fall on its other side in float32.
    assert_close(merged, expected, share=0.001)
    with pytest.raises(AssertionError):
        assert_close(merged, twin.task_arithmetic(world[1]["base"], tasks, scales), share=0.1)


def test_consensus_leaves_alone_what_few_tasks_use():
    base = np.zeros(5)
    # Both alike, both opposed, one alone, one drowned by the other, none.
    tasks = [np.array([1.0, 1, 1, 0.1, 0]), np.array([1.0, -1, 0, 1, 0])]
    merged = {
        k: combined("consensus", base, tasks, [1.0, 0.5], k=k, **{"lambda": 0.4}) for k in range(3)
    }
    added = [1.5, 0.5, 1, 0.6, 0]
    np.testing.assert_allclose(merged[0], added)
    np.testing.assert_allclose(merged[1], added)
    np.testing.assert_allclose(merged[2], [1.5, 0.5, 0, 0, 0])
    everything = combined("consensus", base, tasks, [1.0, 0.5], **{"lambda": 0})
    np.testing.assert_allclose(everything, added)
    np.testing.assert_allclose(combined("consensus", base, tasks[:1], [1.0], k=1), tasks[0])


def test_a_threshold_comes_from_a_histogram():
    values = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    histogram = np.bincount(bin_of(values), minlength=BINS)
    for density in (0.01, 0.2, 0.9):
        found = threshold(histogram, density)
        assert found == pytest.approx(np.quantile(values, 1 - density), rel=2e-3)
        assert np.mean(values >= np.float32(found)) == pytest.approx(density, abs=1e-3)
    assert threshold(histogram, 1.0) <= values.min()
    coarse = np.bincount(bin_of(np.float32([0, 0, 0, 1, 1, 1, 1, 2])), minlength=BINS)
    assert [threshold(coarse, d) for d in (0, 0.125, 0.25, 0.625, 0.7, 1)] == [
        2,
        2,
        1,
        1,
        0,
        0,
    ]  # ties are kept
    assert [edge(int(b)) <= v for b, v in zip(bin_of(values[:9]), values[:9], strict=True)] == [
        True
    ] * 9


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scales", [(1.0,), (1.0, 1.0), (0.7, -0.4, 2.0)])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_keeps_the_kind_of_numbers_and_follows_the_paper(dtype, scales, density):
    base, *moves = changes(1 + len(scales), dtype=dtype)
    tasks = [base + m for m in moves]
    merged = combined("ties", base, tasks, scales, density=density)
    assert merged.dtype == dtype
    expected = twin.ties({"x": base}, [{"x": t} for t in tasks], scales, density)["x"]
    wrong = ~np.isclose(
        merged,
        expected,
        rtol=1e-5 if dtype == np.float32 else 1e-12,
        atol=1e-6 if dtype == np.float32 else 1e-12,
    )
    assert wrong.mean() <= (0 if density == 1 else 0.001 * len(scales))


def test_every_method_has_a_twin():
    assert set(twin.TWINS) == ELEMENTWISE


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_a_method_in_float64_is_its_twin(name):
    method, rng = METHODS[name], np.random.default_rng(9)
    scales = (0.7, -0.4 if method.needs_base else 0.4, 2.0)[: method.tasks]
    base, *moves = changes(1 + len(scales))
    tasks, densities = (
        [base + m for m in moves],
        {"ties": 1.0, "dare_linear": 0.3, "dare_ties": 0.3},
    )
    given = {"density": densities[name]} if name in densities else {}
    precisions = list(np.exp(rng.normal(size=(len(scales) + 1, base.size))))
    draws = tuple(rng.random((len(scales), base.size)))
    problem = twin.Problem(
        base={"x": base},
        tasks=[{"x": t} for t in tasks],
        scales=scales,
        base_precision={"x": precisions[0]},
        precisions=[{"x": p} for p in precisions[1:]],
        guard=0.2,
        settings=settings_of(method, given),
        kept=[{"x": d < given.get("density", 1)} for d in draws],
    )
    merged = combined(
        name,
        base,
        tasks,
        scales,
        draws=draws,
        precisions=precisions[1:],
        base_precision=precisions[0],
        guard=0.2,
        **given,
    )
    np.testing.assert_allclose(merged, twin.TWINS[name](problem)["x"], rtol=1e-10, atol=1e-10)


def test_copies_of_one_task_do_not_grow_in_ties():
    base, move = changes(2)
    once = combined("ties", base, [base + move], [1.0])
    np.testing.assert_allclose(
        combined("ties", base, [base + move] * 3, [1.0] * 3), once, rtol=1e-12
    )
    assert 0 < np.mean(once != base) < 0.21


def test_opposite_changes_cancel_where_signs_are_elected():
    base, move = np.zeros(4000), changes(1)[0]
    for name, more in (("ties", {}), ("dare_ties", {"draws": (move * 0, move * 0)})):
        merged = combined(name, base, [move, -move], [1.0, 1.0], density=1, **more)
        np.testing.assert_array_equal(merged, base)


def test_ties_stays_between_the_changes_it_merges():
    base, *moves = changes(4)
    moved = combined("ties", base * 0, moves, [1.0] * 3, density=0.5)
    assert (moved <= np.maximum.reduce([*moves, base * 0])).all()
    assert (moved >= np.minimum.reduce([*moves, base * 0])).all()


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_the_smallest_changes_have_a_sign_too(name):
    base = np.zeros(3, np.float32)
    task = np.array([1e-30, -1e-30, 0.0], np.float32)  # their squares are zero in float32
    draws = {"draws": (base,)} if name == "dare_ties" else {}
    np.testing.assert_array_equal(combined(name, base, [task], [1.0], density=1, **draws), task)


def test_dare_that_drops_nothing_is_task_arithmetic_or_ties_without_a_trim():
    base, *moves = changes(4)
    tasks, scales = [base + m for m in moves], [1.0, 0.5, -0.3]
    draws = tuple(np.random.default_rng(5).random((3, base.size)))
    for name, like, same in (
        ("dare_linear", "task_arithmetic", {}),
        ("dare_ties", "ties", {"density": 1}),
    ):
        dropped_none = combined(name, base, tasks, scales, draws=draws, density=1)
        np.testing.assert_allclose(
            dropped_none, combined(like, base, tasks, scales, **same), rtol=1e-12, atol=1e-12
        )


def test_dare_is_task_arithmetic_on_average():
    rng, n, density = np.random.default_rng(6), 200_000, 0.1
    base, tasks = np.zeros(n), [np.full(n, 1.0), np.full(n, -0.4)]
    merged = combined(
        "dare_linear", base, tasks, [1.0, 0.5], draws=tuple(rng.random((2, n))), density=density
    )
    deviation = np.sqrt((1 - density) / density * (1.0**2 + 0.2**2) / n)
    assert merged.mean() == pytest.approx(0.8, abs=4 * deviation)


def test_fisher_merging_forgets_how_large_a_fisher_is():
    rng = np.random.default_rng(7)
    means, fishers = list(rng.normal(size=(2, 500))), list(np.exp(rng.normal(size=(2, 500))))
    before = combined("fisher", None, means, [1.0, 1.0], precisions=fishers, floor=0)
    after = combined(
        "fisher", None, means, [1.0, 1.0], precisions=[fishers[0] * 1e3, fishers[1] * 1e-3], floor=0
    )
    np.testing.assert_allclose(after, before, rtol=1e-10, atol=1e-12)
    equal = combined("fisher", None, means, [1.0, 3.0], precisions=[fishers[0]] * 2, floor=0)
    np.testing.assert_allclose(equal, 0.25 * means[0] + 0.75 * means[1], rtol=1e-10, atol=1e-12)


def test_where_every_fisher_is_tiny_the_first_model_wins():
    means, tiny_fisher = [np.zeros(100), np.ones(100)], np.full(100, 1e-12)
    tiny_fisher[0] = 1.0
    floored, bare = (
        combined("fisher", None, means, [1.0, 1.0], precisions=[tiny_fisher] * 2, floor=f)
        for f in (1e-6, 0)
    )
    assert (floored[1:] < 1e-5).all()
    np.testing.assert_allclose(bare, 0.5)
    assert floored[0] == pytest.approx(0.5)


def test_slerp_keeps_the_norm_and_its_ends():
    one, other = np.random.default_rng(8).normal(size=(2, 500))
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    angles = []
    for t in (0.0, 0.25, 0.5, 1.0):
        merged = combined("slerp", None, [one, other], [1.0, 1.0], t=t)
        assert np.linalg.norm(merged) == pytest.approx(1, rel=1e-12)
        angles.append(np.arccos(np.clip(merged @ one, -1, 1)))
    np.testing.assert_allclose(angles, angles[-1] * np.array([0, 0.25, 0.5, 1]), atol=1e-7)
    back = combined("slerp", None, [other, one], [1.0, 1.0], t=0.75)
    np.testing.assert_allclose(
        back, combined("slerp", None, [one, other], [1.0, 1.0], t=0.25), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tise", "base": "base"}, "did you mean 'ties'"),
        ({"method": "ties"}, "--base"),
        ({"method": "slerp", "base": "base"}, "takes no base"),
        ({"method": "slerp", "models": "abc"}, "merges 2 models"),
        ({"method": "slerp", "scale": (0.5,)}, "takes no --scale"),
        ({"method": "ties", "base": "base", "weights": "precision"}, "does not weigh"),
        ({"method": "ties", "base": "base", "shrink": "0.3"}, "--shrink only matters .* drop it"),
        ({"method": "consensus", "base": "base", "models": "a"}, "k=2: no entry.* 2 of 1 tasks"),
    ],
)
def test_a_method_says_what_it_cannot_do(world, settings, message):
    models = tuple(str(world[0] / f"{n}.safetensors") for n in settings.pop("models", "ab"))
    if "base" in settings:
        settings["base"] = str(world[0] / "base.safetensors")
    with pytest.raises(ConfigError, match=r"(?i)" + message):
        run_merge(MergeConfig(models=models, out="x.safetensors", **settings))


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_a_task_of_scale_zero_has_no_vote(name):
    base, move, other = changes(3)
    more = {"draws": (move * 0, move * 0)} if name == "dare_ties" else {}
    alone = {"draws": (move * 0,)} if name == "dare_ties" else {}
    both = combined(name, base, [base + move, base + other], [1.0, 0.0], density=1, **more)
    np.testing.assert_array_equal(
        both, combined(name, base, [base + move], [1.0], density=1, **alone)
    )
