"""The mixin over trl's SFTTrainer: whole models and adapters, the right loss, both curvatures."""

import datasets
import peft
import pytest
import torch

from mergekit_bayes.lora import INITIAL_A
from mergekit_bayes.models.load import load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap
from tests import tiny
from tests.finetuning import info_of
from tests.tiny_models import tiny_gpt2
from tests.trainers import ROWS, first_gradient, true_gradient

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'mergekit-bayes[sft]'")


class Trainer(IvonTrainerMixin, trl.SFTTrainer):
    pass


def trainer(tmp_path, adapter=False, ivon=None, **arguments):
    loaded = load_model(str(tiny_gpt2(tmp_path / "m")))
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "bf16": False,
        "max_steps": 3,
        "max_length": 32,
        **arguments,
    }
    return Trainer(
        model=loaded.model,
        args=trl.SFTConfig(**settings),
        processing_class=loaded.tokenizer,
        train_dataset=datasets.Dataset.from_dict(ROWS),
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
        if adapter
        else None,
        optimizer_cls_and_kwargs=(
            IVON,
            {"lr": 0.1, "ess": 1e4, "weight_decay": 1e-3, "beta2": 0.9, **(ivon or {})},
        ),
    )


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("curvature", ["price", "ggn"])
def test_what_is_trained_has_a_precision_and_nothing_else_moves(tmp_path, adapter, curvature):
    ivon = {
        "curvature": curvature,
        "curvature_every": 2,
        "mc_samples": 2,
        "antithetic": curvature == "price",
        "clip_radius": 0.1,
    }
    t = trainer(tmp_path, adapter, ivon)
    before = {n: p.detach().clone() for n, p in t.model.named_parameters()}
    trained = {n for n, p in t.model.named_parameters() if p.requires_grad}
    t.train()
    assert trained == {n for n in before if "lora_" in n or not adapter}
    optimizer = unwrap(t.optimizer)
    precision = optimizer.precision(t.model.named_parameters())
    assert set(precision) == trained
    assert all(bool((s > 0).all()) for s in precision.values())
    assert {n for n, p in t.model.named_parameters() if not torch.equal(p, before[n])} == trained
    if curvature == "ggn":
        assert {int(s["estimates"]) for s in optimizer.state.values()} == {2}
        seen = sum(float(s["hess"].sum()) for s in optimizer.state.values())
        assert seen > 0


def test_the_gradient_is_that_of_the_mean_over_the_tokens_that_are_predicted(tmp_path):
    t = trainer(tmp_path, ivon={"ess": 1e14, "lr": 0.0}, max_steps=1, gradient_accumulation_steps=2)
    ours, batches = first_gradient(t)
    assert len(batches) == 2
    expected = true_gradient(load_model(str(tmp_path / "m")).model, batches)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("adapter", [False, True])
def test_the_ready_trainer_scores_completions_and_stores_their_posterior(tmp_path, adapter):
    """`SFTTrainer` becomes `IvonSFTTrainer`; the rest is as trl documents it."""
    from mergekit_bayes.trainer import IvonSFTTrainer

    completions = ["on the mat .", "film", "ran the dog"]
    rows = [{"prompt": "the cat sat ", "completion": text} for text in completions * 4]
    settings = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    t = IvonSFTTrainer(
        model=str(tiny_gpt2(tmp_path / "m")),
        args=trl.SFTConfig(
            str(tmp_path / "out"), learning_rate=1e-3, max_steps=2, logging_steps=1, **settings
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
        if adapter
        else None,
    )
    t.train()
    rates = [entry["learning_rate"] for entry in t.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-3, 5e-4])
    assert unwrap(t.optimizer).defaults["lr"] == 1.0
    t.save_model(str(tmp_path / "tuned"))
    info = info_of(tmp_path / "tuned")
    scored = sum(int((labels != -100).sum()) for labels in labels_of(t))
    assert (info.unit, info.observations, info.estimator) == ("token", scored, "ggn")
    assert (INITIAL_A in info.training) == adapter
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    stored = tiny.read(tmp_path / "tuned" / weights)
    assert set(tiny.read(tmp_path / "tuned" / "posterior" / "precision.posterior")) == set(stored)


def labels_of(trainer):
    """The labels that trl's loss scores, row by row: the first of a row is scored by no token."""
    return [batch["labels"][:, 1:] for batch in trainer.get_train_dataloader()]
