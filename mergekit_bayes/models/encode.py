"""Encode rows of text as token ids with labels, and cut them into batches."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_bayes.errors import MismatchError, shown
from mergekit_bayes.libraries import token_ids
from mergekit_bayes.models.cells import check_texts
from mergekit_bayes.models.load import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORED = -100  # a label that no loss counts, transformers' convention
Example: TypeAlias = Mapping[str, Any]  # `input_ids`, a list; `labels`, a list or one number


class Encoding(NamedTuple):
    """Examples of some rows, and what was lost on the way.

    Attributes:
        examples: Lists of `input_ids` and `labels` of a language model, where a label of `IGNORED`
            is not scored; `labels` of a classifier is one number.
        rows: Number of examples before any was left out.
        tokens: Tokens before any was cut.
        cut: Number of examples that were longer than the limit.
        lost: Tokens that these had beyond it.
        unscored: Number of examples that were left out, since no token of theirs is scored.
    """

    examples: list[dict[str, Any]]
    rows: int
    tokens: int
    cut: int = 0
    lost: int = 0
    unscored: int = 0


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
        encoding = encode_texts(
            rows, loaded, text=text, label=label, max_length=max_length, pack=pack
        )
        refuse_unscored(encoding.examples, text)
    except MismatchError as error:
        if source is None:
            raise
        names = [source] if isinstance(source, str) else source
        raise MismatchError(f"{', '.join(repr(name) for name in names)}: {error}") from None
    return encoding.examples


def encode_texts(
    rows: Mapping[str, Sequence[object]],
    loaded: Loaded,
    *,
    text: str,
    label: str | None = None,
    max_length: int = 512,
    pack: bool = False,
) -> Encoding:
    """Tokenise rows as `encode_rows` does, and count what was cut. There may be no example.

    Raises:
        CheckpointError: The tokenizer of a language model has no token to start a document from.
        MismatchError: A text is not text, or a label is not one of the classifier's.
    """
    max_length = min(max_length, loaded.context)
    texts = check_texts(rows[text], text)
    if loaded.task == "classification":
        labels = None if label is None else label_ids(rows[label], loaded.model, label)
        return _encode_labelled(texts, labels, loaded, text, max_length)
    start = loaded.start  # before any text is tokenised, which may take minutes
    encoded = token_ids(
        loaded.model,
        lambda: loaded.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [],
    )
    eos = loaded.tokenizer.eos_token_id
    ending = [] if eos is None else [eos]
    if not pack:
        documents = [[start, *ids, *ending] for ids in encoded]
        return cut_documents([(ids, ids) for ids in documents], max_length)
    stream = [start, *(token for ids in encoded for token in (*ids, *ending))]
    # A block starts with the token before it, so that every token is scored once.
    firsts = range(0, len(stream) - 1, max_length - 1)
    blocks = [stream[first : first + max_length] for first in firsts]
    return cut_documents([(block, block) for block in blocks], max_length)


def cut_documents(documents: Sequence[tuple[list[int], list[int]]], max_length: int) -> Encoding:
    """Cut documents of a language model at a length, and leave out those without a scored token.

    The first token of a document is never scored: nothing predicts it.

    Args:
        documents: Tokens and labels of each, of one length; a label is its token, or `IGNORED`.
        max_length: Tokens of a document at most.
    """
    examples, tokens, cut, lost = [], 0, 0, 0
    for ids, labels in documents:
        tokens += len(ids)
        if len(ids) > max_length:
            cut, lost = cut + 1, lost + len(ids) - max_length
        kept = ids[:max_length]
        example = {"input_ids": kept, "labels": kept if labels is ids else labels[:max_length]}
        if scored_tokens(example) > 0:
            examples.append(example)
    return Encoding(examples, len(documents), tokens, cut, lost, len(documents) - len(examples))


def _encode_labelled(
    texts: list[str], labels: list[int] | None, loaded: Loaded, column: str, max_length: int
) -> Encoding:
    encoded = tokens_of(texts, loaded, column, max_length=max_length)
    examples: list[dict[str, Any]] = [{"input_ids": ids} for ids in encoded]
    for example, value in zip(examples, labels or [], strict=labels is not None):
        example["labels"] = value
    # Those that fill the limit may have been cut there.
    full = [text for text, ids in zip(texts, encoded, strict=True) if len(ids) == max_length]
    whole = [len(ids) - max_length for ids in _uncut(full, loaded)]
    cut = [extra for extra in whole if extra > 0]
    tokens = sum(map(len, encoded)) + sum(cut)
    return Encoding(examples, len(texts), tokens, len(cut), sum(cut))


def _uncut(texts: list[str], loaded: Loaded) -> list[list[int]]:
    if not texts:
        return []
    return token_ids(loaded.model, lambda: loaded.tokenizer(texts, verbose=False)["input_ids"])


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


def refuse_unscored(examples: Sequence[Example], column: str, cut_at: int | None = None) -> None:
    """Refuse rows of which none has a token to predict.

    Args:
        examples: Those that have one.
        column: Where the texts come from, for the message.
        cut_at: Tokens after which rows were cut, if any was.

    Raises:
        MismatchError: There is no example.
    """
    if not examples and cut_at is not None:
        raise MismatchError(
            f"no row has a token to predict among its first {cut_at:,} tokens, after which rows "
            "are cut. Raise max_length, up to what the model sees, or shorten the rows."
        )
    if not examples:
        raise MismatchError(
            f"no row has a token to predict: the texts in column '{column}' are empty, or the "
            "tokenizer makes nothing of them."
        )


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


def scored_tokens(example: Example) -> int:
    """Number of tokens of a language model's example that are scored; the first one never is."""
    ids, labels = example["input_ids"], example.get("labels")
    if labels is None or labels is ids or isinstance(labels, int):
        return len(ids) - 1
    return sum(label != IGNORED for label in labels[1:])


def observations(examples: Sequence[Example], task: str) -> int:
    """Count the observations in a set of examples: rows of a classifier, else scored tokens."""
    if task == "classification":
        return len(examples)
    return sum(map(scored_tokens, examples))


class Collate:
    """Pad examples on the right into a batch of tensors.

    Padding is neither attended to nor scored. The first token of a row is not scored either, since
    nothing predicts it: transformers' Trainer would count it for models whose class names no loss
    (GPT-2 is one), and divide the loss by too many tokens.

    Packed examples have `position_ids`, which start again at 0 with each document. transformers
    keeps documents apart by them, but only where there is no attention mask: padding is one more
    document at the end then, whose tokens are not scored.

    Args:
        pad: The token that fills short rows.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A batch of `input_ids`, `attention_mask` or `position_ids`, and `labels` if any."""
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
        if "position_ids" in examples[0]:
            rows = [[*e["position_ids"], *range(length - len(e["position_ids"]))] for e in examples]
            batch = {"input_ids": ids, "position_ids": torch.tensor(rows)}
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
