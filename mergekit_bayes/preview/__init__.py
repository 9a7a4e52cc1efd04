"""Many scales of one merge, formed in place in one model and measured.

All but the settings needs torch and is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from mergekit_bayes.preview.settings import PreviewConfig

if TYPE_CHECKING:
    from mergekit_bayes.preview.files import read_preview
    from mergekit_bayes.preview.report import Point, PreviewReport
    from mergekit_bayes.preview.run import run_preview

__all__ = ["Point", "PreviewConfig", "PreviewReport", "read_preview", "run_preview"]

_MODULES = {
    "Point": "report",
    "PreviewReport": "report",
    "read_preview": "files",
    "run_preview": "run",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value
