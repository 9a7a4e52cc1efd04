"""One command line in this process, through the entry point, with all that it does observed."""

import contextlib
import faulthandler
import gc
import io
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from bmerge_cli import main as command

CEILING = 4 << 30  # bytes of memory that a case may take before the system refuses
LARGEST = 1 << 30  # bytes of a file that a case may write


class Hang(BaseException):
    """A case ran out of time; no handler of the package's own may catch it."""


@dataclass(frozen=True)
class Ran:
    """What a line did.

    Attributes:
        code: Its exit code; None if an exception left the entry point.
        out: What it printed on stdout.
        err: What it printed on stderr.
        error: The exception that left the entry point.
        seconds: How long it took.
        grown: Peak of its memory above that of its start, in bytes.
        opened: Files that it left open.
    """

    code: int | None
    out: str
    err: str
    error: BaseException | None
    seconds: float
    grown: int
    opened: int


class Stage:
    """Runs lines in this process, with both streams caught, also what C code writes to them."""

    def __init__(self) -> None:
        self._terminal = os.dup(2)
        # Never closed: loggers of libraries keep the stream that they first saw.
        self._files = [io.FileIO(os.memfd_create(name), "r+") for name in ("stdout", "stderr")]
        self._streams = [
            io.TextIOWrapper(f, "utf-8", errors="surrogateescape", write_through=True)
            for f in self._files
        ]

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Point the streams and their descriptors at the files."""
        kept = sys.stdin, sys.stdout, sys.stderr
        descriptors = [os.dup(number) for number in range(3)]
        nothing = os.open(os.devnull, os.O_RDONLY)
        for file in self._files:
            file.seek(0)
            file.truncate()
        for number, file in ((0, nothing), (1, self._files[0]), (2, self._files[1])):
            os.dup2(file if isinstance(file, int) else file.fileno(), number)
        os.close(nothing)
        sys.stdout, sys.stderr = self._streams
        sys.stdin = io.TextIOWrapper(io.FileIO(os.devnull))
        try:
            yield
        finally:
            sys.stdin.close()
            sys.stdin, sys.stdout, sys.stderr = kept
            for number, saved in enumerate(descriptors):
                os.dup2(saved, number)
                os.close(saved)

    def run(self, words: tuple[str, ...], folder: Path, limit: float) -> Ran:
        """Run `bmerge WORDS` in a folder, for `limit` seconds at most."""
        code: int | None = None
        error: BaseException | None = None
        opened, memory, began = _descriptors(), _reset_peak(), time.monotonic()
        arguments, sys.argv = sys.argv, ["bmerge", *words]
        try:
            with contextlib.chdir(folder), self.caught(), _bounds(limit, self._terminal):
                try:
                    command.main()
                except SystemExit as stop:
                    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
                except BaseException as raised:
                    error = raised
        except Hang as late:  # the alarm rang between the two
            error = late
        finally:
            sys.argv = arguments
        seconds, grown = time.monotonic() - began, _status("VmHWM") - memory
        if _descriptors() > opened:
            gc.collect()
        out, err = (self._text(file) for file in self._files)
        left = 0 if error is not None else max(0, _descriptors() - opened)
        return Ran(code, out, err, error, seconds, grown, left)

    def _text(self, file: io.FileIO) -> str:
        file.seek(0)
        return file.read().decode(errors="surrogateescape")


@contextlib.contextmanager
def _bounds(limit: float, terminal: int) -> Iterator[None]:
    """Raise `Hang` after `limit` seconds; end the process if even that does not help.

    Args:
        limit: The seconds.
        terminal: Descriptor to which the stack is then written.
    """

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang(f"over {limit:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    limits = {resource.RLIMIT_DATA: _status("VmData") + CEILING, resource.RLIMIT_FSIZE: LARGEST}
    kept = {which: resource.getrlimit(which) for which in limits}
    faulthandler.dump_traceback_later(3 * limit + 60, exit=True, file=terminal)
    for which, most in limits.items():
        resource.setrlimit(which, (most, kept[which][1]))
    signal.setitimer(signal.ITIMER_REAL, limit, 2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
        for which, pair in kept.items():
            resource.setrlimit(which, pair)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def _reset_peak() -> int:
    """Start the peak of memory anew; returns what is taken now."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
