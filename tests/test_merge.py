"""A merge of real files gives the numbers of its method, with the names and dtypes of the base."""

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.plan import plan_merge
from tests import three_models, tiny
from tests.three_models import expected_matching, merge

world = three_models.world


def test_precision_weights_without_a_base_average_by_precision(world):
    report = merge("a", "b", weights="precision")
    assert report.path == "merged.safetensors"
    merged, stored = tiny.read("merged.safetensors"), tiny.read("merged.posterior")
    for key in tiny.SHAPES:
        (ma, sa), (mb, sb) = ((np.float64(x[key]) for x in world[n]) for n in "ab")
        np.testing.assert_allclose(
            merged[key], (sa * ma + sb * mb) / (sa + sb), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(stored[key], (sa + sb) / 2, rtol=1e-6)
    assert json.loads(Path("merged.merge_report.json").read_text())["method"] == "precision_average"


def test_uniform_weights_average_and_write_no_posterior(world):
    merge("a", "b", scale=(3.0, 1.0), out="u.safetensors")
    for key, value in tiny.read("u.safetensors").items():
        np.testing.assert_allclose(
            value, 0.75 * world["a"][0][key] + 0.25 * world["b"][0][key], rtol=1e-5, atol=1e-7
        )
    assert not Path("u.posterior").exists()


def test_a_base_makes_uniform_weights_task_arithmetic(world):
    merge("a", "b", base="base", scale=(1.0, -0.5), out="u.safetensors")
    for key, value in tiny.read("u.safetensors").items():
        m0, a, b = (np.float64(world[n][0][key]) for n in ("base", "a", "b"))
        np.testing.assert_allclose(value, m0 + (a - m0) - 0.5 * (b - m0), rtol=1e-5, atol=1e-6)


def test_a_base_makes_precision_weights_gradient_matching(world):
    report = merge("a", "b", base="base", weights="precision", out="m.safetensors")
    merged, stored = tiny.read("m.safetensors"), tiny.read("m.posterior")
    for key, (mean, precision) in expected_matching(world, "ab", (1, 1)).items():
        np.testing.assert_allclose(merged[key], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stored[key], precision, rtol=1e-6)
    h = [sum(float(world[n][1][k].sum()) for k in tiny.SHAPES) for n in ("base", "a", "b")]
    assert [m.ratio for m in report.models[1:]] == pytest.approx(
        [h[1] / h[0], h[2] / h[0]], rel=1e-5
    )
    assert report.guarded_share == 0


def test_the_result_does_not_depend_on_the_chunk_size(world):
    config = {
        "models": ("a.safetensors", "b.safetensors"),
        "base": "base.safetensors",
        "weights": "precision",
    }
    for shrink, pool in ((None, None), ("0.3", None), ("row:0.3", "row")):
        for chunk, out in ((3, "x"), (1 << 16, "y")):
            run_merge(
                MergeConfig(
                    **config, shrink=shrink, pool=pool, out=f"{out}.safetensors", force=True
                ),
                chunk=chunk,
            )
        for suffix in (".safetensors", ".posterior"):
            for (_, x), (_, y) in zip(
                tiny.read("x" + suffix).items(), tiny.read("y" + suffix).items(), strict=True
            ):
                np.testing.assert_allclose(x, y, rtol=1e-6 if shrink else 0)


def test_a_bare_adapter_among_whole_models_is_refused(world, tmp_path):
    for name in ("l1", "l2"):
        tiny.write(tmp_path / name / "adapter_model.safetensors", tiny.arrays(0))
        (tmp_path / name / "adapter_config.json").write_text("{}")
    with pytest.raises(MismatchError, match="is an adapter"):
        run_merge(MergeConfig(models=("l1", "l2")))


def test_two_names_for_one_tensor_are_refused(world):
    mean = tiny.arrays(1)
    tiny.write(
        "two.safetensors",
        {**{f"transformer.{k}": v for k, v in mean.items()}, "h.0.ln.bias": mean["h.0.ln.bias"]},
    )
    with pytest.raises(MismatchError, match="are both"):
        merge("two", base="base", out="x.safetensors")


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
    tiny.posterior(
        "long.safetensors", longer, {f"transformer.{k}": v for k, v in precision.items()}
    )
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
        {**mean, "h.0.attn.bias": mask, "ids": np.arange(3), "lm_head.weight": mean["wte.weight"]},
        "full.safetensors",
    )
    report = merge("full", base="base", out="x.safetensors")
    assert set(report.left_out) == {"h.0.attn.bias", "ids", "lm_head.weight"}
    assert set(tiny.read("x.safetensors")) == set(tiny.SHAPES)
    report = run_merge(
        MergeConfig(models=("b.safetensors",), base="full.safetensors", out="y.safetensors")
    )
    assert set(report.copied) == {"h.0.attn.bias", "ids"}
    merged = tiny.read("y.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"], merged["wte.weight"])


def test_a_plan_knows_every_output_tensor_and_writes_nothing(world):
    plan = plan_merge(MergeConfig(models=("a.safetensors", "b.safetensors"), weights="precision"))
    assert [s.spec for s in plan.steps] == [
        TensorSpec("F32", tiny.SHAPES[s.name]) for s in plan.steps
    ]
    plan.close()
    assert not list(Path().glob("merged*"))


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


def test_a_dtype_that_was_asked_for_is_not_offered_again(world):
    for dtype in ("BF16", "F16"):
        report = merge("a", "b", base="base", dtype=dtype, out=f"{dtype}.safetensors")
        assert not [n for n in report.notes if "finer dtype" in n]
