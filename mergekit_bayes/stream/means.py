"""Means of a stored precision, over its tensor or over each row.

Sums are taken over windows that depend on the tensor alone and are added in order, so that neither
chunks nor threads change a bit.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, is_bad_precision
from mergekit_bayes.kernels import row_sums
from mergekit_bayes.kernels.base import Array
from mergekit_bayes.methods.measuring import WINDOW, OrderedMap
from mergekit_bayes.plan import MergePlan, Operand
from mergekit_bayes.stream.chunks import Reader

_READ = 4 * WINDOW  # entries that are read at a time


class _Window(NamedTuple):
    start: int
    stop: int
    row: int  # entries that are added up together


class PrecisionMeans:
    """Reads the means of precisions that have one number per entry.

    Args:
        plan: The merge.
        reader: Gives the calling thread's reader.
        ordered_map: Runs the windows.
        fused: Whether to use the compiled sums.
    """

    def __init__(
        self,
        plan: MergePlan,
        reader: Callable[[], Reader],
        ordered_map: OrderedMap,
        *,
        fused: bool,
    ) -> None:
        self._plan, self._reader, self._map, self._fused = plan, reader, ordered_map, fused

    def over_tensor(self, operand: Operand, size: int) -> tuple[Array, int]:
        """The mean of the first `size` entries, (1,) in float64, and how many of them are bad."""
        end = size // WINDOW * WINDOW
        windows = [
            _Window(start, min(start + _READ, end), WINDOW) for start in range(0, end, _READ)
        ]
        if end < size:
            windows.append(_Window(end, size, size - end))
        sums, bad = self._sums(operand, windows)
        return np.array([_sum_in_order(sums) / max(size, 1)]), bad

    def over_rows(self, operand: Operand, size: int, row: int) -> tuple[Array, int]:
        """The mean of each row of the first `size` entries, and how many of these are bad.

        Args:
            operand: The input's contribution.
            size: A multiple of `row`.
            row: Entries of a row.

        Returns:
            (rows,) in float64, and the number of bad entries.
        """
        if row <= WINDOW:
            step = _READ // row * row
            windows = [
                _Window(start, min(start + step, size), row) for start in range(0, size, step)
            ]
            sums, bad = self._sums(operand, windows)
            return (np.concatenate(sums) / row if sums else np.zeros(0)), bad
        windows = [
            _Window(start, min(start + WINDOW, end), min(WINDOW, end - start))
            for end in range(row, size + row, row)
            for start in range(end - row, end, WINDOW)
        ]
        sums, bad = self._sums(operand, windows)
        each = math.ceil(row / WINDOW)
        rows = [_sum_in_order(sums[first : first + each]) for first in range(0, len(sums), each)]
        return np.array(rows) / row, bad

    def _sums(self, operand: Operand, windows: Sequence[_Window]) -> tuple[list[Array], int]:
        results = list(self._map(lambda window: self._window_sums(operand, window), windows))
        return [sums for sums, _ in results], sum(bad for _, bad in results)

    def _window_sums(self, operand: Operand, window: _Window) -> tuple[Array, int]:
        """Sums by row, and how many entries are bad, which are summed as if data added nothing."""
        precision, config, bad_entries = operand.precision, self._plan.config, 0
        assert precision is not None
        assert precision.source is not None
        dtype = precision.source.specs[precision.name].dtype
        raw = self._reader().raw(precision.source, precision.name, window.start, window.stop)
        if dtype == "BF16":
            stored = raw.view(np.uint16)
        else:
            stored = decode(raw, dtype).astype(np.float32, copy=False)
        if config.on_bad == "base" or config.pool is not None:  # else the second pass sees them
            values = decode(raw, dtype).astype(np.float32, copy=False)
            if not (values.min() >= 0 and values.max() < np.inf):
                bad = is_bad_precision(values)
                bad_entries = int(np.count_nonzero(bad))
                stored = np.where(bad, np.float32(operand.input.weighing.contained), values)
        sums = np.zeros((window.stop - window.start) // window.row)
        row_sums(stored, window.row, sums, fused=self._fused)
        return sums, bad_entries


def _sum_in_order(sums: Sequence[Array]) -> float:
    """The sum of all numbers, in order and in float64."""
    total = 0.0
    for numbers in sums:
        for number in numbers:
            total += float(number)
    return total
