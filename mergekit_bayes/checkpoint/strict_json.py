"""JSON as checkpoints use it: no name twice in an object, no NaN, no invalid text."""

import json
from collections import Counter
from pathlib import Path
from typing import Any


def parse_json(text: bytes) -> object:
    """Parse JSON strictly: UTF-8, no name twice in an object, no NaN or infinity.

    An escaped half of a surrogate pair is refused as well, because it is not a character.

    Raises:
        ValueError: If the text is not such JSON; the message says what is wrong.
    """
    try:
        content: object = json.loads(
            text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        if b"\\u" in text:  # only an escape can produce half of a surrogate pair
            json.dumps(content, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    return content


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that a merge can do without; empty if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def shown(value: object) -> str:
    """A value from a file as a message shows it: quoted, escaped, and cut if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}...{text[-1]}"


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"it names {shown(counts.most_common(1)[0][0])} twice")
    return content


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
