"""Calls into other libraries on what comes from outside: whatever they raise is one message.

Only the call itself is wrapped, so that a bug of this package is not hidden.
"""

import os
import tempfile
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from mergekit_bayes.errors import BmergeError, CheckpointError, printable

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")
_STDERR = RLock()
TOKENIZER_FAILS = "the tokenizer fails on the texts"


def call(what: str, function: Callable[[], T], what_to_do: str = "") -> T:
    """Call a library on something from outside.

    Args:
        what: What the message says could not be done, with the file or folder.
        function: The call, and nothing else.
        what_to_do: The last sentence of the message.

    Raises:
        CheckpointError: The call failed.
    """
    try:
        return function()
    except BmergeError:
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception; Ctrl-C is none either, and passes.
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise CheckpointError(f"{what} ({reason(error)}). {what_to_do}".rstrip()) from error


def call_tokenizers(what: str, function: Callable[[], T], what_to_do: str = "") -> T:
    """As `call`, for a library in Rust: if it panics, the stack that Rust writes is not shown.

    Rust writes it to the descriptor of stderr, before Python gets the exception. What else is
    written meanwhile, such as a warning that quotes a file, appears in printable form when the call
    has ended.
    """
    return call(what, lambda: _without_stacks(function), what_to_do)


def _without_stacks(function: Callable[[], T]) -> T:
    with _STDERR, _memory() as written:
        stderr = os.dup(2)
        try:
            os.dup2(written.fileno(), 2)
            return function()
        except BaseException as error:
            if _is_panic(error):
                written.truncate(0)
            raise
        finally:
            os.dup2(stderr, 2)
            written.seek(0)
            for block in iter(lambda: written.read(1 << 16), b""):
                os.write(stderr, printable(block.decode(errors="replace")).encode())
            os.close(stderr)


def _memory() -> BinaryIO:
    """A file without a name: in memory where the system can, since a disk may be read-only."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("stderr"), "w+b")
    return tempfile.TemporaryFile()


def _is_panic(error: BaseException) -> bool:
    return not isinstance(error, Exception) and type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """The first line of an error as a message shows it: printable, cut, with its type."""
    lines = str(error).strip().splitlines()
    text = printable(lines[0].strip()) if lines else ""
    text = text.rstrip(".:") if len(text) <= 300 else f"{text[:297]}..."
    # An error that only names a key or an index says nothing without its type.
    says = isinstance(error, OSError | RuntimeError | ValueError)
    is_clear = says and text and not isinstance(error, RecursionError)
    return text if is_clear else ": ".join(filter(None, (type(error).__name__, text)))


def token_ids(model: object, tokenise: Callable[[], list[list[int]]]) -> list[list[int]]:
    """Tokens of texts, each of which the model has a row for.

    Args:
        model: The model that will read them.
        tokenise: The call of the tokenizer.

    Raises:
        CheckpointError: The tokenizer fails, or gives a token that the model has no row for.
    """
    return known_to(model, call_tokenizers(TOKENIZER_FAILS, tokenise))


def known_to(model: object, encoded: list[list[int]]) -> list[list[int]]:
    """The tokens, if the model has a row of its embedding for each.

    Raises:
        CheckpointError: It has none for one of them.
    """
    rows = embedding_rows(model)
    largest = max((max(ids, default=0) for ids in encoded), default=0)
    if rows is not None and largest >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {largest:,}, but the model's embedding has {rows:,} rows "
            f"(tokens 0 to {rows - 1:,}). Use the tokenizer that belongs to the model."
        )
    return encoded


def longest_text(tokenizer: object, most: int) -> int:
    """Tokens of a text that a tokenizer allows, at most `most`; it may hold anything as its own."""
    length = getattr(tokenizer, "model_max_length", most)
    is_number = isinstance(length, int | float) and not isinstance(length, bool)
    return int(min(max(length, 0), most)) if is_number and length == length else most


def outputs_of(model: Callable[..., Any], **inputs: object) -> Any:
    """What a model gives for these inputs; its config may describe what fails on some texts only.

    Raises:
        CheckpointError: It fails.
    """
    return call(
        "the model cannot be run",
        lambda: model(**inputs),
        "Take the config and the tokenizer that belong to it.",
    )


def embedding_rows(model: object) -> int | None:
    """Number of tokens that a model has a row for; None if it does not say."""
    embedding_of: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    try:
        embedding = embedding_of() if embedding_of is not None else None
    except (NotImplementedError, AttributeError):  # transformers leaves it to the model
        return None
    rows: int | None = getattr(embedding, "num_embeddings", None)
    return rows
