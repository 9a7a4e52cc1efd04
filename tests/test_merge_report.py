"""The report of a merge says what went in, how, and what the output lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.posterior import identify
from tests import model_forms, tiny
from tests.model_forms import SHAPES, TORCH, load, merge, model

here = model_forms.here


def test_the_report_says_who_went_in_and_how():
    for i, name in enumerate(("base", "a", "b")):
        model(name, i)
    table = {
        ("uniform", None): "m = sum_t scale_t m_t / sum_t scale_t",
        ("uniform", "base"): "m = m0 + sum_t scale_t (m_t - m0)",
        ("precision", None): "sum_t scale_t S_t m_t",
        ("precision", "base"): "m = m0 + sum_t scale_t S_t (m_t - m0) / S",
    }
    for (weights, base), formula in table.items():
        report = merge("a", "b", weights=weights, base=base, scale=(0.5, 2.0))
        assert formula in report.formula
        refs = [*([base] if base else []), "a", "b"]
        assert [(m.ref, m.role, m.scale) for m in report.models] == [
            (f"{r}.safetensors", "base" if r == "base" else "task", {"a": 0.5, "b": 2.0}.get(r))
            for r in refs
        ]
        for ref, found in zip(refs, report.models, strict=True):
            source = SafetensorsSource([Path(f"{ref}.safetensors")])
            assert found.identity == identify(source).blocks
            source.close()
        assert json.loads(Path("x.merge_report.json").read_text()) == report.model_dump(mode="json")


@pytest.mark.parametrize("out", ["BF16", "F16", "F8_E4M3", "F32"])
@pytest.mark.parametrize("weights", ["uniform", "precision"])
def test_changed_and_lost_entries_equal_a_count_of_all(out, weights):
    shapes = {"w": (40, 30), "v": (50,)}
    base = {
        n: torch.as_tensor(x).to(TORCH[out]).double().numpy()
        for n, x in tiny.arrays(0, shapes).items()
    }
    rng = np.random.default_rng(3)
    edit = {
        n: x * 10.0 ** rng.uniform(-5, 0, x.shape) * (rng.random(x.shape) < 0.6)
        for n, x in base.items()
    }
    model("base", 0, mean=base, precision=tiny.precisions(0, shapes), dtype=out)
    model(
        "a",
        1,
        mean={n: x + edit[n] for n, x in base.items()},
        precision=tiny.precisions(1, shapes),
        dtype="F32",
    )
    report = merge("a", weights=weights, scale=(0.5,))
    before, after, found = load("base.safetensors"), load("a.safetensors"), load("x.safetensors")
    changed = sum(np.count_nonzero(after[n] != before[n]) for n in shapes)
    lost = sum(np.count_nonzero((after[n] != before[n]) & (found[n] == before[n])) for n in shapes)
    assert report.changed_share == pytest.approx(changed / 1250)
    assert report.lost_share == pytest.approx(lost / changed)
    assert (lost > 100) == (out != "F32")
    assert any("is exact in F32 only" in n for n in report.notes) == (out != "F32")


@pytest.mark.parametrize("weights", ["uniform", "precision"])
@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize("scale", [-0.5, 1.0])
def test_an_undo_is_not_told_that_its_edit_was_lost(weights, dtype, scale):
    """What is taken out again has the base's value: nothing was too small, F32 is no advice."""
    for i, name in enumerate(("base", "a")):
        model(name, i, dtype="F32")
    frame = {"weights": weights, "base": "base"}
    merge("a", **frame, scale=(scale,), out="edited.safetensors", dtype=dtype)
    undone = merge(
        "edited", "a", **frame, scale=(1.0, -scale), out="undone.safetensors", dtype=dtype
    )
    assert undone.lost_share > 0.1  # so that there is something to be said
    notes = [note for note in undone.notes if "base's value" in note]
    if weights == "precision":  # the record shows that nothing is left
        assert not notes
    else:
        assert all("changes cancel" in note for note in notes)
        assert not any("F32 only" in note for note in notes) or dtype == "BF16"


@pytest.mark.parametrize("unit", [1e-5, 1.0, 1e5])
def test_a_ratio_that_smells_of_a_unit_is_noted(unit):
    base = model("base", 0)
    a = model("a", 1, precision={n: unit * p for n, p in tiny.precisions(1, SHAPES).items()})
    report = merge("a")
    ratio = sum(p.sum() for p in a[1].values()) / sum(p.sum() for p in base[1].values())
    assert report.models[1].ratio == pytest.approx(ratio, rel=1e-5)
    assert any("check the units" in n for n in report.notes) == (unit != 1)
