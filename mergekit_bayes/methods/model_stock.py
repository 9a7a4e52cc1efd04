"""Model Stock: how far to go from the base to the mean of the tasks (Jang et al., ECCV 2024)."""

import numpy as np

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.sphere import changes_of, cosines_of, weighted_sum
from mergekit_bayes.methods.tensors import Array, Reads, Settings, TensorRule, Tensors, by_tensor

_NO_RATIO = 1e-6  # of the denominator, below which task vectors cancel out


def model_stock(tensors: Tensors) -> Array:
    """Go from the base to the mean of the tasks as far as their task vectors agree.

        c    = the mean over pairs of cos(m_s - m0, m_t - m0)
        t    = T c / (1 + (T - 1) c)
        mean = (1 - t) m0 + t sum_t m_t / T

    Source: Jang, Yun and Han, "Model Stock", ECCV 2024 (2403.19522), for each layer. The paper has
    one angle for all pairs, and its experiments two models; the mean of cosines for more is
    mergekit's. A task that changed nothing has cosine 0 with every other. Where the denominator is
    below 1e-6, which means that task vectors cancel out, the base stays as it is, as in mergekit.
    Between, for c < 0, t is negative, and the merge leaves the base in the other direction.

    mergekit also takes a product of two norms below 1e-6 for 1e-6, which keeps small changes, such
    as 1e-3 of a norm layer, at the base; here the size of changes does not matter, as in the paper.

    With `filter_wise=1` each vector along the last axis has its own c and t.

    Args:
        tensors: The base and two tasks or more.

    Raises:
        ArithmeticError: One task only.
    """
    assert tensors.base is not None
    count = len(tensors.tasks)
    if count < 2:
        raise ArithmeticError("Model Stock compares task vectors, and needs two models or more")
    if reads_of(tensors.settings) == "rows" and tensors.base.ndim > 1:
        return _by_vectors(tensors)
    if tensors.products is None:
        wide = [np.float64(m).reshape(-1) for m in (tensors.base, *tensors.tasks)]
        products = np.array([[np.vdot(one, other) for other in wide] for one in wide])
    else:
        products = tensors.products
    cosines = cosines_of(changes_of(products))
    pairs = cosines.sum() - np.trace(cosines)
    t = float(_ratio(pairs / (count * (count - 1)), count))
    return weighted_sum((tensors.base, *tensors.tasks), (1 - t, *[t / count] * count))


def _by_vectors(tensors: Tensors) -> Array:
    changes, count = tensors.changes, len(tensors.tasks)
    directions, voting = np.zeros(changes[0].shape), np.zeros((*changes[0].shape[:-1], 1))
    for change in changes:
        norms = np.linalg.norm(change.astype(np.float64), axis=-1, keepdims=True)
        voting = voting + (norms > 0)
        directions = directions + change / np.where(norms > 0, norms, 1.0)
    # |sum_t u_t|^2 is the number of unit vectors plus their cosines, each pair counted twice.
    pairs = (directions * directions).sum(axis=-1, keepdims=True) - voting
    t = _ratio(pairs / (count * (count - 1)), count).astype(changes[0].dtype)
    return np.asarray(tensors.base + t * np.mean(changes, axis=0))


def _ratio(cosine: Array | float, tasks: int) -> Array:
    cosine = np.asarray(cosine, np.float64)
    denominator = 1 + (tasks - 1) * cosine
    is_undefined = np.abs(denominator) < _NO_RATIO
    return np.where(is_undefined, 0.0, tasks * cosine / np.where(is_undefined, 1.0, denominator))


def reads_of(settings: Settings) -> Reads:
    """What is needed at a time: products, or rows where each vector has its own ratio."""
    return "rows" if settings["filter_wise"] else "products"


MODEL_STOCK = Method(
    "model_stock",
    by_tensor,
    needs_base=True,
    needs_precision=False,
    summary="From the base towards the mean of the tasks, as far as they agree in direction "
    "(Model Stock, Jang et al., ECCV 2024).",
    example="bmerge merge A B --base BASE --method model_stock",
    formula="m = (1 - t) m0 + t sum_t m_t / T,  t = T c / (1 + (T - 1) c),  c the mean cosine",
    parameters=(Parameter("filter_wise", 0, "1 gives each row of a weight its own ratio", 0, 1),),
    takes_scales=False,
    fewest=2,
    tensor=TensorRule(model_stock, "products", reads_of),
)
