"""Which parameter has which number in an optimizer's state, for the rules of several programs."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.moments import Moment, Moments, Parameter, name_moments
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests import tiny
from tests.tiny_models import tiny_bert, tiny_gpt2

W, B, N = (4, 4), (4,), (4,)
LLAMA = [
    Parameter("embed.weight", (9, 4), "Embedding"),
    Parameter("layers.0.q.weight", W, "Linear"),
    Parameter("layers.0.q.bias", B, "Linear"),
    Parameter("layers.0.input_layernorm.weight", N, "LlamaRMSNorm"),
    Parameter("layers.0.k.weight", W, "Linear"),
    Parameter("norm.weight", N, "LlamaRMSNorm"),
]
RULES = {
    "Trainer, and with RMSNorm": ([0, 1, 4], [2, 3, 5]),
    "Trainer, earlier": ([0, 1, 3, 4, 5], [2]),
    "one group": ([0, 1, 2, 3, 4, 5],),
}


def moments_of(groups, parameters, **changes):
    """A state whose second moments know, in their dtype's place, whose they are."""
    by_key, keys = {}, []
    numbers = iter(range(len(parameters)))
    for group in groups:
        keys.append(tuple(next(numbers) for _ in group))
        by_key |= {
            number: Moment(parameters[i].shape, parameters[i].name, 1, 0.9, lambda: None)
            for number, i in zip(keys[-1], group, strict=True)
        }
    return Moments(Path("o.pt"), by_key | changes.get("by_key", {}), tuple(keys))


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_that_fits_names_the_numbers(rule):
    named = name_moments(moments_of(RULES[rule], LLAMA), LLAMA)
    assert [name for name, moment in named.items() if moment.dtype != name] == []
    assert named.keys() == {p.name for p in LLAMA}


def test_a_layer_norm_is_without_decay_by_every_rule_but_the_examples():
    bert = [
        Parameter("embeddings.weight", (9, 4), "Embedding"),
        Parameter("embeddings.LayerNorm.weight", N, "LayerNorm"),
        Parameter("embeddings.LayerNorm.bias", N, "LayerNorm"),
        Parameter("ln_f.weight", N, "LayerNorm"),
        Parameter("head.weight", (2, 4), "Linear"),
    ]
    for groups in (([0, 4], [1, 2, 3]), ([0, 3, 4], [1, 2])):
        named = name_moments(moments_of(groups, bert), bert)
        assert all(moment.dtype == name for name, moment in named.items())
        assert len(named) == 5


def test_a_parameter_without_a_gradient_has_no_moment():
    moments = moments_of(([0, 1, 4], [2, 3, 5]), LLAMA)
    del moments.by_key[1]
    named = name_moments(moments, LLAMA)
    assert named.keys() == {p.name for p in LLAMA} - {"layers.0.q.weight"}


@pytest.mark.parametrize(
    ("groups", "parameters", "message"),
    [
        (([0, 1, 4], [2, 3]), LLAMA, "is the state of 5 parameters, but the model trains 6"),
        (([0, 4], [1, 2, 3, 5]), LLAMA, r"in groups of 2, 4, .*expected 3 in a group of 2"),
        (([1, 0, 4], [2, 3, 5]), LLAMA, r"number 0 is \[4, 4\], and 'embed.weight' is \[9, 4\]"),
        (([0, 1], [4], [2, 3, 5]), LLAMA, "no program makes so many groups"),
    ],
)
def test_numbers_that_no_rule_explains_are_refused(groups, parameters, message):
    with pytest.raises(MismatchError, match=message):
        name_moments(moments_of(groups, parameters), parameters)


def test_numbers_that_two_rules_explain_otherwise_are_refused():
    """One parameter is without decay by the Trainer of today, another by that of before."""
    both = [
        Parameter("a_norm.weight", W, "Linear"),
        Parameter("b.weight", W, "LlamaRMSNorm"),
    ]
    with pytest.raises(MismatchError, match=r"can be read in two ways .* differ in 'b.weight'"):
        name_moments(moments_of(([1], [0]), both), both)


def step_once(model, groups, file):
    """One step of AdamW on random gradients; returns their squares by name."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
    optimizer.step()
    torch.save(optimizer.state_dict(), file)
    return {n: p.grad.square() for n, p in model.named_parameters() if p.requires_grad}


def by_decay(model):
    decay = transformers.Trainer.get_decay_parameter_names(None, model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for n, p in trained if (n in decay) is kept]} for kept in (True, False)]


def stored(folder, file):
    report = run_precision(
        PrecisionConfig(
            model=str(folder), moments=str(file), observations=60, batch_observations=4
        ),
        quiet=True,
    )
    return report, tiny.read_precision(folder)


def assert_squares(found, squares):
    assert found.keys() == squares.keys()
    for name, value in squares.items():
        np.testing.assert_allclose(found[name], 240 * value.numpy(), rtol=1e-5, err_msg=name)


def test_a_classifier_counts_rows(tmp_path):
    folder = tiny_bert(tmp_path / "b")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    squares = step_once(model, by_decay(model), tmp_path / "optimizer.pt")
    report, found = stored(folder, tmp_path / "optimizer.pt")
    loss = trained_loss(load_model(str(folder)).model)
    assert (report.unit, report.loss) == ("example", loss.describe())
    assert_squares(found, squares)


SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mixtral"])
def test_models_of_several_kinds_get_theirs_and_experts_one_by_one(tmp_path, kind):
    more = {"num_local_experts": 2} if kind == "Mixtral" else {"head_dim": 4}
    config = getattr(transformers, f"{kind}Config")(**SIZES, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.save_pretrained(tmp_path / "m")
    squares = step_once(model, by_decay(model), tmp_path / "optimizer.pt")
    _, found = stored(tmp_path / "m", tmp_path / "optimizer.pt")
    assert_squares(found, checkpoint_names(model, squares))
    if kind == "Mixtral":
        experts = "model.layers.0.{}.experts{}"
        np.testing.assert_allclose(
            found[experts.format("block_sparse_moe", ".1.w3.weight")],
            240 * squares[experts.format("mlp", ".gate_up_proj")][1, 12:],
            rtol=1e-5,
        )


def test_an_adapter_s_moments_are_those_of_its_own_parameters(tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_gpt2(tmp_path / "g", layers=1))
    base.name_or_path = str(tmp_path / "g")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path / "a")
    squares = step_once(model, by_decay(model), tmp_path / "optimizer.pt")
    _, found = stored(tmp_path / "a", tmp_path / "optimizer.pt")
    assert_squares(found, checkpoint_names(model, squares))
