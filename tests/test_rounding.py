"""Matrices rounded to 4 bits: their levels, and which parameters of a model are matrices."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.models import rounding
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.rounding import (
    refuse_unroundable,
    round_matrices,
    round_to_four_bits,
    rounded,
)
from tests import tiny_models


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(row):
    """A row, group by group, with numpy's float32."""
    result = []
    for start in range(0, len(row), 64):
        group = row[start : start + 64]
        low, high = min(np.float32(0), group.min()), max(np.float32(0), group.max())
        step = max(high - low, np.float32(1e-30)) / np.float32(15)
        result += [np.clip(np.round((w - low) / step), 0, 15) * step + low for w in group]
    return result


def as_published(matrix):
    """The rounding as docs/experiments.md was measured with."""
    rows, columns = matrix.shape
    groups = torch.nn.functional.pad(matrix, (0, -columns % 64)).reshape(rows, -1, 64)
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    step = (groups.amax(-1, keepdim=True).clamp(min=0) - low).clamp(min=1e-30) / 15
    nearest = ((groups - low) / step).round().clamp(0, 15) * step + low
    return nearest.reshape(rows, -1)[:, :columns]


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 200])
def test_a_row_is_rounded_group_by_group_also_at_a_ragged_edge(columns):
    matrix = normal(4, columns) * torch.tensor([[1e-20], [1.0], [3.0], [1e20]])
    found = rounded(matrix)
    assert found.shape == matrix.shape
    assert torch.equal(found, as_published(matrix))
    assert found.tolist() == [by_hand(row) for row in matrix.numpy()]


def test_no_error_exceeds_half_a_step_and_extremes_stay():
    matrix = normal(50, 64)
    matrix[:10] = matrix[:10].abs() + 5  # zero lies outside the weights, but not of their levels
    matrix[10:20] = -matrix[10:20].abs() - 5
    found = rounded(matrix)
    low, high = matrix.amin(1).clamp(max=0), matrix.amax(1).clamp(min=0)
    error = (found - matrix).abs().amax(1)
    assert (error <= (high - low) / 15 * (0.5 + 1e-5)).all()
    assert (error > (high - low) / 15 * 0.3).all()
    both = slice(20, None)
    torch.testing.assert_close(found[both].amax(1), matrix[both].amax(1))
    torch.testing.assert_close(found[10:].amin(1), matrix[10:].amin(1))
    torch.testing.assert_close(found[:10].amax(1), matrix[:10].amax(1))
    assert all(len(row.unique()) <= 16 for row in found)


def test_rounding_again_changes_nothing_but_the_last_bit():
    matrix = normal(100, 130)
    once = rounded(matrix)
    torch.testing.assert_close(rounded(once), once, rtol=0, atol=5e-7)
    assert not torch.equal(once, matrix)


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-38, 1e30])
def test_a_constant_group_keeps_its_value(value):
    matrix = torch.full((2, 70), value)
    # Below a step of 1e-30 / 15 there are no levels; such weights are nothing.
    torch.testing.assert_close(rounded(matrix), matrix, rtol=3e-7, atol=1e-30)


def test_sixteen_even_weights_are_their_own_levels():
    matrix = torch.arange(-7.0, 9.0).repeat(3, 5)
    assert torch.equal(rounded(matrix), matrix)


def test_narrow_weights_are_rounded_in_float32_and_stored_in_their_own_type():
    linear = torch.nn.Linear(64, 5, bias=False, dtype=torch.bfloat16)
    linear.weight.data = normal(5, 64, dtype=torch.bfloat16)
    before = linear.weight.detach().clone()
    round_matrices(linear, "m")
    assert linear.weight.dtype == torch.bfloat16
    assert torch.equal(linear.weight, rounded(before.float()).to(torch.bfloat16))
    assert not torch.equal(linear.weight, before)


def test_both_layouts_are_rounded_along_their_inputs_and_vectors_are_left(monkeypatch):
    from transformers.pytorch_utils import Conv1D

    weight = normal(70, 5)  # inputs, outputs
    conv, linear, norm = Conv1D(5, 70), torch.nn.Linear(70, 5), torch.nn.LayerNorm(5)
    kernel = torch.nn.Conv1d(8, 8, 3, groups=4)
    conv.weight.data.copy_(weight)
    linear.weight.data.copy_(weight.T)
    left = [p.detach().clone() for p in (linear.bias, norm.weight, kernel.weight)]
    monkeypatch.setattr(rounding, "_AT_ONCE", 140)  # two rows
    round_matrices(torch.nn.Sequential(conv, linear, norm, kernel), "m")
    assert torch.equal(linear.weight, rounded(weight.T))
    assert torch.equal(conv.weight, linear.weight.T)
    assert not torch.equal(conv.weight, weight)
    for parameter, before in zip((linear.bias, norm.weight, kernel.weight), left, strict=True):
        assert torch.equal(parameter, before)


def experts(kind):
    """Stacked experts of transformers: a module, and whether its inputs come first."""
    from transformers.models.gpt_oss import GptOssConfig, modeling_gpt_oss
    from transformers.models.llama4 import Llama4TextConfig, modeling_llama4
    from transformers.models.mixtral import MixtralConfig, modeling_mixtral

    sizes = {"hidden_size": 70, "intermediate_size": 66, "num_local_experts": 3}
    if kind == "mixtral":
        return modeling_mixtral.MixtralExperts(MixtralConfig(**sizes)), False
    if kind == "llama4":
        return modeling_llama4.Llama4TextExperts(Llama4TextConfig(**sizes)), True
    return modeling_gpt_oss.GptOssExperts(GptOssConfig(**sizes)), True


@pytest.mark.parametrize("kind", ["mixtral", "llama4", "gpt_oss"])
def test_each_of_stacked_experts_is_rounded_along_its_inputs(kind):
    module, inputs_first = experts(kind)
    before = {}
    for i, (name, parameter) in enumerate(module.named_parameters()):
        parameter.data = normal(*parameter.shape, seed=i)
        before[name] = parameter.detach().clone()
    assert before["gate_up_proj"].shape[1 if inputs_first else 2] == 70
    assert before["down_proj"].shape[1 if inputs_first else 2] == 66
    round_matrices(module, "m")
    for name, parameter in module.named_parameters():
        for matrix, old in zip(parameter, before[name], strict=True):
            if name.endswith("_bias"):
                assert torch.equal(matrix, old)
            else:
                expected = rounded(old.T).T if inputs_first else rounded(old)
                assert torch.equal(matrix, expected)
                assert not torch.equal(matrix, old)


def test_a_tied_matrix_is_rounded_once(tmp_path):
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m", width=100)))
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    round_to_four_bits(loaded)
    for name, parameter in loaded.model.named_parameters():
        old = before[name]
        is_conv = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        expected = old if old.ndim == 1 else rounded(old.T).T if is_conv else rounded(old)
        assert torch.equal(parameter, expected), name
        assert old.ndim == 1 or not torch.equal(parameter, old), name


def adapted(folder):
    from peft import LoraConfig, get_peft_model

    loaded = load_model(str(tiny_models.tiny_gpt2(folder)))
    model = get_peft_model(
        loaded.model,
        LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", r=2),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = normal(*parameter.shape)
    return replace(loaded, model=model.eval())


def test_an_adapter_is_rounded_as_its_merged_model(tmp_path):
    loaded = adapted(tmp_path / "m")
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        before = loaded.model(input_ids=ids).logits
        merged = adapted(tmp_path / "again").model.merge_and_unload()
        round_matrices(merged, "merged")
        round_to_four_bits(loaded)
        found = loaded.model(input_ids=ids).logits
        assert torch.equal(found, merged(input_ids=ids).logits)
    assert not torch.allclose(found, before, atol=1e-3)


def test_an_adapter_without_weights_to_merge_is_refused(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    prompts = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    loaded = replace(loaded, model=get_peft_model(loaded.model, prompts))
    with pytest.raises(ConfigError, match="changes no weights"):
        round_to_four_bits(loaded)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path, value):
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    with torch.no_grad():
        loaded.model.transformer.h[1].mlp.c_fc.weight[3, 4] = value
    with pytest.raises(CheckpointError, match=r"'transformer.h.1.mlp.c_fc.weight' holds a weight"):
        round_to_four_bits(loaded)


def test_a_range_beyond_float32_is_refused():
    linear = torch.nn.Linear(64, 1, bias=False)
    linear.weight.data[0, :2] = torch.tensor([3e38, -3e38])
    with pytest.raises(CheckpointError, match="not finite"):
        round_matrices(linear, "m")


def test_quantised_weights_are_refused(tmp_path):
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    coded = torch.zeros(2, 2, dtype=torch.int8)
    loaded.model.lm_head.weight = torch.nn.Parameter(coded, requires_grad=False)
    for refuse in (refuse_unroundable, round_to_four_bits):
        with pytest.raises(ConfigError, match=r"quantised already \('lm_head.weight' is int8\)"):
            refuse(loaded)


def test_what_can_be_rounded_is_looked_at_and_not_changed(tmp_path):
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "m")))
    before = {n: p.detach().clone() for n, p in loaded.model.named_parameters()}
    refuse_unroundable(loaded)
    assert all(torch.equal(p, before[n]) for n, p in loaded.model.named_parameters())


def test_no_more_than_some_rows_of_a_matrix_are_in_memory_twice(monkeypatch):
    linear = torch.nn.Linear(100, 50, bias=False)
    expected, sizes = rounded(linear.weight.detach()), []

    def watched(rows):
        sizes.append(rows.numel())
        return rounded(rows)

    monkeypatch.setattr(rounding, "_AT_ONCE", 1000)
    monkeypatch.setattr(rounding, "rounded", watched)
    round_matrices(linear, "m")
    assert sizes == [1000] * 5
    assert torch.equal(linear.weight, expected)
