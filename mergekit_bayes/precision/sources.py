"""The examples that a precision is estimated on: the user's rows, or what needs no data.

A causal language model can write its own data. Texts sampled from it at temperature 1 give the
curvature under its own distribution without bias, which is that of its training data as far as it
has learned them. Uniform tokens cost nothing, and no text looks like them.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.replacing import refuse_inputs, replacing
from mergekit_bayes.curvature.fisher_exact import refuse_outputs
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.curvature.parts import parts_in
from mergekit_bayes.curvature.table import LABELLED
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.generation import write_texts
from mergekit_bayes.libraries import embedding_rows
from mergekit_bayes.models.columns import Columns
from mergekit_bayes.models.encode import encode_rows
from mergekit_bayes.models.examples import Encoded, read_examples
from mergekit_bayes.models.load import Loaded, other_head
from mergekit_bayes.models.quiet import bar
from mergekit_bayes.models.rows import load_rows
from mergekit_bayes.precision.keeping import parts_folder
from mergekit_bayes.precision.settings import PrecisionConfig

_TEXT = "text"  # the column of the texts that are kept, which is that of `--data` by default


class Source(NamedTuple):
    """What a precision is estimated on.

    Attributes:
        name: Where the examples come from.
        examples: Encoded rows, as `encode_rows` makes them.
        record: What the posterior says of the source; of rows it says nothing.
        notes: What was guessed of it, cut or left out.
    """

    name: Literal["data", "self-generated", "random-tokens"]
    examples: list[dict[str, Any]]
    record: dict[str, str | float]
    notes: tuple[str, ...] = ()


def refuse_source(config: PrecisionConfig, target: Path | None) -> None:
    """Refuse settings that name no source, or two, or a place where texts cannot be kept.

    Args:
        config: The settings, without `moments`; those `moment_checks` looks at.
        target: Where the precision is written; None if that is not known yet.

    Raises:
        CheckpointError: The file for the texts exists and `force` is False, or it is an input.
        ConfigError: The settings do not go together.
    """
    given = [
        flag
        for flag, value in (
            ("--data", config.data),
            ("--self-generated", config.self_generated),
            ("--random-tokens", config.random_tokens),
        )
        if value is not None
    ]
    if not given:
        raise ConfigError(
            "name what the precision stands for: --data TEXT, or --from PATH. A causal language "
            "model can do without: --self-generated N (texts that it writes) or --random-tokens N."
        )
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a precision stands for one of them. Name one.")
    if config.where is not None and config.data is None:
        raise ConfigError(f"--where chooses rows of --data, and {given[0]} has none. Leave it out.")
    if config.estimator in LABELLED and config.random_tokens is not None:
        raise ConfigError(
            f"--estimator {config.estimator} looks at observed tokens, and nobody observed those "
            "of --random-tokens. Choose ggn or fisher, or another source."
        )
    if config.keep_generated is not None:
        _refuse_keeping(config, Path(os.path.expanduser(config.keep_generated)), target)


def _refuse_keeping(config: PrecisionConfig, kept: Path, target: Path | None) -> None:
    if config.self_generated is None:
        raise ConfigError("--keep-generated keeps the texts of --self-generated N. Name both.")
    if os.path.lexists(kept) and not config.force and not _is_stopped(config):
        raise CheckpointError(
            f"'{kept}' exists. Choose another --keep-generated, or pass --force to replace it."
        )
    place = None if target is None else os.path.realpath(target)
    if place is not None and Path(os.path.realpath(kept)).is_relative_to(place):
        raise ConfigError(
            f"--keep-generated: '{kept}' lies in the output '{target}', which would replace it. "
            "Choose another."
        )
    refuse_inputs(kept, [config.model])


def read_source(config: PrecisionConfig, loaded: Loaded) -> Source:
    """Read rows, or have the model do without them.

    A model that writes is moved to its device.

    Raises:
        CheckpointError: Rows cannot be read, or the model cannot write.
        ConfigError: The model is a classifier and no rows are named, or the estimator is not for
            this model.
        MismatchError: Rows without the named columns, labels that are not the classifier's, or
            nothing to learn from.
    """
    if config.estimator == "fisher-exact":
        refuse_outputs(_outputs(loaded))
    if config.data is not None:
        rows, examples, blank, notes = _read_rows(config, loaded)
        return Source("data", examples, {}, (*_left_out(blank, rows + blank, "rows"), *notes))
    source: Literal["self-generated", "random-tokens"]
    source = "random-tokens" if config.self_generated is None else "self-generated"
    if loaded.task == "classification":
        raise ConfigError(
            f"--{source} is for causal language models, and '{config.model}' is a classifier. Name "
            "any text with --data: labels are not needed."
        )
    length = min(config.max_length, loaded.context)
    record: dict[str, str | float] = {"source": source, "max_length": length}
    if config.self_generated is None:
        count = config.random_tokens or 0
        examples = random_tokens(loaded, count, length, config.seed)
        return Source(source, examples, record | {"random_tokens": count})
    written = _written(config, loaded, length)
    texts = [text for text in written if text.strip()]  # as of rows that are read
    examples = encode_rows(
        {_TEXT: texts}, loaded, text=_TEXT, max_length=length, source=f"--{source}"
    )
    record |= {"texts": len(texts), "temperature": 1.0, "top_p": 1.0}
    left_out = _left_out(len(written) - len(texts), len(written), "texts")
    return Source(source, examples, record, left_out)


def random_tokens(loaded: Loaded, count: int, length: int, seed: int) -> list[dict[str, Any]]:
    """Rows of uniform tokens behind the start token, `count` tokens in all.

    Special tokens, and those that the model has no row for, are not drawn.

    Args:
        loaded: A causal language model.
        count: Number of tokens, each of which is scored.
        length: Tokens of a row with its start token; the last row may be shorter.
        seed: Seed of the tokens.
    """
    special = set(loaded.tokenizer.all_special_ids)
    known = min(len(loaded.tokenizer), embedding_rows(loaded.model) or len(loaded.tokenizer))
    tokens = torch.tensor([token for token in range(known) if token not in special])
    generator = torch.Generator().manual_seed(seed)
    drawn = tokens[torch.randint(len(tokens), (count,), generator=generator)]
    rows = [[loaded.start, *row.tolist()] for row in torch.split(drawn, length - 1)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _left_out(blank: int, rows: int, what: str) -> tuple[str, ...]:
    """The note on rows without a word; none where there are none."""
    return (
        (f"{blank:,} of {rows:,} {what} hold no word that is scored and were left out",)
        if blank
        else ()
    )


def _outputs(loaded: Loaded) -> int:
    config = loaded.model.config
    name = "num_labels" if loaded.task == "classification" else "vocab_size"
    return int(getattr(config, name, 0) or 0)


def _read_rows(config: PrecisionConfig, loaded: Loaded) -> Encoded:
    """The rows of `data`, encoded; with labels only where the estimator looks at them."""
    assert config.data is not None
    label = None
    if loaded.task == "classification" and config.estimator in LABELLED:
        _refuse_other_heads(config, loaded)
        label = config.label_column
    try:
        return read_examples(
            config.data,
            loaded,
            columns=Columns(
                config.text_column,
                config.messages_column,
                config.prompt_column,
                config.completion_column,
            ),
            label=label,
            where=config.where,
            max_length=config.max_length,
            skip_blank=True,
        )
    except MismatchError as error:
        if label is None:
            raise
        raise MismatchError(
            f"{error} --estimator {config.estimator} looks at the labels in --label-column."
        ) from None


def _refuse_other_heads(config: PrecisionConfig, loaded: Loaded) -> None:
    """Refuse labels for a head that does not choose one of them: rows hold one label each."""
    loss = trained_loss(loaded.model)
    if other_head(loaded) or loss.likelihood != "categorical":
        raise ConfigError(
            f"--estimator {config.estimator} looks at one label a row, and the loss of "
            f"'{config.model}' is {loss.describe()}. Choose ggn, fisher or fisher-exact, which "
            "need no labels."
        )


def _is_stopped(config: PrecisionConfig) -> bool:
    """Whether an estimate goes on from a saved state."""
    return config.resume and bool(parts_in(parts_folder(config)))


def _written(config: PrecisionConfig, loaded: Loaded, length: int) -> list[str]:
    """Texts that the model writes from its start token alone; kept where that is asked for.

    An estimate that goes on reads what it has kept. Its saved state names the rows that it is of.
    """
    count = config.self_generated or 0
    kept = (
        None if config.keep_generated is None else Path(os.path.expanduser(config.keep_generated))
    )
    if kept is not None and kept.exists() and _is_stopped(config):
        return [str(text) for text in load_rows(str(kept), text=_TEXT)[_TEXT]]
    loaded.move_to(config.device)
    with bar("texts", count) as progress:
        texts = write_texts(
            loaded.model,
            loaded.tokenizer,
            count,
            start=loaded.start,
            context=loaded.context,
            new_tokens=length - 1,
            seed=config.seed,
            progress=progress,
        )
    if kept is not None:
        with replacing(kept, force=config.force) as partial:
            write_own(partial, "".join(json.dumps({_TEXT: text}) + "\n" for text in texts))
    return texts
