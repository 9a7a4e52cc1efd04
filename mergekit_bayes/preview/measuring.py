"""The losses of the model in memory on the data sets of a preview."""

from typing import Literal, NamedTuple

from mergekit_bayes.evaluate.inputs import Inputs
from mergekit_bayes.evaluate.predictions import Predictions, predict
from mergekit_bayes.evaluate.refusals import refuse_model
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.evaluate.texts import Examples, number_classes
from mergekit_bayes.metrics.base import PRESENT, Interval
from mergekit_bayes.metrics.classification import classification_change
from mergekit_bayes.metrics.perplexity import loss_change
from mergekit_bayes.models.load import UNIT, Loaded


class Scores(NamedTuple):
    """What one merge scored, by data set.

    Attributes:
        loss: Mean loss, nats a token or an example.
        accuracy: Share of right labels; empty for a language model.
        observations: Number of tokens or examples.
    """

    loss: dict[str, float]
    accuracy: dict[str, float]
    observations: dict[str, int]


class Measurer:
    """Measures a model that changes, always on the same texts.

    Args:
        config: How to measure.
        inputs: The texts that `read_inputs` read by it.
        loaded: The model.

    Raises:
        BmergeError: The model cannot be measured so, or the labels are not its own.
    """

    def __init__(self, config: EvaluateConfig, inputs: Inputs, loaded: Loaded) -> None:
        refuse_model(config, loaded)
        self._config, self._inputs, self._loaded = config, inputs, loaded
        self._examples: dict[str, Examples] = number_classes(config, inputs.labelled, loaded)

    @property
    def unit(self) -> Literal["token", "example"]:
        """What one observation is."""
        return UNIT[self._loaded.task]

    def predictions(self) -> Predictions:
        """What the parameters that the model has now say about the texts.

        Raises:
            CheckpointError: Its outputs are not numbers.
        """
        return predict(
            self._config, self._loaded, self._inputs.texts, self._examples, PRESENT, _ignore
        )

    def measure(self) -> Scores:
        """The losses of the parameters that the model has now; raises as `predictions`."""
        perplexity, classification = self.predictions()
        return Scores(
            {n: r.loss.value for n, r in perplexity.items()}
            | {n: r.nll.value for n, r in classification.items()},
            {n: r.accuracy.value for n, r in classification.items()},
            {n: r.tokens for n, r in perplexity.items()}
            | {n: r.examples for n, r in classification.items()},
        )


def loss_changes(before: Predictions, after: Predictions, seed: int) -> dict[str, Interval]:
    """By data set the mean loss of one merge less that of another, paired, in nats an observation.

    Args:
        before: Of the merge to compare with.
        after: Of the other, on the same texts.
        seed: Seed of the bootstrap over documents or examples.
    """
    return {
        name: loss_change(report, after.perplexity[name], seed=seed)
        for name, report in before.perplexity.items()
    } | {
        name: classification_change(report, after.classification[name], seed=seed).nll
        for name, report in before.classification.items()
    }


def _ignore(step: str, done: int, of: int) -> None:
    pass
