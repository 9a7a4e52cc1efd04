"""Merges of real files: numbers, chains, counts, names, dtypes, and that nothing grows with the model."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.merge import MergeConfig, first, run_merge, work
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import Anchor, PosteriorInfo, open_posterior, write_index
from mergekit_bayes.tensors import SafetensorsSource, TensorSpec
from tests import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Base and two tasks with precisions in `base`, `a`, `b` .safetensors, and their arrays."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for i, name in enumerate(("base", "a", "b")):
        mean, precision = tiny.arrays(i), tiny.precisions(i)
        tiny.posterior(f"{name}.safetensors", mean, precision)
        found[name] = (mean, precision)
    return found


def merge(*models, **settings):
    refs = tuple(f"{m}.safetensors" for m in models)
    if settings.get("base"):
        settings["base"] += ".safetensors"
    return run_merge(MergeConfig(models=refs, **settings))


def expected_matching(world, names, scales):
    """Twin in float64; `base` counts with delta_0, all counts equal."""
    result = {}
    for key in tiny.SHAPES:
        m0, s0 = (np.float64(x[key]) for x in world["base"])
        s0 = s0 + DELTA_0
        total, pull = s0, 0.0
        for name, scale in zip(names, scales, strict=True):
            m, h = (np.float64(x[key]) for x in world[name])
            total = total + scale * h
            pull = pull + scale * (s0 + h) * (m - m0)
        result[key] = (m0 + pull / total, total)
    return result


def test_precision_weights_without_a_base_average_by_precision(world):
    report = merge("a", "b", weights="precision")
    assert report.path == "merged.safetensors"
    merged, stored = tiny.read("merged.safetensors"), tiny.read("merged.precision.safetensors")
    for key in tiny.SHAPES:
        (ma, sa), (mb, sb) = ((np.float64(x[key]) for x in world[n]) for n in "ab")
        np.testing.assert_allclose(merged[key], (sa * ma + sb * mb) / (sa + sb), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stored[key], (sa + sb) / 2, rtol=1e-6)
    assert json.loads(Path("merged.merge_report.json").read_text())["method"] == "precision_average"


def test_uniform_weights_average_and_write_no_posterior(world):
    merge("a", "b", scale=(3.0, 1.0), out="u.safetensors")
    for key, value in tiny.read("u.safetensors").items():
        np.testing.assert_allclose(value, 0.75 * world["a"][0][key] + 0.25 * world["b"][0][key], rtol=1e-5, atol=1e-7)
    assert not Path("u.precision.safetensors").exists()


def test_a_base_makes_uniform_weights_task_arithmetic(world):
    merge("a", "b", base="base", scale=(1.0, -0.5), out="u.safetensors")
    for key, value in tiny.read("u.safetensors").items():
        m0, a, b = (np.float64(world[n][0][key]) for n in ("base", "a", "b"))
        np.testing.assert_allclose(value, m0 + (a - m0) - 0.5 * (b - m0), rtol=1e-5, atol=1e-6)


def test_a_base_makes_precision_weights_gradient_matching(world):
    report = merge("a", "b", base="base", weights="precision", out="m.safetensors")
    merged, stored = tiny.read("m.safetensors"), tiny.read("m.precision.safetensors")
    for key, (mean, precision) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(merged[key], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stored[key], precision, rtol=1e-6)
    h = [sum(float(world[n][1][k].sum()) for k in tiny.SHAPES) for n in ("base", "a", "b")]
    assert [m.ratio for m in report.models[1:]] == pytest.approx([h[1] / h[0], h[2] / h[0]], rel=1e-5)
    assert report.guarded_share == 0


def test_the_result_does_not_depend_on_the_chunk_size(world):
    config = {"models": ("a.safetensors", "b.safetensors"), "base": "base.safetensors", "weights": "precision"}
    for shrink, pool in ((None, None), ("0.3", None), ("row:0.3", "row")):
        for chunk, out in ((3, "x"), (1 << 16, "y")):
            run_merge(
                MergeConfig(**config, shrink=shrink, pool=pool, out=f"{out}.safetensors", force=True), chunk=chunk
            )
        for suffix in (".safetensors", ".precision.safetensors"):
            for (_, x), (_, y) in zip(tiny.read("x" + suffix).items(), tiny.read("y" + suffix).items(), strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6 if shrink else 0)


def test_a_merge_can_be_merged_again_and_undone(world):
    tiny.posterior("c.safetensors", tiny.arrays(3), tiny.precisions(3), observations=250)
    kw = {"base": "base", "weights": "precision"}
    merge("a", "b", **kw, scale=(1.0, 0.7), out="ab.safetensors")
    merge("ab", "c", **kw, scale=(1.0, 0.3), out="chain.safetensors")
    merge("a", "b", "c", **kw, scale=(1.0, 0.7, 0.3), out="once.safetensors")
    undone = merge("chain", "b", **kw, scale=(1.0, -0.7), out="undone.safetensors")
    merge("a", "c", **kw, scale=(1.0, 0.3), out="rest.safetensors")
    for suffix in (".safetensors", ".precision.safetensors"):
        once, rest = tiny.read("once" + suffix), tiny.read("rest" + suffix)
        for key, value in tiny.read("chain" + suffix).items():
            np.testing.assert_allclose(value, once[key], rtol=1e-5, atol=1e-6)
        for key, value in tiny.read("undone" + suffix).items():
            np.testing.assert_allclose(value, rest[key], rtol=1e-4, atol=1e-5)
    assert undone.guarded_share == 0
    terms = open_posterior("undone.safetensors").info.terms
    assert {t.label: round(t.scale, 9) for t in terms} == {"a.safetensors": 1.0, "c.safetensors": 0.3}


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
        for file in (f"{name}.safetensors", f"{name}.precision.safetensors"):
            Path(file).unlink(missing_ok=True)
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i), stored, observations=n, ess=ess, prior=prior * ess / n)


def close(left, right, rtol=1e-4):
    for suffix in (".safetensors", ".precision.safetensors"):
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


@pytest.mark.parametrize(
    "making", [{"only": "attn"}, {"anchor": "none"}, {"observations": {"b.safetensors": "3x"}}], ids=str
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


def test_a_base_that_counts_otherwise_than_in_the_merge_is_refused(world):
    three = {"observations": {"base.safetensors": "3x"}}
    merge("a", "b", base="base", weights="precision", **three, out="ab.safetensors")
    with pytest.raises(MismatchError, match=r"--observations base\.safetensors=3x"):
        merge("ab", "b", base="base", weights="precision", scale=(1.0, -1.0), out="x.safetensors")


def test_counts_set_by_hand_are_remembered_by_the_merge(world):
    tiny.posterior("c.safetensors", tiny.arrays(3), tiny.precisions(3), observations=25000)
    by_hand = {"a.safetensors": "100", "b.safetensors": "100"}
    merge("a", "b", weights="precision", observations=by_hand, out="ab.safetensors")
    report = merge("ab", "c", weights="precision", out="x.safetensors")
    assert [m.count for m in report.models] == [100, 100]


def test_a_removal_counts_by_multiples_only(world):
    kw = {"base": "base", "weights": "precision"}
    merge("a", **kw, scale=(-0.5,), out="neg.safetensors")
    with pytest.raises(ConfigError, match="Multiply it"):
        merge("neg", "a", **kw, observations={"neg.safetensors": "10"}, out="x.safetensors")
    report = merge("neg", "a", **kw, observations={"neg.safetensors": "6x"}, out="y.safetensors")
    assert report.guarded_share > 0  # reported although every scale is positive


@pytest.mark.parametrize(("anchor", "expected"), [("h0", 2.0), ("none", 0.5)])
def test_the_multiplier_is_how_far_the_task_vector_is_stretched(tmp_path, monkeypatch, anchor, expected):
    monkeypatch.chdir(tmp_path)
    for name, mean, precision in (("base", 0.0, 30.0), ("a", 1.0, 10.0)):
        tiny.posterior(f"{name}.safetensors", {"w": np.float32([mean])}, {"w": np.float32([precision])})
    report = merge("a", base="base", weights="precision", scale=(-1.0,), anchor=anchor, out="x.safetensors")
    assert report.largest_multiplier == pytest.approx(expected, rel=1e-5)
    assert -tiny.read("x.safetensors")["w"][0] == pytest.approx(expected, rel=1e-5)


def test_only_asks_for_the_precisions_that_it_needs(world):
    partial = {k: v for k, v in tiny.precisions(1).items() if k != "wte.weight"}
    tiny.posterior("p.safetensors", tiny.arrays(1), partial)
    merge("p", base="base", weights="precision", only="attn", out="x.safetensors")
    with pytest.raises(PrecisionError, match=r"no precision for 'wte\.weight'"):
        merge("p", base="base", weights="precision", out="y.safetensors")


def test_a_file_without_a_precision_is_told_to_run_its_models_folder(world):
    tiny.write("bare.safetensors", tiny.arrays(1))
    with pytest.raises(PrecisionError, match=r"`bmerge precision FOLDER --data TEXTS -o bare\.precision\.safetensors`"):
        merge("bare", "b", weights="precision", out="x.safetensors")


def test_verify_and_a_guarded_removal_fit_into_the_header(world):
    report = merge("a", base="base", weights="precision", scale=(-1.0,), verify=True, out="x.safetensors")
    assert report.guarded_share > 0
    assert open_posterior("x.safetensors").info.mean.full is not None


def test_force_with_uniform_weights_takes_the_old_precision_away(world):
    merge("a", "b", weights="precision", out="x.safetensors")
    merge("a", "b", out="x.safetensors", force=True)
    assert not Path("x.precision.safetensors").exists()


def test_a_bare_adapter_among_whole_models_is_refused(world, tmp_path):
    for name in ("l1", "l2"):
        tiny.write(tmp_path / name / "adapter_model.safetensors", tiny.arrays(0))
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(MismatchError, match="is an adapter"):
        run_merge(MergeConfig(models=("l1", "l2")))


def test_two_names_for_one_tensor_are_refused(world):
    mean = tiny.arrays(1)
    tiny.write(
        "two.safetensors", {**{f"transformer.{k}": v for k, v in mean.items()}, "h.0.ln.bias": mean["h.0.ln.bias"]}
    )
    with pytest.raises(MismatchError, match="are both"):
        merge("two", base="base", out="x.safetensors")


def test_removing_from_a_merge_as_base_is_refused_with_the_right_line(world):
    merge("a", "b", base="base", weights="precision", out="ab.safetensors")
    with pytest.raises(MismatchError, match=r"bmerge merge ab.safetensors b.safetensors --base BASE"):
        merge("b", base="ab", weights="precision", scale=(-1.0,), out="x.safetensors")


def test_a_chain_in_another_frame_is_refused(world):
    merge("a", "b", base="base", weights="precision", out="ab.safetensors")
    tiny.posterior("other.safetensors", tiny.arrays(8), tiny.precisions(8))
    with pytest.raises(MismatchError, match="frame of another base"):
        merge("ab", "a", base="other", weights="precision", out="x.safetensors")


def test_equal_counts_take_every_precision_per_observation(world):
    big = {k: v * 50 for k, v in world["b"][1].items()}
    tiny.posterior("big.safetensors", world["b"][0], big, observations=5000)
    merge("a", "big", base="base", weights="precision", out="equal.safetensors")
    merge("a", "big", base="base", weights="precision", counts="recorded", out="recorded.safetensors")
    merge("a", "big", base="base", weights="precision", observations={"big.safetensors": "50x"}, out="set.safetensors")
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
    stored = tiny.read("x.precision.safetensors")
    for key in tiny.SHAPES:
        expected = (prior + 3 * np.float64(world["a"][1][key]) + np.float64(world["b"][1][key])) / 2
        np.testing.assert_allclose(stored[key], expected, rtol=1e-5)


def test_tempered_precisions_are_brought_to_their_observations(world):
    """IVON's ess sets its noise; a merge reads S * N / ess."""
    path = tiny.posterior("hot.safetensors", world["a"][0], {k: v * 10 for k, v in world["a"][1].items()})
    model = open_posterior(str(path))
    info = model.info.model_copy(update={"ess": 1000.0})
    tiny.write("hot.precision.safetensors.new", tiny.read("hot.precision.safetensors"), metadata=info.to_metadata())
    Path("hot.precision.safetensors.new").rename("hot.precision.safetensors")
    merge("hot", "b", base="base", weights="precision", out="x.safetensors")
    for key, (mean, _) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(tiny.read("x.safetensors")[key], mean, rtol=1e-5, atol=1e-6)


def test_shrinking_adds_the_mean_and_pooling_replaces_by_it(world):
    for settings, change in (
        ({"shrink": "0.3"}, lambda s: s + 0.3 * s.mean()),
        ({"shrink": "row:0.5"}, lambda s: s + 0.5 * (s.mean(-1, keepdims=True) if s.ndim > 1 else s)),
        ({"pool": "tensor"}, lambda s: np.full_like(s, s.mean())),
        ({"pool": "row"}, lambda s: np.broadcast_to(s.mean(-1, keepdims=True), s.shape) if s.ndim > 1 else s),
    ):
        merge("a", "b", weights="precision", out="x.safetensors", force=True, **settings)
        stored = tiny.read("x.precision.safetensors")
        for key in tiny.SHAPES:
            expected = (change(np.float64(world["a"][1][key])) + change(np.float64(world["b"][1][key]))) / 2
            kept = np.broadcast_to(stored[key], expected.shape)
            np.testing.assert_allclose(kept, expected, rtol=1e-5, err_msg=f"{settings} {key}")
        if "pool" in settings:
            assert stored["wte.weight"].shape == ((1, 1) if settings["pool"] == "tensor" else (7, 1))


@pytest.mark.parametrize("observations", [{}, {"base.safetensors": "3x"}, {"a.safetensors": "5x"}])
def test_a_precision_a_little_below_its_prior_adds_nothing(tmp_path, monkeypatch, observations):
    # IVON's h may lie between -weight_decay and zero.
    monkeypatch.chdir(tmp_path)
    mean = {"w": np.float32([0, 0, 0, 0])}
    tiny.posterior("base.safetensors", mean, {"w": np.float32([0.4, 0.9, 1, 3])}, observations=10_000, prior=1.0)
    tiny.posterior("a.safetensors", {"w": mean["w"] + 1}, {"w": np.float32([0.9, 0.4, 0.9, 0.9])}, prior=1.0)
    merge("a", base="base", weights="precision", observations=observations, out="x.safetensors")
    np.testing.assert_allclose(tiny.read("x.safetensors")["w"], 1, rtol=1e-6)
    merge("a", base="base", weights="precision", observations=observations, scale=(0.5,), out="y.safetensors")
    np.testing.assert_allclose(tiny.read("y.safetensors")["w"], 0.5, rtol=1e-6)
    assert (tiny.read("y.precision.safetensors")["w"] >= 1).all()


def test_a_removal_is_guarded_and_counted(world):
    report = merge("a", base="base", weights="precision", scale=(-1.0,), out="x.safetensors")
    guarded = total = 0
    for key, value in tiny.read("x.safetensors").items():
        m0, s0 = (np.float64(x[key]) for x in world["base"])
        m, h = (np.float64(x[key]) for x in world["a"])
        precision = np.maximum(s0 - h, 0.2 * (s0 + h))
        np.testing.assert_allclose(value, m0 - (s0 + h) / precision * (m - m0), rtol=1e-4, atol=1e-5)
        guarded, total = guarded + np.sum(s0 - h < 0.2 * (s0 + h)), total + s0.size
    assert report.guarded_share == pytest.approx(guarded / total)
    assert 0 < guarded < total
    assert report.largest_multiplier == pytest.approx(5.0, rel=1e-5)


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
        for anchor, pull in (("none", h * tau), ("1.5", (h + 1.5) * tau), ("zero-decay", h * tau + 0.5 * m)):
            np.testing.assert_allclose(results[anchor][key], m0 + pull / total, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(results["recorded"][key], results["zero-decay"][key])
    with pytest.raises(PrecisionError, match="does not record a quadratic pull"):
        merge("a", base="base", weights="precision", anchor="zero-decay", out="y.safetensors")


def test_a_foreign_precision_is_taken_as_it_is(world):
    tiny.write("fisher.safetensors", world["a"][1])
    tiny.write("plain.safetensors", world["a"][0])
    report = merge(
        "plain", "b", weights="precision", precision={"plain.safetensors": "fisher.safetensors"}, out="x.safetensors"
    )
    assert any("taken as it is" in note for note in report.notes)
    stored = tiny.read("x.precision.safetensors")
    for key in tiny.SHAPES:
        np.testing.assert_allclose(stored[key], (np.float64(world["a"][1][key]) + world["b"][1][key]) / 2, rtol=1e-5)


def test_one_number_can_stand_for_a_precision(world):
    tiny.write("plain.safetensors", world["a"][0])
    merge(
        "b", base="plain", weights="precision", isotropic={"plain.safetensors": 4.0}, scale=(-1.0,), out="x.safetensors"
    )
    for key, value in tiny.read("x.safetensors").items():
        m0, (m, h) = np.float64(world["a"][0][key]), (np.float64(x[key]) for x in world["b"])
        np.testing.assert_allclose(
            value, m0 - (4 + h) / np.maximum(4 - h, 0.2 * (4 + h)) * (m - m0), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F16"])
def test_the_bases_dtype_comes_out_with_one_rounding(world, dtype):
    tiny.write("narrow.safetensors", world["base"][0], dtype)
    merge("a", base="narrow", scale=(0.5,), out="x.safetensors")
    source = SafetensorsSource([Path("x.safetensors")])
    assert {s.dtype for s in source.specs.values()} == {dtype}
    source.close()
    for key, value in tiny.read("x.safetensors").items():
        m0 = np.float64(tiny.read("narrow.safetensors")[key])
        exact = m0 + 0.5 * (np.float64(world["a"][0][key]) - m0)
        step = {"F64": 1e-15, "F32": 2e-7, "BF16": 2**-8, "F16": 2**-10}[dtype]
        assert (abs(value - exact) <= step * abs(exact) + 1e-6 * (dtype != "F64")).all()


def test_zero_scales_copy_the_base_byte_for_byte(world):
    mean = {k: v.copy() for k, v in world["base"][0].items()}
    mean["h.0.ln.bias"][0] = -0.0
    tiny.posterior("zero.safetensors", mean, world["base"][1])
    merge("a", base="zero", weights="precision", scale=(0.0,), out="x.safetensors")
    for key, value in tiny.read("x.safetensors").items():
        assert value.tobytes() == mean[key].tobytes()


def test_only_merges_what_matches(world):
    report = merge("a", base="base", weights="precision", only=r"attn", out="x.safetensors")
    merged = tiny.read("x.safetensors")
    assert report.merged_tensors == 1
    for key in tiny.SHAPES:
        changed = not np.array_equal(merged[key], world["base"][0][key])
        assert changed == ("attn" in key)
    with pytest.raises(ConfigError, match="matches no tensor"):
        merge("a", base="base", only="nothing", out="y.safetensors")


def test_a_common_prefix_is_matched_and_the_donors_names_are_written(world):
    mean, precision = world["a"]
    longer = {f"transformer.{k}": v for k, v in mean.items()}
    tiny.posterior("long.safetensors", longer, {f"transformer.{k}": v for k, v in precision.items()})
    report = merge("long", "b", base="base", weights="precision", out="x.safetensors")
    assert any("transformer." in n for n in report.notes)
    merge("a", "b", base="base", weights="precision", out="y.safetensors")
    for key, value in tiny.read("x.safetensors").items():
        np.testing.assert_array_equal(value, tiny.read("y.safetensors")[key])
    merge("b", base="long", out="z.safetensors")
    assert set(tiny.read("z.safetensors")) == set(longer)


def test_buffers_and_tied_heads_are_listed_not_merged(world):
    from safetensors.numpy import save_file

    mean, _ = world["a"]
    mask = np.ones((1, 1, 3, 3), np.float32)
    save_file(
        {**mean, "h.0.attn.bias": mask, "ids": np.arange(3), "lm_head.weight": mean["wte.weight"]}, "full.safetensors"
    )
    report = merge("full", base="base", out="x.safetensors")
    assert set(report.left_out) == {"h.0.attn.bias", "ids", "lm_head.weight"}
    assert set(tiny.read("x.safetensors")) == set(tiny.SHAPES)
    report = run_merge(MergeConfig(models=("b.safetensors",), base="full.safetensors", out="y.safetensors"))
    assert set(report.copied) == {"h.0.attn.bias", "ids"}
    merged = tiny.read("y.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"], merged["wte.weight"])


def test_folders_shards_side_files_and_posteriors_come_along(world, tmp_path):
    mean, precision = world["base"]
    folder = tmp_path / "sharded"
    names = list(tiny.SHAPES)
    parts = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, part in parts.items():
        tiny.write(folder / file, {n: mean[n] for n in part})
    write_index(folder, "model", parts, 0)
    for file in ("config.json", "tokenizer.json", "generation_config.json"):
        (folder / file).write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"x")
    from mergekit_bayes.posterior import checkpoint_files, identify, save_posterior

    source = SafetensorsSource(checkpoint_files(folder))
    info = PosteriorInfo(estimator="ggn", unit="token", observations=100, ess=100, mean=identify(source))
    source.close()
    save_posterior(folder, precision, info)
    assert (folder / "posterior" / "precision-00002-of-00002.safetensors").exists()
    run_merge(MergeConfig(models=("a.safetensors", "b.safetensors"), base=str(folder), weights="precision"))
    found = sorted(str(p.relative_to("merged")) for p in Path("merged").rglob("*") if p.is_file())
    assert found == [
        "config.json", "generation_config.json", "merge_recipe.yaml", "merge_report.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
        "posterior/posterior.json", "posterior/precision-00001-of-00002.safetensors",
        "posterior/precision-00002-of-00002.safetensors", "posterior/precision.safetensors.index.json",
        "tokenizer.json",
    ]  # fmt: skip
    merged = tiny.read("merged")
    for key, (m, _) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(merged[key], m, rtol=1e-5, atol=1e-6)
    again = open_posterior("merged")
    assert again.info.observations == 200
    assert again.info.prior.kind == "base"
    again.close()


def test_a_precision_of_other_weights_is_refused(world):
    tiny.write("a.safetensors.new", {k: v + 1 for k, v in world["a"][0].items()})
    Path("a.safetensors.new").rename("a.safetensors")
    with pytest.raises(PrecisionError, match=r"'a.safetensors' .*other weights"):
        merge("a", "b", weights="precision")


def test_verify_sees_a_change_between_the_sampled_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = {"w": (400, 400)}
    for i, name in enumerate("ab"):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
    raw = bytearray(Path("a.safetensors").read_bytes())
    at = len(raw) - 400 * 400 * 4 + 30_000  # between two of the sixteen blocks
    raw[at] ^= 1
    Path("a.safetensors").write_bytes(raw)
    merge("a", "b", weights="precision", out="x.safetensors")
    with pytest.raises(PrecisionError, match="differs from the weights"):
        merge("a", "b", weights="precision", verify=True, out="y.safetensors")


def test_different_estimators_or_units_are_refused(world):
    tiny.posterior("e.safetensors", *world["a"], unit="example")
    with pytest.raises(PrecisionError, match="different kinds"):
        merge("e", "b", weights="precision")


def test_a_plan_knows_every_output_tensor_and_writes_nothing(world):
    plan = plan_merge(MergeConfig(models=("a.safetensors", "b.safetensors"), weights="precision"))
    assert [s.spec for s in plan.steps] == [TensorSpec("F32", tiny.SHAPES[s.name]) for s in plan.steps]
    plan.close()
    assert not list(Path().glob("merged*"))


@pytest.mark.parametrize("fused", [False, True])
def test_memory_does_not_grow_with_the_model(tmp_path, fused):
    """Peak resident memory of a merge of 64 MiB files stays within 24 MiB of one of 1 MiB files."""
    code = (
        "import re, sys\n"
        "from mergekit_bayes.merge import MergeConfig, run_merge\n"
        "run_merge(MergeConfig(models=('a.safetensors','b.safetensors'), base='base.safetensors', weights='precision',"
        f" out='o.safetensors'), fused={fused})\n"
        f"assert ('numba' in sys.modules) == {fused}\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1))"
    )
    peaks = []
    for rows in (64, 4096):
        folder = tmp_path / str(rows)
        shapes = {"w": (rows, 4096)}
        for i, name in enumerate(("base", "a", "b")):
            tiny.posterior(folder / f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 24, peaks


def test_a_merge_names_the_output_it_will_not_overwrite(world):
    merge("a", "b", out="x.safetensors")
    with pytest.raises(CheckpointError, match=r"'x.safetensors' exists.*--force"):
        merge("a", "b", out="x.safetensors")
    merge("a", "b", out="x.safetensors", force=True)
    with pytest.raises(CheckpointError, match=r"would overwrite 'a\.safetensors'"):
        merge("a", "b", out="a.safetensors", force=True)


def with_tokenizer(folder, name, words):
    """A model folder whose tokenizer gives these words the numbers 0, 1, ..."""
    tiny.write(folder / name / "model.safetensors", tiny.arrays(len(name)))
    vocabulary = {word: i for i, word in enumerate(words)}
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": len(words), "content": "<pad>"}]}
    (folder / name / "tokenizer.json").write_text(json.dumps(content))
    return str(folder / name)


def test_models_whose_token_numbers_mean_other_tokens_are_refused(tmp_path):
    one = with_tokenizer(tmp_path, "one", ["the", "cat", "sat"])
    same = with_tokenizer(tmp_path, "same", ["the", "cat", "sat", "on"])  # 3 is <pad> in one, and a word here
    other = with_tokenizer(tmp_path, "other", ["cat", "the", "sat"])
    out = str(tmp_path / "out")
    with pytest.raises(MismatchError, match=r"2 token numbers .* \(0 is 'cat' there, 'the' here"):
        run_merge(MergeConfig(models=(one, other), out=out))
    with pytest.raises(MismatchError, match="1 token numbers"):
        run_merge(MergeConfig(models=(one, same), out=out))
    report = run_merge(MergeConfig(models=(one, other), out=out, vocab="base"))
    assert report.copied == {"wte.weight": "tokenizers differ; --vocab base"}
    (tmp_path / "same" / "tokenizer.json").write_text((tmp_path / "one" / "tokenizer.json").read_text() + "\n")
    run_merge(MergeConfig(models=(one, same), out=out, force=True))  # another file, the same tokens


def test_a_recipe_notices_that_a_model_changed(world):
    merge("a", "b", base="base", out="x.safetensors")
    recipe = MergeConfig(**yaml.safe_load(Path("x.merge_recipe.yaml").read_text()))
    run_merge(recipe.model_copy(update={"out": "again.safetensors"}))
    assert Path("again.safetensors").read_bytes() == Path("x.safetensors").read_bytes()
    Path("a.safetensors").unlink()
    tiny.write("a.safetensors", tiny.arrays(99))
    with pytest.raises(MismatchError, match=r"'a\.safetensors' is not what the recipe was made with"):
        run_merge(recipe.model_copy(update={"out": "more.safetensors"}))


def test_models_without_a_common_tensor_are_no_merge(world):
    tiny.write("other.safetensors", {"encoder.weight": np.zeros((3, 3), np.float32)})
    with pytest.raises(MismatchError, match="no parameter in common"):
        merge("a", "other", on_missing="skip", out="x.safetensors")


def test_a_rule_that_drops_changes_does_not_call_them_lost(world):
    report = merge("a", "b", base="base", method="ties", out="x.safetensors")
    assert report.lost_share is None
    assert not [n for n in report.notes if "rounded back" in n]


def test_a_model_of_more_digits_than_the_output_is_noted(world):
    tiny.write("half.safetensors", tiny.arrays(5), "BF16")
    report = merge("half", "a", out="x.safetensors")
    assert any("'a.safetensors' has 4 tensors in a finer dtype" in n for n in report.notes)
    assert not merge("a", "half", out="y.safetensors").notes


def test_force_does_not_turn_a_file_into_a_folder_nor_back(world):
    Path("notes.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is a file, and a folder would replace it"):
        merge("a", "b", out="notes.txt", force=True)
    Path("x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, and a file would replace it"):
        merge("a", "b", out="x.safetensors", force=True)
    assert Path("notes.txt").read_text() == "years of work"


TRAVELS = (
    "config.json", "tokenizer.model", "tokenizer.model.v3", "vocab.bpe", "source.spm", "emoji.vocab", "merges.txt",
    "qwen.tiktoken", "chat_template.jinja", "modeling_own.py", "LICENSE", "NOTICE.md", "1_Pooling/config.json",
    "additional_chat_templates/tool.jinja",
)  # fmt: skip
STAYS = (
    "pytorch_model.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "training_args.bin",
    ".gitattributes", "trainer_state.json", "all_results.json", "README.md", "evaluation/report.json",
    "evaluation/documents.jsonl", "onnx/model.onnx", "onnx/config.json", "2_Dense/model.safetensors",
    "2_Dense/config.json", ".cache/x.json", "checkpoint-5/config.json", "checkpoint-5/optimizer.pt",
    "huge/text.txt", "runs/events.out.tfevents.1", "pytorch_model.bin.index.json",
)  # fmt: skip


def with_side_files(folder):
    for name in (*TRAVELS, *STAYS):
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}" if name != "huge/text.txt" else " " * (1 << 21))


def beside(folder):
    written = {"model.safetensors", "merge_recipe.yaml", "merge_report.json"}
    written |= {"adapter_config.json", "adapter_model.safetensors"}
    return {str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file()} - written


def test_everything_but_tensors_and_what_is_said_of_the_first_model_comes_along(world):
    for name in "ab":
        tiny.write(f"m{name}/model.safetensors", world[name][0])
    with_side_files("ma")
    run_merge(MergeConfig(models=("ma", "mb"), out="out"))
    assert beside("out") == set(TRAVELS)


def test_adapters_bring_the_same_side_files(world, tmp_path):
    from mergekit_bayes.lora import merge_adapters
    from tests.adapters import adapter, factors

    for i, name in enumerate("ab"):
        adapter(Path(name), factors(i))
    with_side_files("a")
    merge_adapters(("a", "b"), Path("out"))
    assert beside("out") == set(TRAVELS)


def test_a_side_file_that_cannot_be_copied_is_found_before_the_first_tensor_is_merged(world, monkeypatch):
    for name in "ab":
        tiny.write(f"m{name}/model.safetensors", world[name][0])
    monkeypatch.setattr(work.Worker, "run", lambda *a: pytest.fail("a tensor was merged"))
    Path("ma/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"ma/config\.json: is not JSON"):
        run_merge(MergeConfig(models=("ma", "mb"), out="out", dtype="BF16"))
    real = Path.open

    def refusing(self, mode="r", *rest, **options):
        if self.name == "config.json" and mode == "rb":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(CheckpointError, match=r"ma/config\.json: cannot be read \(Permission denied\)"):
        run_merge(MergeConfig(models=("ma", "mb"), out="out"))
    assert not list(Path().glob("out*"))


def test_more_shards_than_the_usual_limit_of_open_files_are_merged(tmp_path):
    shapes = {f"h.{i}.weight": (2, 2) for i in range(40)}
    for k, name in enumerate(("base", "a", "b")):
        parts = {f"model-{i + 1:05d}-of-00040.safetensors": [n] for i, n in enumerate(shapes)}
        for (file, (tensor,)), values in zip(parts.items(), tiny.arrays(k, shapes).values(), strict=True):
            tiny.write(tmp_path / name / file, {tensor: values})
        write_index(tmp_path / name, "model", parts, 0)
    code = (
        "import resource, sys\n"
        "from mergekit_bayes.errors import CheckpointError\n"
        "from mergekit_bayes.merge import MergeConfig, run_merge\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[1])))\n"
        "try:\n"
        "    run_merge(MergeConfig(models=('a', 'b'), base='base', out='out'))\n"
        "except CheckpointError as error:\n"
        "    print(error)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, hard], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout
        for hard in ("60", "1000")
    ]
    assert "ulimit -n" in said[0]
    assert said[1] == ""
    assert set(tiny.read(tmp_path / "out")) == set(shapes)


def test_an_error_is_heard_of_and_progress_is_shown_before_the_first_pass_of_all_tensors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shapes = {f"h.{i:02d}.weight": (8, 8) for i in range(60)}
    for i, name in enumerate(("base", "a")):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
    config = MergeConfig(
        models=("a.safetensors",), base="base.safetensors", weights="precision", shrink="0.3", out="x.safetensors"
    )
    passed, real = [], first.FirstPass.known
    monkeypatch.setattr(first.FirstPass, "known", lambda self, step: passed.append(step.name) or real(self, step))
    seen = []
    run_merge(config, threads=1, progress=lambda done, total: seen.append(len(passed)))
    assert len(seen) == 60
    assert seen[0] < 20
    mean = tiny.arrays(1, shapes)
    mean["h.00.weight"][0, 0] = np.nan
    tiny.posterior("bad.safetensors", mean, tiny.precisions(1, shapes))
    passed.clear()
    with pytest.raises(CheckpointError, match=r"h\.00\.weight"):
        run_merge(config.model_copy(update={"models": ("bad.safetensors",), "out": "y.safetensors"}), threads=1)
    assert len(passed) < 20
