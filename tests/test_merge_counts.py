"""Observations, priors, anchors, shrinking and pooling reach the arithmetic of a merge."""

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior import Anchor, open_posterior
from tests import three_models, tiny
from tests.three_models import expected_matching, merge

world = three_models.world


def test_a_base_that_counts_otherwise_than_in_the_merge_is_refused(world):
    three = {"observations": {"base.safetensors": "3x"}}
    merge("a", "b", base="base", weights="precision", **three, out="ab.safetensors")
    with pytest.raises(MismatchError, match=r"--observations base\.safetensors=3x"):
        merge("ab", "b", base="base", weights="precision", scale=(1.0, -1.0), out="x.safetensors")


def test_a_merge_that_was_shrunk_otherwise_is_told_in_flags(world):
    merge("a", "b", weights="precision", shrink="0.3", out="ab.safetensors")
    message = (
        "was merged with --shrink 0.3 and no --pool, this merge has no --shrink and --pool row"
    )
    with pytest.raises(MismatchError, match=message):
        merge("ab", "b", weights="precision", pool="row", out="x.safetensors")


def test_counts_set_by_hand_are_remembered_by_the_merge(world):
    tiny.posterior("c.safetensors", tiny.arrays(3), tiny.precisions(3), observations=25000)
    by_hand = {"a.safetensors": "100", "b.safetensors": "100"}
    merge("a", "b", weights="precision", observations=by_hand, out="ab.safetensors")
    report = merge("ab", "c", weights="precision", out="x.safetensors")
    assert [m.count for m in report.models] == [100, 100]


@pytest.mark.parametrize(("anchor", "expected"), [("h0", 2.0), ("none", 0.5)])
def test_the_multiplier_is_how_far_the_task_vector_is_stretched(
    tmp_path, monkeypatch, anchor, expected
):
    monkeypatch.chdir(tmp_path)
    for name, mean, precision in (("base", 0.0, 30.0), ("a", 1.0, 10.0)):
        tiny.posterior(
            f"{name}.safetensors", {"w": np.float32([mean])}, {"w": np.float32([precision])}
        )
    report = merge(
        "a", base="base", weights="precision", scale=(-1.0,), anchor=anchor, out="x.safetensors"
    )
    assert report.largest_multiplier == pytest.approx(expected, rel=1e-5)
    assert -tiny.read("x.safetensors")["w"][0] == pytest.approx(expected, rel=1e-5)


def test_equal_counts_take_every_precision_per_observation(world):
    big = {k: v * 50 for k, v in world["b"][1].items()}
    tiny.posterior("big.safetensors", world["b"][0], big, observations=5000)
    merge("a", "big", base="base", weights="precision", out="equal.safetensors")
    merge(
        "a", "big", base="base", weights="precision", counts="recorded", out="recorded.safetensors"
    )
    merge(
        "a",
        "big",
        base="base",
        weights="precision",
        observations={"big.safetensors": "50x"},
        out="set.safetensors",
    )
    equal, recorded, by_hand = (tiny.read(f"{n}.safetensors") for n in ("equal", "recorded", "set"))
    for key, (mean, _) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(equal[key], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(recorded[key], by_hand[key], rtol=1e-5, atol=1e-6)
    assert any(abs(recorded[k] - equal[k]).max() > 1e-2 for k in equal)


def test_observations_multiply_the_data_and_never_the_prior(world):
    prior = 2.0
    with_prior = {k: v + prior for k, v in world["a"][1].items()}
    tiny.posterior("p.safetensors", world["a"][0], with_prior, prior=prior)
    merge("p", "b", weights="precision", observations={"p.safetensors": "3x"}, out="x.safetensors")
    stored = tiny.read("x.posterior")
    for key in tiny.SHAPES:
        expected = (prior + 3 * np.float64(world["a"][1][key]) + np.float64(world["b"][1][key])) / 2
        np.testing.assert_allclose(stored[key], expected, rtol=1e-5)


def test_tempered_precisions_are_brought_to_their_observations(world):
    """IVON's ess sets its noise; a merge reads S * N / ess."""
    path = tiny.posterior(
        "hot.safetensors", world["a"][0], {k: v * 10 for k, v in world["a"][1].items()}
    )
    model = open_posterior(str(path))
    info = model.info.model_copy(update={"ess": 1000.0})
    tiny.write(
        "new.posterior",
        tiny.read("hot.posterior"),
        metadata=info.to_metadata(),
    )
    Path("new.posterior").rename("hot.posterior")
    merge("hot", "b", base="base", weights="precision", out="x.safetensors")
    for key, (mean, _) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(tiny.read("x.safetensors")[key], mean, rtol=1e-5, atol=1e-6)


def test_shrinking_adds_the_mean_and_pooling_replaces_by_it(world):
    for settings, change in (
        ({"shrink": "0.3"}, lambda s: s + 0.3 * s.mean()),
        (
            {"shrink": "row:0.5"},
            lambda s: s + 0.5 * (s.mean(-1, keepdims=True) if s.ndim > 1 else s),
        ),
        ({"pool": "tensor"}, lambda s: np.full_like(s, s.mean())),
        (
            {"pool": "row"},
            lambda s: np.broadcast_to(s.mean(-1, keepdims=True), s.shape) if s.ndim > 1 else s,
        ),
    ):
        merge("a", "b", weights="precision", out="x.safetensors", force=True, **settings)
        stored = tiny.read("x.posterior")
        for key in tiny.SHAPES:
            expected = (
                change(np.float64(world["a"][1][key])) + change(np.float64(world["b"][1][key]))
            ) / 2
            kept = np.broadcast_to(stored[key], expected.shape)
            np.testing.assert_allclose(kept, expected, rtol=1e-5, err_msg=f"{settings} {key}")
        if "pool" in settings:
            assert stored["wte.weight"].shape == (
                (1, 1) if settings["pool"] == "tensor" else (7, 1)
            )


@pytest.mark.parametrize("observations", [{}, {"base.safetensors": "3x"}, {"a.safetensors": "5x"}])
def test_a_precision_a_little_below_its_prior_adds_nothing(tmp_path, monkeypatch, observations):
    # IVON's h may lie between -weight_decay and zero.
    monkeypatch.chdir(tmp_path)
    mean = {"w": np.float32([0, 0, 0, 0])}
    tiny.posterior(
        "base.safetensors",
        mean,
        {"w": np.float32([0.4, 0.9, 1, 3])},
        observations=10_000,
        prior=1.0,
    )
    tiny.posterior(
        "a.safetensors", {"w": mean["w"] + 1}, {"w": np.float32([0.9, 0.4, 0.9, 0.9])}, prior=1.0
    )
    merge("a", base="base", weights="precision", observations=observations, out="x.safetensors")
    np.testing.assert_allclose(tiny.read("x.safetensors")["w"], 1, rtol=1e-6)
    merge(
        "a",
        base="base",
        weights="precision",
        observations=observations,
        scale=(0.5,),
        out="y.safetensors",
    )
    np.testing.assert_allclose(tiny.read("y.safetensors")["w"], 0.5, rtol=1e-6)
    assert (tiny.read("y.posterior")["w"] >= 1).all()


def test_anchors_reach_the_arithmetic(world):
    decay = Anchor(kind="zero", precision=0.5)
    tiny.posterior("d.safetensors", world["a"][0], world["a"][1], anchor=decay)
    results = {}
    for anchor in ("none", "1.5", "zero-decay", "recorded"):
        merge("d", base="base", weights="precision", anchor=anchor, out="x.safetensors", force=True)
        results[anchor] = tiny.read("x.safetensors")
    for key in tiny.SHAPES:
        m0, s0 = (np.float64(x[key]) for x in world["base"])
        m, h = (np.float64(x[key]) for x in world["a"])
        tau, total = m - m0, s0 + h
        for anchor, pull in (
            ("none", h * tau),
            ("1.5", (h + 1.5) * tau),
            ("zero-decay", h * tau + 0.5 * m),
        ):
            np.testing.assert_allclose(
                results[anchor][key], m0 + pull / total, rtol=1e-4, atol=1e-5
            )
        np.testing.assert_array_equal(results["recorded"][key], results["zero-decay"][key])
    with pytest.raises(PrecisionError, match="does not record a quadratic pull"):
        merge("a", base="base", weights="precision", anchor="zero-decay", out="y.safetensors")


def test_a_foreign_precision_is_taken_as_it_is(world):
    tiny.write("fisher.safetensors", world["a"][1])
    tiny.write("plain.safetensors", world["a"][0])
    report = merge(
        "plain",
        "b",
        weights="precision",
        precision={"plain.safetensors": "fisher.safetensors"},
        out="x.safetensors",
    )
    assert any("taken as it is" in note for note in report.notes)
    stored = tiny.read("x.posterior")
    for key in tiny.SHAPES:
        np.testing.assert_allclose(
            stored[key], (np.float64(world["a"][1][key]) + world["b"][1][key]) / 2, rtol=1e-5
        )


def test_one_number_can_stand_for_a_precision(world):
    tiny.write("plain.safetensors", world["a"][0])
    merge(
        "b",
        base="plain",
        weights="precision",
        isotropic={"plain.safetensors": 4.0},
        scale=(-1.0,),
        out="x.safetensors",
    )
    for key, value in tiny.read("x.safetensors").items():
        m0, (m, h) = np.float64(world["a"][0][key]), (np.float64(x[key]) for x in world["b"])
        np.testing.assert_allclose(
            value, m0 - (4 + h) / np.maximum(4 - h, 0.2 * (4 + h)) * (m - m0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("count", "is_noted"), [("0.5", True), ("2e4", True), ("3x", False), ("90", False)]
)
def test_a_count_that_may_have_been_meant_as_a_multiple_is_noted(world, count, is_noted):
    report = merge(
        "a", base="base", weights="precision", observations={"BASE": count}, out="x.safetensors"
    )
    assert any(f"{count}x multiplies" in note for note in report.notes) == is_noted
