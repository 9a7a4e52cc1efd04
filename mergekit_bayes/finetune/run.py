"""Fine-tune a model and keep its posterior: a checkpoint folder with a `posterior/` inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. By default the
posterior is estimated at the end (`posterior: flush`): the root-GGN diagonal at the final mean
times the number of observations, plus the prior. `posterior: ivon` stores the optimizer's own
Hessian. That lags behind where the curvature falls. Under `curvature: price` its size also depends
on kappa and on how much of `hess_init` is left, which the run's health numbers tell.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mergekit_bayes.finetune.checkpoints import close_checkpoints, has_folder
from mergekit_bayes.finetune.data import Run, load_run
from mergekit_bayes.finetune.fsdp import as_launched, without_plugin
from mergekit_bayes.finetune.gathered import Gathered
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.finetune.session import (
    Trained,
    check_checkpoint,
    checkpoint_folder,
    open_output,
    train,
)
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport
from mergekit_bayes.finetune.store import save_finetuned
from mergekit_bayes.finetune.training import make_trainer, training_arguments
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.sharding import is_sharded
from mergekit_bayes.optim import IVON
from mergekit_bayes.ranks import is_main, on_main
from mergekit_bayes.trainer import unwrap


def run_finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneReport:
    """Fine-tune a model, and store it with its posterior.

    Under a launcher every rank calls this and gets the same report, or the same error. Rank 0
    writes.

    Args:
        config: Settings of the run.
        quiet: Print nothing and show no progress bars.

    Raises:
        CheckpointError: The output or its checkpoints exist, the output would replace the model or
            the data, or the model cannot be loaded.
        ConfigError: Settings that contradict each other or the checkpoint that is resumed, or a
            model that cannot be trained.
        MismatchError: Data without the named columns or with unknown labels.
    """
    import transformers

    config = as_launched(config)
    refuse_before(config)
    quiet = quiet or not is_main()
    with (
        quiet_libraries(bars=not quiet),
        checkpoint_folder(config) as folder,
        without_plugin(),
        ExitStack() as held,
    ):
        transformers.set_seed(config.seed)
        arguments = training_arguments(config, folder, quiet=quiet)
        checkpoint = on_main(lambda: open_output(config, held))
        run = load_run(config, arguments.world_size)
        check_checkpoint(checkpoint, run.identity)
        loss_before = 0.0 if checkpoint is None else checkpoint.loss
        if checkpoint is not None:
            resumed = f"resuming from '{checkpoint.path}'"
            run = replace(run, notes=(*run.notes, resumed))
        trainer = make_trainer(run, arguments, quiet=quiet, loss_before=loss_before)
        is_ivon = run.choices.ivon is not None
        patience = config.patience
        steps = run.choices.steps
        trained = train(trainer, checkpoint, steps, is_ivon=is_ivon, patience=patience)
        optimizer = unwrap(trainer.optimizer) if is_ivon else None
        if not is_sharded(run.loaded.model):
            return on_main(lambda: _store(run, optimizer, trained, folder))
        gathered = Gathered(run, optimizer)
        return gathered.lead(lambda: _store(run, optimizer, trained, folder, gathered))


def _store(
    run: Run,
    optimizer: IVON | None,
    trained: Trained,
    folder: Path,
    gathered: Gathered | None = None,
) -> FinetuneReport:
    """Store the model with the logs of its training, and then clean up beside it."""
    made = trained.steps if trained.best_step is None else trained.best_step
    run = replace(run, choices=replace(run.choices, steps=made))  # for the posterior's record
    report = save_finetuned(
        run, optimizer, trained.steps, trained.loss, folder, gathered, trained.evaluation
    )
    if has_folder(run.config):
        keep = run.config.keep_checkpoints or run.config.save_steps is None
        close_checkpoints(folder, keep=keep)
    return report.model_copy(
        update={"evaluation": dict(trained.evaluation), "best_step": trained.best_step}
    )
