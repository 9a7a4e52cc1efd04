"""Encode conversations and pairs: the whole is read, and the assistant's part is scored."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.libraries import TOKENIZER_FAILS, call_tokenizers, known_to
from mergekit_bayes.models.cells import described, place_of
from mergekit_bayes.models.columns import TOOLS, Form
from mergekit_bayes.models.encode import IGNORED, Encoding, cut_documents
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.rows import Table, read_out
from mergekit_bayes.models.turns import (
    Conversation,
    Scored,
    conversation,
    refuse_no_template,
    rendered,
    says_something,
)

if TYPE_CHECKING:
    from datasets import Dataset

_AT_ONCE = 1000  # texts that are tokenised in one call


class Pair(NamedTuple):
    """A prompt and its completion, both text."""

    prompt: str
    completion: str


def read_chat(table: Table, form: Form) -> list[Pair | Conversation]:
    """Check the rows of a table of pairs or conversations.

    Args:
        table: The rows, with the form's columns and `tools` where there are any.
        form: Its form, which is not text.

    Raises:
        MismatchError: A row holds something else.
    """
    return list(_rows(table, form))


def has_words(row: Pair | Conversation) -> bool:
    """Whether there is a word in what is scored of a row."""
    return bool(row.completion.strip()) if isinstance(row, Pair) else says_something(row)


def encode_chat(
    rows: Sequence[Pair | Conversation], loaded: Loaded, source: str, max_length: int
) -> Encoding:
    """Tokenise pairs and conversations, and score the completions and the assistant's turns.

    A pair becomes the start token, its texts as one and EOS, which is scored, too; a conversation
    what the chat template makes of it, with no token added. A token that is partly of a scored text
    is scored.

    Args:
        rows: From `read_chat`.
        loaded: A causal language model.
        source: Where they come from, for messages.
        max_length: Tokens of an example at most, and no more than the model's context.

    Raises:
        CheckpointError: The tokenizer does not say which characters a token stands for, there is
            no chat template, or it fails.
        MismatchError: The template does not say which characters are the assistant's.
    """
    tokenizer = loaded.tokenizer
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"the tokenizer of '{loaded.path}' does not tell which characters a token stands for, "
            "which scoring a part of a text needs. Use a fast tokenizer, or a column of texts."
        )
    if any(isinstance(row, Conversation) for row in rows):
        refuse_no_template(tokenizer, str(loaded.path), source)
    texts: list[Scored] = []
    is_pair: list[bool] = []
    for row in rows:
        made = _scored(row) if isinstance(row, Pair) else rendered(row, tokenizer)
        texts += made
        is_pair += [isinstance(row, Pair)] * len(made)
    ending = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    documents = []
    for (ids, labels), paired in zip(_labelled(texts, loaded), is_pair, strict=True):
        if paired:
            ids, labels = [loaded.start, *ids, *ending], [IGNORED, *labels, *ending]
        documents.append((ids, labels))
    return cut_documents(documents, min(max_length, loaded.context))


def _labelled(texts: Sequence[Scored], loaded: Loaded) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of texts, some at a time: the places of tokens take far more memory."""
    for i in range(0, len(texts), _AT_ONCE):
        some = texts[i : i + _AT_ONCE]
        encoded = _tokenised([scored.text for scored in some], loaded)
        known_to(loaded.model, encoded["input_ids"])
        for scored, ids, places in zip(
            some, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            yield ids, _labels(scored, ids, places)


def _tokenised(texts: list[str], loaded: Loaded) -> Mapping[str, Any]:
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded: Mapping[str, Any] = call_tokenizers(
        TOKENIZER_FAILS, lambda: loaded.tokenizer(texts, **options)
    )
    return encoded


def _labels(scored: Scored, ids: list[int], places: Sequence[tuple[int, int]]) -> list[int]:
    """Each token that stands for a scored character, and `IGNORED` for the others."""
    marks = np.zeros(len(scored.text) + 1, np.int64)
    for first, end in scored.spans:
        marks[first + 1 : end + 1] = 1
    before = np.cumsum(marks)  # scored characters before each place
    firsts, ends = np.array(places, np.int64).reshape(-1, 2).T
    # Some tokenizers count white space to no token: one that is nothing else has an empty place at
    # its end, and stands for the character before that.
    firsts = np.minimum(firsts, np.maximum(ends - 1, 0))
    labels: list[int] = np.where(before[ends] > before[firsts], ids, IGNORED).tolist()
    return labels


def _scored(pair: Pair) -> list[Scored]:
    text = pair.prompt + pair.completion
    return [Scored(text, [(len(pair.prompt), len(text))])]


def _rows(table: Table, form: Form) -> Iterator[Pair | Conversation]:
    name, rows, numbers, _ = table
    columns = [read_out(rows[column], column, name) for column in form.columns]
    tools = _tools(rows, name)
    for i, number in enumerate(numbers[: len(rows)]):
        place = place_of(name, number)
        values: list[Any] = [column[i] for column in columns]
        if form.kind == "messages":
            yield conversation(values[0], form.columns[0], place, tools=tools[i])
        elif all(isinstance(value, str) for value in values):
            yield Pair(values[0], values[1])
        elif all(isinstance(value, (list, tuple)) for value in values):
            first, then = zip(values, form.columns, strict=True)
            yield conversation(*first, place, completion=then, tools=tools[i])
        else:
            found = " and ".join(
                f"'{column}' is {described(value)}"
                for column, value in zip(form.columns, values, strict=True)
            )
            raise MismatchError(f"{place}: {found}, expected two texts or two lists of messages.")


def _tools(rows: "Dataset", name: str) -> list[object]:
    if TOOLS not in rows.column_names:
        return [None] * len(rows)
    return read_out(rows[TOOLS], TOOLS, name)
