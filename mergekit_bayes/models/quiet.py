"""Progress bars and log output of transformers and datasets, on or off."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def with_bar(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The same items under a progress bar on stderr, unless inside `quiet_libraries(True)`."""
    from transformers.utils.logging import tqdm

    bar: Iterable[T] = tqdm(items, desc=what, total=total)
    return bar


@contextmanager
def quiet_libraries(quiet: bool) -> Iterator[None]:
    """Switch off the progress bars and warnings of transformers and datasets inside the block.

    Errors are still logged. The settings from before are restored at the end.

    Args:
        quiet: False changes nothing.
    """
    import datasets
    from transformers.utils import logging

    if not quiet:
        yield
        return
    verbosity = logging.get_verbosity()
    model_bars = logging.is_progress_bar_enabled()
    row_bars = not datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if model_bars:
            logging.enable_progress_bar()
        if row_bars:
            datasets.enable_progress_bars()
