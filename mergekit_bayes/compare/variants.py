"""What of a model is measured: the model as it is, and what becomes of it."""

from collections.abc import Callable, Generator

from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.evaluate.report import Variant
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.models.load import Loaded

Change = Callable[[Loaded], None]  # made to the loaded model before it is measured


def variants_of(
    config: CompareConfig, model: str
) -> Generator[tuple[Variant, EvaluateConfig, Change | None]]:
    """What is measured of one model, one after the other.

    What a variant needs on the disk lasts until the next one is asked for, or the iterator is
    closed: iterate inside `contextlib.closing`.

    Args:
        config: The settings of all models.
        model: One of them, as the config names it.

    Yields:
        The variant, its evaluation (whose model may be another folder), and what to change in the
        loaded model first, if anything.
    """
    yield "as it is", config.evaluation(model), None
