"""The Trainer of a fine-tune: its arguments, its optimizer and its loss."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.data import Run
from mergekit_bayes.finetune.rates import learning_rate
from mergekit_bayes.finetune.refusals import refuse_accelerator
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.models.encode import Collate
from mergekit_bayes.models.packing import refuse_leaks
from mergekit_bayes.optim import IVON
from mergekit_bayes.ranks import COLLECTIVE_TIMEOUT, refuse_other_processes
from mergekit_bayes.trainer import classification_loss

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


def training_arguments(config: FinetuneConfig, folder: Path, *, quiet: bool) -> "TrainingArguments":
    """The Trainer's arguments. Making them joins the process group, if a launcher started several.

    Args:
        config: Settings of the run.
        folder: Where the Trainer writes its checkpoints.
        quiet: Show no progress bars.

    Raises:
        ConfigError: The process group has another size than `num_processes`.
    """
    import transformers

    is_ivon = config.optimizer == "ivon"
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=learning_rate(config),
        weight_decay=0.0 if is_ivon else config.weight_decay,
        max_grad_norm=0.0 if is_ivon else 1.0,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        logging_steps=config.logging_steps,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        eval_strategy="no" if config.eval_data is None else "steps",
        eval_steps=config.evaluates_every,
        load_best_model_at_end=config.load_best,
        metric_for_best_model="eval_loss" if config.load_best else None,
        greater_is_better=False if config.load_best else None,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},  # IVON goes back twice
        torch_compile=config.torch_compile,
        seed=config.seed,
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=list(config.report_to),
        run_name=Path(config.output).name,  # else the folder of the checkpoints
        disable_tqdm=quiet,
        log_level_replica="passive",  # else the Trainer turns warnings on again
        ddp_timeout=COLLECTIVE_TIMEOUT,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # Else the Trainer wraps the model in DataParallel, whose copies IVON does not perturb.
        arguments._n_gpu = 1
    refuse_other_processes(config.num_processes, arguments.world_size)
    return arguments


def make_trainer(
    run: Run, arguments: "TrainingArguments", *, quiet: bool, loss_before: float = 0.0
) -> "Trainer":
    """Make the Trainer, with IVON or AdamW.

    Args:
        run: What is trained, and how.
        arguments: From `training_arguments`.
        quiet: Print nothing during training.
        loss_before: Sum of the training loss over the steps of the checkpoint that is resumed.

    Raises:
        ConfigError: A `report_to` that is unknown or not installed, or an accelerator with which
            the optimizer does not work.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from mergekit_bayes.finetune.evaluation import BestCheckpoint, Patience
    from mergekit_bayes.finetune.hooks import (
        CheckpointMarker,
        IvonRunTrainer,
        PlainRunTrainer,
        ProgressBar,
    )

    config, loaded = run.config, run.loaded
    arguments.learning_rate = run.choices.learning_rate  # which may follow from the steps
    options: dict[str, object] = {
        "model": loaded.model,
        "args": arguments,
        "train_dataset": run.examples,
        "eval_dataset": run.held_out or None,
        "data_collator": Collate(loaded.pad),
    }
    if loaded.task == "classification":
        options["compute_loss_func"] = classification_loss
    try:
        if run.choices.ivon is None:
            trainer = PlainRunTrainer(run, **options)
        else:
            optimizer = IVON, run.choices.ivon_arguments(config.seed)
            trainer = IvonRunTrainer(run, optimizer_cls_and_kwargs=optimizer, **options)
    except (RuntimeError, ImportError, ValueError) as error:
        if any(name in str(error).lower() for name in config.report_to):
            raise ConfigError(f"report_to: {str(error).splitlines()[0]}") from None
        raise
    refuse_accelerator(trainer.accelerator, ivon=run.choices.ivon is not None)
    if config.pack == "documents":
        refuse_leaks(loaded, config.batch_size)  # on the device where the Trainer has put the model
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(CheckpointMarker(trainer, run.identity, loss_before))
    if config.load_best:
        trainer.add_callback(BestCheckpoint())
    if config.patience is not None:
        trainer.add_callback(Patience(config.patience))
    if not quiet:
        first = "\n".join((*run.notes, run.choices.summary(run.unit)))
        trainer.add_callback(ProgressBar(first, config.patience))
    return trainer
