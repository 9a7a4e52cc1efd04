"""Entries that are not finite, or negative precisions, are named or count as unchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.posterior import open_posterior
from tests import model_forms, tiny
from tests.model_forms import AT, POOLED, SHAPES, close, expect, load, merge, model, spoiled

here = model_forms.here
BAD = {"NaN": np.nan, "inf": np.inf, "-inf": -np.inf, "negative": -3.0}
POOLINGS = [{}, {"shrink": "0.3"}, {"shrink": "row:0.3"}, {"pool": "row"}, {"pool": "tensor"}]


@pytest.mark.parametrize("settings", POOLINGS, ids=str)
@pytest.mark.parametrize("kind", ["F32", "BF16", "F64"])
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_bad_precision_is_named_and_nothing_is_left_behind(value, kind, settings):
    model("base", 0)
    model("b", 2)
    model("a", 1, precision=spoiled(tiny.precisions(1, SHAPES), value), kept=kind)
    before = sorted(Path().iterdir())
    for base, scale in (("base", 1.0), (None, 1.0)):
        with pytest.raises(PrecisionError) as error:
            merge("b", "a", base=base, scale=(scale,), **settings)
        shown = str(error.value)
        assert f"'{AT[0]}' in a.posterior is {value} at flat index 13. " in shown
        assert "--on-bad base" in shown  # without a base it says that one is needed
        assert ("with --base" in shown) == (base is None)
        assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F16", "F8_E5M2"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_mean_is_named_and_counted_and_nothing_is_left_behind(value, dtype):
    model("base", 0, dtype="BF16")
    mean = spoiled(spoiled(tiny.arrays(1, SHAPES), value), value, (AT[0], (3, 4)))
    model("a", 1, mean=mean, dtype=dtype)
    before = sorted(Path().iterdir())
    for weights in ("uniform", "precision"):
        with pytest.raises(
            CheckpointError,
            match=rf"'{AT[0]}' is {value} at flat index 13, the first of 2 bad entri",
        ):
            merge("a", weights=weights)
        with pytest.raises(CheckpointError, match=r"Make it again\.$"):
            merge("base", base="a", weights=weights, on_bad="base")
        assert sorted(Path().iterdir()) == before


def test_bad_entries_of_a_first_model_without_a_base_are_named():
    model("a", 1, mean=spoiled(tiny.arrays(1, SHAPES), np.nan))
    model("b", 2)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: 'h\.0\.attn\.weight' is nan"):
        merge("a", "b", base=None)


@pytest.mark.parametrize("settings", POOLINGS, ids=str)
@pytest.mark.parametrize("where", ["mean", "precision"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "F64"])
def test_bad_entries_count_as_unchanged_where_asked(where, kind, settings):
    prior = {"kind": "isotropic", "precision": 0.05}
    model("base", 0)
    good = model("a", 1, dtype=kind, kept=kind, prior=prior)
    merge("a", **settings, out="good.safetensors")
    values = iter(BAD.values()) if where == "precision" else iter([np.nan, np.inf, -np.inf, np.nan])
    mean, precision = tiny.arrays(1, SHAPES), tiny.precisions(1, SHAPES)
    for k in range(4):
        target = spoiled(mean if where == "mean" else precision, next(values), (AT[0], (k, 3)))
        mean, precision = (target, precision) if where == "mean" else (mean, target)
    model("a", 1, mean=mean, precision=precision, dtype=kind, kept=kind, prior=prior)
    report = merge("a", **settings, on_bad="base", out="replaced.safetensors")
    assert [m.mended for m in report.models] == [0, 4]
    assert "4 bad entries of 'a.safetensors' took the base's values" in report.notes
    found, whole = load("replaced.safetensors"), load("good.safetensors")
    for name in set(SHAPES) - {AT[0]}:
        np.testing.assert_array_equal(found[name], whole[name])
    if where == "mean" or "pool" not in settings:
        np.testing.assert_array_equal(found[AT[0]][:, 3], load("base.safetensors")[AT[0]][:, 3])
    # What the data of the other entries added, summed up: none of the bad ones'.
    s0, h = load("base.posterior")[AT[0]], good[1][AT[0]] - 0.05
    if where == "precision":
        h[:, 3] = 0
    if settings.get("pool"):
        axis = 1 if settings["pool"] == "row" else None
        s0, h = s0.mean(axis=axis, keepdims=True), h.mean(axis=axis, keepdims=True)
    if settings.get("shrink"):
        axis = 1 if "row" in settings["shrink"] else None
        s0, h = (
            s0 + 0.3 * s0.mean(axis=axis, keepdims=True),
            h + 0.3 * h.mean(axis=axis, keepdims=True),
        )
    if "pool" not in settings:
        h[:, 3] = 0
    np.testing.assert_allclose(load("replaced.posterior")[AT[0]], s0 + h, rtol=2e-5)


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("pool", ["row", "tensor"])
@pytest.mark.parametrize("settings", POOLINGS, ids=str)
def test_a_bad_number_of_a_pooled_precision_is_found_and_replaced(pool, value, settings):
    model("base", 0, pool=pool)
    precision = {n: POOLED[pool](p) for n, p in tiny.precisions(1, SHAPES).items()}
    at = (AT[0], (2, 0) if pool == "row" else (0, 0))
    model("a", 1, precision=spoiled(precision, value, at))
    with pytest.raises(PrecisionError, match=rf"'{AT[0]}' in a\.posterior is {value} at flat"):
        merge("a", **settings)
    report = merge("a", **settings, on_bad="base")
    kept = load("x.posterior")
    assert all(np.isfinite(s).all() and (s > 0).all() for s in kept.values())
    assert report.models[1].mended > 0
    s0 = load("base.posterior")[AT[0]]
    if not settings:
        row = slice(2, 3) if pool == "row" else slice(None)
        np.testing.assert_array_equal(
            load("x.safetensors")[AT[0]][row], load("base.safetensors")[AT[0]][row]
        )
        np.testing.assert_allclose(np.broadcast_to(kept[AT[0]], s0.shape)[row], s0[row], rtol=1e-6)


def test_a_bad_row_that_is_pooled_further_adds_nothing_to_the_mean():
    base = model("base", 0, pool="row")
    rows = {n: POOLED["row"](p) for n, p in tiny.precisions(1, SHAPES).items()}
    model(
        "a",
        1,
        precision=spoiled(rows, np.nan, (AT[0], (2, 0))),
        prior={"kind": "isotropic", "precision": 0.05},
    )
    for settings in ({"pool": "tensor"}, {"shrink": "0.3"}):
        report = merge("a", on_bad="base", **settings)
        s0, h = base[1][AT[0]], np.float64(rows[AT[0]]) - 0.05
        h[2] = 0
        if "pool" in settings:
            expected, bad = np.full((1, 1), s0.mean() + h.mean()), 1  # one number
        else:
            expected, bad = s0 + 0.3 * s0.mean() + h + 0.3 * h.mean(), 5  # the entries of its row
            expected[2] -= 0.3 * h.mean()
        np.testing.assert_allclose(load("x.posterior")[AT[0]], expected, rtol=2e-5)
        assert report.models[1].mended == bad


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "ties"},
        {"method": "ties", "param": {"scope": "tensor"}},
        {"weights": "precision"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_replaced_means_merge_like_means_replaced_by_hand(settings, dtype):
    base = model("base", 0, dtype=dtype)
    b = model("b", 2, dtype=dtype)
    precision = tiny.precisions(2, SHAPES)
    spoilt, by_hand, known = b[0], b[0], precision
    for k, value in enumerate((np.nan, np.inf, -np.inf)):
        at = (AT[0], (k, 2))
        spoilt, by_hand = spoiled(spoilt, value, at), spoiled(by_hand, base[0][AT[0]][at[1]], at)
        known = spoiled(known, 0.0, at)
    model("a", 1, dtype=dtype)
    model("spoilt", 2, mean=spoilt, dtype=dtype)
    model("by_hand", 2, mean=by_hand, precision=known, dtype=dtype)
    settings = {"weights": "uniform"} | settings
    merge("a", "spoilt", on_bad="base", **settings)
    merge("a", "by_hand", out="y.safetensors", **settings)
    close(load("x.safetensors"), load("y.safetensors"), rtol=0, atol=0)


def test_a_bad_entry_of_a_merge_in_the_frame_of_its_base_adds_nothing():
    for settings in ({}, {"shrink": "0.3"}, {"shrink": "row:0.3"}):
        for i, name in enumerate(("base", "a", "b")):
            model(name, i)
        merge("a", out="m.safetensors", **settings)
        stored = load_file("m.posterior")
        header = open_posterior("m.safetensors").info.to_metadata()
        stored[f"precision:{AT[0]}"][AT[1]] = torch.nan
        save_file(stored, "m.posterior", header)
        merge("b", out="b_only.safetensors", **settings)
        report = merge("m", "b", on_bad="base", **settings)
        assert report.models[1].mended == 1
        for suffix in (".safetensors", ".posterior"):
            one, other = (load(f"{n}{suffix}")[AT[0]][AT[1]] for n in ("x", "b_only"))
            assert one == pytest.approx(other, rel=1e-5), (settings, suffix)


def test_a_negative_zero_is_a_precision_and_a_tensor_of_zeros_is_noted():
    precision = spoiled(tiny.precisions(1, SHAPES), -0.0)
    precision["h.0.conv"] *= 0
    base, a = model("base", 0), model("a", 1, precision=precision)
    report = merge("a", on_bad="error")
    mean, stored = expect(base, (a,), (1.0,))
    close(load("x.safetensors"), mean)
    close(load("x.posterior"), stored)
    assert [n for n in report.notes if "is zero" in n] == [
        "the precision of 'a.safetensors' is zero in all of 'h.0.conv'"
    ]


@pytest.mark.parametrize("pool", POOLED)
@pytest.mark.parametrize("base", ["base", None])
def test_a_precision_of_zeros_everywhere_is_refused(pool, base):
    model("base", 0)
    model("b", 2)
    model("a", 1, pool=pool, precision={n: np.zeros(s, np.float32) for n, s in SHAPES.items()})
    before = sorted(Path().iterdir())
    with pytest.raises(PrecisionError, match=r"'a\.safetensors' .*is zero everywhere"):
        merge("b", "a", base=base)
    assert sorted(Path().iterdir()) == before


def test_a_copied_tensor_is_not_the_place_for_a_bad_precision_or_a_cast_nan():
    model("base", 0, precision=spoiled(tiny.precisions(0, SHAPES), -1.0))
    model("a", 1)
    with pytest.raises(
        PrecisionError, match=r"'h\.0\.attn\.weight' in base\.posterior is -1\.0 at flat index 13"
    ):
        merge("a", only="wte")
    merge("a", only="wte", weights="uniform")
    every = np.uint32(0x7FFFFFFF).view(
        np.float32
    )  # a NaN whose bits carry over where they are rounded
    model("base", 0, mean=spoiled(tiny.arrays(0, SHAPES), every))
    merge("a", only="wte")
    assert np.isnan(load("x.safetensors")[AT[0]][AT[1]])  # copied byte for byte
    with pytest.raises(CheckpointError, match=r"base\.safetensors: 'h\.0\.attn\.weight' is nan"):
        merge("a", only="wte", dtype="BF16")
