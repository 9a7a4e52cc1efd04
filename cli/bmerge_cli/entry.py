"""The entry point of the `bmerge` script: it answers signals from the first moment to the last.

Loading the commands takes a few tenths of a second, in which Python itself would answer an
interrupt by a traceback, and so would its end. A request to terminate, or a terminal that is
closed, would end the process at once, and leave its scratch folder to the next run.
"""

import os
import signal
import sys


def main() -> None:
    """Load the command line and run it."""
    _open_closed_streams()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores one of them
            signal.signal(number, _terminate)
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # a process in the background ignores it
        from bmerge_cli.main import main as run

        run()
        return
    signal.signal(signal.SIGINT, _stop)
    from bmerge_cli.main import main as run

    try:
        run(lambda: signal.signal(signal.SIGINT, before))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was done is done


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
