"""Spend evaluations only where the prediction of a merge is good (see `merge/increase`)."""

import math
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge.predict import PredictedMerge, predict_merges
from mergekit_bayes.plan import MergeConfig
from mergekit_bayes.preview.designs import Named
from mergekit_bayes.preview.settings import Choice, PreviewConfig, Vector


class Prediction(NamedTuple):
    """What a merge is predicted to cost the models that go into it.

    Attributes:
        nats: The mean, or the largest, of the models' predicted rises on their own data, in nats an
            observation.
        trusted: Whether every task is nearer to the merge than to the base; True without a base.
    """

    nats: float
    trusted: bool


Predicted = dict[Vector, Prediction]


def predict(config: PreviewConfig, recipe: MergeConfig, vectors: Named, out: Path) -> Predicted:
    """The prediction of every vector, by one pass over the inputs; none if it is not asked for.

    Args:
        config: What is previewed.
        recipe: The merge.
        vectors: The scales.
        out: An output that does not exist, and is not made.

    Raises:
        ConfigError: Nothing is known of any model's loss.
        BmergeError: As `predict_merges`.
    """
    if config.predict_first is None:
        return {}
    report = predict_merges(recipe.model_copy(update={"out": str(out)}), list(vectors))
    return {
        scales: _prediction(found, config.choose)
        for scales, found in zip(vectors, report.sets, strict=True)
    }


def best_predicted(config: PreviewConfig, vectors: Named, predicted: Predicted) -> Named:
    """The recipe's own vector, and those of the smallest predictions, in their order."""
    if config.predict_first is None:
        return vectors
    others = [scales for scales, origin in vectors.items() if origin != "recipe"]
    best = sorted(others, key=lambda scales: predicted[scales].nats)[: config.predict_first]
    return {s: origin for s, origin in vectors.items() if origin == "recipe" or s in best}


def _prediction(merge: PredictedMerge, choice: Choice) -> Prediction:
    rises = [increase.nats for increase in merge.predicted if increase.nats is not None]
    if not rises:
        raise ConfigError(
            "--predict-first: nothing is predicted, since no precision of these models says for "
            "how many observations it stands. Leave it out."
        )
    nats = max(rises) if choice == "worst" else math.fsum(rises) / len(rises)
    return Prediction(nats, all(increase.trusted is not False for increase in merge.predicted))
