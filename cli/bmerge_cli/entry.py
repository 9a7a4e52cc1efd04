"""The entry point of the `bmerge` script: it answers signals from the first moment to the last.

Loading the commands takes a few tenths of a second, in which Python itself would answer an
interrupt by a traceback, and so would its end. A request to terminate, or a terminal that is
closed, would end the process at once, and leave its scratch folder to the next run.
"""

import gc
import os
import signal
import sys
from collections.abc import Callable

# Read by libraries when they are loaded; what the user has set stays, and processes that a command
# starts inherit them.
_LIBRARIES = {
    # An idle thread of numpy's OpenBLAS spins for 2^N ticks before it sleeps: by default a tenth of
    # a second of every other core from the moment that numpy is loaded. 2^20 are about 0.4 ms,
    # which still bridges the time between two calls of a decomposition.
    "OPENBLAS_THREAD_TIMEOUT": "20",
    # Else pydantic reads the entry points of every package that is installed to look for plugins.
    "PYDANTIC_DISABLE_PLUGINS": "__all__",
}


def main() -> None:
    """Load the command line and run it."""
    _open_closed_streams()
    for name, value in _LIBRARIES.items():
        os.environ.setdefault(name, value)
    gc.disable()  # nothing that is loaded is garbage; looking for some takes a tenth of the time
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, _terminate)
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a process in the background ignores it
        _run()
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        _run(lambda: signal.signal(signal.SIGINT, before))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was done is done


def _run(ready: Callable[[], object] = lambda: None) -> None:
    """Load the command line and run it; `ready` is called in between."""
    from bmerge_cli.main import main as run

    def loaded() -> None:
        gc.freeze()  # what is loaded stays to the end, and no collection visits it again
        gc.enable()
        ready()

    run(loaded)


def _open_closed_streams() -> None:
    """Open what the caller has closed (`>&-`) on nothing.

    Else Python has no such stream, and the first file that is opened takes its number: what a
    library writes to stderr would land in it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: that of the stream
            setattr(sys, name, open(number, mode, errors="backslashreplace"))  # noqa: SIM115


def _terminate(number: int, _: object) -> None:
    """End by way of all that cleans up, with the exit code that a shell gives to the signal."""
    sys.exit(128 + number)


def _stop(*_: object) -> None:
    """End at once: nothing has begun, and an exception inside of an import may be swallowed."""
    os.write(2, b"stopped; nothing was written\n")
    os._exit(130)
