"""The covariance of the inputs of linear layers, against inputs that are collected one by one."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from mergekit_bayes.curvature import Keeping
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.curvature.inputs import input_covariance
from mergekit_bayes.curvature.sums import Sums
from mergekit_bayes.errors import ConfigError

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "head_dim": 4}
LENGTHS = (5, 3, 6, 2, 6, 4)


def model_of(kind):
    torch.manual_seed(0)
    name, _, task = kind.partition(" ")
    more = {
        "Llama": {},
        "Mixtral": {**EXPERTS, "num_local_experts": 4},
        "Qwen3Moe": {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        "GptOss": {**EXPERTS, "num_local_experts": 4},
        "Bert": {"type_vocab_size": 1},
        "GPT2": {},
    }[name]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more, num_labels=3)
    suffix = {"": "ForCausalLM", "classifier": "ForSequenceClassification"}[task]
    suffix = "LMHeadModel" if name == "GPT2" and not task else suffix
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model


def rows_of(kind):
    """Rows of different lengths, which padding makes equal."""
    generator = torch.Generator().manual_seed(1)
    is_classifier = kind.endswith("classifier")
    rows = []
    for length in LENGTHS:
        tokens = torch.randint(3, 20, (1, length), generator=generator)
        row = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        rows.append(row if is_classifier else {**row, "labels": tokens})
    return rows


def batched(rows, size):
    """The rows, `size` at a time, padded on the right with tokens that are not neutral."""
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        length = max(row["input_ids"].shape[1] for row in some)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        yield {
            name: torch.cat(
                [
                    nn.functional.pad(r[name], (0, length - r[name].shape[1]), value=fill[name])
                    for r in some
                ]
            )
            for name in some[0]
        }


def naive(model, rows):
    """Sums of x x' in float64 by the weights' names, one row at a time, as F.linear and @ see x."""
    sums, names = {}, {id(p): n for n, p in model.named_parameters()}

    class Seeing(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                add(args[1], args[0], -1)
            elif function is torch.addmm:  # Conv1D
                add(args[2], args[1], -2)
            elif function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
                add(args[1], args[0], -2)
            return function(*args, **(kwargs or {}))

    def add(weight, x, axis):
        whole = weight if weight._base is None else weight._base
        name = names.get(id(whole))
        if name is None or weight.shape[axis] != x.shape[-1]:
            return
        x = x.detach().double().reshape(-1, x.shape[-1])
        place = ...
        if whole.ndim == 3:
            place = weight.storage_offset() // weight.numel()
        total = sums.setdefault(name, torch.zeros(*whole.shape[:-2], *[x.shape[1]] * 2).double())
        total[place] += x.T @ x

    model.config._experts_implementation = "eager"
    with torch.no_grad():
        for row in rows:
            inputs = {n: v for n, v in row.items() if n != "labels"}
            with Seeing():
                model(**inputs)
    return sums


KINDS = ("Llama", "GPT2", "Mixtral", "Qwen3Moe", "GptOss", "Bert classifier", "Llama classifier")
AT_ONE_TOKEN = "score.weight"


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_sum_over_all_tokens_but_padding_in_batches_of_any_size(kind):
    model, rows = model_of(kind), rows_of(kind)
    found = input_covariance(model, batched(rows, 4))
    single = input_covariance(model, batched(rows, 1))
    expected = naive(model, rows)
    layers = set(found.matrices) - {AT_ONE_TOKEN}
    # What else is multiplied keeps the diagonal: tied heads, and routers.
    assert all(
        "wte" in n or ".gate." in n or ".router." in n for n in expected.keys() - found.matrices
    )
    assert len(layers) == len(expected.keys() & layers) >= 8
    for name in layers:
        close(found.total[name].squeeze(-3), expected[name])
    for name in found.matrices:
        close(single.total[name], found.total[name])
    assert found.observations == single.observations == (6 if "classifier" in kind else 20)
    assert all(p.requires_grad for p in model.parameters())


def test_the_head_of_a_classifier_counts_the_token_that_it_is_read_at():
    kind = "Llama classifier"
    model, rows = model_of(kind), rows_of(kind)
    found = input_covariance(model, batched(rows, 4)).total[AT_ONE_TOKEN]
    with torch.no_grad():
        last = [model.model(**row).last_hidden_state[0, -1].double() for row in rows]
    close(found[0], sum(torch.outer(x, x) for x in last))


@pytest.mark.parametrize("kind", ["Mixtral", "Bert classifier"])
def test_all_else_has_the_diagonal_of_root_ggn(kind):
    model, rows = model_of(kind), rows_of(kind)
    found = input_covariance(model, batched(rows, 4), seed=3)
    ggn = ggn_diagonal(model, batched(rows, 4), seed=3)
    others = found.total.keys() - found.matrices
    assert {n.rpartition(".")[2] for n in others} >= {"weight"}
    for name in others:
        close(found.total[name], ggn.total[name])


def test_blocks_are_those_on_the_diagonal_where_they_divide_the_inputs():
    model, rows = model_of("Llama"), rows_of("Llama")
    whole, thirds = (
        input_covariance(model, batched(rows, 4), keep=Keeping(blocks=k)).total for k in (1, 3)
    )
    name = "model.layers.0.mlp.down_proj.weight"  # of 12 inputs
    assert thirds[name].shape == (3, 4, 4)
    for block in range(3):
        at = slice(4 * block, 4 * block + 4)
        close(thirds[name][block], whole[name][0, at, at])
    name = "model.layers.0.mlp.up_proj.weight"  # of 8
    assert torch.equal(thirds[name], whole[name])


def test_sums_may_lie_elsewhere(tmp_path):
    model, rows = model_of("Mixtral"), rows_of("Mixtral")
    here, there = (
        input_covariance(model, batched(rows, 4), keep=Keeping(place=place)).total
        for place in ("device", tmp_path)
    )
    assert all(torch.equal(here[name], there[name]) for name in here)


class Routed(nn.Module):
    """Experts that are modules, a layer whose weight is read, and one that is computed again."""

    def __init__(self, is_turned=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
        self.read, self.again, self.head = (nn.Linear(4, n, bias=False) for n in (4, 4, 20))
        self.is_turned = is_turned

    def forward(self, input_ids, attention_mask):
        from torch.utils.checkpoint import checkpoint

        x = self.embedding(input_ids)
        if self.is_turned:
            x = self.again(x.transpose(0, 1)).transpose(0, 1)
        flat = x.reshape(-1, 4)
        outputs = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            (chosen,) = torch.where(input_ids.flatten() % 3 == i)
            if len(chosen):
                outputs = outputs.index_add(0, chosen, expert(flat[chosen]))
        x = nn.functional.linear(outputs.reshape(x.shape).tanh(), self.read.weight)
        x = checkpoint(self.again, x, use_reentrant=False)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))


def test_experts_that_are_modules_see_the_tokens_that_reached_them():
    model, rows = Routed(), rows_of("Llama")
    found = input_covariance(model, batched(rows, 4))
    tokens = torch.cat([row["input_ids"][0] for row in rows])
    for i in range(3):
        x = model.embedding(tokens[tokens % 3 == i]).double().detach()
        close(found.total[f"experts.{i}.weight"][0], x.T @ x)
    assert "read.weight" not in found.matrices
    assert found.total["read.weight"].shape == (4, 4)
    assert bool((found.total["read.weight"] >= 0).all())


def test_activations_that_are_computed_again_count_once():
    model, rows = Routed(), rows_of("Llama")
    found = input_covariance(model, batched(rows, 1)).total["again.weight"]
    seen = []
    model.again.register_forward_hook(lambda _, x, __: seen.append(x[0].detach().double()[0]))
    with torch.no_grad():
        for row in rows:
            model(row["input_ids"], row["attention_mask"])
    close(found[0], sum(x.T @ x for x in seen))


def test_rows_that_are_not_the_tokens_are_refused_beside_padding():
    model, rows = Routed(is_turned=True), rows_of("Llama")
    model.experts = nn.ModuleList()
    with pytest.raises(ConfigError, match=r"'again.weight' sees rows \[6, 4\].*--batch-size 1"):
        input_covariance(model, batched(rows, 4))
    assert model.again.weight.requires_grad
    assert input_covariance(model, batched(rows, 1)).observations == 20


def test_a_model_without_linear_layers_is_refused():
    model = Routed()
    model.experts, model.again, model.head = nn.ModuleList(), nn.Identity(), nn.Embedding(4, 20)
    model.forward = lambda input_ids, attention_mask: transformers.modeling_outputs.CausalLMOutput(
        logits=model.embedding(input_ids)
    )
    with pytest.raises(ConfigError, match=r"runs none.*Choose ggn"):
        input_covariance(model, batched(rows_of("Llama"), 4))


def test_a_model_of_linear_layers_alone_has_no_diagonal():
    model = Routed()
    model.embedding.requires_grad_(False)
    model.read.requires_grad_(False)
    found = input_covariance(model, batched(rows_of("Llama"), 4))
    assert found.total.keys() == set(found.matrices)
    assert found.observations == 20


def test_a_conv1d_has_its_inputs_on_the_other_axis():
    model = Routed()
    model.again = Conv1D(4, 4)
    found = input_covariance(model, batched(rows_of("Llama"), 4))
    assert (found.matrices["again.weight"], found.matrices["head.weight"]) == (-2, -1)


def test_its_stability_is_that_of_the_diagonals():
    model, rows = model_of("Llama"), rows_of("Llama")
    found = input_covariance(model, batched(rows, 1), keep=Keeping(blocks=2))
    assert len(found.parts) == 4
    for name in found.matrices:
        diagonal = found.total[name].diagonal(dim1=-2, dim2=-1).flatten()
        close(sum(part.rows[name] for part in found.parts), diagonal)


class Residual(nn.Module):
    """A layer whose outputs are added to its inputs in place, before two others see them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 4)
        self.first, self.second, self.third = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 20, bias=False)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        x += self.first(x)
        x = self.second(x) + self.third(x)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x))


def test_rows_that_two_layers_see_are_multiplied_once_and_those_changed_in_place_again(monkeypatch):
    model, rows, calls = Residual(), rows_of("Llama"), []
    products = Sums.products
    monkeypatch.setattr(Sums, "products", lambda *given: calls.append(given[1]) or products(*given))
    found = input_covariance(model, batched(rows, 10)).total
    assert calls == ["first.weight", "second.weight", "head.weight"]
    x = model.embedding(torch.cat([row["input_ids"][0] for row in rows])).detach()
    close(found["first.weight"][0], x.double().T @ x.double())
    x = x + model.first(x).detach()
    close(found["second.weight"][0], x.double().T @ x.double())
    assert torch.equal(found["second.weight"], found["third.weight"])
