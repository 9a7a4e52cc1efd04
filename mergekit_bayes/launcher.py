"""Start a command as several processes on this machine, where no other launcher has."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.ranks import launched

T = TypeVar("T")
P = ParamSpec("P")
# What launchers tell a process of the others.
_OF_A_RANK = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OF_RANKS = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")  # the beginnings of names
_PR_SET_PDEATHSIG = 1  # Linux' prctl: the signal that a process gets when its parent dies


def idle_gpus() -> int:
    """Number of GPUs that a run without a launcher leaves unused."""
    return 0 if launched() else max(0, torch.cuda.device_count() - 1)


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command as several ranks on this machine.

    Each process gets the variables that torchrun sets and accelerate reads, and on a CPU
    `ACCELERATE_USE_CPU`. When one fails, the others are stopped. All are stopped when this process
    is interrupted, terminated or (on Linux) killed. torchrun itself leaves its processes running
    when it is killed, and prints a table of failures below the command's own message.

    Args:
        command: Program and arguments.
        processes: Number of ranks to start.

    Returns:
        The exit status of the first process that fails, or 0.

    Raises:
        ConfigError: More processes than GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus and processes > gpus:
        raise ConfigError(
            f"--num-processes {processes}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}, "
            "and each process takes one. Use that many, or hide them with CUDA_VISIBLE_DEVICES= to "
            "train on the CPU."
        )
    # Its server holds the port from here on, so that no other process can take it before rank 0.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    environment = _environment(processes, store.port, on_cpu=not gpus)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(processes):
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(
                subprocess.Popen(list(command), env=variables, preexec_fn=_end_with_parent)
            )
        return _first_failure(children)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop(children)


def apart(work: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a function in a process of its own, which belongs to no launcher.

    What trains would join the other ranks, which do something else. Without a launcher this is a
    plain call.

    Args:
        work: A function of a module.
        arguments: Its arguments; picklable, as the result must be.
        keywords: Likewise.

    Raises:
        BmergeError: What the function raises, or the process ended without a result.
    """
    call = partial(work, *arguments, **keywords)
    return _elsewhere(call, None) if launched() else call()


def on_device(
    device: torch.device, work: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
) -> T:
    """Call a function that takes the first GPU that it sees, and have it take this device.

    Where that is another device, or under a launcher, the function runs in a process of its own,
    which sees no other GPU and belongs to no launcher. Otherwise this is a plain call.

    Args:
        device: A GPU or the CPU of this machine.
        work: A function of a module.
        arguments: Its arguments; picklable, as the result must be.
        keywords: Likewise.

    Raises:
        BmergeError: As `apart`.
    """
    call, visible = partial(work, *arguments, **keywords), _other_gpus(device)
    return call() if visible is None and not launched() else _elsewhere(call, visible)


def _other_gpus(device: torch.device) -> str | None:
    """`CUDA_VISIBLE_DEVICES` for a process that is to see this device only; None if it may stay."""
    if device.type == "cpu" and torch.cuda.device_count():
        return ""
    if device.type == "cuda" and device.index:
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        return names.split(",")[device.index].strip() if names else str(device.index)
    return None


def _elsewhere(call: Callable[[], T], gpus: str | None) -> T:
    """Call a function in a new process that no launcher knows, which may see these GPUs."""
    torch.cuda.empty_cache()  # the other process needs the room
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin_apart, initargs=(gpus,)
        ) as pool:
            return pool.submit(call).result()
    except BrokenProcessPool:
        raise ConfigError(
            "a process that worked beside this one ended without a message; the system ends one "
            "when memory runs out. Make room, or start fewer processes."
        ) from None


def without_launcher(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment without what a launcher tells of other processes."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _OF_A_RANK and not name.startswith(_OF_RANKS)
    }


def _begin_apart(gpus: str | None) -> None:
    _end_with_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    for name in set(os.environ) - set(without_launcher(os.environ)):
        del os.environ[name]


def _environment(processes: int, port: int, *, on_cpu: bool) -> dict[str, str]:
    """This process's variables and those by which the ranks find each other, at its store."""
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # no rank starts a store of its own, as in torchrun
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # torch's own threads warn of parameters that are all in use, which no Python code can filter.
    environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if on_cpu:
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def _end_with_parent() -> None:
    """Have the kernel end this child when the command is killed (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all children or for the first that fails; return its exit status, or 0."""
    while True:
        statuses = [child.poll() for child in children]
        failures = [status for status in statuses if status]
        if failures:
            # Every rank raises the same error: let rank 0 finish its message.
            time.sleep(1)
            return failures[0] if failures[0] > 0 else 128 - failures[0]
        if None not in statuses:
            return 0
        time.sleep(0.05)


def _stop(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Terminate the children that still run, and kill those that do not end within 10 seconds."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    for child in children:
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
