"""Merges chain and are undone exactly in one frame, and other removals are guarded."""

from pathlib import Path

import numpy as np
import pytest

from bmerge_cli.merge_tables import guard_in_words
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.posterior import open_posterior
from tests import three_models, tiny
from tests.three_models import merge

world = three_models.world


def test_a_merge_can_be_merged_again_and_undone(world):
    tiny.posterior("c.safetensors", tiny.arrays(3), tiny.precisions(3), observations=250)
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, scale=(1.0, 0.7), out="ab.safetensors")
    merge("ab", "c", **kw, scale=(1.0, 0.3), out="chain.safetensors")
    merge("a", "b", "c", **kw, scale=(1.0, 0.7, 0.3), out="once.safetensors")
    undone = merge("chain", "b", **kw, scale=(1.0, -0.7), out="undone.safetensors")
    merge("a", "c", **kw, scale=(1.0, 0.3), out="rest.safetensors")
    for suffix in (".safetensors", ".posterior"):
        once, rest = tiny.read("once" + suffix), tiny.read("rest" + suffix)
        for key, value in tiny.read("chain" + suffix).items():
            np.testing.assert_allclose(value, once[key], rtol=1e-5, atol=1e-6)
        for key, value in tiny.read("undone" + suffix).items():
            np.testing.assert_allclose(value, rest[key], rtol=1e-4, atol=1e-5)
    assert undone.guarded_share == 0
    terms = open_posterior("undone.safetensors").info.terms
    assert {t.label: round(t.scale, 9) for t in terms} == {
        "a.safetensors": 1.0,
        "c.safetensors": 0.3,
    }


FRAMES = [
    {},
    {"counts": "recorded"},
    {"observations": {"base.safetensors": "3x"}},
    {"shrink": "0.3"},
    {"shrink": "row:0.3", "counts": "recorded"},
    {"pool": "row"},
    {"only": "attn"},
    {"anchor": "none"},
]


def uneven():
    """Posteriors with a prior, different counts, and an ess that is not the count."""
    for i, (name, n) in enumerate((("base", 300), ("a", 20), ("b", 100), ("c", 250))):
        ess, prior = 7.0 * n, 2.0
        stored = {k: ess / n * (v * n / 100 + prior) for k, v in tiny.precisions(i).items()}
        for file in (f"{name}.safetensors", f"{name}.posterior"):
            Path(file).unlink(missing_ok=True)
        tiny.posterior(
            f"{name}.safetensors",
            tiny.arrays(i),
            stored,
            observations=n,
            ess=ess,
            prior=prior * ess / n,
        )


def close(left, right, rtol=1e-4):
    for suffix in (".safetensors", ".posterior"):
        one, other = tiny.read(left + suffix), tiny.read(right + suffix)
        for key, value in one.items():
            np.testing.assert_allclose(value, other[key], rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_chains_and_undos_are_exact_in_one_frame(world, frame):
    uneven()
    kw = {"base": "base", "weights": "precision", **frame}
    merge("b", "c", **kw, scale=(1.0, 0.7), out="bc.safetensors")
    merge("bc", "a", **kw, scale=(1.0, 0.3), out="chain.safetensors")
    merge("b", "c", "a", **kw, scale=(1.0, 0.7, 0.3), out="once.safetensors")
    close("chain", "once")
    undone = merge("chain", "c", **kw, scale=(1.0, -0.7), out="undone.safetensors")
    merge("b", "a", **kw, scale=(1.0, 0.3), out="rest.safetensors")
    close("undone", "rest", rtol=1e-3)
    assert any("undoes a term" in n for n in undone.notes)
    assert undone.guard < 1e-3


@pytest.mark.parametrize("ratio", [1.0, 1e9])
def test_an_undo_says_whether_its_guard_acted(world, ratio):
    """At extreme ratios of the precisions little of the base's remains, and the guard bounds it."""
    for i, name in enumerate(("a", "b")):
        for file in (f"{name}.safetensors", f"{name}.posterior"):
            Path(file).unlink(missing_ok=True)
        precisions = {k: ratio * v for k, v in tiny.precisions(i + 1).items()}
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i + 1), precisions, observations=100)
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, out="ab.safetensors")
    undone = merge("ab", "a", "b", **kw, scale=(1.0, -1.0, -1.0), out="undone.safetensors")
    text = " ".join(undone.notes)
    assert undone.guard == 1e-6
    assert "--guard 0.2 is not used" in text
    assert (undone.guarded_share > 0) == (ratio > 1)
    assert ("the undo is not exact" in text) == (ratio > 1)
    off = max(
        float(np.abs(v - tiny.read("base.safetensors")[k]).max())
        for k, v in tiny.read("undone.safetensors").items()
    )
    assert (off > 0.01) == (ratio > 1)


def test_no_note_calls_the_guard_of_an_undo_harmless_before_it_was_counted(world):
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, out="ab.safetensors")
    undone = merge("ab", "b", **kw, scale=(1.0, -1.0), out="undone.safetensors")
    assert not any(word in n for n in undone.notes for word in ("only", "exact"))
    assert guard_in_words(undone) == "guard 1e-06 (of an undo, instead of --guard)"
    removed = merge("a", **kw, scale=(-1.0,), out="removed.safetensors")
    assert guard_in_words(removed) == "guard 0.2"


@pytest.mark.parametrize(
    "making",
    [{"only": "attn"}, {"anchor": "none"}, {"observations": {"b.safetensors": "3x"}}],
    ids=str,
)
def test_an_inexact_undo_keeps_the_ordinary_guard(world, making):
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, **making, out="ab.safetensors")
    assert merge("ab", "b", **kw, scale=(1.0, -1.0), out="x.safetensors").guard == 0.2


def test_removing_more_than_was_added_or_from_a_guarded_merge_keeps_the_guard(world):
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, out="ab.safetensors")
    assert merge("ab", "b", "b", **kw, scale=(1.0, -1.0, -1.0), out="x.safetensors").guard == 0.2
    guarded = merge("a", "b", **kw, scale=(1.0, -1.0), out="g.safetensors")
    assert guarded.guarded_share > 0
    assert merge("g", "a", **kw, scale=(1.0, -1.0), out="y.safetensors").guard == 0.2


def test_a_removal_counts_by_multiples_only(world):
    kw = {"base": "base", "weights": "precision"}
    merge("a", **kw, scale=(-0.5,), out="neg.safetensors")
    with pytest.raises(ConfigError, match="Multiply it"):
        merge("neg", "a", **kw, observations={"neg.safetensors": "10"}, out="x.safetensors")
    report = merge("neg", "a", **kw, observations={"neg.safetensors": "6x"}, out="y.safetensors")
    assert report.guarded_share > 0  # reported although every scale is positive


def test_verify_and_a_guarded_removal_fit_into_the_header(world):
    report = merge(
        "a", base="base", weights="precision", scale=(-1.0,), verify=True, out="x.safetensors"
    )
    assert report.guarded_share > 0
    assert open_posterior("x.safetensors").info.mean.full is not None


def test_removing_from_a_merge_as_base_is_refused_with_the_right_line(world):
    merge("a", "b", base="base", weights="precision", out="ab.safetensors")
    with pytest.raises(
        MismatchError, match=r"bmerge merge ab.safetensors b.safetensors --base BASE"
    ):
        merge("b", base="ab", weights="precision", scale=(-1.0,), out="x.safetensors")


def test_a_chain_in_another_frame_is_refused(world):
    merge("a", "b", base="base", weights="precision", out="ab.safetensors")
    tiny.posterior("other.safetensors", tiny.arrays(8), tiny.precisions(8))
    with pytest.raises(MismatchError, match="frame of another base"):
        merge("ab", "a", base="other", weights="precision", out="x.safetensors")


def test_a_removal_is_guarded_and_counted(world):
    report = merge("a", base="base", weights="precision", scale=(-1.0,), out="x.safetensors")
    guarded = total = 0
    for key, value in tiny.read("x.safetensors").items():
        m0, s0 = (np.float64(x[key]) for x in world["base"])
        m, h = (np.float64(x[key]) for x in world["a"])
        precision = np.maximum(s0 - h, 0.2 * (s0 + h))
        np.testing.assert_allclose(
            value, m0 - (s0 + h) / precision * (m - m0), rtol=1e-4, atol=1e-5
        )
        guarded, total = guarded + np.sum(s0 - h < 0.2 * (s0 + h)), total + s0.size
    assert report.guarded_share == pytest.approx(guarded / total)
    assert 0 < guarded < total
    assert report.largest_multiplier == pytest.approx(5.0, rel=1e-5)
