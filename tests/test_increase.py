"""The predicted increase of each model's loss is that of its quadratic, and says when it is far."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import Anchor
from mergekit_bayes.stream import units
from tests import interrupted, three_models, tiny
from tests.reference import increase as twin

world = three_models.world
inputs = interrupted.inputs
needs_numba = pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="needs numba")
N = 100.0


def merge(*models, fused=False, **settings):
    refs = tuple(f"{m}.safetensors" for m in models)
    base = settings.pop("base", "base")
    return run_merge(
        MergeConfig(
            models=refs,
            base=base and f"{base}.safetensors",
            weights="precision",
            out="x.safetensors",
            force=True,
            **settings,
        ),
        fused=fused,
    )


@pytest.mark.parametrize(
    ("scales", "fused"),
    [
        ((1.0, 1.0), False),
        pytest.param((1.0, 1.0), True, marks=needs_numba),
        ((0.4, 0.7), False),
        ((-0.5, 1.0), False),
    ],
)
def test_it_is_that_of_the_quadratic(world, scales, fused):
    report = merge("a", "b", scale=scales, fused=fused)
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    assert [p.role for p in report.predicted] == ["base", "task", "task"]
    for found in report.predicted:
        mean, precision = world[found.ref.removesuffix(".safetensors")]
        expected = twin.increase(merged, mean, base, precision, N)
        assert found.nats == pytest.approx(sum(expected.values()), rel=2e-5)
        assert (found.count, found.unit, found.left_out) == (N, "token", 0)
        layers = {"embeddings": ["wte.weight"], "h.0": [n for n in mean if n.startswith("h.0")]}
        for layer, names in layers.items():
            share = sum(expected[n] for n in names)
            assert found.layers[layer] == pytest.approx(share, rel=2e-5)
        assert list(found.layers.values()) == sorted(found.layers.values(), reverse=True)
        if found.role == "base":
            assert (found.distance, found.trusted) == (None, None)
        else:
            far = twin.distance(merged, mean, base, precision)
            assert found.distance == pytest.approx(far, rel=2e-5)
            assert found.trusted == (far <= 1)


@pytest.mark.parametrize("kind", ["base", "zero"])
def test_a_recorded_pull_is_a_gradient(world, kind):
    """It counts as the precision does: here three observations for each that is on record."""
    mean, precision = world["a"]
    ess, strength = 50.0, 3.0
    tiny.posterior(
        "pulled.safetensors",
        mean,
        {n: p / 2 for n, p in precision.items()},
        ess=ess,
        anchor=Anchor(kind=kind, precision=strength),
    )
    report = merge("pulled", "b", observations={"pulled.safetensors": "3x"})
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    name = "pull" if kind == "base" else "decay"
    # 100 observations by a precision that is scaled to 50
    pulled = twin.increase(merged, mean, base, precision, N, **{name: 2 * strength})
    free = twin.increase(merged, mean, base, precision, N)
    found = {p.ref: p for p in report.predicted}["pulled.safetensors"]
    assert abs(sum(pulled.values()) - sum(free.values())) > 0.05
    assert found.nats == pytest.approx(sum(pulled.values()), rel=1e-4)
    assert found.count == 300


def test_it_is_exact_for_a_task_whose_loss_is_quadratic(tmp_path, monkeypatch):
    """A ridge regression on orthogonal inputs, trained with a pull to the base until its end."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows, width, pull = 64, 6, 5.0
    shapes = {"w": (width,)}
    basis = np.linalg.qr(rng.normal(size=(rows, width)))[0] * rng.uniform(1, 6, width)
    base = tiny.arrays(0, shapes)
    tiny.posterior("base.safetensors", base, tiny.precisions(0, shapes), observations=64.0)
    losses = {}
    for name in "ab":
        target = basis @ rng.normal(size=width) + rng.normal(size=rows)
        curvature = np.diag(basis.T @ basis)
        mean = (basis.T @ target + pull * np.float64(base["w"])) / (curvature + pull)
        tiny.posterior(
            f"{name}.safetensors",
            {"w": np.float32(mean)},
            {"w": np.float32(curvature)},
            observations=float(rows),
            anchor=Anchor(kind="base", precision=pull),
        )

        def per_row(w, target=target):
            return float(np.sum((target - basis @ np.float64(w)) ** 2)) / 2 / rows

        losses[f"{name}.safetensors"] = (per_row, mean)
    for scales in ((1.0, 1.0), (0.3, 0.8), (1.0, -0.2)):
        report = merge("a", "b", scale=scales, anchor="recorded")
        merged = tiny.read("x.safetensors")["w"]
        for found in report.predicted[1:]:
            per_row, mean = losses[found.ref]
            assert found.nats == pytest.approx(per_row(merged) - per_row(mean), rel=1e-4)


def test_a_removal_is_not_trusted_and_a_model_alone_is_where_it_was(world):
    (base, task) = merge("a", scale=(-0.5,)).predicted
    assert task.trusted is False
    assert task.distance > 1
    assert base.trusted is None
    (base, task) = merge("a").predicted
    assert task.trusted is True
    assert task.nats == pytest.approx(0.0, abs=1e-12)  # up to rounding of the merge
    assert base.nats > 0


def test_without_a_base_there_is_no_distance_to_compare_with(world):
    report = merge("a", "b", base=None)
    merged = tiny.read("x.safetensors")
    for found in report.predicted:
        mean, precision = world[found.ref.removesuffix(".safetensors")]
        expected = twin.increase(merged, mean, mean, precision, N)
        assert found.nats == pytest.approx(sum(expected.values()), rel=2e-5)
        assert (found.role, found.trusted, found.distance) == ("task", None, None)


def test_a_pull_to_a_base_that_is_not_there_is_noted(world):
    mean, precision = world["a"]
    tiny.posterior("pulled.safetensors", mean, precision, anchor=Anchor(kind="base", precision=3.0))
    (note,) = [n for n in merge("pulled", "b", base=None).notes if "without the gradient" in n]
    assert "'pulled.safetensors'" in note
    assert not [n for n in merge("pulled", "b").notes if "without the gradient" in n]
    assert [n for n in merge("pulled", "b").notes if "how entries act together" in n]


def test_what_shrinkage_adds_is_not_the_datas(world):
    report = merge("a", "b", shrink="0.5")
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    for found in report.predicted:
        mean, precision = world[found.ref.removesuffix(".safetensors")]
        expected = twin.increase(merged, mean, base, precision, N)
        assert found.nats == pytest.approx(sum(expected.values()), rel=2e-5)


def test_a_merge_inside_counts_without_the_base_that_it_holds(world):
    merge("a")
    inside = tiny.read("x.safetensors")
    for ending in ("safetensors", "posterior"):
        Path(f"x.{ending}").rename(f"in.{ending}")
    report = merge("in", "b")
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    found = {p.ref: p for p in report.predicted}["in.safetensors"]
    expected = twin.increase(merged, inside, base, world["a"][1], N)
    assert found.nats == pytest.approx(sum(expected.values()), rel=1e-3)
    assert found.count == N


def test_tensors_without_a_precision_of_its_own_are_left_out_and_counted(world):
    report = merge("a", "b", scale=(1.0, "b.safetensors:wte=0"))
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    found = {p.ref: p for p in report.predicted}["b.safetensors"]
    mean, precision = world["b"]
    expected = twin.increase(merged, mean, base, precision, N)
    assert found.left_out == 1
    assert found.nats == pytest.approx(
        sum(x for n, x in expected.items() if "wte" not in n), rel=2e-5
    )
    none = {p.ref: p for p in merge("a", "b", scale=(1.0, 0.0)).predicted}["b.safetensors"]
    assert (none.nats, none.trusted, none.left_out) == (None, None, len(mean))


def test_nothing_is_predicted_without_precisions_or_without_a_count(world):
    report = run_merge(MergeConfig(models=("a.safetensors",), base="base.safetensors"))
    assert report.predicted == ()
    mean, precision = world["a"]
    tiny.write("bare.safetensors", mean)
    tiny.write("bare.posterior", precision)
    found = {p.ref: p for p in merge("bare", "b").predicted}["bare.safetensors"]
    assert (found.count, found.nats, found.layers) == (None, None, {})
    assert found.distance > 0


def test_beyond_float32_nothing_is_predicted(world):
    for name, (mean, _) in world.items():
        tiny.write(f"wide_{name}.safetensors", {n: 100 * m for n, m in mean.items()})
    vast = dict.fromkeys(("BASE", "wide_a.safetensors", "wide_b.safetensors"), 1e35)
    for found in merge("wide_a", "wide_b", base="wide_base", isotropic=vast).predicted:
        assert (found.nats, found.distance, found.trusted) == (None, None, None)


def test_a_resumed_merge_predicts_the_same(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT", 500)
    monkeypatch.chdir(tmp_path)
    whole = run_merge(interrupted.config(inputs, out="whole.safetensors"))
    settings = interrupted.config(inputs, out="resumed.safetensors")
    interrupted.interrupt(monkeypatch, settings, 7)
    resumed = run_merge(settings, threads=2)
    assert len(whole.predicted) == 3
    assert resumed.predicted == whole.predicted
