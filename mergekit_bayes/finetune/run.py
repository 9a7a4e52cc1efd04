"""Fine-tune a model and keep its posterior: a checkpoint folder with a `posterior/` inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. By default the
posterior is estimated at the end (`posterior: flush`): the root-GGN diagonal at the final mean
times the number of observations, plus the prior. `posterior: ivon` stores the optimizer's own
Hessian. That lags behind where the curvature falls. Under `curvature: price` its size also depends
on kappa and on how much of `hess_init` is left, which the run's health numbers tell.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.errors import BmergeError, CheckpointError
from mergekit_bayes.finetune.checkpoints import (
    Checkpoint,
    checkpoints_of,
    close_checkpoints,
    has_folder,
    holding,
    make_checkpoint_folder,
    open_checkpoints,
    refuse_broken,
    refuse_other_settings,
)
from mergekit_bayes.finetune.data import Run, load_run
from mergekit_bayes.finetune.ranks import is_main, mean_over_ranks, on_main
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport
from mergekit_bayes.finetune.store import save_finetuned
from mergekit_bayes.finetune.training import make_trainer, training_arguments
from mergekit_bayes.libraries import call
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import unwrap

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Methods of the Trainer that read the files of a checkpoint, and nothing else.
_LOADERS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state")


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

    refuse_before(config)
    quiet = quiet or not is_main()
    with (
        quiet_libraries(bars=not quiet),
        _checkpoint_folder(config) as folder,
        ExitStack() as held,
    ):
        transformers.set_seed(config.seed)
        arguments = training_arguments(config, folder, quiet=quiet)
        checkpoint = on_main(lambda: _open_output(config, held))
        run = load_run(config, arguments.world_size)
        if checkpoint is not None:
            refuse_other_settings(checkpoint, run.identity)
            refuse_broken(checkpoint)
            logger.info("resuming from %s", checkpoint.path)
        loss_before = 0.0 if checkpoint is None else checkpoint.loss
        trainer = make_trainer(run, arguments, quiet=quiet, loss_before=loss_before)
        if checkpoint is not None and checkpoint.step >= run.choices.steps:
            trained = _load_trained(trainer, checkpoint, is_ivon=run.choices.ivon is not None)
        else:
            trained = _train(trainer, checkpoint)
        trainer.accelerator.wait_for_everyone()
        optimizer = None if run.choices.ivon is None else unwrap(trainer.optimizer)
        return on_main(lambda: _store(run, optimizer, trained, folder))


class _Trained(NamedTuple):
    """The whole run, over all its starts: steps made, and mean training loss of a step."""

    steps: int
    loss: float


@contextmanager
def _checkpoint_folder(config: FinetuneConfig) -> Iterator[Path]:
    """Where the Trainer writes: beside the output, or a folder that is removed at the end."""
    beside = checkpoints_of(Path(config.output))
    with Scratch(Path(tempfile.gettempdir()), "bmerge-") as scratch:
        yield beside if has_folder(config) else scratch.new


def _store(run: Run, optimizer: IVON | None, trained: _Trained, folder: Path) -> FinetuneReport:
    """Store the model with the logs of its training, and then clean up beside it."""
    report = save_finetuned(run, optimizer, trained.steps, trained.loss, folder)
    if has_folder(run.config):
        keep = run.config.keep_checkpoints or run.config.save_steps is None
        close_checkpoints(folder, keep=keep)
    return report


def _open_output(config: FinetuneConfig, held: ExitStack) -> Checkpoint | None:
    """Make sure that the output may be written, and find the checkpoint to continue from.

    Args:
        config: Settings of the run.
        held: Keeps other runs away from the checkpoints until it is closed.
    """
    target = Path(config.output)
    if target.exists() and not config.force:
        raise CheckpointError(
            f"'{target}' exists. Choose another output, or pass --force to replace it."
        )
    data = (config.data,) if isinstance(config.data, str) else config.data
    refuse_inputs(target, [config.model, *data])
    folder = checkpoints_of(target)
    if has_folder(config):
        make_checkpoint_folder(folder)
        held.enter_context(holding(folder))
    if config.save_steps is None:
        return None
    return open_checkpoints(folder, resume=config.resume, force=config.force)


def _train(trainer: "Trainer", checkpoint: Checkpoint | None) -> _Trained:
    """Train from the first step, or on from a checkpoint."""
    from transformers import TrainerState

    step, loss, path = 0, 0.0, None
    if checkpoint is not None:
        step, loss, path = checkpoint.step, checkpoint.loss, str(checkpoint.path)
        with _loading(checkpoint):
            TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        for name in _LOADERS:
            setattr(trainer, name, _loading(checkpoint)(getattr(trainer, name)))
    trainer._save_checkpoint = _saying_what_fails(trainer._save_checkpoint, trainer.args.output_dir)
    output = trainer.train(resume_from_checkpoint=path)
    loss += mean_over_ranks(output.training_loss) * (output.global_step - step)
    return _Trained(output.global_step, loss / max(1, output.global_step))


def _saying_what_fails(save: Callable[..., None], folder: str | None) -> Callable[..., None]:
    """Make a full disk one message: torch and safetensors raise errors of their own for it."""

    def wrapped(*args: object, **kwargs: object) -> None:
        call(
            f"{folder}: writing a checkpoint failed",
            lambda: save(*args, **kwargs),
            "Free some space; the same line and --resume goes on from the last complete one.",
        )

    return wrapped


@contextmanager
def _loading(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what libraries raise over a checkpoint's files, which is anything, into one message."""
    try:
        yield
    except BmergeError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"'{checkpoint.path}' cannot be loaded ({type(error).__name__}: {reason}). Remove it: "
            "--resume then takes the one before it."
        ) from None


def _load_trained(trainer: "Trainer", checkpoint: Checkpoint, *, is_ivon: bool) -> _Trained:
    """Load a run that was stopped after its last step.

    The Trainer itself would make one more step if that lies in the middle of an epoch.
    """
    with _loading(checkpoint):
        trainer._load_from_checkpoint(str(checkpoint.path))
        if is_ivon:
            trainer.create_optimizer()
            file = checkpoint.path / "optimizer.pt"
            state = torch.load(file, map_location="cpu", weights_only=True)
            trainer.optimizer.load_state_dict(state)
    return _Trained(checkpoint.step, checkpoint.loss / checkpoint.step)
