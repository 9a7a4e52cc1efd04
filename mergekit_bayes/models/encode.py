"""Check rows of text, encode them as token ids with labels, and cut them into batches."""

import datetime
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from mergekit_bayes.errors import MismatchError, shown
from mergekit_bayes.libraries import token_ids
from mergekit_bayes.models.load import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # a label that no loss counts, transformers' convention
Example: TypeAlias = Mapping[str, Any]  # `input_ids`, a list; `labels`, a list or one number

FORMS = {  # columns of conversations and of pairs, as they are published
    "messages": "conversations (`messages`)",
    "conversations": "conversations (`conversations`)",
    "prompt": "pairs (`prompt` and `completion`)",
    "completion": "pairs (`prompt` and `completion`)",
}


def encode_rows(
    rows: Mapping[str, Sequence[object]],
    loaded: Loaded,
    *,
    text: str = "text",
    label: str | None = None,
    max_length: int = 512,
    pack: bool = False,
    source: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Tokenise rows into examples of Python lists, ready for `Collate`.

    A row of a language model becomes its start token, the text and EOS, cut at `max_length`. With
    `pack`, the rows are joined by EOS and cut into blocks of `max_length`, so that no token is
    lost. A row of a classifier becomes what its tokenizer makes of it.

    Args:
        rows: Columns by name: a `datasets.Dataset`, or a mapping of lists.
        loaded: The model that the examples are for.
        text: Name of the column with the texts.
        label: Name of the column with a classifier's labels; None encodes no labels.
        max_length: Tokens of an example, at most the model's context.
        pack: Join a language model's rows instead of cutting each one.
        source: Where the rows come from, for messages.

    Raises:
        CheckpointError: The tokenizer of a language model has no token to start a document from.
        MismatchError: A text is not text, a label is not one of the classifier's, or no row gives
            anything to learn from.
    """
    try:
        return _encode(rows, loaded, text, label, min(max_length, loaded.context), pack=pack)
    except MismatchError as error:
        if source is None:
            raise
        names = [source] if isinstance(source, str) else source
        raise MismatchError(f"{', '.join(repr(name) for name in names)}: {error}") from None


def _encode(
    rows: Mapping[str, Sequence[object]],
    loaded: Loaded,
    text: str,
    label: str | None,
    max_length: int,
    *,
    pack: bool,
) -> list[dict[str, Any]]:
    texts = check_texts(rows[text], text)
    if loaded.task == "classification":
        encoded = tokens_of(texts, loaded, text, max_length=max_length)
        examples: list[dict[str, Any]] = [{"input_ids": ids} for ids in encoded]
        if label is not None:
            labels = label_ids(rows[label], loaded.model, label)
            for example, value in zip(examples, labels, strict=True):
                example["labels"] = value
        return examples
    start = loaded.start  # before any text is tokenised, which may take minutes
    encoded = token_ids(
        loaded.model,
        lambda: loaded.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [],
    )
    eos = loaded.tokenizer.eos_token_id
    ending = [] if eos is None else [eos]
    if not pack:
        documents = [[start, *ids, *ending][:max_length] for ids in encoded]
        return _scored(documents, text)
    stream = [start, *(token for ids in encoded for token in (*ids, *ending))]
    # A block starts with the token before it, so that every token is scored once.
    firsts = range(0, len(stream) - 1, max_length - 1)
    return _scored([stream[first : first + max_length] for first in firsts], text)


def tokens_of(
    texts: Sequence[str], loaded: Loaded, column: str, *, max_length: int
) -> list[list[int]]:
    """Tokens of a classifier's texts, cut at `max_length`.

    Args:
        texts: The texts.
        loaded: The classifier.
        column: Where the texts come from, for the message.
        max_length: Tokens of a text at most.

    Raises:
        MismatchError: There are no texts, or one has no tokens, of which no classifier has an
            output.
    """
    if not texts:
        raise MismatchError(f"no row has a text in column '{column}'.")
    options = {"truncation": True, "max_length": max_length}
    encoded = token_ids(loaded.model, lambda: loaded.tokenizer(list(texts), **options)["input_ids"])
    bare = [text for text, ids in zip(texts, encoded, strict=True) if not ids]
    if bare:
        # Without numbers: which rows of a file these are depends on the filter that was read.
        raise MismatchError(
            f"'{column}' holds {shown(bare[0])}, which is no token for this tokenizer; a "
            f"classifier needs one. Remove such rows ({len(bare)} of {len(texts)})."
        )
    return encoded


def _scored(documents: Sequence[list[int]], column: str) -> list[dict[str, Any]]:
    """Examples of the documents that have a token to predict.

    Raises:
        MismatchError: None has one.
    """
    examples = [{"input_ids": ids, "labels": ids} for ids in documents if len(ids) > 1]
    if not examples:
        raise MismatchError(
            f"no row has a token to predict: the texts in column '{column}' are empty, or the "
            "tokenizer makes nothing of them."
        )
    return examples


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
                f"{_row(source, number)}: '{column}' is {_described(value)}, expected text. "
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
            f"{_row(source, wrong[0])}: '{column}' is {_described(wrong[1])}, expected a label: "
            "a whole number or a name."
        )
    return labels


def label_ids(values: Sequence[object], model: "PreTrainedModel", column: str) -> list[int]:
    """Translate labels to the classifier's numbers.

    Args:
        values: Numbers of the classifier's range, or names of its labels.
        model: The classifier.
        column: Where the labels come from, for the message.

    Raises:
        MismatchError: A label is neither.
    """
    numbers = {str(name): int(number) for name, number in (model.config.label2id or {}).items()}
    result = []
    for value in values:
        is_label = isinstance(value, (str, int))
        number = numbers.get(str(value)) if is_label else None
        if number is None and isinstance(value, int):
            number = value
        if number is None or not 0 <= int(number) < model.config.num_labels:
            raise MismatchError(
                f"label {shown(value)} in column '{column}': the model knows "
                f"{', '.join(numbers) or 'none'} (or 0 to {model.config.num_labels - 1})."
            )
        result.append(int(number))
    return result


def observations(examples: Sequence[Example], task: str) -> int:
    """Count the observations in a set of examples: rows of a classifier, else scored tokens."""
    if task == "classification":
        return len(examples)
    return sum(len(e["input_ids"]) - 1 for e in examples)


class Collate:
    """Pad examples on the right into a batch of tensors.

    Padding is neither attended to nor scored. The first token of a row is not scored either, since
    nothing predicts it: transformers' Trainer would count it for models whose class names no loss
    (GPT-2 is one), and divide the loss by too many tokens.

    Args:
        pad: The token that fills short rows.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of `input_ids`, `attention_mask` and, where the examples have them, `labels`."""
        length = max(len(e["input_ids"]) for e in examples)
        ids = torch.full((len(examples), length), self.pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for i, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[i, :n] = torch.tensor(example["input_ids"])
            mask[i, :n] = 1
            if isinstance(example.get("labels"), list):
                labels[i, 1:n] = torch.tensor(example["labels"][1:])
        batch = {"input_ids": ids, "attention_mask": mask}
        if "labels" in examples[0]:
            by_token = isinstance(examples[0]["labels"], list)
            batch["labels"] = labels if by_token else torch.tensor([e["labels"] for e in examples])
        return batch


def batches(
    examples: Sequence[Example],
    size: int,
    collate: Collate,
    *,
    device: torch.device | str = "cpu",
) -> Iterator[dict[str, Tensor]]:
    """Consecutive batches of `size` examples on a device."""
    for i in range(0, len(examples), size):
        yield {name: t.to(device) for name, t in collate(examples[i : i + size]).items()}


def _row(source: str | None, number: int) -> str:
    return f"row {number}" if source is None else f"'{source}', row {number}"


def _described(value: object) -> str:
    """A value's type in words, with the value of a number."""
    if value is None:
        return "null (an empty cell, or null in JSON)"
    if isinstance(value, bool):
        return f"a truth value ({str(value).lower()})"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value))}" if value else "an empty object"
    if isinstance(value, (list, tuple)):
        return "a list of messages" if _is_conversation(value) else "a list"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return f"a date or a time ({value})"
    return f"a value of type {type(value).__name__}"


def _is_conversation(value: Sequence[object]) -> bool:
    return bool(value) and all(isinstance(m, Mapping) and len(m) > 1 for m in value)


def _advice(column: str, value: object, *, empty_is_null: bool) -> str:
    """What to do about a value that is no text, without promising what is not there."""
    if value is None:
        return "Remove such rows" + ("." if empty_is_null else ", or write the empty string there.")
    if isinstance(value, (list, tuple)) and _is_conversation(value):
        return (
            f"{not_read('messages')} Write each as one string, for example by its tokenizer's "
            "apply_chat_template."
        )
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


def not_read(column: str) -> str:
    """The sentence that the rows of such a column are not read.

    Args:
        column: One of `FORMS`.
    """
    return f"{FORMS[column][0].upper()}{FORMS[column][1:]} are not read yet."
