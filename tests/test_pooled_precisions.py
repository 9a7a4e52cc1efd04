"""A precision by row or by tensor merges like the same numbers spread out to every entry."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.kernels.plain import plain_sums
from mergekit_bayes.plan import MergeConfig, plan_merge
from mergekit_bayes.posterior import Prior
from mergekit_bayes.stream import means
from mergekit_bayes.stream.chunks import Reader
from tests import model_forms, tiny
from tests.model_forms import POOLED, SHAPES, close, expect, load, merge, model

here = model_forms.here


def coarsest(pools):
    return next(p for p in ("entry", "row", "tensor") if p in pools)


@pytest.mark.parametrize("pools", list(itertools.product(POOLED, repeat=3)), ids="-".join)
def test_pooled_precisions_equal_the_same_numbers_spread_out(pools):
    base, a, b = (
        model(n, i, pool=p, kept=("F32", "BF16")[i % 2])
        for i, (n, p) in enumerate(zip(("base", "a", "b"), pools, strict=True))
    )
    merge("a", "b", scale=(1.0, 0.4))
    mean, precision = expect(base, (a, b), (1.0, 0.4))
    close(load("x.safetensors"), mean)
    stored = load("x.posterior")
    close(stored, precision)
    assert {n: s.shape for n, s in stored.items()} == {
        n: POOLED[coarsest(pools)](np.ones(s, np.float32)).shape for n, s in SHAPES.items()
    }
    for name in SHAPES:
        if coarsest(pools) != "entry":
            assert (
                precision[name].size == 1
                or np.ptp(precision[name].reshape(len(precision[name]), -1), 1).max() == 0
            )


@pytest.mark.parametrize(
    "settings",
    [
        {"shrink": "0.3"},
        {"shrink": "row:0.3"},
        {"pool": "row"},
        {"pool": "tensor"},
        {"pool": "row", "shrink": "row:0.5"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "pools", [("entry", "row", "tensor"), ("tensor", "entry", "row"), ("row",) * 3], ids="-".join
)
def test_shrinking_and_pooling_of_pooled_precisions(pools, settings):
    each = [
        model(n, i, pool=p) for i, (n, p) in enumerate(zip(("base", "a", "b"), pools, strict=True))
    ]
    merge("a", "b", **settings)

    def shape(s, to):
        axes = tuple(range(1, s.ndim)) if to == "row" else tuple(range(s.ndim))
        return np.broadcast_to(s.mean(axis=axes, keepdims=True), s.shape)

    def with_replaced(name, s):
        s = np.broadcast_to(s, SHAPES[name])
        s = shape(s, settings["pool"]) if "pool" in settings else s
        amount, by_row = (
            settings.get("shrink", "0").removeprefix("row:"),
            "row:" in settings.get("shrink", ""),
        )
        return s + float(amount) * shape(s, "row" if by_row else "tensor")

    base, a, b = ((m, {n: with_replaced(n, s) for n, s in p.items()}) for m, p in each)
    mean, precision = expect(base, (a, b), (1, 1))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), precision)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shrink": "0.3"},
        {"shrink": "row:0.3"},
        {"pool": "row"},
        {"pool": "tensor", "shrink": "0.5"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "pools", [("row",) * 4, ("tensor",) * 4, ("entry", "row", "tensor", "row")], ids="-".join
)
def test_merges_of_pooled_precisions_chain_and_undo(pools, settings):
    for i, (name, pool) in enumerate(zip(("base", "a", "b", "c"), pools, strict=True)):
        model(name, i, pool=pool)
    merge("a", "b", scale=(1.0, 0.7), out="ab.safetensors", **settings)
    merge("ab", "c", scale=(1.0, 0.3), out="chain.safetensors", **settings)
    merge("a", "b", "c", scale=(1.0, 0.7, 0.3), out="once.safetensors", **settings)
    report = merge("chain", "b", scale=(1.0, -0.7), out="undone.safetensors", **settings)
    merge("a", "c", scale=(1.0, 0.3), out="rest.safetensors", **settings)
    assert report.guarded_share == 0
    for suffix in (".safetensors", ".posterior"):
        close(load(f"chain{suffix}"), load(f"once{suffix}"), rtol=1e-4, atol=1e-5)
        close(load(f"undone{suffix}"), load(f"rest{suffix}"), rtol=1e-3, atol=1e-4)


def test_a_removal_of_pooled_precisions_is_guarded_like_the_same_numbers_spread_out():
    base, a = model("base", 0, pool="row"), model("a", 1, pool="row")
    report = merge("a", scale=(-1.0,))
    stored, guarded, entries = load("x.posterior"), 0, 0
    for name, m0 in base[0].items():
        s0, h = (np.broadcast_to(p[1][name], m0.shape) for p in (base, a))
        s = np.maximum(s0 - h, 0.2 * (s0 + h))
        np.testing.assert_allclose(
            load("x.safetensors")[name], m0 - (s0 + h) / s * (a[0][name] - m0), rtol=2e-4
        )
        np.testing.assert_allclose(np.broadcast_to(stored[name], m0.shape), s, rtol=2e-5)
        guarded, entries = guarded + np.count_nonzero(s0 - h < 0.2 * (s0 + h)), entries + s.size
    assert report.guarded_share == pytest.approx(guarded / entries)
    assert guarded > 0


def test_a_pooled_posterior_is_kilobytes():
    shapes = {"w": (300, 500), "b": (500,)}
    for i, name in enumerate(("base", "a")):
        model(name, i, mean=tiny.arrays(i, shapes), precision=tiny.precisions(i, shapes))
    whole = 4 * 300 * 500
    for pool, numbers in (("row", 800), ("tensor", 2)):
        merge("a", pool=pool, out=f"{pool}.safetensors")
        assert (
            precision_path(Path(f"{pool}.safetensors")).stat().st_size < 4 * numbers + 4000 < whole
        )
        # And it can be pooled or spread out no further: it stays what it is.
        merge(pool, pool=pool, out="again.safetensors", base="base")
        assert load("again.posterior")["w"].shape == load(f"{pool}.posterior")["w"].shape


def test_rows_of_vocabularies_that_differ_keep_their_own_pooled_precision():
    for longer, kept, pool in itertools.product((5, 9), POOLED, (None, "row", "tensor")):
        shapes = SHAPES | {"wte.weight": (longer, 4)}
        base = model("base", 0, pool=kept)
        a = model(
            "a", 1, pool=kept, mean=tiny.arrays(1, shapes), precision=tiny.precisions(1, shapes)
        )
        report = merge("a", vocab="common", pool=pool)
        rows = min(7, longer)
        s0, h = base[1]["wte.weight"], a[1]["wte.weight"]
        s0 = np.broadcast_to(s0, (7, 4))
        # The rows that only one model has are its own, and then all of its precision counts.
        needed = max(rows, longer) if longer > 7 else rows
        h = np.broadcast_to(h, (longer, 4))[:needed]
        if pool is not None:
            axis = 1 if pool == "row" else None
            s0, h = (np.broadcast_to(x.mean(axis=axis, keepdims=True), x.shape) for x in (s0, h))
        m0, m = base[0]["wte.weight"], a[0]["wte.weight"]
        mean, precision = np.concatenate([m0, m[7:]]), np.concatenate([s0, h[7:]])
        precision[:rows] += h[:rows]
        mean[:rows] += (s0[:rows] + h[:rows]) / precision[:rows] * (m[:rows] - m0[:rows])
        case = f"{longer} {kept} {pool}"
        close({"w": load("x.safetensors")["wte.weight"]}, {"w": mean}, what=case)
        close({"w": load("x.posterior")["wte.weight"]}, {"w": precision}, what=case)
        assert str(rows) in report.ruled["wte.weight"]


@pytest.mark.parametrize("pool", [None, "row"])
def test_rows_that_only_a_task_has_are_counted_by_its_own_record(pool):
    long = SHAPES | {"wte.weight": (9, 4)}
    own = {"observations": 300.0, "ess": 30.0, "prior": Prior(kind="isotropic", precision=0.05)}
    model("base", 0)
    for seed, name in enumerate("ab", start=1):
        model(name, seed, mean=tiny.arrays(seed, long), precision=tiny.precisions(1, long), **own)
    settings = {"counts": "recorded", "pool": pool}
    merge("a", vocab="common", **settings)
    found = load("x.posterior")["wte.weight"][7:]
    # The same as where the model is copied as a base.
    merge("b", base="a", only="attn", **settings)
    copied = load("x.posterior")["wte.weight"]
    np.testing.assert_allclose(np.broadcast_to(found, (2, 4)), np.broadcast_to(copied, (9, 4))[7:])
    stored = tiny.precisions(1, long)["wte.weight"]
    if pool is not None:
        stored = stored.mean(axis=1, keepdims=True)
    counted = 10 * (stored - 0.05) + 0.05 * 10  # per observation times 300, and the prior once
    np.testing.assert_allclose(found, counted[7:], rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("size", [0, 30, 60, 64, 240, 256, 270, 1020, 1024, 1200])
def test_means_are_summed_by_windows_however_many_are_read_at_a_time(monkeypatch, size, fused):
    """To the bit: a stored precision that was pooled before has the same sums."""
    monkeypatch.setattr(means, "WINDOW", 64)
    monkeypatch.setattr(means, "_READ", 256)
    shapes = {"w.weight": (40, 30)}
    for i, name in enumerate(("base", "a")):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
    stored = tiny.precisions(1, shapes)["w.weight"].reshape(-1)[:size]
    stored[700:701] = 0.0

    def in_windows(values):
        total = 0.0
        for start in range(0, values.size, 64):
            part = np.zeros(1)
            window = values[start : start + 64]
            plain_sums(window, window.size, part)
            total += float(part[0])
        return total

    config = MergeConfig(
        models=("a.safetensors",),
        base="base.safetensors",
        weights="precision",
        pool="tensor",
        on_bad="base",
        out="x.safetensors",
    )
    given = tiny.precisions(1, shapes)
    given["w.weight"].reshape(-1)[700] = np.nan
    Path("a.posterior").unlink()
    tiny.write("a.posterior", given, metadata=tiny.info("a.safetensors").to_metadata())
    with plan_merge(config) as plan:
        operand = plan.steps[0].operands[1]
        reader = Reader(plan)
        read = means.PrecisionMeans(plan, lambda: reader, map, fused=fused)
        mean, bad = read.over_tensor(operand, size)
        assert (mean[0], bad) == (in_windows(stored) / max(size, 1), size > 700)
        for row in (30, 60, 120, 400):
            if size % row == 0:
                rows, bad = read.over_rows(operand, size, row)
                assert bad == (size > 700)
                expected = [in_windows(values) / row for values in stored.reshape(-1, row)]
                np.testing.assert_array_equal(rows, expected)
