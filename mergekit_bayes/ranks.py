"""Several processes in step: who goes first, and an error on one rank is the same error on all.

Without this, a rank that meets an error would leave the others waiting in a collective operation,
and a late rank would find what another one has just written. With one process every function here
is a plain call.
"""

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from mergekit_bayes import errors
from mergekit_bayes.errors import BmergeError, ConfigError, printable

T = TypeVar("T")
R = TypeVar("R")
# Rank 0 may download and estimate for hours. When a process dies, the launcher ends the others.
COLLECTIVE_TIMEOUT = 24 * 3600  # seconds
_GRACE = 3.0  # seconds in which rank 0 can say first what all ranks met
_alone = False  # whether this rank does work that others do not share at this moment


def launched() -> int:
    """Number of processes that a launcher (bmerge, accelerate, torchrun) started; 0 without one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return count if count > 1 else 0


def join(asked: int | None = None) -> None:
    """Join the other processes of a launcher, until this one ends; without a launcher do nothing.

    Each takes a GPU of its machine where there are any. What joined before, such as a Trainer, is
    left as it is.

    Args:
        asked: Number of processes that the settings name, if they do.

    Raises:
        ConfigError: There are other processes than asked for, more than GPUs, or they cannot find
            each other.
    """
    refuse_other_processes(asked, launched() or 1)
    if not launched() or not dist.is_available() or dist.is_initialized():
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            raise ConfigError(
                f"process {own} of this machine has no GPU: there are {gpus}, and each process "
                "takes one. Start that many, or hide them with CUDA_VISIBLE_DEVICES=."
            )
        torch.cuda.set_device(own)
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the {launched()} processes of the launcher cannot find each other "
            f"({str(error).splitlines()[0]}). Start them by --num-processes, accelerate launch or "
            "torchrun."
        ) from None
    atexit.register(_leave)


def refuse_other_processes(asked: int | None, found: int) -> None:
    """Refuse another number of processes than the settings name.

    Args:
        asked: The setting `num_processes`.
        found: Number of processes that work together.

    Raises:
        ConfigError: They differ.
    """
    if asked is not None and asked != found:
        raise ConfigError(
            f"num_processes: {asked} were asked for and {found} run. Start them with "
            f"--num-processes {asked}, or with accelerate launch."
        )


def is_main() -> bool:
    """Whether this is the one process that prints and writes."""
    return not launched() or int(os.environ.get("RANK", "0")) == 0


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
    return cast(T, result) if world() == 1 else cast(T, _told(result))


def in_step(work: Callable[[], T]) -> T:
    """Do work on every rank, which may differ; each rank returns its own result.

    Raises:
        BmergeError: On every rank, the error of the first rank that failed.
        RuntimeError: Likewise, where that error was of another class.
    """
    result, error = _attempt(work)
    _agree(error)
    return cast(T, result)


def in_turn(work: Callable[[], T]) -> T:
    """As `in_step`, by one rank of each machine at a time.

    What each rank needs for a moment only is then there once on a machine.

    Raises:
        BmergeError: On every rank, the error of the first rank that failed.
        RuntimeError: Likewise, where that error was of another class.
    """
    own = int(os.environ.get("LOCAL_RANK", "0"))
    result: T | None = None
    for turn in range(max(gather(own)) + 1):
        error = None
        if turn == own or world() == 1:
            result, error = _attempt(work)
        _agree(error)
    return cast(T, result)


def or_end(work: Callable[[], T]) -> T:
    """Do work inside of which a library has the ranks wait for each other.

    A rank that fails there cannot tell the others, which would wait for it for ever. It prints its
    error and ends its process, upon which the launcher ends the others.
    """
    try:
        return work()
    except Exception as error:
        if not is_main():
            time.sleep(_GRACE)  # an error of all ranks is printed by rank 0, and ends this one
        name = type(error).__name__
        os.write(2, f"{name}: process {own_number()}: {printable(str(error))}\n".encode())
        os._exit(2)  # an orderly end would wait for what the others wait for


def lead(work: Callable[[Callable[[T], object]], R], job: Callable[[T], object]) -> R:
    """Do work on rank 0 alone, but for jobs in it that all ranks do together.

    The other ranks do one job after the other, as rank 0 comes to them, until its work is done;
    every rank returns its result, which must be picklable.

    Args:
        work: Called on rank 0, with a function that has all ranks do a job.
        job: What every rank does with what that function is given, which must be picklable and not
            None. An error in it must be the same on all ranks.

    Raises:
        BmergeError: On every rank, the error of rank 0.
        RuntimeError: Likewise, where that error was of another class.
    """
    if world() == 1:
        return work(job)

    def together(item: T) -> None:
        _told(item)
        with _by_itself(False):
            job(item)

    result, error = None, None
    if is_main():
        result, error = _attempt(lambda: work(together))
        _told(None)
    else:
        while (item := _told(None)) is not None:
            with suppress(Exception):  # rank 0 has it as well, and decides what follows from it
                job(cast(T, item))
    _agree(error)
    return cast(R, _told(result))


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


def own_number() -> int:
    """This rank's number among those that work together: 0 without a group."""
    return dist.get_rank() if world() > 1 else 0


def add_over_ranks(tensor: torch.Tensor) -> None:
    """Add up a tensor of each rank, in place on all of them. Every rank must call this."""
    if world() > 1:
        dist.all_reduce(tensor)


def gather(value: T) -> list[T]:
    """One picklable value of each rank, in their order. Every rank must call this."""
    values = [value] * world()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def rows_to_main(own: torch.Tensor, whole: torch.Tensor | None) -> None:
    """Put the rows of all ranks below each other, on rank 0. Every rank must call this.

    Args:
        own: This rank's rows, of any number.
        whole: Where all rows are put, in the CPU's memory, contiguous; None on the other ranks.
    """
    lengths = gather(len(own))
    if whole is None:
        if len(own):
            dist.send(own.detach().cpu().contiguous(), dst=0)
        return
    parts = torch.split(whole, lengths)
    parts[0].copy_(own)
    for rank, part in enumerate(parts):
        if rank and len(part):
            dist.recv(part, src=rank)


def mean_over_ranks(value: float) -> float:
    """Mean of one number of each rank. Every rank must call this."""
    values = gather(value)
    return value if len(values) == 1 else float(sum(values) / len(values))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _told(value: object) -> object:
    """What rank 0 has; every rank calls this."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def _by_itself(alone: bool = True) -> Iterator[None]:
    """Work that others do not share, or share again: what it calls must not wait for them."""
    global _alone
    before, _alone = _alone, alone
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
