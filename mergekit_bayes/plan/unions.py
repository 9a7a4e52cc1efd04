"""Bring all models of a merge to one list of tokens: whose tokenizer, and which rows."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.model_config import read_config, text_config
from mergekit_bayes.checkpoint.side_files import FETCHED
from mergekit_bayes.checkpoint.sources import resolve
from mergekit_bayes.checkpoint.specs import CheckpointSource
from mergekit_bayes.checkpoint.token_maps import MEAN, ZERO, TokenMaps, TokenRule, token_maps
from mergekit_bayes.checkpoint.token_rows import TokenSource, token_rows, token_tensors
from mergekit_bayes.checkpoint.tokenizer_files import tokenizer_files
from mergekit_bayes.checkpoint.tokenizer_parts import TokenizerParts, read_parts
from mergekit_bayes.checkpoint.tokenizers import (
    TokenList,
    has_tokens,
    read_tokens,
    special_token_ids,
    tokenizer_identity,
)
from mergekit_bayes.checkpoint.vocabularies import OutputTokens, OwnTokens, output_tokens
from mergekit_bayes.errors import ConfigError, MismatchError, did_you_mean, shown
from mergekit_bayes.plan.vocabulary import token_folder
from mergekit_bayes.posterior import Posterior

BASE, UNION = "base", "union"
_ID_KEY = re.compile(r"_token_(id|ids|index)$")


class RowChoice(NamedTuple):
    """The row of one token where a model lacks it, as the user chose it.

    Attributes:
        model: The model that gives it, as the merge names it; None for zeros.
        token: The token whose row it is; by default the token itself.
        token_id: The number of the row, in place of a token.
        is_forced: Whether the models that have the token take this row, too.
    """

    model: str | None
    token: str | None = None
    token_id: int | None = None
    is_forced: bool = False


@dataclass(frozen=True)
class TokenChoice:
    """The tokens of an output, as the user chose them.

    Attributes:
        source: `base`, `union`, or a model whose tokens the output has: one of the merge as it is
            named there, a folder, or a Hub id.
        rows: Rows of single tokens. A token that the output would lack is added.
        multiple: The number of rows is rounded up to a multiple of it.
    """

    source: str = UNION
    rows: Mapping[str, RowChoice] = field(default_factory=dict)
    multiple: int = 1


@dataclass(frozen=True)
class TokenPlan:
    """All models of a merge, brought to one list of tokens.

    Attributes:
        models: The models in their order, whose means have the rows of the output's tokens. Where
            nothing changes it is the model as it was.
        tokens: The tokens.
        maps: The rows.
        folder: The folder whose tokenizer the output has, or has in an extended form.
        ref: The same as a model, as the user gave it.
        copied: Files of the tokenizer to be copied, by their names in the output.
        written: Files of the tokenizer to be written, and their text.
        config_changes: Keys of the written `config.json` that follow; None removes a key. The
            config is that of the base, else of the first model.
        notes: Remarks for the report.
        parts: The tokenizer of each model.
    """

    models: tuple[Posterior, ...]
    tokens: OutputTokens
    maps: TokenMaps
    folder: Path
    ref: str
    copied: Mapping[Path, Path]
    written: Mapping[Path, str]
    config_changes: Mapping[str, object]
    notes: tuple[str, ...]
    parts: tuple[TokenizerParts, ...]

    def new_ids(self, model: int, content: Mapping[str, Any]) -> dict[str, object]:
        """The keys of a model's config that must change because tokens have other numbers.

        Args:
            model: The number of the model in whose numbers the config is written.
            content: A `config.json`, `generation_config.json` or a part of one.

        Returns:
            The keys that end in `_token_id`, `_token_ids` or `_token_index` and change; None for
            one whose token the output lacks.
        """
        return _new_ids(self.tokens, self.parts[model], content)


def plan_tokens(
    models: Sequence[Posterior], base: int | None, choice: TokenChoice | None = None
) -> TokenPlan:
    """Choose the output's tokens, and map the rows of all models to them.

    Reads the tokenizers and the headers of the models, and no tensor.

    Args:
        models: All models of the merge, opened. A model that is listed twice counts once in a mean.
        base: The position of the base among them, whose rows are taken where another one lacks a
            token; None without a base, where the first model's tokens come first.
        choice: What the user chose; by default a union.

    Returns:
        The plan. Its models own the files of those given.

    Raises:
        CheckpointError: A tokenizer cannot be read.
        ConfigError: The choice names a model or token that is not there.
        MismatchError: A model lists no tokens, or tokenizers or rows do not fit together.
    """
    choice = TokenChoice() if choice is None else choice
    tokenizers = _Tokenizers()
    folders = [tokenizers.folder_of(model) for model in models]
    parts = tuple(map(tokenizers.parts, folders))
    rows = [token_rows(model.mean.specs) for model in models]
    own = [OwnTokens(m.ref, p, n) for m, p, n in zip(models, parts, rows, strict=True)]
    owner = base or 0
    position = owner if choice.source in (BASE, UNION) else _find(choice.source, models)
    if position is not None:
        donor = own[position]
    else:
        folder = _other_folder(choice.source, models)
        donor = OwnTokens(choice.source, tokenizers.parts(folder), 0)
    tokens = output_tokens(
        donor, own, union=choice.source == UNION, more=list(choice.rows), multiple=choice.multiple
    )
    rules = {
        tokens.numbers[token]: _rule(token, row, models, own) for token, row in choice.rows.items()
    }
    maps = token_maps(
        tokens.numbers,
        [p.numbers for p in parts],
        rows,
        base=base,
        rules=rules,
        counted=_distinct(models),
        total=tokens.rows,
    )
    sources = [model.mean for model in models]
    files = tokenizer_files(tokens)
    notes = [*tokens.notes, *_describe_rows(tokens, maps, own)]
    return TokenPlan(
        models=tuple(_with_rows(models, sources, m, maps) for m in range(len(models))),
        tokens=tokens,
        maps=maps,
        folder=donor.parts.folder,
        ref=donor.ref,
        copied=files.copied,
        written=files.written,
        config_changes=_config_changes(tokens, models, parts, owner, position),
        notes=tuple(notes),
        parts=parts,
    )


class _Tokenizers:
    """Reads the tokenizers of folders, and each but once where several have the same one."""

    def __init__(self) -> None:
        self._lists: dict[str, TokenList] = {}
        self._parts: dict[str, TokenizerParts] = {}

    def folder_of(self, model: Posterior) -> Path:
        """The folder that lists the tokens of a model."""
        folder = token_folder(model)
        if folder is None or _key(folder) not in self._lists:
            listed = None if folder is None else read_tokens(folder)
            if folder is None or listed is None:
                raise MismatchError(
                    f"'{model.ref}' lists no tokens ({model.path}), and the rows of its embedding "
                    "have no meaning without. Name it as a folder with its tokenizer, or leave the "
                    "choice of tokens out."
                )
            self._lists[_key(folder)] = listed
        return folder

    def parts(self, folder: Path) -> TokenizerParts:
        """The tokenizer of a folder, after all models were looked at."""
        if (key := _key(folder)) not in self._parts:
            lists = self._lists.values()
            reference = next((x for x in lists if not x.is_sentencepiece), None)
            parts = read_parts(folder, reference)
            assert parts is not None  # its list was read before
            self._parts[key] = parts
        return self._parts[key]


def _key(folder: Path) -> str:
    """What the folders have in common that have the same tokenizer."""
    return tokenizer_identity(folder) or str(folder)


def _find(ref: str, models: Sequence[Posterior]) -> int | None:
    """The position of a model that is named as the merge names it, or by the same path."""
    refs = [model.ref for model in models]
    if ref in refs:
        return refs.index(ref)
    path = os.path.realpath(os.path.expanduser(ref))
    paths = [os.path.realpath(model.path) for model in models]
    return paths.index(path) if path in paths else None


def _other_folder(ref: str, models: Sequence[Posterior]) -> Path:
    """The folder of a tokenizer whose model is not merged."""
    path = resolve(ref, FETCHED)
    folder = path if path.is_dir() else path.parent
    if not has_tokens(folder) or read_tokens(folder) is None:
        names = ", ".join(model.ref for model in models)
        raise ConfigError(
            f"The tokens of {shown(ref)} are asked for, and {folder} lists none. Name one of "
            f"{names}, or a folder with a tokenizer."
        )
    return folder


def _rule(
    token: str, row: RowChoice, models: Sequence[Posterior], own: Sequence[OwnTokens]
) -> TokenRule:
    """Find the row that the user chose for a token."""
    if row.model is None:
        return TokenRule(ZERO, 0, row.is_forced)
    position = _find(row.model, models)
    if position is None:
        refs = [model.ref for model in models]
        message = (
            f"The row of the token {shown(token)} is to be that of {shown(row.model)}, which is "
            f"none of the merged models ({', '.join(refs)}). {did_you_mean(row.model, refs)}"
        )
        raise ConfigError(message.strip())
    listed, rows = own[position].parts.numbers, own[position].rows
    wanted = token if row.token is None else row.token
    number = listed.get(wanted) if row.token_id is None else row.token_id
    if number is None:
        raise ConfigError(
            f"The row of the token {shown(token)} is to be that of {shown(wanted)} in "
            f"'{row.model}', which has no such token. {did_you_mean(wanted, listed)}".strip()
        )
    if not 0 <= number < rows:
        raise ConfigError(
            f"The row of the token {shown(token)} is to be row {number:,} of '{row.model}', whose "
            f"embedding has {rows:,} rows. Take another one."
        )
    return TokenRule(position, number, row.is_forced)


def _distinct(models: Sequence[Posterior]) -> list[int]:
    """The positions of the models, without those that are listed a second time."""
    keys = [tuple(str(p.path) for p in (model, *model.parts)) for model in models]
    return [position for position, key in enumerate(keys) if keys.index(key) == position]


def _with_rows(
    models: Sequence[Posterior],
    sources: Sequence[CheckpointSource],
    model: int,
    maps: TokenMaps,
) -> Posterior:
    source = sources[model]
    owner, row = maps.of(model)
    lengths = {source.specs[name].shape[0] for name in token_tensors(source.specs)}
    is_same = (owner == model).all() and (row == np.arange(maps.rows)).all()
    if not lengths or (is_same and lengths == {maps.rows}):
        return models[model]
    mapped = TokenSource(sources, model, maps, [m.ref for m in models])
    return replace(models[model], mean=mapped, stored_mean=source)


def _describe_rows(tokens: OutputTokens, maps: TokenMaps, own: Sequence[OwnTokens]) -> list[str]:
    """Say which rows the models get that lack tokens."""
    notes = []
    is_token = np.zeros(maps.tokens, np.bool_)
    is_token[list(tokens.numbers.values())] = True
    for model, (ref, parts, rows) in enumerate(own):
        lost = [t for t, number in parts.numbers.items() if number < rows]
        lost = [t for t in lost if t not in tokens.numbers]
        if lost and tokens.donor is not parts:
            notes.append(f"{len(lost):,} tokens of '{ref}' are left out, such as {shown(lost[0])}")
        missing = (maps.own[model] < 0) & is_token
        if not rows or not missing.any():
            continue
        owners, counts = np.unique(maps.filled.owner[missing], return_counts=True)
        names = {MEAN: "the mean of the models that have them", ZERO: "zeros"}
        kinds = [
            f"{count:,} {names.get(int(o)) or repr(own[o].ref)}"
            for o, count in zip(owners, counts, strict=True)
        ]
        total = int(missing.sum())
        notes.append(
            f"'{ref}' lacks {total:,} of the {len(tokens.numbers):,} tokens, and takes for them "
            f"the rows of: {', '.join(kinds)}"
        )
    if forced := int(maps.forced.sum()):
        notes.append(f"the rows of {forced:,} token{'s' if forced > 1 else ''} are forced")
    if padding := maps.rows - maps.tokens:
        notes.append(f"{padding:,} rows behind those of the tokens are padding: a model's mean row")
    return notes


def _config_changes(
    tokens: OutputTokens,
    models: Sequence[Posterior],
    parts: Sequence[TokenizerParts],
    owner: int,
    donor: int | None,
) -> dict[str, object]:
    """Keys of the output's config, which is that of the model `owner`."""
    config = _config_of(models[owner])
    changes = _new_ids(tokens, parts[owner], {**text_config(config), **config})
    if donor != owner and parts[owner] is not tokens.donor:
        folder = tokens.donor.folder
        given = _config_of(models[donor]) if donor is not None else read_config(folder)
        of_donor = {**text_config(given), **given}
        ids = {key: x for key, x in of_donor.items() if _ID_KEY.search(key) and x is not None}
        changes |= ids or special_token_ids(folder)
        stored = {**text_config(config), **config}
        changes = {key: x for key, x in changes.items() if key not in stored or stored[key] != x}
    vocab_size = text_config(config).get("vocab_size", config.get("vocab_size"))
    if vocab_size != tokens.rows and token_rows(models[owner].mean.specs):
        changes["vocab_size"] = tokens.rows
    return changes


def _config_of(model: Posterior) -> dict[str, Any]:
    """The config of a model; of BASE+ADAPTER the base's."""
    path = model.parts[0].path if model.parts else model.path
    return read_config(path if path.is_dir() else path.parent)


def _new_ids(
    tokens: OutputTokens, parts: TokenizerParts, content: Mapping[str, Any]
) -> dict[str, object]:
    if parts is tokens.donor:
        return {}
    by_number = {number: token for token, number in parts.numbers.items()}

    def moved(number: object) -> int | None:
        token = by_number.get(number) if type(number) is int else None
        return None if token is None else tokens.numbers.get(token)

    changes: dict[str, object] = {}
    for key, value in content.items():
        if not _ID_KEY.search(key):
            continue
        if isinstance(value, list):
            numbers = [new for one in value if (new := moved(one)) is not None]
            new_value: object = numbers or None
        elif type(value) is int and value >= 0:  # -1 stands for none
            new_value = moved(value)
        else:
            continue
        if new_value != value:
            changes[key] = new_value
    return changes
