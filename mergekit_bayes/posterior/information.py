"""How much a precision knows: how far it is from one number, and whether it looks like curvature.

A fixed sample of entries decides, on every axis at most 32 evenly spaced indices, so that rows and
columns of different tensors are looked at in the same places. The curvature of a layer `y = W x` is
nearly an outer product,

    H_ij ~ E[g_i^2] E[x_j^2]        g = dloss/dy,

so that rows and columns explain most of how it varies inside a matrix; of numbers in any other
order they explain nothing. The bias of the layer has the curvature E[g_i^2] of the rows, and what
reads from the residual stream or writes into it shares x_j or g_i with its neighbours, which shows
a matrix that is transposed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.layers import EMBEDDINGS, group_layers
from mergekit_bayes.checkpoint.specs import TensorSource
from mergekit_bayes.correlation import mean_ranks, unit_ranks
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.records import Frozen

SIDE = 32  # indices of an axis that are looked at
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")  # of an expert, in the name of a tensor
_SMALL = 16  # length of an axis below which a matrix shows no structure
_AT_ONCE = 1 << 16  # entries of a tensor that is read in one piece
_ENOUGH = 2048  # entries of matrices below which nothing is said
_ALONE = 0.01  # share of the prior below which curvature adds nothing to it

# Thresholds of `doubts`, measured by scripts/experiments/planted_precisions.py.
_CONSTANT = 0.05  # standard deviation of the log within a matrix; good ones had 0.85 or more
# Share that rows and columns explain: good ones had 0.68 or more, of one to three batches 0.20, and
# noise 0.01.
_EXPLAINED = 0.12
_SCATTERED = 0.05  # share of zeros outside of rows and columns of zeros
_ZEROS = 0.4  # share of zeros in matrices

_Matrix = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Grid:
    """The entries of one tensor that are looked at.

    Attributes:
        name: The tensor.
        values: (rows, columns) in float64; one column for a vector.
        shape: (rows, columns) of the tensor, whose axes after the first are joined.
        is_embedding: Whether it is an embedding by its name: it has rows of tokens that no text
            held.
    """

    name: str
    values: _Matrix
    shape: tuple[int, int]
    is_embedding: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a layer, and large enough to show structure."""
        return min(self.shape) >= _SMALL and not self.is_embedding

    @cached_property
    def logs(self) -> _Matrix:
        """Logarithms of the values that are positive numbers, flat."""
        values = self.values.ravel()
        return np.log(values[np.isfinite(values) & (values > 0)])

    @cached_property
    def ranks(self) -> _Matrix:
        """Ranks of the values."""
        return mean_ranks(self.values)


class Information(Frozen):
    """What a sample of a precision says about its worth.

    Attributes:
        entries: Number of entries in the sample.
        matrix_entries: How many of them lie in matrices: weights of layers, of 16 rows and columns
            or more.
        within: Share of the variance of log precision that lies within tensors; the rest is between
            them. None where it does not vary.
        deviation: Standard deviation of log precision within a matrix, the median over matrices;
            None without a matrix, as the next two.
        explained: Share of the variance of the ranks within a matrix that rows and columns explain,
            adjusted for their number; the median over matrices.
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


def positions(length: int) -> NDArray[np.int64]:
    """The indices of an axis that are looked at: at most `SIDE`, evenly spaced."""
    count = min(length, SIDE)
    return (np.arange(count) * length + length // 2) // max(count, 1)


def two_axes(shape: Sequence[int]) -> tuple[int, int]:
    """A shape as rows and columns: the axes after the first are joined."""
    rows = shape[0] if shape else 1
    return rows, int(np.prod(shape[1:]))


def read_grids(source: TensorSource, names: Mapping[str, str]) -> dict[str, Grid]:
    """Read the entries of a precision or of a mean that are looked at.

    Args:
        source: Its tensors.
        names: Those with one number an entry, by the name under which they are looked at.
    """
    embeddings = set(group_layers(names).get(EMBEDDINGS, ()))
    return {
        name: _read_grid(source, stored, name, is_embedding=name in embeddings)
        for name, stored in names.items()
    }


def _read_grid(source: TensorSource, stored: str, name: str, *, is_embedding: bool) -> Grid:
    shape = source.specs[stored].shape
    rows, columns = two_axes(shape)
    places = positions(columns)
    if columns == 1:
        values = read_chunk(source, stored, 0, rows)[positions(rows), None]
    elif rows * columns <= _AT_ONCE:
        values = read_chunk(source, stored, 0, rows * columns).reshape(rows, columns)
        values = values[positions(rows)][:, places]
    else:
        first, last = (int(places[0]), int(places[-1])) if places.size else (0, -1)
        found = [
            read_chunk(source, stored, row * columns + first, row * columns + last + 1)
            for row in positions(rows).tolist()
        ]
        values = np.stack(found)[:, places - first] if found else np.zeros((0, 0))
    return Grid(name, values.astype(np.float64), (rows, columns), is_embedding)


def chosen(names: Iterable[str], layers: int) -> list[str]:
    """The tensors of some layers, evenly spaced, and of experts the first.

    Args:
        names: Names of tensors.
        layers: How many numbered layers; those of all stacks count as one.
    """
    groups = list(group_layers(names).items())
    numbered = [layer for layer, _ in groups if layer[-1].isdigit()]
    kept = {numbered[i * len(numbered) // layers] for i in range(layers)} if numbered else None
    found: list[str] = []
    for layer, members in groups:
        if kept is None or layer in kept:
            first = {_INDEX.sub("#", n.removeprefix(layer)): n for n in reversed(members)}
            found += [name for name in members if name in first.values()]
    return found


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
        deviation=median(_deviation(grid.logs) for grid in matrices),
        explained=median(_explained(grid.ranks) for grid in matrices),
        aligned=_aligned(grids, matrices, weights or {}),
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
    if not is_enough(found) or found.deviation is None or found.explained is None:
        return []
    reasons = []
    if found.scattered > _SCATTERED or found.zeros > _ZEROS:
        reasons.append(f"{found.zeros:.0%} of the entries of its matrices are zero")
    if found.deviation < _CONSTANT:
        reasons.append("it hardly differs from one number a tensor")
    elif found.explained < _EXPLAINED:
        reasons.append(
            f"rows and columns explain {max(found.explained, 0):.0%} of how it varies in a matrix, "
            "where they explain most of a curvature: it is noise, or in another order"
        )
    elif found.aligned is not None and found.aligned < 0:
        reasons.append(
            "the rows of its square matrices fit the columns of other tensors: it is transposed"
        )
    return reasons


def median(numbers: Iterable[float]) -> float | None:
    """The median; None of nothing. numpy's loads a module that takes longer than all of this."""
    found = sorted(numbers)
    if not found:
        return None
    return float(found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2


def _deviation(logs: _Matrix) -> float:
    return float(logs.std()) if logs.size else 0.0


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
    return within / (within + between) if within + between > 0 else None


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


def _aligned(
    grids: Mapping[str, Grid], matrices: Sequence[Grid], weights: Mapping[str, Grid]
) -> float | None:
    """The mean over square matrices of `right - wrong`.

    Where the layer has a bias, right is the correlation of the bias with the outputs and wrong that
    with the inputs. Elsewhere two such differences are added:

    - right is the better of the correlations of its outputs with those of other tensors, and of its
      inputs with theirs; wrong is the same with inputs and outputs exchanged;
    - right are the correlations of rows with the size of the weights in them, and of columns; wrong
      are those of rows with columns.

    Transposing all square matrices changes the sign.
    """
    biases = _biases(grids, matrices)
    output = _output_axis(matrices, biases)
    profiles = {grid.name: (_profile(grid, 0), _profile(grid, 1)) for grid in matrices}
    outputs = _references(matrices, profiles, output)
    inputs = _references(matrices, profiles, 1 - output)
    gaps = []
    for grid in matrices:
        length = grid.shape[0]
        if length != grid.shape[1]:
            continue
        down, across = profiles[grid.name]
        out, into = (across, down) if output else (down, across)
        if grid.name in biases:
            bias = unit_ranks(biases[grid.name].values)
            gaps.append(_fit(out, bias) - _fit(into, bias))
            continue
        gap = 0.0
        if length in outputs and length in inputs:
            gap += max(_fit(out, outputs[length]), _fit(into, inputs[length]))
            gap -= max(_fit(into, outputs[length]), _fit(out, inputs[length]))
        if grid.name in weights:
            squares = weights[grid.name].values ** 2
            rows, columns = unit_ranks(squares.mean(1)), unit_ranks(squares.mean(0))
            gap += _fit(down, rows) + _fit(across, columns)
            gap -= _fit(down, columns) + _fit(across, rows)
        gaps.append(gap)
    return float(np.mean(gaps)) if gaps else None


def needs_weights(grids: Mapping[str, Grid]) -> list[str]:
    """The square matrices without a bias: their weights help to tell rows from columns."""
    matrices = [grid for grid in grids.values() if grid.is_matrix]
    biases = _biases(grids, matrices)
    return [g.name for g in matrices if g.shape[0] == g.shape[1] and g.name not in biases]


def _biases(grids: Mapping[str, Grid], matrices: Sequence[Grid]) -> dict[str, Grid]:
    return {grid.name: grids[bias] for grid in matrices if (bias := _bias(grid.name)) in grids}


def _bias(name: str) -> str:
    return f"{name.removesuffix('weight')}bias"


def _output_axis(matrices: Sequence[Grid], biases: Mapping[str, Grid]) -> int:
    """The axis of outputs: the first, unless biases show that weights are stored transposed."""
    votes = 0
    for grid in matrices:
        if grid.name in biases and grid.shape[0] != grid.shape[1]:
            length = biases[grid.name].shape[0]
            votes += (grid.shape[0] == length) - (grid.shape[1] == length)
    return 1 if votes < 0 else 0


def _profile(grid: Grid, axis: int) -> _Matrix | None:
    """The mean rank of the entries at each index of an axis, as unit ranks."""
    return unit_ranks(grid.ranks.mean(1 - axis))


def _references(
    matrices: Sequence[Grid],
    profiles: Mapping[str, tuple[_Matrix | None, _Matrix | None]],
    axis: int,
) -> dict[int, _Matrix | None]:
    """The mean profile along an axis of the matrices that are not square, by its length."""
    found: dict[int, list[_Matrix]] = {}
    for grid in matrices:
        profile = profiles[grid.name][axis]
        if grid.shape[0] != grid.shape[1] and profile is not None:
            found.setdefault(grid.shape[axis], []).append(profile)
    return {length: unit_ranks(np.mean(several, axis=0)) for length, several in found.items()}


def _fit(one: _Matrix | None, other: _Matrix | None) -> float:
    """The correlation of two profiles, at least 0; 0 where one of them is constant."""
    return 0.0 if one is None or other is None else max(float(one @ other), 0.0)
