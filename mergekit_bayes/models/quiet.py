"""Progress bars and log output of the libraries, on or off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The same items under a bar on stderr, unless `hushed`."""
    from transformers.utils.logging import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, total=total)
    return bar


@contextmanager
def hushed(quiet: bool) -> Iterator[None]:
    """No progress bars and no warnings of transformers and datasets inside, if `quiet`; errors
    still show.
    """
    import datasets
    from transformers.utils import logging

    if not quiet:
        yield
        return
    shown, shown_rows = (
        logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled() is False,
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
        if shown_rows:
            datasets.enable_progress_bars()
