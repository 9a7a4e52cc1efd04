"""Check the cells of rows: what is text is text, and what is a label is a label."""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from mergekit_bayes.errors import MismatchError

_NAMED, _SHORT = 8, 40  # names of an object that a message shows, and letters of each
CONVERSATIONS = (
    "Conversations are read by bmerge finetune and bmerge precision, in the column that "
    "messages_column names; elsewhere write each as one string, for example by its tokenizer's "
    "apply_chat_template."
)


def check_texts(
    values: Iterable[object],
    column: str,
    source: str | None = None,
    numbers: Sequence[int] | None = None,
    *,
    empty_is_null: bool = False,
) -> list[str]:
    """The values as a list, if every one of them is text.

    Args:
        values: Values of the column, row by row.
        column: Name of the column, for the message.
        source: File or data set that they come from, for the message.
        numbers: Number of each row in the source; by default they count from 1.
        empty_is_null: The source cannot tell the empty string from null, as CSV.

    Raises:
        MismatchError: A value is not text. The message names its row and its type.
    """
    texts = []
    for i, value in enumerate(values):
        if not isinstance(value, str):
            number = i + 1 if numbers is None else numbers[i]
            raise MismatchError(
                f"{place_of(source, number)}: '{column}' is {described(value)}, expected text. "
                f"{_advice(column, value, empty_is_null=empty_is_null)}"
            )
        texts.append(value)
    return texts


def check_labels(
    values: Iterable[object],
    column: str,
    source: str | None = None,
    numbers: Sequence[int] | None = None,
) -> list[str | int]:
    """The values as a list, if every one of them is a label: text or a whole number.

    The arguments are those of `check_texts`.

    Raises:
        MismatchError: A value is neither. A missing label is named first, since it makes the
            numbers of a column fractional.
    """
    labels: list[str | int] = []
    wrong: tuple[int, object] | None = None
    for i, value in enumerate(values):
        if isinstance(value, (str, int)):
            labels.append(value)
        elif wrong is None or (value is None and wrong[1] is not None):
            wrong = i + 1 if numbers is None else numbers[i], value
    if wrong is not None:
        raise MismatchError(
            f"{place_of(source, wrong[0])}: '{column}' is {described(wrong[1])}, expected a label: "
            "a whole number or a name."
        )
    return labels


def place_of(source: str | None, number: int) -> str:
    """A row for the start of a message: its number, from 1, and its file where that is known."""
    return f"row {number}" if source is None else f"'{source}', row {number}"


def described(value: object) -> str:
    """A value's type in words, with the value of a number."""
    if value is None:
        return "null (an empty cell, or null in JSON)"
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, Mapping):
        return f"an object with {_names(value)}" if value else "an empty object"
    if isinstance(value, (list, tuple)):
        if not value:
            return "an empty list"
        return "a list of messages" if is_conversation(value) else "a list"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return f"a date or a time ({value})"
    return f"a value of type {type(value).__name__}"


def _names(value: Mapping[object, object]) -> str:
    """The first names in an object, each shortened."""
    names = [str(name) for name in islice(value, _NAMED)]
    short = [name if len(name) <= _SHORT else f"{name[:_SHORT]}..." for name in names]
    return ", ".join([*short, *(["..."] if len(value) > _NAMED else [])])


def is_conversation(value: Sequence[object]) -> bool:
    """Whether a list looks like the messages of a conversation."""
    return bool(value) and all(isinstance(m, Mapping) and len(m) > 1 for m in value)


def _advice(column: str, value: object, *, empty_is_null: bool) -> str:
    """What to do about a value that is no text, without promising what is not there."""
    if value is None:
        return "Remove such rows" + ("." if empty_is_null else ", or write the empty string there.")
    if isinstance(value, (list, tuple)) and is_conversation(value):
        return CONVERSATIONS
    inside = [f"'{n}'" for n in _texts_inside(value, column)] if isinstance(value, Mapping) else []
    if inside:
        return f"Text inside it is named by a dot: {', '.join(inside)}."
    return "Write a string there, or name another column."


def _texts_inside(value: Mapping[str, object], name: str) -> Iterator[str]:
    """The dotted names of the texts in an object."""
    for key, part in value.items():
        if isinstance(part, str):
            yield f"{name}.{key}"
        elif isinstance(part, Mapping):
            yield from _texts_inside(part, f"{name}.{key}")
