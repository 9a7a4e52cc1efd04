"""The Trainer mixin: the mean is what is saved, a stop leaves nothing perturbed, replicas stay
equal.
"""

import os
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers

from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.encode import Collate, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap
from tests.tiny_models import tiny_bert, tiny_gpt2

ROWS = {
    "text": ["the cat sat on the mat .", "a dog ran", "good film", "the tree was dull and bad"] * 4
}


class Trainer(IvonTrainerMixin, transformers.Trainer):
    pass


def trainer(tmp_path, callbacks=(), ivon=None, eval_dataset=False, adapter=False, **arguments):
    if not (tmp_path / "m").exists():
        tiny_gpt2(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    model = loaded.model
    if adapter:
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
        )
    rows = encode_rows(ROWS, loaded)
    settings = {
        "output_dir": str(tmp_path / "out"),
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "max_steps": 4,
        **arguments,
    }
    return Trainer(
        model=model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows if eval_dataset else None,
        data_collator=Collate(2),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(
            IVON,
            {"lr": 0.1, "ess": 1e4, "weight_decay": 1e-3, "beta2": 0.9, **(ivon or {})},
        ),
    )


def test_one_group_keeps_the_prior_that_was_asked_for(tmp_path):
    t = trainer(tmp_path)
    t.train()
    groups = unwrap(t.optimizer).param_groups
    assert len(groups) == 1
    assert groups[0]["weight_decay"] == 1e-3


class Means(transformers.TrainerCallback):
    """Remembers the weights that callbacks see, and may stop in the middle of a step."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def _look(self, model):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._look(model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._look(model)
        if self.stop_at is not None and state.global_step == self.stop_at:
            control.should_training_stop = True


def test_callbacks_only_ever_see_the_mean(tmp_path):
    means = Means()
    t = trainer(tmp_path, [means], gradient_accumulation_steps=2)
    t.train()
    step_ends = means.seen[1::2]
    for substep, before in zip(means.seen[2::2], step_ends, strict=False):
        assert torch.equal(substep, before)


def test_a_stop_in_the_middle_of_a_step_leaves_nothing_perturbed(tmp_path):
    means = Means(stop_at=2)
    t = trainer(tmp_path, [means], gradient_accumulation_steps=2, max_steps=10)
    t.train()
    final = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    assert torch.equal(final, means.seen[-1])
    assert t.state.global_step == 2


def test_what_an_interrupted_step_left_is_dropped(tmp_path):
    t = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    t._collected = [{"input_ids": torch.full((2, 4), 10**9)}]  # would raise if it were run
    t.train()
    assert t.state.global_step == 1


def test_settings_that_would_break_ivon_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_grad_norm=0"):
        trainer(tmp_path, max_grad_norm=1.0).train()


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="not IVON"):
        unwrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def true_gradient(model, batches):
    """Of the mean over all tokens that are predicted in the batches, by parameter name."""
    total, tokens = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
            :, :-1
        ]
        labels = batch["labels"][:, 1:]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        )
        tokens += int((labels != -100).sum())
    (total / tokens).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def first_gradient(t):
    """What the optimizer got in a run of one step, by parameter name, and the micro-batches of the
    step.
    """
    seen, inner = [], t._prepare_inputs

    def prepare(inputs):
        seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return inner(inputs)

    t._prepare_inputs = prepare
    t.train()
    state = unwrap(t.optimizer).state
    return {n: state[p]["momentum"] / (1 - 0.9) for n, p in t.model.named_parameters()}, seen


@pytest.mark.parametrize(
    "first", [True, False]
)  # whether the collator leaves a row's first label in
def test_the_gradient_is_that_of_the_mean_over_the_tokens_that_are_predicted(tmp_path, first):
    """Next to no noise, two micro-batches of unequal length, and a model whose class name tells no
    loss.
    """
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
    found = []
    for size, steps in ((16, 1), (4, 4)):
        t = classifier(
            tmp_path,
            labels,
            problem_type,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        t.train()
        found.append(
            torch.cat([s["momentum"].flatten() for s in unwrap(t.optimizer).state.values()])
        )
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["masked", "tokens", "regression", "multi-label"])
def test_the_ggn_of_a_loss_that_it_does_not_know_is_refused_before_the_first_step(tmp_path, kind):
    labels, model = CLASSES, None
    if kind in ("masked", "tokens"):
        classes = {
            "masked": transformers.BertForMaskedLM,
            "tokens": transformers.BertForTokenClassification,
        }
        model = classes[kind].from_pretrained(tiny_bert(tmp_path))
        labels = torch.zeros(16, 6, dtype=torch.long)
    elif kind == "regression":
        labels = TARGETS[:, :1]
    else:
        labels = (TARGETS > 0).float()
    t = classifier(tmp_path, labels, ivon={**GGN, "ess": 1e4}, model=model)
    with pytest.raises(ConfigError, match="curvature='price'"):
        t.train()
    assert t.state.global_step == 0
    classifier(tmp_path, labels, model=model).train()


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


class Scripted(transformers.TrainerCallback):
    """Decides which step is the best, and remembers the trained parameters of each."""

    def __init__(self, losses):
        self.losses, self.seen = losses, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }

    def evaluate(self, trainer):
        return lambda *args, **kwargs: {"eval_loss": self.losses[trainer.state.global_step - 1]}


BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_has_its_own_posterior_and_not_the_last_one(tmp_path, adapter):
    script = Scripted([3.0, 1.0, 2.0, 4.0])
    t = trainer(tmp_path, [script], eval_dataset=True, adapter=adapter, **BEST)
    t.evaluate = script.evaluate(t)
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-2")
    trained = {n: p for n, p in t.model.named_parameters() if n in script.seen[2]}
    for name, p in trained.items():
        assert torch.equal(p, script.seen[2][name]), name
    assert not all(torch.equal(p, script.seen[4][n]) for n, p in trained.items())
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt")["state"]
    precision = unwrap(t.optimizer).precision(t.model.named_parameters())
    assert len(precision) == len(saved) == len(trained)
    for entry, tensor in zip(saved.values(), precision.values(), strict=True):
        assert entry["step"] == 2
        torch.testing.assert_close(tensor, 1e4 * (entry["hess"] + 1e-3), rtol=1e-6, atol=0)


def test_a_best_checkpoint_without_a_posterior_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="save_only_model=False"):
        trainer(tmp_path, eval_dataset=True, save_only_model=True, **BEST).train()


GGN = {"curvature": "ggn", "weight_decay": 1e-2, "clip_radius": 1e-3, "seed": 3}


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
        ours, theirs = optimizer.state[p]["hess"], whole.total[name] / whole.observations
        if p.ndim > 1:
            assert float(ours.sum() / theirs.sum()) == pytest.approx(1, rel=0.25), name
    all_ours = sum(float(optimizer.state[p]["hess"].sum()) for p in t.model.parameters())
    assert all_ours == pytest.approx(
        sum(float(v.sum()) for v in whole.total.values()) / whole.observations, rel=0.1
    )


def test_curvature_is_taken_every_so_many_steps_and_trains(tmp_path):
    t = trainer(
        tmp_path,
        ivon={**GGN, "curvature_every": 3, "mc_samples": 2, "antithetic": True},
        max_steps=7,
    )
    before = torch.cat([p.detach().flatten() for p in t.model.parameters()]).clone()
    t.train()
    state = next(iter(unwrap(t.optimizer).state.values()))
    assert int(state["estimates"]) == 3
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in t.model.parameters()]))


def test_both_of_a_pair_see_the_same_dropout(tmp_path):
    """With a linear loss of the noise nothing but dropout differs between +eps and -eps as eps goes
    to zero.
    """
    t = trainer(tmp_path, ivon={"mc_samples": 2, "antithetic": True, "ess": 1e14})
    for module in t.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    losses, inner = [], t.accelerator.backward
    t.accelerator.backward = lambda loss, **kw: (
        losses.append(float(loss.detach())),
        inner(loss, **kw),
    )
    t.train()
    assert len(losses) == 8
    for first, second in zip(losses[::2], losses[1::2], strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    assert len({round(x, 3) for x in losses}) > 2


DDP = """
import sys, torch
from pathlib import Path
from tests.test_trainer import GGN, trainer
for ivon in ({}, GGN, {"mc_samples": 2, "antithetic": True, "restore": "redraw"}):
    t = trainer(Path(sys.argv[1]) / str(__import__('os').environ['RANK']), ivon=ivon)
    assert t.accelerator.num_processes == 2, t.accelerator.num_processes
    t.train()
    print('digest', ivon, float(sum(p.double().abs().sum() for p in t.model.parameters())),
          float(sum(s['hess'].double().sum() for s in t.optimizer.optimizer.state.values())))
"""


@pytest.mark.slow
def test_two_replicas_stay_equal_bit_for_bit(tmp_path):
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29541",
    ]
    done = subprocess.run(
        [*line, str(script), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    digests = [x for x in done.stdout.splitlines() if x.startswith("digest")]
    assert len(digests) == 6
    assert len(set(digests)) == 3
