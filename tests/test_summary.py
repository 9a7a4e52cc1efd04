"""The first line of a merge says whether models are averaged or changes added."""

import re

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora import merge_adapters, open_adapter
from mergekit_bayes.lora.factors import choose_averaging
from mergekit_bayes.lora.inputs import AdapterMerge, match_adapters
from mergekit_bayes.lora.layers import Factors
from tests import model_forms
from tests.adapters import adapter, factors, precise, product
from tests.model_forms import merge, model

here = model_forms.here


def lines(*arguments):
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return [line for line in done.output.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("settings", "summary"),
    [
        ({"base": None}, "average of 2 models"),
        ({"base": None, "scale": (1, 3)}, "average of 2 models (shares 0.25, 0.75)"),
        ({"base": None, "weights": "precision"}, "average of 2 models, weighted by precision"),
        ({"base": None, "method": "slerp"}, "slerp of 2 models"),
        (
            {"base": None, "method": "fisher", "weights": "precision"},
            "fisher of 2 models, weighted by precision",
        ),
        ({}, "'base.safetensors' plus the changes of 2 models (scale 1 each)"),
        (
            {"scale": (1, -0.5), "weights": "precision"},
            "'base.safetensors' plus the changes of 2 models (scales 1, -0.5), weighted by "
            "precision",
        ),
        (
            {"scale": (1, "a.safetensors:attn=0")},
            "'base.safetensors' plus the changes of 2 models (scale 1 each); some tensors by "
            "scales of their own",
        ),
        ({"method": "model_stock"}, "model_stock of 'base.safetensors' and 2 models"),
        (
            {"method": "ties"},
            "'base.safetensors' plus the changes of 2 models (scale 1 each), by ties",
        ),
    ],
)
def test_a_merge_of_models_says_what_it_does_in_one_line(settings, summary):
    for seed, name in enumerate(("base", "a", "b")):
        model(name, seed)
    report = merge("a", "b", **{"weights": "uniform"} | settings)
    assert report.summary == summary


def test_the_line_comes_first_on_the_screen_of_a_plan_and_of_a_merge():
    for seed, name in enumerate(("base", "a")):
        model(name, seed)
    line = ("merge", "a.safetensors", "--base", "base.safetensors", "-o", "x.safetensors")
    expected = "'base.safetensors' plus the change of 1 model (scale 1)"
    assert lines(*line, "--dry-run")[0] == expected
    assert lines(*line)[0] == expected
    for seed, name in enumerate("cd"):
        adapter(model_forms.Path(name), factors(seed))
    assert lines("merge", "c", "d", "-o", "cd")[0] == (
        "sum of the changes of 2 adapters (scale 1 each; --scale 0.5 averages them)"
    )


def test_a_merge_of_adapters_says_whether_it_adds_or_averages(tmp_path):
    made = factors(1)
    for name, seed in (("a", 1), ("b", 2)):
        other = factors(seed, same_a=made)
        adapter(tmp_path / name, other, precision=precise(other, seed))
    refs = [str(tmp_path / name) for name in "ab"]
    for settings, summary in (
        ({}, "sum of the changes of 2 adapters (scale 1 each; --scale 0.5 averages them)"),
        ({"scales": (1, -0.5)}, "sum of the changes of 2 adapters (scales 1, -0.5)"),
        ({"space": "concat"}, "sum of the changes of 2 adapters (scale 1 each; --scale 0.5 "),
        ({"space": "factor"}, "sum of the changes of 2 adapters (scale 1 each; --scale 0.5 "),
        ({"weights": "precision"}, "average of the changes of 2 adapters, weighted by precision"),
        (
            {"weights": "precision", "space": "factor", "scales": (1, 3)},
            "average of the factors of 2 adapters (shares 0.25, 0.75), weighted by precision",
        ),
    ):
        report = merge_adapters(refs, tmp_path / "out", force=True, **settings)
        assert report.summary.startswith(summary), settings
    half = merge_adapters(refs, tmp_path / "half", scales=(0.5,), rank=4)
    assert half.summary == "sum of the changes of 2 adapters (scale 0.5 each)"
    mean = (product(refs[0], "m.q") + product(refs[1], "m.q")) / 2  # as the hint promises
    np.testing.assert_allclose(product(tmp_path / "half", "m.q"), mean, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"weights": "precision"}, {"scales": (1, 0)}])
def test_a_cut_is_told_with_the_rank_that_cuts_nothing(tmp_path, settings):
    for name, seed in (("a", 1), ("b", 2)):
        made = factors(seed)
        adapter(tmp_path / name, made, precision=precise(made, seed))
    refs = [str(tmp_path / name) for name in "ab"]
    cut = merge_adapters(refs, tmp_path / "cut", rank=1, **settings)
    assert cut.largest_error > 0.01
    exact = merge_adapters(refs, tmp_path / "exact", rank=cut.exact_rank, **settings)
    assert exact.largest_error < 1e-6
    below = merge_adapters(refs, tmp_path / "below", rank=cut.exact_rank - 1, **settings)
    assert below.largest_error > 1e-3  # no rank is named that is too large
    words = {"weights": ("--weights", "precision"), "scales": ("--scale", "1", "--scale", "0")}
    flags = [word for key in settings for word in words[key]]
    shown = " ".join(lines("merge", *refs, *flags, "--rank", "1", "-o", str(tmp_path / "x")))
    assert f"--rank {cut.exact_rank} is exact" in shown
    assert ("--space concat" in shown) == ("weights" not in settings)
    flags += ["--rank", str(cut.exact_rank), "-o", str(tmp_path / "y")]
    assert "is exact" not in " ".join(lines("merge", *refs, *flags))


def test_every_symbol_of_a_formula_is_said(tmp_path):
    from mergekit_bayes.lora.report import FORMULA, SYMBOLS

    assert set(FORMULA) == set(SYMBOLS)
    for key, formula in FORMULA.items():
        for symbol in set(re.findall(r"\b([A-Za-z]_[tW]|R)\b", formula)) - {"S_t"}:
            assert symbol in SYMBOLS[key], (key, symbol)
        assert "S_t" not in formula or "S_t =" in formula or "S_t" in SYMBOLS[key]


def test_how_factors_are_averaged_is_decided_without_a_side_effect(tmp_path):
    made = factors(1)
    for name, pair in (("a", made), ("b", factors(2, same_a=made)), ("c", factors(3))):
        adapter(tmp_path / name, pair)
    opened = [open_adapter(str(tmp_path / name)) for name in "abc"]
    try:
        layers, _ = match_adapters(opened[:2])
        merge = AdapterMerge(opened[:2], (1.0, 1.0), (None, None), "uniform", 0)
        first, second = (choose_averaging(merge, layers) for _ in range(2))
        assert first == second
        assert first.is_linear
        assert "share" in first.reason
        layers, _ = match_adapters(opened[1:])
        with pytest.raises(MismatchError, match="cannot be averaged"):
            choose_averaging(merge._replace(adapters=opened[1:]), layers)
    finally:
        for adapter_ in opened:
            adapter_.close()


@pytest.mark.parametrize("space", ["product", "core"])
@pytest.mark.parametrize("size", [0.05, 0.15])
def test_a_large_cut_is_a_note_of_its_own(tmp_path, space, size):
    made = {"m.q": Factors(np.eye(2, 4, dtype="f4"), np.diag([1, size]).astype("f4"))}
    ref = str(adapter(tmp_path / "a", made, alpha=2))
    report = merge_adapters([ref], tmp_path / "out", space=space, rank=1)
    share = size / np.hypot(1, size)  # of the singular values 1 and size
    np.testing.assert_allclose(report.largest_error, share, rtol=1e-6)
    told = f"rank 1 cuts off up to {share:.0%} of a layer's merged change ('m.q'); --rank 2 is"
    notes = [note for note in report.notes if note.startswith(told)]
    assert len(notes) == (size > 0.1)
    shown = " ".join(lines("merge", ref, "--rank", "1", "-o", str(tmp_path / "x")))
    assert shown.count("--rank 2 is exact") == 1
    assert ("note: rank 1" in shown) == (size > 0.1)
