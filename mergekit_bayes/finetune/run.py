"""Fine-tune a model and keep its posterior: an ordinary checkpoint folder with a `posterior/`
inside.

Built on `transformers.Trainer`, so it runs unchanged under `accelerate launch`. What is stored by
default is a
flush: the root-GGN diagonal at the final mean times the number of observations, plus the prior.
`posterior: ivon` stores the optimizer's own h, which lags behind where the curvature falls and,
under `curvature: price`, has the right order but after a short run up to a thousand times the right
size.
"""

import logging
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import (
    Checkpoint,
    checkpoints_of,
    identity_of,
    open_checkpoints,
    refuse_other_settings,
)
from mergekit_bayes.finetune.choices import run_settings
from mergekit_bayes.finetune.data import load_data_and_model, with_lora
from mergekit_bayes.finetune.ranks import is_main, main_first, mean_over_ranks, on_main
from mergekit_bayes.finetune.refusals import refuse_launcher, refuse_quantised, refuse_settings
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport
from mergekit_bayes.finetune.store import save_finetuned
from mergekit_bayes.finetune.training import make_trainer, training_arguments
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.posterior.info import base_identity

logger = logging.getLogger(__name__)


def run_finetune(config: FinetuneConfig, *, quiet: bool = False) -> FinetuneReport:
    """Fine-tune, store the model and its posterior, and return what happened.

    Under a launcher every rank calls this and gets the same report, or the same error; rank 0
    writes.

    Raises:
        CheckpointError: The output or its checkpoints exist, or the model cannot be loaded.
        ConfigError: Settings that contradict each other, or those of the checkpoint that is
            resumed.
        MismatchError: Data without the named columns or with unknown labels.
    """
    refuse_settings(config)
    refuse_launcher(config)
    quiet = quiet or not is_main()
    with quiet_libraries(quiet):
        return _run(config, Path(config.output), quiet=quiet)


def _run(config: FinetuneConfig, target: Path, *, quiet: bool) -> FinetuneReport:
    import transformers

    transformers.set_seed(config.seed)
    scratch = Path(tempfile.mkdtemp(prefix="bmerge-"))
    try:
        arguments = training_arguments(
            config, scratch if config.save_steps is None else checkpoints_of(target), quiet=quiet
        )
        checkpoint = on_main(lambda: _open_output(config, target))
        loaded, examples = main_first(lambda: load_data_and_model(config))
        base = main_first(lambda: base_identity(loaded.path))
        if config.lora is not None:
            loaded = replace(loaded, model=with_lora(loaded, config.lora, config.model))
        refuse_quantised(loaded.model, config.model)
        settings = run_settings(config, arguments, loaded, examples)
        identity = identity_of(config, settings, base, examples, arguments.world_size)
        before = 0.0
        if checkpoint is not None:
            refuse_other_settings(checkpoint, identity)
            before = checkpoint.loss
            logger.info("resuming from %s", checkpoint.path)
        trainer = make_trainer(
            config, arguments, loaded, examples, settings, identity, quiet=quiet, loss_before=before
        )
        result = _train(trainer, checkpoint, settings["steps"], config)
        trainer.accelerator.wait_for_everyone()
        return on_main(
            lambda: save_finetuned(
                config, loaded, examples, trainer, settings, base, result, target
            )
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _open_output(config: FinetuneConfig, target: Path) -> Checkpoint | None:
    if target.exists() and not config.force:
        raise CheckpointError(
            f"'{target}' exists. Choose another output, or pass --force to replace it."
        )
    if config.save_steps is None:
        return None
    return open_checkpoints(checkpoints_of(target), resume=config.resume, force=config.force)


def _train(trainer: Any, checkpoint: Checkpoint | None, steps: int, config: FinetuneConfig) -> Any:
    """Train from the start or the checkpoint; what comes back has `global_step` and the whole run's
    `training_loss`.
    """
    if checkpoint is not None and checkpoint.step >= steps:
        # Killed after the last step: the Trainer would make one more in the middle of an epoch.
        trainer._load_from_checkpoint(str(checkpoint.path))
        if config.optimizer == "ivon":
            trainer.create_optimizer()
            state = torch.load(
                checkpoint.path / "optimizer.pt", map_location="cpu", weights_only=True
            )
            trainer.optimizer.load_state_dict(state)
        return SimpleNamespace(
            global_step=checkpoint.step, training_loss=checkpoint.loss / checkpoint.step
        )
    step, loss, path = (
        (0, 0.0, None)
        if checkpoint is None
        else (checkpoint.step, checkpoint.loss, checkpoint.path)
    )
    done = trainer.train(resume_from_checkpoint=None if path is None else str(path))
    loss += mean_over_ranks(done.training_loss) * (done.global_step - step)
    return SimpleNamespace(
        global_step=done.global_step, training_loss=loss / max(1, done.global_step)
    )
