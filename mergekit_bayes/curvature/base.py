"""What an estimator of curvature takes and returns.

An estimator adds up the diagonal curvature of the loss over observations, at the weights that the
model has; the loss is the one that transformers trains the model with. It leaves the weights, the
gradients and the mode of the model as they were, draws only from its own seed, and counts an
observation where the loss counts one: a scored token of a model of tokens, an example of a
sequence classifier. Its docstring states the equation, the bias and the variance;
`tests/test_cases.py` and `tests/test_estimators.py` compare it with a dense matrix.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.nn import Module

from mergekit_bayes.curvature.stability import Part
from mergekit_bayes.curvature.sums import ENTRIES, Keeping


class Curvature(NamedTuple):
    """Diagonal curvature of the loss summed over observations.

    Attributes:
        total: By parameter name: float32, >= 0, summed loss/weight^2; of the parameter's shape, or
            1 on the axes over which `Keeping` takes the mean.
        observations: Number of observations; divide by it for the curvature of the mean loss.
        parts: Row sums over disjoint subsamples of the batches, which show how stable the total is;
            empty for an estimator that keeps none, or for fewer batches than subsamples.
        matrices: By parameter name, those whose total is a sum of products (..., k, n, n) in place
            of a diagonal, and the axis of the parameter that it is for, -1 or -2.
        sketches: The names of those matrices whose total is a sketch (`sketches`), (..., 1 + k, n).
        outputs: By the name of such a parameter, the factor of its other axis, (1, n, n), where the
            curvature is the Kronecker product of both.
    """

    total: dict[str, Tensor]
    observations: int
    parts: tuple[Part, ...] = ()
    matrices: Mapping[str, int] = {}
    outputs: Mapping[str, Tensor] = {}
    sketches: frozenset[str] = frozenset()


class Estimator(Protocol):
    """A function from a model and batches of its data to a `Curvature`."""

    def __call__(
        self,
        model: Module,
        batches: Iterable[Mapping[str, Tensor]],
        *,
        seed: int = 0,
        keep: Keeping = ENTRIES,
    ) -> Curvature:
        """Estimate the diagonal curvature of the loss summed over the batches.

        Args:
            model: A model of tokens (a causal or masked language model, a classifier of tokens) if
                batches hold `labels` of the inputs' shape, else a sequence classifier. Parameters
                that require no gradient are left out.
            batches: Mappings with `input_ids`, `attention_mask` and, for models of tokens,
                `labels`. Other labels only say by their dtype which loss is trained.
            seed: Seed of whatever the estimator draws.
            keep: How finely the sums are kept, and where.
        """
        ...
