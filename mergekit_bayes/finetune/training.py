"""The Trainer of a fine-tune: its arguments, its loss, its log, and what it refuses."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.checkpoints import mark_whole
from mergekit_bayes.finetune.choices import chosen, learning_rate
from mergekit_bayes.finetune.health import LOGGED, Watch
from mergekit_bayes.finetune.ranks import mean_over_ranks
from mergekit_bayes.finetune.refusals import refuse_accelerator
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.encode import Collate
from mergekit_bayes.models.load import UNIT, Loaded
from mergekit_bayes.optim.ivon import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, classification_loss, unwrap

_IVON = (
    "lr",
    "ess",
    "hess_init",
    "beta1",
    "beta2",
    "weight_decay",
    "clip_radius",
    "rescale_lr",
    "mc_samples",
    "antithetic",
    "rank_noise",
    "curvature",
    "curvature_every",
)


def training_arguments(config: FinetuneConfig, folder: Path, *, quiet: bool) -> Any:
    """`transformers.TrainingArguments`; making them joins the process group, if a launcher made
    several.
    """
    import transformers

    ivon = config.optimizer == "ivon"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=learning_rate(config),
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
        ddp_timeout=24
        # rank 0 may download and measure for hours; when a process dies, a launcher ends all
        * 3600,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if (
        arguments.n_gpu > 1
    ):  # else the Trainer wraps the model in DataParallel, whose copies IVON does not perturb
        arguments._n_gpu = 1
    if config.num_processes is not None and arguments.world_size != config.num_processes:
        raise ConfigError(
            f"num_processes: {config.num_processes} were asked for and {arguments.world_size} run. "
            "Start them with "
            f"bmerge finetune --num-processes {config.num_processes}, or with accelerate launch."
        )
    return arguments


def make_trainer(
    config: FinetuneConfig,
    arguments: Any,
    loaded: Loaded,
    examples: list[dict[str, Any]],
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    *,
    quiet: bool,
    loss_before: float = 0.0,
) -> Any:
    """The Trainer, with IVON or AdamW inside; its checkpoints carry `identity` and the loss so far."""
    import transformers

    ivon = config.optimizer == "ivon"
    common: dict[str, Any] = {
        "model": loaded.model,
        "args": arguments,
        "train_dataset": examples,
        "data_collator": Collate(loaded.pad),
    }
    if loaded.task == "classification":
        common["compute_loss_func"] = classification_loss
    if ivon:
        common["optimizer_cls_and_kwargs"] = (
            IVON,
            {**{n: settings[n] for n in _IVON}, "seed": config.seed},
        )
    try:
        trainer = (_ivon_trainer(config, settings) if ivon else transformers.Trainer)(**common)
    except (RuntimeError, ImportError, ValueError) as error:
        if config.report_to and any(name in str(error).lower() for name in config.report_to):
            raise ConfigError(f"report_to: {str(error).splitlines()[0]}") from None
        raise
    refuse_accelerator(trainer.accelerator, ivon=ivon)
    return _with_callbacks(
        trainer, chosen(settings, UNIT[loaded.task]), identity, loss_before, quiet=quiet
    )


def _ivon_trainer(config: FinetuneConfig, settings: Mapping[str, Any]) -> Any:
    import transformers

    watch = Watch(config)

    class IvonTrainer(IvonTrainerMixin, transformers.Trainer):  # type: ignore[misc]
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                health = unwrap(self.optimizer).health(settings["batch_size"])
                watch.look(health, warn=self.is_world_process_zero())
                logs = {**logs, **{name: health[name] for name in LOGGED[config.curvature]}}
            super().log(logs, *args, **kwargs)

    return IvonTrainer


def _with_callbacks(
    trainer: Any, first_line: str, identity: Mapping[str, Any], loss_before: float, *, quiet: bool
) -> Any:
    """A first line, a bar and a line a log on stderr at most: the Trainer's own callbacks print on
    stdout.
    """
    import transformers
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                print(first_line, file=sys.stderr)
            super().on_train_begin(args, state, control, **kwargs)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if self.training_bar is not None and "loss" in (logs or {}):
                line = f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.4g}"
                for name in ("learning_rate", *LOGGED["price"]):
                    if name in logs:
                        line += f"  {name} {float(logs[name]):.3g}"
                self.training_bar.write(line, file=sys.stderr)
                self.training_bar.set_postfix(loss=f"{float(logs['loss']):.4g}")

    class Whole(transformers.TrainerCallback):  # type: ignore[misc]
        """Marks a checkpoint when every rank has written its part of it."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Every rank comes here when it has written its files, and goes on when all have.
            loss = loss_before + mean_over_ranks(
                trainer._total_loss_scalar + float(trainer._tr_loss)
            )
            if state.is_world_process_zero:
                path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                mark_whole(path, state.global_step, identity, loss)

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Whole())
    if not quiet:
        trainer.add_callback(Bar())
    return trainer
