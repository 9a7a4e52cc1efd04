"""Compare the tokenizers of two model folders without loading them.

What a row of an embedding means is the token of that number, which a folder may list in several
forms: `tokenizer.json`, `vocab.json`, `vocab.txt`, a SentencePiece model or a tiktoken file. A
tokenizer in any of them is compared with one in any other.
"""

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from mergekit_bayes.documents import (
    DocumentError,
    read_bytes,
    read_mapping,
    read_object,
    read_text,
)
from mergekit_bayes.errors import CheckpointError, shown

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types of protocol buffers
_MOST = 1_000_000  # tokens; XLM-V, which has the most, has 901,629
_LONGEST = 10_000  # characters or bytes of a token
_MODEL, _LINES = 64 << 20, 32 << 20  # bytes of a SentencePiece model, and of a list of lines
_FIELDS = 100  # of a piece, which has three
_UNKNOWN, _CONTROL = 2, 3  # types of a SentencePiece piece that is no text


@dataclass(frozen=True)
class TokenList:
    """The tokens of a folder by number.

    Attributes:
        file: The file that lists them.
        tokens: Token by number. Bytes are written as the characters of byte-level BPE.
        special: Numbers of a SentencePiece model that are no text and are named otherwise in
            other forms.
        is_sentencepiece: Whether the numbers are those of a SentencePiece model, which some
            tokenizers shift by a constant.
    """

    file: Path
    tokens: Mapping[int, str]
    special: frozenset[int] = frozenset()
    is_sentencepiece: bool = False

    @property
    def count(self) -> int:
        """How many rows an embedding needs for these tokens: one more than the highest number."""
        return max(self.tokens, default=-1) + 1


_Reader: TypeAlias = Callable[[Path], TokenList | None]


def tokenizer_identity(folder: Path) -> str | None:
    """SHA-256 of a folder's `tokenizer.json`; None if it has none.

    Raises:
        CheckpointError: It cannot be read, is not a regular file, or is larger than any tokenizer.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return hashlib.sha256(read_bytes(file)).hexdigest()
    except OSError as error:
        reason = error.strerror or str(error)
    except DocumentError as error:
        reason = str(error)
    raise CheckpointError(f"{file}: cannot be read ({reason}). Fetch it again.")


def read_tokens(folder: Path) -> TokenList | None:
    """The tokens of a folder, in the first form that lists them; None if none does."""
    for file, read in _forms(folder):
        stat = file.stat()
        tokens = _read_cached(read, file, stat.st_mtime_ns, stat.st_size)
        if tokens is not None:
            return tokens
    return None


def has_tokens(folder: Path) -> bool:
    """Whether a folder has a file that may list its tokens, without a look into it."""
    return next(_forms(folder), None) is not None


def tokens_apart(one: Path, other: Path) -> list[tuple[int, str, str]]:
    """Ids to which the tokenizers of two folders give different tokens.

    Returns:
        The id and both tokens of each, by id; empty if one of the folders lists no tokens.
    """
    identities = (tokenizer_identity(one), tokenizer_identity(other))
    if None not in identities and identities[0] == identities[1]:
        return []
    tokens, others = read_tokens(one), read_tokens(other)
    if tokens is None or others is None:
        return []
    if tokens.is_sentencepiece == others.is_sentencepiece:
        left, right = tokens.tokens, others.tokens
    else:
        left, right = aligned_tokens(tokens, others), aligned_tokens(others, tokens)
    common = sorted(left.keys() & right.keys())
    return [(i, left[i], right[i]) for i in common if left[i] != right[i]]


def special_token_ids(folder: Path) -> dict[str, int]:
    """The numbers of the special tokens that a folder's `tokenizer_config.json` names.

    Returns:
        `bos_token_id`, `eos_token_id` and `pad_token_id`, as far as they are known.
    """
    tokens, config = read_tokens(folder), read_object(folder / "tokenizer_config.json")
    if tokens is None:
        return {}
    numbers = {token: number for number, token in tokens.tokens.items()}
    ids = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        token = config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in numbers:
            ids[f"{key}_id"] = numbers[content]
    return ids


def _forms(folder: Path) -> Iterator[tuple[Path, _Reader]]:
    """The files that may list a folder's tokens, each with its reader, the surest first."""
    named: tuple[tuple[str, _Reader], ...] = (
        ("tokenizer.json", _read_tokenizer_json),
        ("vocab.json", _read_vocab_json),
        ("vocab.txt", _read_vocab_txt),
        ("*.tiktoken", _read_model),
        ("tokenizer.model", _read_model),
        ("*.model", _read_model),
        ("*.spm", _read_model),
    )
    if folder.is_dir():
        for pattern, read in named:
            for file in sorted(filter(Path.is_file, folder.glob(pattern))):
                yield file, read


@lru_cache(maxsize=8)
def _read_cached(read: _Reader, file: Path, changed: int, size: int) -> TokenList | None:
    """The tokens that a file lists, None if it lists none; time and size tell its versions."""
    try:
        tokens = read(file)
    except (OSError, CheckpointError, ValueError, LookupError):
        return None
    return tokens if tokens is not None and tokens.tokens else None


def _read_tokenizer_json(file: Path) -> TokenList | None:
    content = read_mapping(file)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    _check_count(len(vocabulary) if isinstance(vocabulary, dict | list) else 0)
    if isinstance(vocabulary, dict):
        tokens = {_number(i): token for token, i in vocabulary.items()}
    else:  # Unigram: a list of [token, score]
        tokens = {i: _text(entry) for i, entry in enumerate(_list(vocabulary))}
    added = _list(content.get("added_tokens") or [])
    for token in added:
        if not isinstance(token, dict):
            raise ValueError("an added token that is no mapping")
        tokens[_number(token.get("id"))] = _text([token.get("content")])
    return TokenList(file, tokens)


def _read_vocab_json(file: Path) -> TokenList | None:
    content = read_mapping(file)
    if any(isinstance(i, dict) for i in content.values()):
        return None  # one vocabulary for each language
    _check_count(len(content))
    tokens = {_number(i): token for token, i in content.items()}
    return TokenList(file, tokens | _added_tokens(file.parent))


def _read_vocab_txt(file: Path) -> TokenList | None:
    # Not splitlines(): a token may hold one of Unicode's other line separators.
    text = read_text(file, _LINES).removesuffix("\n")
    _check_count(text.count("\n"))
    lines = text.split("\n")
    return TokenList(file, dict(enumerate(lines)) | _added_tokens(file.parent))


def _read_model(file: Path) -> TokenList | None:
    """A SentencePiece model or, under the same name in some models, a tiktoken file."""
    content = read_bytes(file, _MODEL)
    added = _added_tokens(file.parent)
    if content[:1] != b"\x0a":  # the tag of a SentencePiece model's first piece
        return TokenList(file, _tiktoken_tokens(content) | added)
    tokens, special = {}, set()
    pieces = (piece for number, piece in _fields(content, _MOST + _FIELDS) if number == 1)
    for i, piece in enumerate(pieces):
        _check_count(i)
        if not isinstance(piece, bytes):
            raise ValueError("a piece that is a number")
        fields = dict(_fields(piece, _FIELDS))
        text = fields.get(1, b"")
        tokens[i] = text.decode() if isinstance(text, bytes) else ""
        if fields.get(3) in (_UNKNOWN, _CONTROL):
            special.add(i)
    return TokenList(file, tokens | added, frozenset(special), is_sentencepiece=True)


def _tiktoken_tokens(content: bytes) -> dict[int, str]:
    """The tokens of lines `BASE64 RANK`."""
    _check_count(content.count(b"\n"))
    characters = _byte_characters()
    tokens = {}
    for line in content.splitlines():
        if line.strip():
            token, rank = line[:_LONGEST].split()
            decoded = base64.b64decode(token, validate=True)
            tokens[_number(int(rank[:20]))] = "".join(characters[byte] for byte in decoded)
    return tokens


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte.

    Printable characters of Latin-1 stand for themselves, the others for those from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def added_entries(folder: Path) -> dict[int, dict[str, Any]]:
    """Tokens that were added to a vocabulary, as slow tokenizers store them beside it.

    Returns:
        By number, the entry of each: its `content`, and flags such as `special` and `lstrip`, as
        far as they are stored.
    """
    content = read_object(folder / "added_tokens.json")
    added: dict[int, dict[str, Any]] = {
        i: {"content": token} for token, i in content.items() if type(i) is int and i >= 0
    }
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for number, token in decoder.items():
            if number.isdecimal() and isinstance(token, dict):
                text = str(token.get("content", ""))[:1000]
                added[int(number[:20])] = {**token, "content": text}
    return added


def _added_tokens(folder: Path) -> dict[int, str]:
    return {number: entry["content"] for number, entry in added_entries(folder).items()}


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} as the number of a token")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{shown(value)} as a list of tokens")
    return value


def _text(entry: object) -> str:
    """The token of an entry, which is a list that begins with it."""
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        raise ValueError(f"{shown(entry)} as an entry of a vocabulary")
    return entry[0]


def _check_count(count: int) -> None:
    if count > _MOST:
        raise ValueError(f"more than {_MOST:,} tokens")


def _fields(message: bytes, most: int) -> Iterator[tuple[int, int | bytes]]:
    """The fields of an encoded protocol buffer: their number, and an integer or raw bytes.

    Raises:
        ValueError: It is not a protocol buffer, or has more than `most` fields.
        IndexError: It is cut off.
    """
    position = 0
    for count in itertools.count():
        if position >= len(message):
            return
        if count == most:
            raise ValueError(f"more than {most} fields")
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(message, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(message):
            raise ValueError("cut off")
        yield number, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("an integer of more than 64 bits")


def aligned_tokens(tokens: TokenList, others: TokenList) -> Mapping[int, str]:
    """Tokens by number as a tokenizer uses them, for a comparison with a list in another form.

    Some tokenizers put tokens of their own before those of their SentencePiece model. That shift is
    the difference between the numbers that most of the tokens have in both lists.

    Args:
        tokens: The list. One that is no SentencePiece model is returned as it is.
        others: A list in another form.

    Returns:
        The tokens, without those of a SentencePiece model that are no text.
    """
    if not tokens.is_sentencepiece:
        return tokens.tokens
    numbers = {token: i for i, token in others.tokens.items()}
    texts = {i: token for i, token in tokens.tokens.items() if i not in tokens.special}
    shifts = Counter(numbers[token] - i for i, token in texts.items() if token in numbers)
    shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
    if 2 * count <= shifts.total():
        shift = 0
    return {i + shift: token for i, token in texts.items()}
