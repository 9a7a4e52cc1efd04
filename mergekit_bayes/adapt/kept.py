"""Store the model as it is after chosen steps, while the training goes on (`keep_steps`)."""

import os
import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_bayes.adapt.data import Run, sources
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.adapt.store import save_model
from mergekit_bayes.checkpoint.replacing import refuse_inputs, replacing
from mergekit_bayes.checkpoint.side_files import ADAPT
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import make_checkpoint_folder
from mergekit_bayes.ranks import on_main


def steps_of(target: Path) -> Path:
    """The folder of the kept steps of the run that writes `target`."""
    return target.with_name(f"{target.name}.steps")


def refuse_kept(config: AdaptConfig) -> None:
    """Refuse to keep steps where there is something.

    A run that is resumed finds there what it has kept itself.

    Raises:
        CheckpointError: There is something and neither `force` nor `resume` is set, or the model
            or the rows lie there.
    """
    folder = steps_of(Path(config.output))
    if not config.keep_steps:
        return
    is_empty = folder.is_dir() and not any(folder.iterdir())  # of a run that kept no step
    if os.path.lexists(folder) and not (is_empty or config.resume or config.force):
        raise CheckpointError(
            f"'{folder}' exists, where keep_steps stores. Choose another output, or pass --force "
            "to replace it."
        )
    refuse_inputs(folder, [config.model, *sources(config)])


def open_kept(config: AdaptConfig) -> None:
    """Make the folder of the kept steps, and remove those of an earlier run.

    Raises:
        CheckpointError: As `refuse_kept`, or the folder belongs to another account.
    """
    if not config.keep_steps:
        return
    refuse_kept(config)
    folder = steps_of(Path(config.output))
    make_checkpoint_folder(folder)
    if config.resume:
        return
    for path in folder.iterdir():
        if path.name.isdigit() and not path.is_symlink() and (path / ADAPT).is_file():
            shutil.rmtree(path)


class KeepSteps(TrainerCallback):  # type: ignore[misc]
    """Stores model, tokenizer and settings in `OUTPUT.steps/STEP`, without a posterior.

    Every rank must have it; rank 0 writes. Steps that the run does not make are not stored.

    Args:
        run: The run, whose model is stored as it then is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Store the model if this step is to be kept.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        if state.global_step not in self._run.config.keep_steps:
            return
        target = steps_of(Path(self._run.config.output)) / str(state.global_step)

        def store() -> None:
            with replacing(target, force=True) as partial:
                save_model(self._run, partial)

        on_main(store)
