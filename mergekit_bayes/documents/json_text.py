"""JSON: what it may cost is estimated before it is parsed."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mergekit_bayes.documents.files import SETTINGS, DocumentError, decode_text, open_regular
from mergekit_bayes.errors import shown

MEMORY = 512 << 20  # bytes that a parsed document may take, estimated from above
DEPTH = 100  # configs nest about 5 deep
DIGITS = 400  # characters of a numeral
LARGEST = 2**1023  # beyond it an integer has no float
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
# What a list, an object, a name in it and one more value take in CPython, in bytes.
_COSTS = ((b"[", 88), (b"{", 200), (b":", 120), (b",", 72))
# Text with such characters takes 4 and 2 bytes for each of its characters.
_WIDTHS = ((re.compile(rb"[\xf0-\xff]"), 4), (re.compile(rb"[\xc4-\xff]"), 2))


def parse_json(text: bytes | str, *, strict: bool = False, limit: int = MEMORY) -> object:
    """Parse JSON.

    An escaped half of a surrogate pair is refused, because it is not a character, and so is a
    number that no float can hold.

    Args:
        text: UTF-8, or text.
        strict: Refuse a name that is twice in an object, and NaN and infinity, which JSON does not
            have but which Python writes.
        limit: The most bytes that it may take when it is parsed.

    Raises:
        DocumentError: If the text is not such JSON, is nested too deeply, or would take too much
            memory.
    """
    data = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    check_memory(data, limit)
    try:
        content: object = json.loads(
            decode_text(data),
            parse_int=_whole_number,
            parse_float=_number,
            object_pairs_hook=_without_duplicates if strict else None,
            parse_constant=_refuse_constant if strict else None,
        )
    except RecursionError:
        raise DocumentError("nested too deeply") from None
    except DocumentError:
        raise
    except ValueError as error:
        raise DocumentError(str(error)) from None
    if data.count(b"[") + data.count(b"{") > DEPTH:
        _check_depth(content)
    if _HALF_PAIR.search(data):  # only an escape can produce half of a surrogate pair
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DocumentError("half of a surrogate pair") from None
    return content


def check_memory(data: bytes, limit: int = MEMORY) -> None:
    """Refuse JSON that would take too much memory, before a library parses it.

    Raises:
        DocumentError: If it would.
    """
    width = next((width for signs, width in _WIDTHS if signs.search(data)), 1)
    # The bytes themselves, all of them as text, and the strings that are made of it.
    memory = len(data) * (1 + 2 * width) + sum(cost * data.count(sign) for sign, cost in _COSTS)
    if memory > limit:
        raise DocumentError(f"it may take {memory >> 20:,} MiB when it is parsed")


def parse_lines(file: Path) -> Iterator[object]:
    """The JSON values in a file that has one on each line, parsed as they are asked for.

    Raises:
        OSError: The file cannot be opened or read.
        DocumentError: It is no regular file, or a line is not such JSON as `parse_json` reads.
    """
    with open_regular(file) as content:
        for number in itertools.count(1):
            line = content.readline(SETTINGS + 1)
            if not line:
                return
            if len(line) > SETTINGS:
                raise DocumentError(f"line {number} has more than {SETTINGS:,} bytes")
            try:
                yield parse_json(line)
            except DocumentError as error:
                raise DocumentError(f"line {number}: {error}") from None


def _whole_number(text: str) -> int:
    if len(text) > DIGITS or abs(number := int(text)) >= LARGEST:
        raise DocumentError(f"the number {text[:12]}... has {len(text):,} digits")
    return number


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise DocumentError(f"the number {text[:40]} is too large")
    return number


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise DocumentError(f"it names {shown(counts.most_common(1)[0][0])} twice")
    return content


def _refuse_constant(text: str) -> None:
    raise DocumentError(f"{text} is no number of JSON")


def _check_depth(content: object) -> None:
    level = [content] if isinstance(content, dict | list) else []
    for _ in range(DEPTH):
        level = [
            value
            for outer in level
            for value in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise DocumentError("nested too deeply")
