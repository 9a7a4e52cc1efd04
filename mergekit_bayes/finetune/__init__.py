"""Fine-tune a model and keep its posterior: an ordinary checkpoint folder with a `posterior/` inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. What is stored by default is a
flush: the root-GGN diagonal at the final mean times the number of observations, plus the prior. IVON's own h has
the right order but, after a short run, up to a thousand times the right size; `posterior: ivon` stores it.
"""

import difflib
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport, LoraSettings
from mergekit_bayes.finetune.store import base_identity, save_finetuned
from mergekit_bayes.lora import INITIAL_A, initial_identity
from mergekit_bayes.models import (
    UNIT,
    Collate,
    Loaded,
    encode_rows,
    hushed,
    is_classifier,
    load_model,
    load_rows,
    observations,
)
from mergekit_bayes.optim import IVON
from mergekit_bayes.sources import is_hub_id
from mergekit_bayes.trainer import IvonTrainerMixin

__all__ = ["FinetuneConfig", "FinetuneReport", "LoraSettings", "run_finetune"]

# sigma at the start, as a share of the typical weight, where `ess` is left out.
_NOISE = 0.05


def run_finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneReport:
    """Fine-tune, store the model and its posterior, and return what happened.

    Raises:
        CheckpointError: The output exists, or the model cannot be loaded.
        ConfigError: Settings that contradict each other.
        MismatchError: Data without the named columns or with unknown labels.
    """
    target = Path(config.output)
    if target.exists() and not config.force:
        raise CheckpointError(f"'{target}' exists. Choose another output, or pass --force to replace it.")
    if config.posterior == "ivon" and config.optimizer != "ivon":
        raise ConfigError("posterior: ivon needs optimizer: ivon; AdamW leaves none. Use posterior: flush.")
    _check(config)
    with hushed(quiet):
        return _run(config, target, quiet=quiet)


def _run(config: FinetuneConfig, target: Path, *, quiet: bool) -> FinetuneReport:
    import transformers
    from accelerate.utils import broadcast_object_list

    transformers.set_seed(config.seed)
    loaded = _load(config)
    base = base_identity(loaded.path)
    examples = _examples(config, loaded)
    if config.lora is not None:
        loaded = loaded._replace(model=_with_lora(loaded, config.lora, config.model))
    scratch = Path(tempfile.mkdtemp(prefix="bmerge-"))
    try:
        kept = scratch if config.save_steps is None else target.with_name(f"{target.name}.checkpoints")
        trainer, settings = _trainer(config, loaded, examples, kept, quiet=quiet)
        result = trainer.train()
        trainer.accelerator.wait_for_everyone()
        report = None
        if trainer.accelerator.is_main_process:
            report = save_finetuned(config, loaded, examples, trainer, settings, base, result, target)
        reports = broadcast_object_list([report])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found: FinetuneReport = reports[0]
    return found


def _check(config: FinetuneConfig) -> None:
    from transformers import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if config.scheduler not in known:
        close = difflib.get_close_matches(config.scheduler, known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"one of {', '.join(known)}."
        raise ConfigError(f"scheduler: transformers knows no '{config.scheduler}'; {hint}")


def _load(config: FinetuneConfig) -> Loaded:
    """The model; a checkpoint without a classification head gets one for the labels that the data holds."""
    if config.task != "classification" or config.num_labels is not None or is_classifier(config.model):
        return load_model(config.model, config.task, num_labels=config.num_labels, dtype=config.dtype)
    rows = load_rows(config.data, where=config.where, max_rows=config.max_rows, columns=[config.label_column])
    values = sorted(set(rows[config.label_column]), key=lambda v: (str(type(v)), v))
    named = not all(isinstance(v, int) for v in values)
    loaded = load_model(
        config.model, config.task, num_labels=len(values) if named else max(1, *values) + 1, dtype=config.dtype
    )
    if named:
        loaded.model.config.id2label = {i: str(v) for i, v in enumerate(values)}
        loaded.model.config.label2id = {str(v): i for i, v in enumerate(values)}
    return loaded


def _examples(config: FinetuneConfig, loaded: Loaded) -> list[dict[str, Any]]:
    label = config.label_column if loaded.task == "classification" else None
    columns = [config.text_column, *([label] if label else [])]
    rows = load_rows(config.data, where=config.where, max_rows=config.max_rows, columns=columns)
    return encode_rows(
        rows, loaded, text=config.text_column, label=label, max_length=config.max_length, pack=config.pack
    )


def _with_lora(loaded: Loaded, lora: LoraSettings, name: str) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    modules = lora.target_modules
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(modules) if isinstance(modules, tuple) else modules,
        task_type=TaskType.SEQ_CLS if loaded.task == "classification" else TaskType.CAUSAL_LM,
        fan_in_fan_out=loaded.model.config.model_type == "gpt2",  # its layers store weights transposed
    )
    try:
        model = get_peft_model(loaded.model, settings)
    except ValueError as error:
        raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
    # What the adapter will be loaded on: the Hub id as given, or a folder from wherever one stands.
    model.peft_config["default"].base_model_name_or_path = name if is_hub_id(name) else str(loaded.path.resolve())
    return model


def _trainer(
    config: FinetuneConfig, loaded: Loaded, examples: list[dict[str, Any]], scratch: Path, *, quiet: bool
) -> tuple[Any, dict[str, Any]]:
    import transformers

    ivon = config.optimizer == "ivon"
    rate = config.learning_rate if config.learning_rate is not None else (0.1 if ivon else 1e-4)
    arguments = transformers.TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=rate,
        weight_decay=0.0 if ivon else config.weight_decay,
        max_grad_norm=0.0 if ivon else 1.0,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        logging_steps=config.logging_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=list(config.report_to),
        disable_tqdm=quiet,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    per_step = config.batch_size * config.gradient_accumulation * arguments.world_size
    micro_batches = math.ceil(len(examples) / (config.batch_size * arguments.world_size))
    per_epoch = math.ceil(micro_batches / config.gradient_accumulation)
    steps = config.max_steps or math.ceil(per_epoch * config.epochs)
    total = observations(examples, loaded.task)
    settings: dict[str, Any] = {
        "optimizer": config.optimizer,
        "lr": rate,
        "weight_decay": config.weight_decay,
        "scheduler": config.scheduler,
        "steps": steps,
        "batch_size": total / len(examples) * per_step,
        "loss_reduction": f"mean over {UNIT[loaded.task]}s of a step",
    }
    if config.lora is not None:
        starts = {n: p.detach().float().cpu().numpy() for n, p in loaded.model.named_parameters() if ".lora_A." in n}
        settings[INITIAL_A] = initial_identity(starts)
    common = {
        "model": loaded.model,
        "args": arguments,
        "train_dataset": examples,
        "data_collator": Collate(int(loaded.tokenizer.pad_token_id or 0)),
    }
    if loaded.task == "classification":
        common["compute_loss_func"] = classification_loss
    if not ivon:
        return _progress_only(transformers.Trainer(**common), quiet=quiet), settings
    settings |= {
        "ess": config.ess or max(float(total), _quiet_ess(loaded.model, config.hess_init)),
        "hess_init": config.hess_init,
        "beta1": config.beta1,
        "beta2": config.beta2 if config.beta2 is not None else min(0.99999, max(0.9, 1 - 5 / steps)),
        "clip_radius": config.clip_radius,
        "rescale_lr": config.rescale_lr,
        "mc_samples": config.mc_samples,
    }
    names = ("lr", "ess", "hess_init", "beta1", "beta2", "weight_decay", "clip_radius", "rescale_lr", "mc_samples")
    trainer = _ivon_trainer()(
        **common, optimizer_cls_and_kwargs=(IVON, {**{n: settings[n] for n in names}, "seed": config.seed})
    )
    return _progress_only(trainer, quiet=quiet), settings


def classification_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross-entropy, mean over the examples of the whole step.

    The loss inside transformers' classifiers is the mean of one micro-batch, and since they take the step's count
    without using it, the Trainer adds those means up: with k micro-batches the gradient is k times too large.
    """
    total = torch.nn.functional.cross_entropy(outputs.logits.float(), labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def _progress_only(trainer: Any, *, quiet: bool) -> Any:
    """A bar on stderr at most: the Trainer's own callbacks print their logs on stdout."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not quiet:
        trainer.add_callback(Bar())
    return trainer


def _ivon_trainer() -> Any:
    import transformers

    class IvonTrainer(IvonTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        pass

    return IvonTrainer


def _quiet_ess(model: Any, hess_init: float) -> float:
    """The ess at which the first noise is `_NOISE` of the median weight matrix' root mean square."""
    sizes = [
        float(p.detach().float().square().mean().sqrt()) for p in model.parameters() if p.requires_grad and p.ndim > 1
    ]
    rms = sorted(s for s in sizes if s > 0)
    if not rms:
        return 0.0
    return float(1 / (hess_init * (_NOISE * rms[len(rms) // 2]) ** 2))
