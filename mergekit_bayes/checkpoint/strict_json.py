"""JSON as checkpoints mean it: no duplicate name, no NaN, no invalid text."""

import json
from typing import Any


def parse_json(text: bytes) -> Any:
    """JSON as checkpoints mean it: UTF-8, no name twice in an object, no NaN or infinity, no half
    of a character.

    Raises `ValueError` that says what is wrong.
    """
    try:
        found = json.loads(
            text.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
        if b"\\u" in text:  # only an escape can bring half of a surrogate pair
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    return found


def shown(value: object) -> str:
    """What a file says, for a message: quoted, control characters escaped, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]}...{text[-1]}"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"it names {shown(twice)} twice")
    return found


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")
