"""The change of a fine-tune or an edit as a LoRA adapter, weighed by the precision."""

from mergekit_bayes.extract.report import ExtractedLayer, ExtractReport, OtherChange
from mergekit_bayes.extract.run import run_extract
from mergekit_bayes.extract.settings import ExtractConfig

__all__ = ["ExtractConfig", "ExtractReport", "ExtractedLayer", "OtherChange", "run_extract"]
