"""The course of a training run: where it writes, where it continues from, and its steps.

`bmerge finetune` and `bmerge adapt` both run through here.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.errors import BmergeError, CheckpointError
from mergekit_bayes.finetune.checkpoints import (
    Checkpoint,
    checkpoints_of,
    has_folder,
    holding,
    make_checkpoint_folder,
    open_checkpoints,
    refuse_broken,
)
from mergekit_bayes.finetune.identity import refuse_other_settings
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.libraries import call
from mergekit_bayes.models.sharding import is_sharded
from mergekit_bayes.ranks import mean_over_ranks

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

# Methods of the Trainer that read the files of a checkpoint, and nothing else.
_LOADERS = ("_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state")


class Trained(NamedTuple):
    """The whole run, over all its starts.

    Attributes:
        steps: Steps made.
        loss: Mean training loss of a step.
        best_step: Step of the checkpoint whose weights the model has, where the best was loaded.
        evaluation: Held-out loss of the model, and perplexity or accuracy, if they were measured.
    """

    steps: int
    loss: float
    best_step: int | None = None
    evaluation: Mapping[str, float] = {}


@contextmanager
def checkpoint_folder(config: FinetuneConfig) -> Iterator[Path]:
    """Where the Trainer writes: beside the output, or a folder that is removed at the end."""
    beside = checkpoints_of(Path(config.output))
    with Scratch(Path(tempfile.gettempdir()), "bmerge-") as scratch:
        yield beside if has_folder(config) else scratch.new


def refuse_output(config: FinetuneConfig) -> None:
    """Refuse an output that exists already, or that would replace the model or what is read.

    Raises:
        CheckpointError: It is one.
    """
    target = Path(config.output)
    if target.exists() and not config.force:
        raise CheckpointError(
            f"'{target}' exists. Choose another output, or pass --force to replace it."
        )
    others = [*config.eval_sources, *([config.chat_template] if config.chat_template else [])]
    refuse_inputs(target, [config.model, *config.paths, *others])


def open_output(config: FinetuneConfig, held: ExitStack) -> Checkpoint | None:
    """Make sure that the output may be written, and find the checkpoint to continue from.

    Args:
        config: Settings of the run.
        held: Keeps other runs away from the checkpoints until it is closed.
    """
    refuse_output(config)
    folder = checkpoints_of(Path(config.output))
    if has_folder(config):
        make_checkpoint_folder(folder)
        held.enter_context(holding(folder))
    if config.save_steps is None:
        return None
    return open_checkpoints(folder, resume=config.resume, force=config.force)


def check_checkpoint(checkpoint: Checkpoint | None, identity: Mapping[str, object]) -> None:
    """Refuse a checkpoint of another run, or one that cannot be read; say that it is resumed."""
    if checkpoint is not None:
        refuse_other_settings(checkpoint, identity)
        refuse_broken(checkpoint)
        logger.info("resuming from %s", checkpoint.path)


def train(
    trainer: "Trainer",
    checkpoint: Checkpoint | None,
    steps: int,
    *,
    is_ivon: bool,
    patience: int | None = None,
) -> Trained:
    """Train from the first step, or on from a checkpoint, which may be of the last one.

    Args:
        trainer: The Trainer.
        checkpoint: Where to continue; None for a run from the first step.
        steps: Optimizer steps of the whole run.
        is_ivon: Whether the optimizer's state is needed after training.
        patience: As `FinetuneConfig` has it.
    """
    from mergekit_bayes.finetune.evaluation import has_ended, measured_at

    if checkpoint is not None and (checkpoint.step >= steps or has_ended(checkpoint, patience)):
        trained = _load_trained(trainer, checkpoint, is_ivon=is_ivon)
    else:
        trained = _train(trainer, checkpoint)
    trainer.accelerator.wait_for_everyone()
    state, best_step = trainer.state, None
    if trainer.args.load_best_model_at_end:
        best_step = state.best_global_step if state.best_model_checkpoint else None
        if best_step is None:
            logger.warning("load_best: no evaluation gave a loss, so the last weights are stored")
    evaluation = measured_at(state.log_history, best_step)
    return trained._replace(best_step=best_step, evaluation=evaluation)


def _train(trainer: "Trainer", checkpoint: Checkpoint | None) -> Trained:
    from transformers import TrainerState

    from mergekit_bayes.finetune.evaluation import best_of

    step, loss, path = 0, 0.0, None
    if checkpoint is not None:
        step, loss, path = checkpoint.step, checkpoint.loss, str(checkpoint.path)
        with _loading(checkpoint):
            state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        if trainer.args.load_best_model_at_end:
            best_of(checkpoint)  # which refuses a record that is none, and one that is gone
        _refuse_best_elsewhere(checkpoint, state.best_model_checkpoint)
        for name in _LOADERS:
            setattr(trainer, name, _loading(checkpoint)(getattr(trainer, name)))
    trainer._save_checkpoint = _saying_what_fails(trainer._save_checkpoint, trainer.args.output_dir)
    load_best, folder = trainer._load_best_model, trainer.args.output_dir
    trainer._load_best_model = partial(
        call, f"{folder}: the best checkpoint cannot be loaded", load_best
    )
    output = trainer.train(resume_from_checkpoint=path)
    loss += mean_over_ranks(output.training_loss) * (output.global_step - step)
    return Trained(output.global_step, loss / max(1, output.global_step))


def _refuse_best_elsewhere(checkpoint: Checkpoint, best: object) -> None:
    """Refuse a best checkpoint that is none of the run's own: the Trainer would load it."""
    if not isinstance(best, str) or not Path(best).is_dir():
        return
    if Path(best).resolve().parent != checkpoint.path.resolve().parent:
        raise CheckpointError(
            f"'{checkpoint.path}' names '{best}' as the best checkpoint of its run, which is not "
            f"beside it. Remove {checkpoint.path}: --resume then takes the one before it."
        )


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


def _load_trained(trainer: "Trainer", checkpoint: Checkpoint, *, is_ivon: bool) -> Trained:
    """Load a run that was stopped after its last step, or the best checkpoint of it.

    The Trainer itself would make one more step if that lies in the middle of an epoch.
    """
    from transformers import TrainerState

    from mergekit_bayes.finetune.evaluation import best_of

    best = best_of(checkpoint) if trainer.args.load_best_model_at_end else None
    path = checkpoint.path if best is None else best.path
    with _loading(checkpoint):
        trainer.state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        trainer.state.best_model_checkpoint = None if best is None else str(best.path)
        trainer._load_from_checkpoint(str(path))
        # After training a flush computes as training did, under its autocast.
        trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
        if is_ivon:
            trainer.create_optimizer()
            if is_sharded(trainer.model):
                trainer.load_optimizer(str(path))
            else:
                state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
                trainer.optimizer.load_state_dict(state)
    return Trained(checkpoint.step, checkpoint.loss / checkpoint.step)
