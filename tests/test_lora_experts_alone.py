"""Adapters of stacked experts are merged alone expert by expert, as PEFT stores them."""

import numpy as np
import pytest
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import BmergeError, MismatchError
from mergekit_bayes.lora import merge_adapters, open_adapted, open_adapter
from tests.adapters import peft_adapter, written
from tests.expert_adapters import (
    BOTH,
    DOWN,
    STACK,
    equals,
    folded,
    give_precision,
    single_expert_adapter,
    stack_factors,
)
from tests.tiny_models import tiny_mixtral


@pytest.mark.parametrize(
    ("space", "rank"), [("product", 4), ("concat", None), ("core", 4), ("product", None)]
)
def test_merged_adapters_of_experts_are_the_sum_of_their_changes_in_peft(tmp_path, space, rank):
    base = tiny_mixtral(tmp_path / "base")
    first = {"target_modules": ["q_proj"], "target_parameters": BOTH[1:]}
    second = {"target_modules": [], "target_parameters": [*BOTH, "gate.weight"]}
    peft_adapter(tmp_path / "a", base, 1, r=1, lora_alpha=3, **first)
    peft_adapter(tmp_path / "b", base, 2, r=2, lora_alpha=3, use_rslora=True, **second)
    stored = {n: t.double().numpy() for n, t in load_file(base / "model.safetensors").items()}
    expected = dict(stored)
    for name, scale in (("a", 0.5), ("b", -2.0)):
        one = folded(base, tmp_path / name, tmp_path / f"folded-{name}")
        expected = {n: t + scale * (one[n] - stored[n]) for n, t in expected.items()}
    report = merge_adapters(
        [str(tmp_path / "a"), str(tmp_path / "b")],
        tmp_path / "m",
        scales=[0.5, -2.0],
        space=space,
        rank=rank,
    )
    assert report.rank == rank or report.rank == {"concat": 3, "product": 2}[space]
    found = folded(base, tmp_path / "m", tmp_path / "folded")
    with open_adapted(f"{base}+{tmp_path / 'm'}") as opened:
        for name, values in found.items():
            np.testing.assert_allclose(read_tensor(opened.mean, name), values, atol=1e-6)
    if report.rank > 2:
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
        assert report.largest_error < 1e-6
    else:
        singles = {n: t for n, t in expected.items() if ".w2." in n}
        lost = np.sqrt(sum(np.sum((found[n] - t) ** 2) for n, t in singles.items()))
        norm = np.sqrt(sum(np.sum((t - stored[n]) ** 2) for n, t in singles.items()))
        layer = report.layers[f"{STACK}down_proj"]
        np.testing.assert_allclose([layer.error, layer.norm], [lost / norm, norm], rtol=1e-4)


def test_experts_of_adapters_are_averaged_by_their_precision(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    config = {"target_modules": [], "target_parameters": BOTH[1:]}
    shares, moments = (0.3, 0.7), []
    for seed in (1, 2):
        peft_adapter(tmp_path / f"{seed}", base, seed, r=2, lora_alpha=3, **config)
        moments.append(give_precision(tmp_path / f"{seed}", seed)[f"{STACK}down_proj"])
    weights = [c / variance for c, (_, variance) in zip(shares, moments, strict=True)]
    merged = sum(w * mean for w, (mean, _) in zip(weights, moments, strict=True)) / sum(weights)
    refs = [str(tmp_path / "1"), str(tmp_path / "2")]
    merge_adapters(refs, tmp_path / "m", scales=shares, weights="precision", rank=8)
    with open_adapter(str(tmp_path / "m")) as adapter:
        layer = adapter.layers[f"{STACK}down_proj"]
        for expert in range(4):
            a, b = adapter.factors(layer._replace(expert=expert))
            np.testing.assert_allclose(b @ a, merged[expert], atol=1e-5)


def test_adapters_of_peft_before_and_after_a_change_of_order_are_told_so(tmp_path):
    written(tmp_path / "a", stack_factors(), **DOWN)
    written(tmp_path / "b", stack_factors(rows=12, columns=8), **DOWN)
    refs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(MismatchError, match=r"another order in PEFT before 0\.19\.1\. Fold"):
        merge_adapters(refs, tmp_path / "m")


@pytest.mark.parametrize(
    ("space", "message"),
    [("factor", "does not merge stacked experts"), ("product", "adapts single experts")],
)
def test_merges_of_experts_that_have_no_meaning_are_refused(tmp_path, space, message):
    written(tmp_path / "a", stack_factors(), **DOWN)
    if space == "factor":
        written(tmp_path / "b", stack_factors(), **DOWN)
    else:
        single_expert_adapter(tmp_path / "b")
    refs = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(BmergeError, match=message):
        merge_adapters(refs, tmp_path / "m", space=space)


def test_an_adapter_of_modules_and_one_of_experts_merge_into_one_that_peft_loads(tmp_path):
    base = tiny_mixtral(tmp_path / "base")
    modules = {"target_modules": ["q_proj"], "lora_dropout": 0.1}
    experts = {"target_modules": [], **DOWN}
    peft_adapter(tmp_path / "a", base, 1, r=2, lora_alpha=3, **modules)
    peft_adapter(tmp_path / "b", base, 2, r=2, lora_alpha=3, **experts)
    merge_adapters([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "m")
    expected = folded(base, tmp_path / "m", tmp_path / "folded")
    assert len(equals(base, tmp_path / "m", expected)) == 5
