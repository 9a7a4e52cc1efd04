"""Whether rows and columns of a precision's square matrices fit those of the other tensors.

The bias of a layer has the curvature of its rows, and what reads from the residual stream or writes
into it shares its inputs or outputs with its neighbours, which shows a matrix that is transposed.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.correlation import unit_ranks
from mergekit_bayes.posterior.grids import Grid

_Matrix = NDArray[np.float64]


def alignment(
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
