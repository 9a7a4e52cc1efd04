"""Scales and patterns by tensor merge a part of a model and leave the rest as it is."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.posterior import open_posterior
from tests import model_forms, tiny
from tests.model_forms import AT, SHAPES, expect, load, merge, model

here = model_forms.here


def test_scales_by_tensor_reach_the_arithmetic_and_later_ones_win():
    base, a, b = (model(n, i) for i, n in enumerate(("base", "a", "b")))
    rules = (
        "a.safetensors:h=0.5",
        r"a.safetensors:attn|^wte=0.25",
        "b.safetensors:h\\.0\\.(attn|ln)=0",
    )
    report = merge("a", "b", scale=(1.0, *rules, 0.8))
    found, kept = load("x.safetensors"), load("x.posterior")
    scales = {
        "wte.weight": (0.25, 0.8),
        "h.0.attn.weight": (0.25, 0),
        "h.0.ln.bias": (0.5, 0),
        "h.0.scalar": (0.5, 0.8),
        "h.0.conv": (0.5, 0.8),
    }
    for name, own in scales.items():
        mean, precision = (x[name] for x in expect(base, (a, b), own))
        np.testing.assert_allclose(found[name], mean, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(kept[name], precision, rtol=2e-5)
    assert list(report.settings["scale"]) == [1.0, *rules, 0.8]
    assert open_posterior("x.safetensors").info.merge.uneven


def test_a_model_whose_path_holds_a_colon_or_an_equals_sign_can_be_scaled():
    model("base", 0)
    for name in ("v=1", "v:2"):
        model(name, 1)
        report = merge(
            name, weights="uniform", scale=(0.0, rf"{name}.safetensors:attn(?:=|\.)=0.5")
        )
        assert report.copied == dict.fromkeys(
            set(SHAPES) - {"h.0.attn.weight"}, "all scales are zero"
        )
        found, base, a = (
            load("x.safetensors"),
            load("base.safetensors"),
            load(f"{name}.safetensors"),
        )
        np.testing.assert_allclose(
            found[AT[0]], base[AT[0]] / 2 + a[AT[0]] / 2, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "settings", [{"only": "attn"}, {"scale": (0.0, "a.safetensors:attn=0.5")}], ids=str
)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_what_nothing_matches_stays_byte_equal_to_the_base(dtype, settings):
    mean = tiny.arrays(0, SHAPES)
    mean["wte.weight"][0] = [-0.0, 0.0, 1e-7, -1e-7]
    model("base", 0, mean=mean, dtype=dtype)
    model("a", 1)
    for weights in ("uniform", "precision"):
        merge("a", weights=weights, **settings)
        one, other = load_file("x.safetensors"), load_file("base.safetensors")
        for name in SHAPES:
            same = torch.equal(
                one[name].reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
            )
            assert same == (name != "h.0.attn.weight")


def test_patterns_that_match_nothing_or_cannot_be_read_are_errors():
    model("base", 0)
    model("a", 1)
    for scale, match in (
        ("a.safetensors:mlp=0.5", r"--scale 'a\.safetensors:mlp=0\.5' matches no tensor"),
        ("a.safetensors:attn=much", "'much' is not a number"),
        ("a.safetensors:(=1", "is not used as a regular expression"),
        (
            "c.safetensors:attn=1",
            "expected a number, or MODEL:REGEX=X with a model as given: a.safetensors",
        ),
        ("a.safetensors:attn=inf", "must be finite"),
    ):
        with pytest.raises(ConfigError, match=match):
            merge("a", scale=(1.0, scale))
    with pytest.raises(ConfigError, match=r"--only 'mlp' matches no tensor"):
        merge("a", only="mlp")


def test_a_tensor_without_a_share_of_any_model_is_refused():
    model("a", 0)
    model("b", 1)
    rules = ("a.safetensors:attn=0", "b.safetensors:attn=0")
    with pytest.raises(ConfigError, match=r"leaves 'h\.0\.attn\.weight' without a share"):
        merge("a", "b", base=None, weights="uniform", scale=rules)
    merge("a", "b", base=None, weights="uniform", scale=rules[:1])
    np.testing.assert_allclose(
        load("x.safetensors")[AT[0]], load("b.safetensors")[AT[0]], rtol=1e-5
    )


def test_a_rule_for_a_model_that_is_named_twice_is_for_both():
    base, a = model("base", 0), model("a", 1)
    merge("a", "a", weights="uniform", scale=("a.safetensors:.=0.25",))
    for name, m0 in base[0].items():
        np.testing.assert_allclose(
            load("x.safetensors")[name], m0 + 0.5 * (a[0][name] - m0), rtol=1e-5, atol=1e-6
        )
