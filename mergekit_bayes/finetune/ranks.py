"""Several processes in step: who goes first, and an error on one is the same error on all.

Without this, a rank that meets an error leaves the others waiting in a collective, and a rank that
is late trips over what another has just made. With one process everything here is a plain call.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mergekit_bayes import errors
from mergekit_bayes.errors import BmergeError, ConfigError

T = TypeVar("T")


def launched() -> bool:
    """True inside a process that a launcher (ours, accelerate's, torchrun) started as one of
    several.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """True in the one process that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def idle_gpus() -> int:
    """GPUs that a run without a launcher leaves unused."""
    return 0 if launched() else max(0, torch.cuda.device_count() - 1)


def world() -> int:
    """Processes of the group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def main_first(work: Callable[[], T]) -> T:
    """The same work on every rank, first on one rank a machine, so that what it downloads is there
    for the others.

    Raises, on every rank, the error of the first rank that met one.
    """
    here = int(os.environ.get("LOCAL_RANK", "0")) == 0
    result: Any = None
    for turn in (True, False):
        error = None
        if here == turn:
            result, error = _attempt(work)
        _agree(error)
        if world() == 1:
            break
    return result  # type: ignore[no-any-return]


def on_main(work: Callable[[], T]) -> T:
    """Work of rank 0 alone; every rank gets its result, which must pickle, or raises its error."""
    result, error = _attempt(work) if is_main() or world() == 1 else (None, None)
    _agree(error)
    if world() == 1:
        return result  # type: ignore[return-value]
    held = [result]
    dist.broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[return-value]


def mean_over_ranks(value: float) -> float:
    """Collective: the mean of one number of each rank."""
    if world() == 1:
        return value
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return float(sum(found) / len(found))


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command as `processes` ranks on this machine; return the exit status of the first that
    fails, or 0.

    Each gets the variables that torchrun sets and accelerate reads, on a CPU also
    `ACCELERATE_USE_CPU`. When one fails, the others are stopped, and so are all when this process
    is interrupted, terminated or (on Linux) killed.

    Raises:
        ConfigError: More processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise ConfigError(
            f"--num-processes {processes}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}, "
            "and a process takes "
            "one each. Ask for as many, or hide them with CUDA_VISIBLE_DEVICES= to train on the "
            "CPU."
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if not gpus:
        environment["ACCELERATE_USE_CPU"] = "true"
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(list(command), env=own, preexec_fn=_end_with_parent))
        return _first_failure(children)
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            if child.poll() is None:
                child.terminate()
        for child in children:
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _end_with_parent() -> None:
    """On Linux: a command that is killed leaves no process behind that goes on training."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


_PR_SET_PDEATHSIG = 1


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        states = [child.poll() for child in children]
        bad = [state for state in states if state]
        if bad:
            # One error is told by every rank: let rank 0 finish its message.
            time.sleep(1)
            return bad[0] if bad[0] > 0 else 128 - bad[0]
        if None not in states:
            return 0
        time.sleep(0.05)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def _agree(error: Exception | None) -> None:
    """Raise on every rank what any of them met; a rank's own error is raised as it is."""
    if world() > 1:
        found: list[Any] = [None] * world()
        dist.all_gather_object(found, None if error is None else (type(error).__name__, str(error)))
    if error is not None:
        raise error
    if world() == 1:
        return
    for rank, other in enumerate(found):
        if other is not None:
            kind, text = other
            known = getattr(errors, kind, None)
            if isinstance(known, type) and issubclass(known, BmergeError):
                raise known(text)
            raise RuntimeError(f"process {rank} failed: {kind}: {text}")
