"""Adapt a model: remove and add knowledge in a few steps, the rest held by a K-prior."""

from contextlib import ExitStack

from mergekit_bayes.adapt.checks import Checks
from mergekit_bayes.adapt.data import Run, load_run, training_config
from mergekit_bayes.adapt.kept import KeepSteps, open_kept
from mergekit_bayes.adapt.leap import LeapGuard
from mergekit_bayes.adapt.objective import Objective
from mergekit_bayes.adapt.reconstruction import measure_reconstruction
from mergekit_bayes.adapt.refusals import refuse_settings
from mergekit_bayes.adapt.settings import AdaptConfig, AdaptReport
from mergekit_bayes.adapt.stopping import Stopping
from mergekit_bayes.adapt.store import save_adapted
from mergekit_bayes.adapt.stored import stored_teacher
from mergekit_bayes.adapt.teacher import AdapterOff, FrozenCopy, Teacher, chosen_teacher
from mergekit_bayes.adapt.trainer import ForIvon, adapt_arguments, make_trainer
from mergekit_bayes.adapt.weights import make_weight_part
from mergekit_bayes.finetune.checkpoints import close_checkpoints, has_folder
from mergekit_bayes.finetune.hooks import ProgressBar
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.finetune.session import (
    Trained,
    check_checkpoint,
    checkpoint_folder,
    open_output,
    train,
)
from mergekit_bayes.models.devices import choose_device
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.ranks import is_main, on_main


def run_adapt(config: AdaptConfig, *, quiet: bool = False) -> AdaptReport:
    """Adapt a model, and store it with its posterior.

    Under a launcher every rank calls this and gets the same report, or the same error. Rank 0
    writes.

    Args:
        config: Settings of the run.
        quiet: Print nothing and show no progress bars.

    Raises:
        CheckpointError: The output or its checkpoints exist, the output would replace the model or
            the rows, or the model cannot be loaded.
        ConfigError: Settings that contradict each other or the checkpoint that is resumed, or a
            model that cannot be adapted.
        MismatchError: Rows without the named columns or with unknown labels.
    """
    import transformers

    training = training_config(config)
    refuse_before(training)
    refuse_settings(config)
    quiet = quiet or not is_main()
    with (
        quiet_libraries(bars=not quiet),
        checkpoint_folder(training) as folder,
        ExitStack() as held,
    ):
        transformers.set_seed(config.seed)
        arguments = adapt_arguments(training, folder, quiet=quiet)
        checkpoint = on_main(lambda: open_output(training, held))
        on_main(lambda: open_kept(config))
        run = load_run(config)
        check_checkpoint(checkpoint, run.identity)
        run.loaded.model.to(choose_device(None))
        teacher = _teacher(run)
        penalty = make_weight_part(
            config, run.loaded, run.places, run.units, run.parts.get("memory")
        )
        is_ivon = config.optimizer == "ivon"
        # IVON takes a quadratic of its weights as its prior; that of an adapter is none.
        in_prior = is_ivon and config.lora is None
        objective = Objective(
            run.units,
            {name: len(examples) for name, examples in run.parts.items()},
            config.removal,
            config.npo_beta,
            teacher,
            None if in_prior else penalty,
        )
        loss_before = 0.0 if checkpoint is None else checkpoint.loss
        bar = None if quiet else ProgressBar(run.units.summary())
        if bar is not None and run.memory is not None:
            bar.say(f"memory: {run.memory.facts.describe()}")
        guard = LeapGuard(run, objective, teacher)
        stopping = Stopping(run, Checks(run, teacher), guard, bar.say if bar else None)
        callbacks = [guard, stopping, KeepSteps(run), *([bar] if bar else [])]
        ivon = ForIvon(objective, penalty if in_prior else None) if is_ivon else None
        trainer = make_trainer(run, guard, arguments, callbacks, ivon=ivon, loss_before=loss_before)
        stopping.begin(checkpoint, trainer.accelerator.autocast)
        trained = Trained(0, 0.0)
        if checkpoint is not None or not stopping.is_over:
            steps = checkpoint.step if checkpoint and stopping.is_over else run.units.steps
            trained = train(trainer, checkpoint, steps, is_ivon=is_ivon)
        outcome = stopping.finish(trained.steps)

        def store() -> AdaptReport:
            error = measure_reconstruction(run, teacher, penalty)
            report = save_adapted(run, outcome, error)
            if has_folder(training):
                keep = config.keep_checkpoints or config.save_steps is None
                close_checkpoints(folder, keep=keep)
            return report

        return on_main(store)


def _teacher(run: Run) -> Teacher:
    kind = chosen_teacher(run.config)
    if kind == "stored":
        return stored_teacher(run)
    return (AdapterOff if kind == "adapter" else FrozenCopy)(run.loaded.model)
