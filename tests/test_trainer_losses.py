"""The Trainer mixin: gradient and curvature are those of the mean over a whole step."""

import pytest
import torch
import transformers

from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.load import load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import unwrap
from tests.tiny_models import tiny_bert
from tests.trainers import GGN, Trainer, first_gradient, trainer, true_gradient


@pytest.mark.parametrize("first", [True, False])
def test_the_gradient_is_that_of_the_mean_over_the_tokens_that_are_predicted(tmp_path, first):
    """Next to no noise, two micro-batches of unequal length, a model whose class name tells no
    loss, and a collator that leaves a row's first label in or not."""
    t = trainer(tmp_path, ivon={"ess": 1e14, "lr": 0.0}, max_steps=1, gradient_accumulation_steps=2)
    collate = t.data_collator

    def with_first(examples):
        batch = collate(examples)
        batch["labels"][:, 0] = batch["input_ids"][:, 0]
        return batch

    t.data_collator = with_first if first else collate
    ours, batches = first_gradient(t)
    assert len(batches) == 2
    expected = true_gradient(load_model(str(tmp_path / "m")).model, batches)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def classifier(folder, labels, problem_type=None, ivon=None, model=None, **arguments):
    """A stock Trainer's classifier with the mixin in front and nothing else, on 16 examples of one
    length.
    """
    if model is None:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            tiny_bert(
                folder, labels=labels.shape[-1] if labels.ndim > 1 else 3, problem_type=problem_type
            )
        )
    tokens = torch.randint(3, 20, (16, 6), generator=torch.Generator().manual_seed(1))
    rows = [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": y}
        for x, y in zip(tokens, labels, strict=True)
    ]
    settings = {
        "output_dir": str(folder / "out"),
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_steps": 1,
        **arguments,
    }
    return Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(IVON, {"lr": 0.0, "ess": 1e14, **(ivon or {})}),
    )


CLASSES = torch.arange(16) % 3
TARGETS = torch.linspace(-1, 1, 48).reshape(16, 3)


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (CLASSES, None),
        (TARGETS, "regression"),
        ((TARGETS > 0).float(), "multi_label_classification"),
    ],
)
def test_a_classifiers_gradient_does_not_grow_with_the_micro_batches(
    tmp_path, labels, problem_type
):
    momenta = []
    for size, steps in ((16, 1), (4, 4)):
        t = classifier(
            tmp_path,
            labels,
            problem_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        t.train()
        momenta.append(
            torch.cat([s["momentum"].flatten() for s in unwrap(t.optimizer).state.values()])
        )
    assert momenta[0].norm() > 0
    torch.testing.assert_close(momenta[1], momenta[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["masked", "tokens", "regression", "multi-label"])
def test_the_ggn_of_a_loss_that_it_does_not_know_is_refused_before_the_first_step(tmp_path, loss):
    labels, model = CLASSES, None
    if loss in ("masked", "tokens"):
        classes = {
            "masked": transformers.BertForMaskedLM,
            "tokens": transformers.BertForTokenClassification,
        }
        model = classes[loss].from_pretrained(tiny_bert(tmp_path))
        labels = torch.zeros(16, 6, dtype=torch.long)
    elif loss == "regression":
        labels = TARGETS[:, :1]
    else:
        labels = (TARGETS > 0).float()
    t = classifier(tmp_path, labels, ivon={**GGN, "ess": 1e4}, model=model)
    with pytest.raises(ConfigError, match="curvature='price'"):
        t.train()
    assert t.state.global_step == 0
    classifier(tmp_path, labels, model=model).train()


def test_a_loss_of_the_trainer_itself_scores_the_same_tokens(tmp_path):
    """The Trainer takes the labels out of the inputs when it smooths them."""
    squares = []
    for smoothing in (0.0, 0.1):
        ivon = {**GGN, "curvature_every": 1}
        t = trainer(tmp_path, ivon=ivon, max_steps=1, label_smoothing_factor=smoothing)
        t.train()
        squares.append([s["hess"] for s in unwrap(t.optimizer).state.values()])
    for ours, plain in zip(squares[1], squares[0], strict=True):
        torch.testing.assert_close(ours, plain)


class WithoutConfig(torch.nn.Module):
    """A model that is not of transformers, with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.weights(input_ids.float())
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_without_a_config_trains_and_has_no_ggn(tmp_path):
    t = classifier(tmp_path, CLASSES, model=WithoutConfig(), max_steps=2)
    t.train()
    assert t.state.global_step == 2
    with pytest.raises(ConfigError, match="curvature='price'"):
        classifier(tmp_path, CLASSES, model=WithoutConfig(), ivon=GGN).train()


def test_the_curvature_of_a_classifier_is_that_of_a_pass_over_the_data(tmp_path):
    ivon = {**GGN, "ess": 1e14, "curvature_every": 1, "beta2": 0.999}
    t = classifier(
        tmp_path,
        CLASSES,
        ivon=ivon,
        max_steps=60,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
    )
    t.train()
    batch = {
        name: torch.stack([row[name] for row in t.train_dataset]) for name in t.train_dataset[0]
    }
    whole = ggn_diagonal(t.model, [batch] * 60, seed=8)
    ours = sum(float(s["hess"].sum()) for s in unwrap(t.optimizer).state.values())
    assert ours == pytest.approx(
        sum(float(v.sum()) for v in whole.total.values()) / whole.observations, rel=0.2
    )


def test_the_curvature_of_the_steps_is_that_of_a_pass_over_the_data(tmp_path):
    """A learning rate of 0 and next to no noise: the average of the steps' draws against many
    batches at the mean.
    """
    t = trainer(
        tmp_path,
        ivon={**GGN, "lr": 0.0, "ess": 1e12, "curvature_every": 1, "beta2": 0.999},
        learning_rate=0.0,
        max_steps=60,
        gradient_accumulation_steps=2,
    )
    t.model.config.attn_pdrop = t.model.config.embd_pdrop = t.model.config.resid_pdrop = 0.0
    for module in t.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    t.train()
    collated = [
        t.data_collator([t.train_dataset[i] for i in range(j, j + 2)]) for j in range(0, 16, 2)
    ]
    whole = ggn_diagonal(t.model, collated * 15, seed=8)
    optimizer = unwrap(t.optimizer)
    for name, p in t.model.named_parameters():
        ours, expected = optimizer.state[p]["hess"], whole.total[name] / whole.observations
        if p.ndim > 1:
            assert float(ours.sum() / expected.sum()) == pytest.approx(1, rel=0.25), name
    all_ours = sum(float(optimizer.state[p]["hess"].sum()) for p in t.model.parameters())
    assert all_ours == pytest.approx(
        sum(float(v.sum()) for v in whole.total.values()) / whole.observations, rel=0.1
    )
