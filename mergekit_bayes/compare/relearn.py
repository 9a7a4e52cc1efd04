"""Relearning: what a model says after a short fine-tune on removed text.

A copy of the model is trained for a few steps on some of the removed rows, as whoever downloads it
could, and is measured again. That teaches the text to a model that never held it, too, so the
number alone does not tell whether the text was erased or covered: for that, compare it with one of
a model that was trained without the text. All weights are trained, those of an adapter's merged
base, too: how much a model can relearn must not depend on how its edit is stored. One process
trains, on the device where the model is measured, so that the numbers are those of one process.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.finetune.settings import FinetuneConfig
from mergekit_bayes.launcher import on_device
from mergekit_bayes.libraries import call
from mergekit_bayes.models.columns import Columns
from mergekit_bayes.models.examples import read_examples, refuse_blank
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.merged import merge_adapter
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.ranks import main_first, on_main

if TYPE_CHECKING:
    pass

_ROWS_A_STEP = 16
_PREFIX = ".bmerge-relearn-"
_SEEDS = 2**32  # of a fine-tune; those of an evaluation go further


def refuse_relearning(config: CompareConfig) -> None:
    """Refuse settings and rows that cannot be relearnt, before any model is measured.

    Raises:
        ConfigError: Settings of relearning without its rows.
        CheckpointError: The rows cannot be read, or the output would replace them.
        MismatchError: They lack the column of the texts or, where a classifier is measured, of the
            labels, or no row is left.
    """
    if config.relearn is None:
        fields = type(config).model_fields
        given = [
            "--" + name.replace("_", "-")
            for name in ("relearn_where", "relearn_rows", "relearn_steps", "relearn_rate")
            if getattr(config, name) != fields[name].default
        ]
        if given:
            raise ConfigError(
                f"{', '.join(given)}: about --relearn, which is not given. Name the removed rows "
                "(--relearn ROWS), or leave the rest out."
            )
        return
    if config.output is not None:
        refuse_inputs(Path(config.output), [config.relearn])
    rows = load_rows(
        config.relearn,
        where=config.relearn_where or None,
        max_rows=config.relearn_rows,
        text=config.text_column,
        label=config.label_column if config.classify else None,
    )
    refuse_blank(config.relearn, config.text_column, rows[config.text_column])


def refuse_rows(config: CompareConfig, loaded: Loaded) -> None:
    """Refuse rows that a loaded model cannot relearn.

    Raises:
        MismatchError: A label is not one of the classifier's, or no row gives anything to learn
            from.
    """
    if config.relearn is not None:
        is_classifier = loaded.task == "classification"
        read_examples(
            config.relearn,
            loaded,
            columns=Columns(text=config.text_column),
            label=config.label_column if is_classifier else None,
            where=config.relearn_where or None,
            max_rows=config.relearn_rows,
        )


def relearn(config: CompareConfig, model: str, loaded: Loaded) -> None:
    """Train a copy of a model on the rows, and give the loaded model the weights of the copy.

    The copy lies in a folder beside the output, which is removed however this ends. Training is
    that of `bmerge finetune`: AdamW at a constant rate, 16 rows a step, in float32. It runs on the
    device of `loaded`, which makes room there meanwhile. Every rank must call this, and rank 0
    trains.

    Args:
        config: The rows, the steps, their rate and the seed.
        model: The model, as the config names it.
        loaded: The same, loaded; changed in place. An adapter is merged into its base first.

    Raises:
        BmergeError: As `run_finetune`, `merge_adapter`; or the folder cannot be made, or training
            left weights that are not finite.
    """
    device = loaded.device
    plain = merge_adapter(loaded)
    loaded.model.to("cpu")
    with ExitStack() as stack:
        folder = on_main(lambda: _make_folder(config, stack))
        start = model
        if plain is not loaded.model:
            start = str(folder / "merged")
            on_main(lambda: _save(loaded, folder / "merged"))
        target = folder / "relearnt"
        training = _training(config, start, target)
        on_main(lambda: on_device(device, run_finetune, training, quiet=True))
        trained = main_first(
            lambda: load_model(str(target), trust_remote_code=config.trust_remote_code)
        )
        if not all(p.isfinite().all() for p in trained.model.parameters()):
            raise ConfigError(
                f"--relearn: after {config.relearn_steps} steps at {config.relearn_rate:g} the "
                f"weights of '{model}' are not finite. Lower --relearn-rate."
            )
        plain.load_state_dict(trained.model.state_dict())
    loaded.model.to(device)


def _training(config: CompareConfig, model: str, target: Path) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {
            "model": model,
            "output": str(target),
            "data": config.relearn,
            "where": config.relearn_where or None,
            "max_rows": config.relearn_rows,
            "text_column": config.text_column,
            "label_column": config.label_column,
            "optimizer": "adamw",
            "learning_rate": config.relearn_rate,
            "scheduler": "constant",
            "max_steps": config.relearn_steps,
            "batch_size": _ROWS_A_STEP,
            "posterior": "none",
            "seed": config.seed % _SEEDS,
            "trust_remote_code": config.trust_remote_code,
        }
    )


def _make_folder(config: CompareConfig, stack: ExitStack) -> Path:
    """A folder beside the output, or among the system's temporary ones, until the stack closes."""
    parent = Path(config.output).parent if config.output else Path(tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return stack.enter_context(Scratch(parent, _PREFIX)).new
    except OSError as error:
        raise CheckpointError(
            f"{parent}: no folder can be made there for relearning ({error.strerror or error}). "
            "Choose another -o."
        ) from None


def _save(loaded: Loaded, folder: Path) -> None:
    def save() -> None:
        merge_adapter(loaded).save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)

    call(f"{folder}: writing failed", save, "Free some space or choose another output.")
