"""The course of a training run: where it writes, where it continues from, and its steps.

`bmerge finetune` and `bmerge adapt` both run through here.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
    has_folder,
    holding,
    make_checkpoint_folder,
    open_checkpoints,
    refuse_broken,
    refuse_other_settings,
)
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
    """The whole run, over all its starts: steps made, and mean training loss of a step."""

    steps: int
    loss: float


@contextmanager
def checkpoint_folder(config: FinetuneConfig) -> Iterator[Path]:
    """Where the Trainer writes: beside the output, or a folder that is removed at the end."""
    beside = checkpoints_of(Path(config.output))
    with Scratch(Path(tempfile.gettempdir()), "bmerge-") as scratch:
        yield beside if has_folder(config) else scratch.new


def refuse_output(config: FinetuneConfig) -> None:
    """Refuse an output that exists already, or that would replace the model or the data.

    Raises:
        CheckpointError: It is one.
    """
    target = Path(config.output)
    if target.exists() and not config.force:
        raise CheckpointError(
            f"'{target}' exists. Choose another output, or pass --force to replace it."
        )
    data = (config.data,) if isinstance(config.data, str) else config.data
    refuse_inputs(target, [config.model, *data])


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
    trainer: "Trainer", checkpoint: Checkpoint | None, steps: int, *, is_ivon: bool
) -> Trained:
    """Train from the first step, or on from a checkpoint, which may be of the last one.

    Args:
        trainer: The Trainer.
        checkpoint: Where to continue; None for a run from the first step.
        steps: Optimizer steps of the whole run.
        is_ivon: Whether the optimizer's state is needed after training.
    """
    if checkpoint is not None and checkpoint.step >= steps:
        trained = _load_trained(trainer, checkpoint, is_ivon=is_ivon)
    else:
        trained = _train(trainer, checkpoint)
    trainer.accelerator.wait_for_everyone()
    return trained


def _train(trainer: "Trainer", checkpoint: Checkpoint | None) -> Trained:
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
    return Trained(output.global_step, loss / max(1, output.global_step))


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
    """Load a run that was stopped after its last step.

    The Trainer itself would make one more step if that lies in the middle of an epoch.
    """
    with _loading(checkpoint):
        trainer._load_from_checkpoint(str(checkpoint.path))
        # After training a flush computes as training did, under its autocast.
        trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
        if is_ivon:
            trainer.create_optimizer()
            if is_sharded(trainer.model):
                trainer.load_optimizer(str(checkpoint.path))
            else:
                file = checkpoint.path / "optimizer.pt"
                state = torch.load(file, map_location="cpu", weights_only=True)
                trainer.optimizer.load_state_dict(state)
    return Trained(checkpoint.step, checkpoint.loss / checkpoint.step)
