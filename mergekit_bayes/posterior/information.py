"""How much a precision knows: how far it is from one number, and whether it looks like curvature.

A fixed sample of entries decides (`posterior.grids`). The curvature of a layer `y = W x` is nearly
an outer product,

    H_ij ~ E[g_i^2] E[x_j^2]        g = dloss/dy,

so that rows and columns explain most of how it varies inside a matrix; of numbers in any other
order they explain nothing. `posterior.alignment` tells rows from columns.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.posterior.alignment import alignment
from mergekit_bayes.posterior.grids import Grid
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.records import Frozen

_ENOUGH = 2048  # entries of matrices below which nothing is said
_ROUNDING = 1e-12  # variance of logs that is none: float32 has a relative step of 1e-7
_ALONE = 0.01  # share of the prior below which curvature adds nothing to it

# Thresholds of `doubts`, measured by scripts/experiments/planted_precisions.py.
_CONSTANT = 0.05  # standard deviation of the log within a matrix; good ones had 0.85 or more
# Share that rows and columns explain: good ones had 0.68 or more, of one to three batches 0.20, and
# noise 0.01.
_EXPLAINED = 0.12
_SCATTERED = 0.05  # share of zeros outside of rows and columns of zeros
_ZEROS = 0.4  # share of zeros in matrices

_Matrix = NDArray[np.float64]


class Information(Frozen):
    """What a sample of a precision says about its worth.

    Attributes:
        entries: Number of entries in the sample.
        matrix_entries: How many of them lie in matrices: weights of layers, of 16 rows and columns
            or more.
        within: Share of the variance of log precision that lies within tensors; the rest is between
            them. None where it does not vary.
        deviation: Standard deviation of log precision within a matrix, the median over matrices
            that have a positive entry; None without one.
        explained: Share of the variance of the ranks within a matrix that rows and columns explain,
            adjusted for their number; the median over matrices; None without one.
        aligned: How much better the rows and columns of square matrices fit the other tensors than
            those of the transposed would, as a difference of rank correlations; the mean over
            square matrices. None without one that can be compared.
        informative: Effective number of informative entries, `(sum h)^2 / sum h^2` with h the part
            beyond the prior: that many equal ones would be as unevenly spread. As a share of all.
        alone: Share of entries that hold the prior or `hess_init` alone, or are zero.
        zeros: Share of the matrices' entries that are zero.
        scattered: The same, outside of rows and columns that are zero everywhere.
    """

    entries: int
    matrix_entries: int
    within: float | None
    deviation: float | None
    explained: float | None
    aligned: float | None
    informative: float
    alone: float
    zeros: float
    scattered: float


def floors(info: PosteriorInfo | None) -> tuple[float, ...]:
    """The numbers that an entry holds where the data said nothing, on the stored scale."""
    if info is None or info.prior.kind not in ("none", "isotropic"):
        return (0.0,)
    prior, start = info.prior.precision, info.training.get("hess_init")
    if info.estimator == "ivon" and isinstance(start, int | float):
        return (prior, prior + float(start) * float(info.ess or info.observations or 0.0))
    return (prior,)


@np.errstate(all="ignore")  # bad entries are reported elsewhere
def information(
    grids: Mapping[str, Grid],
    info: PosteriorInfo | None,
    weights: Mapping[str, Grid] | None = None,
) -> Information:
    """What a sample of a precision says about its worth.

    Args:
        grids: The sample, by tensor name.
        info: The record of the precision.
        weights: The same entries of the mean, of the tensors that `needs_weights` names.
    """
    prior = floors(info)
    grids = {name: grid for name, grid in grids.items() if grid.values.size}
    matrices = [grid for grid in grids.values() if grid.is_matrix]
    entries = sum(grid.values.size for grid in matrices)
    zeros = sum(int((grid.values == 0).sum()) for grid in matrices)
    scattered = sum(_scattered(grid.values) for grid in matrices)
    return Information(
        entries=sum(grid.values.size for grid in grids.values()),
        matrix_entries=entries,
        within=_within(grids.values()),
        deviation=median(float(grid.logs.std()) for grid in matrices if grid.logs.size),
        explained=median(_explained(grid.ranks) for grid in matrices),
        aligned=alignment(grids, matrices, weights or {}),
        informative=_informative(grids.values(), prior[0]),
        alone=_alone(grids.values(), prior),
        zeros=zeros / entries if entries else 0.0,
        scattered=scattered / entries if entries else 0.0,
    )


def is_enough(found: Information) -> bool:
    """Whether a sample is large enough to say anything of the precision."""
    return found.matrix_entries >= _ENOUGH


def doubts(found: Information) -> list[str]:
    """Why a precision is probably no curvature of its model, one clause each.

    Args:
        found: What its sample says. Of few matrices nothing is said.
    """
    if not is_enough(found) or found.explained is None:
        return []
    reasons = []
    if found.scattered > _SCATTERED or found.zeros > _ZEROS:
        reasons.append(f"{found.zeros:.0%} of the entries of its matrices are zero")
    if found.deviation is None:
        return reasons  # no entry is positive, which is told by their number
    if found.deviation < _CONSTANT:
        reasons.append("it hardly differs from one number a tensor")
    elif found.explained < _EXPLAINED:
        reasons.append(
            f"rows and columns explain {max(found.explained, 0):.0%} of how it varies in a matrix, "
            "where they explain most of a curvature: it is noise, or in another order"
        )
    elif found.aligned is not None and found.aligned < 0:
        reasons.append(
            "the rows of its square matrices fit the columns of other tensors, as if it were "
            "transposed"
        )
    return reasons


def median(numbers: Iterable[float]) -> float | None:
    """The median; None of nothing. numpy's loads a module that takes longer than all of this."""
    found = sorted(numbers)
    if not found:
        return None
    return float(found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2


def _within(grids: Iterable[Grid]) -> float | None:
    sizes, means, variances = [], [], []
    for grid in grids:
        if (logs := grid.logs).size:
            sizes.append(float(grid.shape[0] * grid.shape[1]))
            means.append(logs.mean())
            variances.append(logs.var())
    if not sizes:
        return None
    weights = np.array(sizes) / sum(sizes)
    within = float(weights @ np.array(variances))
    between = float(weights @ (np.array(means) - weights @ np.array(means)) ** 2)
    return within / (within + between) if within + between > _ROUNDING else None


def _explained(ranks: _Matrix) -> float:
    """1 - (variance that rows and columns leave) / (variance), adjusted for their number."""
    rows, columns = ranks.shape
    total = ((ranks - ranks.mean()) ** 2).sum() / (ranks.size - 1)
    rest = ranks - ranks.mean(1, keepdims=True) - ranks.mean(0, keepdims=True) + ranks.mean()
    left = (rest**2).sum() / ((rows - 1) * (columns - 1))
    return float(1 - left / total) if total else 0.0


def _scattered(values: _Matrix) -> int:
    zero = values == 0
    lines = zero.all(1, keepdims=True) | zero.all(0, keepdims=True)
    return int((zero & ~lines).sum())


def _informative(grids: Iterable[Grid], prior: float) -> float:
    first = second = size = 0.0
    for grid in grids:
        entries = float(grid.shape[0] * grid.shape[1])
        data = grid.values.ravel() - prior
        data = data[np.isfinite(data) & (data > 0)]
        first += entries * float(data.sum()) / grid.values.size
        second += entries * float(data @ data) / grid.values.size
        size += entries
    return float(first**2 / second / size) if second > 0 else 0.0


def _alone(grids: Iterable[Grid], values: Sequence[float]) -> float:
    found = size = 0.0
    for grid in grids:
        entries = float(grid.shape[0] * grid.shape[1])
        alone = np.zeros(grid.values.shape, bool)
        for value in values:
            alone |= np.abs(grid.values - value) <= _ALONE * value
        found += entries * (alone | (grid.values == 0)).mean()
        size += entries
    return float(found / size) if size else 0.0
