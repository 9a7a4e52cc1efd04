"""Several processes in step: who goes first, and an error on one rank is the same error on all.

Without this, a rank that meets an error would leave the others waiting in a collective operation,
and a late rank would find what another one has just written. With one process every function here
is a plain call.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from mergekit_bayes import errors
from mergekit_bayes.errors import BmergeError

T = TypeVar("T")
R = TypeVar("R")
_alone = False  # whether this rank does work that others do not share at this moment


def is_main() -> bool:
    """Whether this is the one process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def world() -> int:
    """Number of processes that work together: 1 without a group, and inside of `on_main`."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def main_first(work: Callable[[], T]) -> T:
    """Do the same work on every rank, first on one rank of each machine.

    The other ranks then find in the cache what the first one downloaded.

    Raises:
        BmergeError: On every rank, the error of the first rank that failed.
        RuntimeError: Likewise, where that error was of another class.
    """
    is_first = world() == 1 or int(os.environ.get("LOCAL_RANK", "0")) == 0
    result: T | None = None
    for turn in (True, False):
        error = None
        if is_first == turn:
            result, error = _attempt(work)
        _agree(error)
        if world() == 1:
            break
    return cast(T, result)


def on_main(work: Callable[[], T]) -> T:
    """Do work on rank 0 alone; every rank returns its result, which must be picklable.

    Raises:
        BmergeError: On every rank, the error of rank 0.
        RuntimeError: Likewise, where that error was of another class.
    """
    result, error = _attempt(work) if is_main() or world() == 1 else (None, None)
    _agree(error)
    if world() == 1:
        return cast(T, result)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def spread(items: Sequence[T], work: Callable[[T], R]) -> list[R]:
    """The result of each item, where rank r of w works on items r, r + w, r + 2w and so on.

    Every rank must call this with the same items and gets all results, in the order of the items.
    What is made of an item must not depend on the others, and must be picklable. Then the results
    are those of one process, to the bit where items are whole batches on equal devices.

    Args:
        items: What there is to do, such as batches.
        work: Called once for each item, on one rank.

    Raises:
        BmergeError: On every rank, the error of the first rank that failed.
        RuntimeError: Likewise, where that error was of another class.
    """
    size = world()
    if size == 1:
        return [work(item) for item in items]
    own, error = _attempt(lambda: [work(item) for item in items[dist.get_rank() :: size]])
    _agree(error)
    parts: list[list[R]] = [[] for _ in range(size)]
    dist.all_gather_object(parts, own)
    return [parts[i % size][i // size] for i in range(len(items))]


def mean_over_ranks(value: float) -> float:
    """Mean of one number of each rank. Every rank must call this."""
    if world() == 1:
        return value
    values: list[float] = [0.0] * world()
    dist.all_gather_object(values, value)
    return float(sum(values) / len(values))


@contextmanager
def _by_itself() -> Iterator[None]:
    """Work that others do not share: what it calls must not wait for them."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        with _by_itself():
            return work(), None
    except Exception as error:
        return None, error


def _agree(error: Exception | None) -> None:
    """Raise on every rank what any of them met; a rank raises its own error unchanged."""
    failures: list[tuple[str, str] | None] = [None] * world()
    if world() > 1:
        failure = None if error is None else (type(error).__name__, str(error))
        dist.all_gather_object(failures, failure)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            name, text = failure
            error_class = getattr(errors, name, None)
            if isinstance(error_class, type) and issubclass(error_class, BmergeError):
                raise error_class(text)
            raise RuntimeError(f"process {rank} failed: {name}: {text}")
