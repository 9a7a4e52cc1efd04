"""The methods beside the two-by-two table, through the engine, against restatements of their papers."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.kernels.base import keyed_draws, task_key
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.methods import METHODS, settings_of
from mergekit_bayes.methods.base import BINS, bin_of, edge, threshold
from mergekit_bayes.posterior import open_posterior
from tests import tiny
from tests.reference import methods as twin

SHAPES = {"wte.weight": (300, 40), "h.0.attn.weight": (50, 60), "h.0.ln.bias": (50,), "h.0.scalar": ()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = tiny.arrays(0, SHAPES)
    found = {"base": base}
    for i, name in enumerate("abc"):
        rng = np.random.default_rng(i + 10)
        change = {n: (rng.normal(size=s) * 0.1 * (rng.random(s) < 0.7)).astype(np.float32) for n, s in SHAPES.items()}
        found[name] = {n: base[n] + change[n] for n in SHAPES}
    for i, (name, mean) in enumerate(found.items()):
        tiny.posterior(folder / f"{name}.safetensors", mean, tiny.precisions(i, SHAPES, low=1e-5), observations=50 + i)
    return folder, found


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge(world, names, *, base=True, out="out.safetensors", **settings):
    models = tuple(str(world[0] / f"{n}.safetensors") for n in names)
    given = {"base": str(world[0] / "base.safetensors")} if base else {}
    run_merge(MergeConfig(models=models, out=out, force=True, **given, **settings))
    return tiny.read(out)


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
    merged = merge(world, "abc", method="ties", scale=scales, param={"density": density, "scope": scope})
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
        kept.append({k: (keyed_draws(task_key(7, k, who), 0, int(np.prod(s))) < np.float32(density)).reshape(s)
                     for k, s in SHAPES.items()})  # fmt: skip
    share = np.mean(np.concatenate([np.ravel(m) for masks in kept for m in masks.values()]))
    assert share == pytest.approx(density, abs=0.01)
    expected = twin.dare(world[1]["base"], [world[1][n] for n in "abc"], scales, density, kept, elect="ties" in name)
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
    config = MergeConfig(models=models, base=str(world[0] / "base.safetensors"), method=name, param={"seed": 1})
    before = None
    for threads, chunk in ((1, 100_000), (3, 777)):
        run_merge(config.model_copy(update={"out": f"{threads}.safetensors"}), threads=threads, chunk=chunk)
        data = Path(f"{threads}.safetensors").read_bytes()
        assert before in (None, data)
        before = data


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_goes_along_the_arc(world, scope, t):
    merged = merge(world, ["a", "b"], base=False, method="slerp", param={"t": t, "scope": scope})
    assert_close(merged, twin.slerp(world[1]["a"], world[1]["b"], t, scope))


def test_slerp_between_unlike_models_bends_and_between_parallel_ones_is_a_line():
    reduction = METHODS["slerp"].reduction
    assert reduction.facts(np.array([1.0, 0.0, 1.0]), {"t": 0.5}, ()) == pytest.approx((2**-0.5, 2**-0.5))
    assert reduction.facts(np.array([1.0, 2.0, 4.0]), {"t": 0.25}, ()) == (0.75, 0.25)
    assert reduction.facts(np.array([0.0, 0.0, 4.0]), {"t": 0.25}, ()) == (0.75, 0.25)


@pytest.mark.parametrize("floor", [1e-6, 0.0, 0.02])
def test_fisher_merging_is_the_papers(world, floor):
    scales = (1.0, 2.0)
    merged = merge(world, "ab", base=False, method="fisher", scale=scales, param={"floor": floor})
    fishers = [{n: np.float64(p) / count for n, p in tiny.precisions(i, SHAPES, low=1e-5).items()}
               for i, count in ((1, 51), (2, 52))]  # fmt: skip
    assert_close(merged, twin.fisher([world[1]["a"], world[1]["b"]], fishers, scales, floor))
    assert not Path("out.precision.safetensors").exists()  # its weights are no precision
    assert any((f < 0.02).any() for f in fishers[0].values())  # the largest floor really acts


def test_a_threshold_comes_from_a_histogram():
    values = np.abs(np.random.default_rng(0).normal(size=100_000)).astype(np.float32)
    histogram = np.bincount(bin_of(values), minlength=BINS)
    for density in (0.01, 0.2, 0.9):
        found = threshold(histogram, density)
        assert found == pytest.approx(np.quantile(values, 1 - density), rel=2e-3)
        assert np.mean(values >= np.float32(found)) == pytest.approx(density, abs=1e-3)
    assert threshold(histogram, 1.0) <= values.min()
    assert [edge(int(b)) <= v for b, v in zip(bin_of(values[:9]), values[:9], strict=True)] == [True] * 9


def test_settings_are_checked():
    ties = METHODS["ties"]
    assert settings_of(ties, {}) == {"density": 0.2, "scope": "model"}
    assert settings_of(ties, {"density": "0.5", "scope": "tensor"}) == {"density": 0.5, "scope": "tensor"}
    for given, message in (
        ({"densty": 1}, "did you mean 'density'"),
        ({"density": 2}, "from 0 to 1"),
        ({"density": "much"}, "a number"),
        ({"density": float("nan")}, "a number"),
        ({"scope": "row"}, "model or tensor"),
    ):
        with pytest.raises(ConfigError, match=r"(?i)" + message):
            settings_of(ties, given)
    with pytest.raises(ConfigError, match="has none"):
        settings_of(METHODS["average"], {"x": 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "tise", "base": "base"}, "did you mean 'ties'"),
        ({"method": "ties"}, "--base"),
        ({"method": "slerp", "base": "base"}, "takes no base"),
        ({"method": "slerp", "models": "abc"}, "merges 2 models"),
        ({"method": "slerp", "scale": (0.5,)}, "takes no --scale"),
        ({"method": "ties", "base": "base", "weights": "precision"}, "does not weigh"),
        ({"method": "ties", "base": "base", "shrink": "0.3"}, "--weights precision"),
    ],
)
def test_a_method_says_what_it_cannot_do(world, settings, message):
    models = tuple(str(world[0] / f"{n}.safetensors") for n in settings.pop("models", "ab"))
    if "base" in settings:
        settings["base"] = str(world[0] / "base.safetensors")
    with pytest.raises(ConfigError, match=r"(?i)" + message):
        run_merge(MergeConfig(models=models, out="x.safetensors", **settings))
