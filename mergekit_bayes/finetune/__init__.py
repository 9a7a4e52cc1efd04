"""Fine-tune a model and keep its posterior.

`run_finetune` and what it needs (torch) are imported on first use, so that the settings can be read
without.
"""

from typing import TYPE_CHECKING

from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport, LoraSettings

if TYPE_CHECKING:
    from mergekit_bayes.finetune.run import run_finetune

__all__ = ["FinetuneConfig", "FinetuneReport", "LoraSettings", "run_finetune"]


def __getattr__(name: str) -> object:
    if name == "run_finetune":
        from mergekit_bayes.finetune.run import run_finetune

        return run_finetune
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
