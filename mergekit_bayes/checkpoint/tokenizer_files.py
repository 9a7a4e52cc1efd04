"""Write a tokenizer that is another one with tokens added to it.

Everything but the tokens is the donor's, as it is stored: normalisation, template of special
tokens, chat template.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.side_files import group_of, side_files
from mergekit_bayes.checkpoint.vocabularies import OutputTokens
from mergekit_bayes.documents import read_mapping
from mergekit_bayes.errors import CheckpointError, MismatchError, shown

_JSON, _CONFIG, _ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
_UNLIKELY = 10.0  # how much below all others the score of a piece is that is never split off


class TokenizerFiles(NamedTuple):
    """The files of an output's tokenizer, by their names relative to its folder.

    Attributes:
        copied: The file that each is a copy of.
        written: The text of the others.
    """

    copied: dict[Path, Path]
    written: dict[Path, str]


def tokenizer_files(output: OutputTokens) -> TokenizerFiles:
    """The files of the tokenizer with the tokens of an output.

    A tokenizer to which nothing is added is copied. Of one that is changed only `tokenizer.json`
    and the configs are written, as transformers does: other lists of tokens would not be true.

    Args:
        output: The tokens.

    Raises:
        CheckpointError: A file cannot be read, or is no tokenizer.
        MismatchError: The tokenizer has no place for a token.
    """
    folder = output.donor.folder
    names = [name for name in side_files(folder) if group_of(name) == "tokenizer"]
    if not output.is_extended:
        return TokenizerFiles({name: folder / name for name in names}, {})
    written: dict[Path, str] = {}
    if output.donor.can_be_extended:
        written[Path(_JSON)] = _text(_extended(output))
        kept = [n for n in names if n.suffix == ".py" or n.name == "special_tokens_map.json"]
    else:
        stored = read_mapping(folder / _ADDED) if Path(_ADDED) in names else {}
        appended = {token: output.numbers[token] for token in output.added}
        written[Path(_ADDED)] = _text(stored | appended)
        kept = [name for name in names if name.name not in (_ADDED, _CONFIG)]
    if Path(_CONFIG) in names:
        written[Path(_CONFIG)] = _text(_config(output, is_legacy=_ADDED in map(str, written)))
    return TokenizerFiles({name: folder / name for name in kept}, written)


def _config(output: OutputTokens, *, is_legacy: bool) -> dict[str, Any]:
    """The donor's `tokenizer_config.json` with the added tokens, if it lists such."""
    config = read_mapping(output.donor.folder / _CONFIG)
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict) or is_legacy:
        more = {
            str(output.numbers[token]): {"content": token, **flags}
            for token, flags in output.added.items()
        }
        config["added_tokens_decoder"] = (decoder if isinstance(decoder, dict) else {}) | more
    return config


def _extended(output: OutputTokens) -> dict[str, Any]:
    """The donor's `tokenizer.json` with the new tokens."""
    donor, file = output.donor, output.donor.file
    content = read_mapping(file)
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{file}: it has no model. Save that tokenizer again.")
    stored = content.get("added_tokens") or []
    entries = {entry["content"]: entry for entry in stored if isinstance(entry, dict)}
    for token, flags in output.added.items():
        entries[token] = {"id": output.numbers[token], "content": token, **flags}
    content["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))
    _extend_model(model, output, {token: output.numbers[token] for token in entries})
    if output.merges != donor.merges:
        is_joined = any(isinstance(pair, str) for pair in (model.get("merges") or [])[:1])
        model["merges"] = [f"{a} {b}" if is_joined else [a, b] for a, b in output.merges]
    return content


def _extend_model(model: dict[str, Any], output: OutputTokens, added: Mapping[str, int]) -> None:
    """Append the learned tokens to a tokenizer's vocabulary.

    The tokenizers library numbers added tokens that are not in the vocabulary one after another
    behind it, whatever the file says. Where that gives other numbers they are written into the
    vocabulary, where nothing splits them off.
    """
    vocabulary = model.get("vocab")
    size = len(vocabulary) if isinstance(vocabulary, dict | list) else 0
    known = vocabulary if isinstance(vocabulary, dict) else output.scores
    behind = sorted(number for token, number in added.items() if token not in known)
    numbers = {token: output.numbers[token] for token in output.learned}
    if output.learned or behind != list(range(size, size + len(behind))):
        numbers |= {token: number for token, number in added.items() if token not in known}
    ordered = sorted(numbers.items(), key=lambda item: item[1])
    if isinstance(vocabulary, dict):
        vocabulary |= dict(ordered)
    elif isinstance(vocabulary, list):
        learned = set(output.learned)
        lowest = min(output.scores.values(), default=0.0) - _UNLIKELY
        for token, number in ordered:
            if number != len(vocabulary):
                raise MismatchError(
                    f"{output.donor.file}: a Unigram model has no place for the token "
                    f"{shown(token)} with the number {number:,} behind {len(vocabulary):,} pieces. "
                    "Take the tokens of one model: the base's, or those of a named one."
                )
            score = output.scores[token] if token in learned else lowest
            vocabulary.append([token, score])


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
