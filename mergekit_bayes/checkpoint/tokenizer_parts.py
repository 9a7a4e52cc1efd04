"""What a folder's tokenizer consists of: its tokens, and the rules that split a text into them.

Two tokenizers with the same tokens may split a text otherwise, by other merges, scores or other
treatment of spaces. What decides it is read here from `tokenizer.json`, or from the older files as
far as they say it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.tokenizers import (
    TokenList,
    added_entries,
    aligned_tokens,
    read_tokens,
)
from mergekit_bayes.documents import DocumentError, read_mapping, read_text
from mergekit_bayes.errors import CheckpointError, shown

LARGEST = 2_000_000  # numbers of tokens; the largest published vocabularies have 901,629
_MERGES = 2_000_000  # Llama 3 has 280,147
_MERGES_FILE = 64 << 20  # bytes of merges.txt
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
# How much of `tokenizer.json` decides how a text is split, beside the tokens.
_SPLITTING = ("normalizer", "pre_tokenizer")
_MODEL_LISTS = ("vocab", "merges", "type")
_METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclass(frozen=True)
class TokenizerParts:
    """A tokenizer, as far as two of them are compared.

    Attributes:
        folder: The folder.
        file: The file that lists the tokens.
        numbers: The number of each token.
        added: Tokens that are found in a text before it is split, with their flags.
        kind: `BPE`, `Unigram`, `WordPiece` or `WordLevel`; None where the files do not say it.
        spelling: How tokens are written down (bytes, spaces, the middle of a word). A token of one
            spelling means another text, or none, in another.
        merges: The pairs that byte-pair encoding merges, the first ones first.
        scores: The score of each piece of a Unigram model.
        rules: All else that decides how a text is split, to be compared; empty where the files do
            not say it.
    """

    folder: Path
    file: Path
    numbers: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    kind: str | None = None
    spelling: str = ""
    merges: tuple[tuple[str, str], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    rules: str = ""

    @property
    def count(self) -> int:
        """How many rows an embedding needs for these tokens: one more than the highest number."""
        return max(self.numbers.values(), default=-1) + 1

    @property
    def can_be_extended(self) -> bool:
        """Whether the tokenizer is stored in a form to which any token can be added."""
        return self.file.name == "tokenizer.json" and self.kind is not None


def read_parts(folder: Path, reference: TokenList | None = None) -> TokenizerParts | None:
    """The parts of a folder's tokenizer; None if it lists no tokens.

    Args:
        folder: The folder.
        reference: A list in another form, by which the numbers of a bare SentencePiece model are
            shifted as its tokenizer shifts them.

    Raises:
        CheckpointError: The highest number is beyond that of any tokenizer.
    """
    listed = read_tokens(folder)
    if listed is None:
        return None
    numbers = {token: number for number, token in _used(listed, reference).items()}
    highest = max(numbers, key=lambda token: numbers[token], default="")
    if numbers and numbers[highest] >= LARGEST:
        raise CheckpointError(
            f"{listed.file}: gives the token {shown(highest)} the number {numbers[highest]:,}, "
            f"where at most {LARGEST:,} rows are read. Save that tokenizer again."
        )
    if listed.file.name == "tokenizer.json":
        return _from_json(folder, listed.file, numbers)
    entries = added_entries(folder).values()
    added = {entry["content"]: _flags(entry) for entry in entries if entry["content"] in numbers}
    if listed.file.name == "vocab.json" and (folder / "merges.txt").is_file():
        merges = _merges_in(folder / "merges.txt")
        return TokenizerParts(folder, listed.file, numbers, added, "BPE", "bytes", merges)
    if listed.file.name == "vocab.txt":
        return TokenizerParts(folder, listed.file, numbers, added, "WordPiece", "##")
    return TokenizerParts(folder, listed.file, numbers, added)


def _used(listed: TokenList, reference: TokenList | None) -> Mapping[int, str]:
    """Tokens by the numbers that the tokenizer gives them."""
    if not listed.is_sentencepiece or reference is None:
        return listed.tokens
    used = dict(aligned_tokens(listed, reference))
    # What is no text has the number that the other list gives it, and so have tokens of the
    # tokenizer's own, which stand before those of the model.
    special = {listed.tokens[number] for number in listed.special}
    texts, count = set(used.values()), max(used, default=-1) + 1
    for number, token in reference.tokens.items():
        is_own = number < count or token in special
        if is_own and number not in used and token not in texts:
            used[number] = token
    return used


def _from_json(folder: Path, file: Path, numbers: Mapping[str, int]) -> TokenizerParts:
    content = read_mapping(file)
    model = content.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    entries = [entry for entry in content.get("added_tokens") or [] if isinstance(entry, dict)]
    added = {entry["content"]: _flags(entry) for entry in entries if entry["content"] in numbers}
    kind = model.get("type") or _kind_of(model)
    options = {key: value for key, value in model.items() if key not in _MODEL_LISTS}
    rules = {key: content.get(key) for key in _SPLITTING} | {"model": options}
    return TokenizerParts(
        folder,
        file,
        numbers,
        added,
        kind if kind in ("BPE", "Unigram", "WordPiece", "WordLevel") else None,
        _spelling(content, model),
        tuple(_pairs(model.get("merges"))),
        _scores(vocabulary) if isinstance(vocabulary, list) else {},
        json.dumps(rules, sort_keys=True),
    )


def _kind_of(model: Mapping[str, Any]) -> str | None:
    """The kind of a model in an old file, which does not name it."""
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _spelling(content: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    steps = [step for key in _SPLITTING for step in _steps(content.get(key))]
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" in kinds:
        return "bytes"
    replaces = any(step.get("content") == _METASPACE for step in steps)
    space = _METASPACE if "Metaspace" in kinds or replaces else ""
    marks = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    return space + " ".join(str(mark) for mark in marks if mark)


def _steps(step: object) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer and, of a sequence, those that it consists of."""
    if isinstance(step, dict):
        yield step
        for inner in step.values():
            if isinstance(inner, list):
                for one in inner:
                    yield from _steps(one)


def _pairs(merges: object) -> Iterator[tuple[str, str]]:
    """Merges, each of which is written as a list of two or with a space between them."""
    for merge in merges[:_MERGES] if isinstance(merges, list) else []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair):
            yield pair[0], pair[1]


def _scores(vocabulary: list[Any]) -> dict[str, float]:
    return {
        entry[0]: float(entry[1])
        for entry in vocabulary
        if isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], int | float)
    }


def _merges_in(file: Path) -> tuple[tuple[str, str], ...]:
    try:
        lines = read_text(file, _MERGES_FILE).split("\n")
    except (OSError, DocumentError):  # what cannot be read is reported when it is copied
        return ()
    return tuple(_pairs([line for line in lines if line and not line.startswith("#version")]))


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The flags of an added token; one without any is neither special nor normalised."""
    return {flag: entry.get(flag) is True for flag in _FLAGS}
