"""Previews of models that a file and memory hold in different ways."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.merge.matrices import read_layer
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import save_posterior
from mergekit_bayes.posterior.factors import Matrices
from mergekit_bayes.preview import PreviewConfig, run_preview
from mergekit_bayes.preview.forming import Plans
from mergekit_bayes.preview.held import Held, held_bytes
from tests import previews, tiny
from tests.adapters import peft_adapter
from tests.test_preview import check_bits
from tests.tiny_models import give_posterior

pytestmark = pytest.mark.slow
VECTORS = [(1.0, 1.0), (0.3, -0.7), (0.0, 1.2), (0.6, 0.6)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def merge_of(**settings):
    return MergeConfig(**{"models": previews.TASKS, "base": "base", **settings})


@pytest.mark.parametrize("settings", [{"weights": "precision"}, {"dtype": "BF16"}])
@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_experts_and_classifiers(kind, settings):
    previews.world(".", kind)
    check_bits(merge_of(**settings), VECTORS)


def test_a_head_that_one_task_unties():
    previews.world(".", weights=False)
    model = transformers.GPT2LMHeadModel.from_pretrained("b")
    config = model.config
    config.tie_word_embeddings = False
    untied = transformers.GPT2LMHeadModel(config)
    untied.load_state_dict(model.state_dict())
    with torch.no_grad():
        untied.lm_head.weight += 0.1
    untied.save_pretrained("b")
    check_bits(merge_of(), VECTORS)


def test_adapters_on_their_base():
    previews.world(".", weights=False)
    for seed, name in enumerate(("x", "y")):
        peft_adapter(
            name, "base", seed, r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"
        )
    check_bits(merge_of(models=("base+x", "base+y")), VECTORS)


def test_rows_of_new_tokens():
    previews.world(".", weights=False)
    model = transformers.GPT2LMHeadModel.from_pretrained("b")
    tokenizer = transformers.AutoTokenizer.from_pretrained("b")
    tokenizer.add_tokens(["owl", "fox"])
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained("b")
    tokenizer.save_pretrained("b")
    check_bits(merge_of(vocab="common"), [(1.0, 1.0), (0.5, 1.5), (1.5, 0.5)])
    with Plans(merge_of(vocab="common"), Path("nowhere")) as plans:
        plans.at((1.0, 1.0))
        with pytest.raises(MismatchError, match=r"is \[27, 16\], and at the recipe's \[29, 16\]"):
            plans.at((1.0, -1.0))


def test_bad_entries_are_replaced_at_every_scale():
    previews.world(".")
    loaded = load_model("a")
    with torch.no_grad():
        loaded.model.transformer.wte.weight[3, 2] = float("nan")
    state = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    loaded.model.save_pretrained("a", state_dict=state)
    give_posterior(Path("a"), loaded, seed=1)
    check_bits(merge_of(weights="precision", on_bad="base"), VECTORS + VECTORS)


def test_layers_that_are_merged_as_whole_matrices():
    previews.world(".", weights=False)
    for seed, name in enumerate(("base", *previews.TASKS)):
        precision = give_posterior(Path(name), seed=seed)
        rng = np.random.default_rng(seed)
        for tensor, entries in precision.items():
            if tensor.endswith(("c_fc.weight", "c_attn.weight")):  # (inputs, outputs)
                inputs = rng.normal(size=(1, len(entries), 2 * len(entries)))
                blocks = (inputs @ inputs.swapaxes(-1, -2)).astype(np.float32)
                precision[tensor] = Matrices(blocks, is_left=True)
        save_posterior(Path(name), precision, tiny.info(name), force=True)
    config = merge_of(weights="precision")
    check_bits(config, [(1.0, 1.0), (0.4, 0.0), (0.4, 1.3)])
    with Plans(config, Path("nowhere")) as plans:
        plan = plans.at((1.0, 1.0))
        layers = [step for step in plan.steps if step.axis is not None]
        held, read = Held(), [read_layer(plan, step) for step in layers]
        assert layers
        assert [held.layer(plan, step).means[0].shape for step in layers] == [
            layer.means[0].shape for layer in read
        ]
        assert held.layer(plan, layers[0]) is held.layer(plans.at((2.0, 1.0)), layers[0])
        assert held_bytes(plan) >= sum(m.nbytes for layer in read for m in layer.means)


def test_an_undo_of_a_listed_term_has_its_own_guard():
    previews.world(".")
    run_merge(merge_of(weights="precision", out="ab"))
    config = merge_of(models=("ab", "b"), weights="precision")
    check_bits(config, [(1.0, -1.0), (1.0, -3.0), (1.0, -0.5)])


def test_a_classifier_is_measured_by_its_labels():
    previews.world(".", "bert")
    previews.recipe("r.yaml", weights="precision")
    report = run_preview(
        PreviewConfig(recipe="r.yaml", data={"x": "cats.csv"}, scales=[(0.5,)], output="out")
    )
    run_merge(merge_of(weights="precision", out="m"))
    evaluated = run_evaluate(EvaluateConfig(model="m", classify={"x": "cats.csv"}))
    measured = evaluated.classification["x"]
    own = report.points[0]
    assert (report.unit, report.observations) == ("example", {"x": 6})
    assert (own.loss["x"], own.accuracy["x"]) == (measured.nll.value, measured.accuracy.value)
    assert report.points[1].loss != own.loss
    assert "x, accuracy" in Path("out/report.md").read_text()


def test_a_model_that_is_named_twice():
    previews.world(".", weights=False)
    check_bits(merge_of(models=("a", "./a")), VECTORS[:2])
