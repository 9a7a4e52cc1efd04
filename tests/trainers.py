"""Trainers of tiny models with IVON, and the gradients that they should have."""

import peft
import torch
import transformers

from mergekit_bayes.models.encode import Collate, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap
from tests.tiny_models import tiny_gpt2

ROWS = {
    "text": ["the cat sat on the mat .", "a dog ran", "good film", "the tree was dull and bad"] * 4
}
GGN = {"curvature": "ggn", "weight_decay": 1e-2, "clip_radius": 1e-3, "seed": 3}


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
