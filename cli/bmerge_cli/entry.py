"""The entry point of the `bmerge` script: it answers Ctrl-C from the first moment to the last.

Loading the commands takes a few tenths of a second, in which Python itself would answer an
interrupt by a traceback, and so would its end.
"""

import os
import signal


def main() -> None:
    """Load the command line and run it."""
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


def _stop(*_: object) -> None:
    """End at once: nothing has begun, and an exception inside of an import may be swallowed."""
    os.write(2, b"stopped; nothing was written\n")
    os._exit(130)
