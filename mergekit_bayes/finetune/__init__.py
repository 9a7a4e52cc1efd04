"""Fine-tune a model and keep its posterior."""

from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport, LoraSettings

__all__ = ["FinetuneConfig", "FinetuneReport", "LoraSettings", "run_finetune"]
