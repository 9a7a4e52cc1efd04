"""What other libraries say while a model is loaded and run, and our own bars instead.

Their warnings are about their own interfaces (a deprecated call, a loss type that is not named), so
a user can do nothing about them. What matters of them, bmerge checks and says in its own words.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from mergekit_bayes.records import Progress

T = TypeVar("T")

_BARS: ContextVar[bool] = ContextVar("_BARS", default=True)
# Loggers of the libraries below, with the variable by which their users ask for more.
_LIBRARIES = {
    "accelerate": "ACCELERATE_LOG_LEVEL",
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "peft": None,
    "torch": "TORCH_LOGS",
    "transformers": "TRANSFORMERS_VERBOSITY",
}
# A RuntimeWarning is about numbers, and is shown.
_SILENT = (DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning)


def with_bar(items: Iterable[T], what: str, total: int) -> Iterable[T]:
    """The same items under a bar on stderr that vanishes when done.

    There is none inside of `quiet_libraries(bars=False)`, and none where stderr is no terminal.
    """
    return _under_a_bar(items, what, total) if _has_bars() else items


def _has_bars() -> bool:
    return _BARS.get() and sys.stderr.isatty()


def _under_a_bar(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    with bar(what, total) as progress:
        for done, item in enumerate(items, 1):
            yield item
            progress(done, total)


@contextmanager
def bar(what: str, total: int) -> Iterator[Progress]:
    """A bar as of `with_bar`, moved by calls with (done, of).

    Where `with_bar` shows none, the calls do nothing.
    """
    if not _has_bars():
        yield lambda done, of: None
        return
    from rich import progress
    from rich.console import Console

    # Not redirected: rich's proxies would lie over the guard of the terminal, so that others' text
    # would pass beside it and the bar's own control characters would be shown as text.
    with progress.Progress(
        console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done, of: shown.update(task, completed=done, total=of)


@contextmanager
def quiet_libraries(*, bars: bool = True) -> Iterator[None]:
    """Keep bars, warnings and logs below errors of other libraries off stderr inside the block.

    Errors are still logged. A library whose own variable is set (`TRANSFORMERS_VERBOSITY=info`)
    logs as that says, and warnings are shown under `python -W`. The settings from before are
    restored at the end.

    Args:
        bars: Show our own bars.
    """
    with ExitStack() as stack:
        token = _BARS.set(_BARS.get() and bars)
        stack.callback(_BARS.reset, token)
        stack.enter_context(_without_their_bars())
        for name, variable in _LIBRARIES.items():
            if variable is None or variable not in os.environ:
                stack.enter_context(logged_from(logging.ERROR, name))
        if not sys.warnoptions:
            stack.enter_context(warnings.catch_warnings())
            for category in _SILENT:
                warnings.simplefilter("ignore", category)
        yield


@contextmanager
def logged_from(least: int, name: str) -> Iterator[None]:
    """Let a library log from this level on only; what it was set to is restored at the end.

    Args:
        least: The level.
        name: Name of the library's logger.
    """
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(max(level, least))
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _without_their_bars() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as transformers_logging

    # Asked here, since on its first use it sets the level of its logger.
    transformers_logging.get_verbosity()
    model_bars = transformers_logging.is_progress_bar_enabled()
    row_bars = not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if model_bars:
            transformers_logging.enable_progress_bar()
        if row_bars:
            datasets.enable_progress_bars()
