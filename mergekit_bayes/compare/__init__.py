"""Models side by side: the same texts, prompts and noise, paired differences, report, picture.

All but the settings needs torch and is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mergekit_bayes.compare.settings import CompareConfig

if TYPE_CHECKING:
    from mergekit_bayes.compare.files import read_compare
    from mergekit_bayes.compare.report import CompareReport, Difference, Evaluated
    from mergekit_bayes.compare.run import run_compare

__all__ = [
    "CompareConfig",
    "CompareReport",
    "Difference",
    "Evaluated",
    "read_compare",
    "run_compare",
]

_MODULES = {
    "CompareReport": "report",
    "Difference": "report",
    "Evaluated": "report",
    "read_compare": "files",
    "run_compare": "run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
