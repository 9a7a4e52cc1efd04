"""From an adapted model to a checkpoint folder."""

from pathlib import Path

import yaml

from mergekit_bayes.adapt.data import Run
from mergekit_bayes.adapt.settings import AdaptReport
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.side_files import ADAPT
from mergekit_bayes.checkpoint.sources import pinned
from mergekit_bayes.libraries import call


def save_adapted(run: Run, steps: int, reconstruction_error: float | None) -> AdaptReport:
    """Write the checkpoint folder, and say what was written.

    Args:
        run: The run, whose model is adapted now.
        steps: Optimizer steps made.
        reconstruction_error: Relative squared error of the K-prior's gradient, if it was told.

    Raises:
        CheckpointError: The folder cannot be written.
    """
    config, units = run.config, run.units
    with replacing(Path(config.output), force=config.force) as partial:
        save_model(run, partial)
    return AdaptReport(
        path=Path(config.output),
        steps=steps,
        kept_step=steps,
        reached=None,
        checks=(),
        unit=units.unit,
        removed=units.removed,
        added=units.added,
        memory=units.memory,
        base=units.base,
        kappa=units.kappa,
        tau=units.tau,
        learning_rate=units.learning_rate,
        refused_steps=0,
        reconstruction_error=reconstruction_error,
        estimator=None,
        health={},
    )


def save_model(run: Run, folder: Path) -> None:
    """Write model, tokenizer and the settings of the run.

    Raises:
        CheckpointError: A file cannot be written.
    """
    config, model = run.config, run.loaded.model

    def save() -> None:
        model.save_pretrained(folder)
        run.loaded.tokenizer.save_pretrained(folder)
        if config.lora is not None and run.loaded.task == "classification":
            model.config.save_pretrained(folder)  # an adapter's own does not name the labels

    call(f"{folder}: writing failed", save, "Free some space or choose another output.")
    settings = config.model_dump(mode="json", exclude={"force", "resume", "keep_checkpoints"})
    settings["model"] = pinned(config.model, run.loaded.path)
    (folder / ADAPT).write_text(yaml.safe_dump(settings, sort_keys=False))
