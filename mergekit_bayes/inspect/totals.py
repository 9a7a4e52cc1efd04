"""Sums over the entries of a layer, kept while its tensors are streamed: norms, quantiles, counts.

Quantiles come from a histogram over the upper 16 bits of each float32 (sign, exponent, 7 bits of
mantissa): 128 bins for every doubling, so a quantile is within 0.4 % of the true one. The smallest
and the largest value are exact. Memory does not grow with the model, and torch is not needed.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.codec import chunks, is_bad_precision, read_chunk, read_tensor
from mergekit_bayes.checkpoint.specs import Array, TensorSource
from mergekit_bayes.inspect.report import QUANTILES, DifferenceLayer, LayerReport, PrecisionLayer
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.directions import diagonal
from mergekit_bayes.posterior.forms import is_form_of
from mergekit_bayes.posterior.stored import stored_numbers

_CHUNK = 1 << 18  # elements
_BINS = 1 << 16
_MEDIAN = QUANTILES.index(0.5)
_INFINITY = 0x7F80  # upper 16 bits of a float32 infinity; finite values lie below


class TensorMatch(NamedTuple):
    """Which tensors of a second checkpoint belong to which of the first.

    Attributes:
        path: The second checkpoint.
        source: Its tensors.
        partners: Its name of a tensor by the first checkpoint's name.
        only_here: Tensors of the first checkpoint without a partner.
        only_there: Tensors of the second without a partner.
        notes: How names differ, if they do.
    """

    path: str
    source: TensorSource
    partners: Mapping[str, str]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    notes: tuple[str, ...] = ()


class MatrixWidth(NamedTuple):
    """What the width of the draws of a matrix is computed from.

    Attributes:
        median: Median of its stored precision.
        rms: RMS of its weights.
    """

    median: float
    rms: float


class LayerTotals:
    """Sums over the tensors of one layer.

    Attributes:
        name: The layer.
        tensors: Number of tensors.
        parameters: Number of entries.
        bad: Entries that are not finite.
        squares: Sum of the squares of the finite entries.
        largest: Largest absolute finite value.
        precision: Sums over the precision.
        difference: Sums over the difference to the other model.
        widths: One for each tensor with a precision and two or more axes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = self.parameters = self.bad = 0
        self.squares = self.largest = 0.0
        self.precision = PrecisionTotals()
        self.difference = DifferenceTotals()
        self.widths: list[MatrixWidth] = []

    def add(self, name: str, posterior: Posterior, other: TensorMatch | None) -> None:
        """Read a tensor, its precision and its partner in the other model, chunk by chunk."""
        spec = posterior.mean.specs[name]
        self.tensors += 1
        precision, stored = posterior.precision, posterior.renamed_precisions.get(name, name)
        if precision is not None and not is_form_of(precision.specs.get(stored), spec):
            precision = None
        numbers = None if precision is None else diagonal(precision, stored)
        is_pooled = precision is not None and (
            numbers is not None or precision.specs[stored].size < spec.size
        )
        partner = other.partners.get(name) if other else None
        squares_before, histogram_before = self.squares, self.precision.histogram.copy()
        for start, stop in chunks(spec, _CHUNK):
            weights = read_chunk(posterior.mean, name, start, stop).astype(np.float64)
            squares = self._add_weights(weights)
            if precision is not None:
                self.precision.squares += squares
                if not is_pooled:
                    self.precision.add(read_chunk(precision, stored, start, stop))
            if other is not None and partner is not None:
                self.difference.add(weights, read_chunk(other.source, partner, start, stop))
        if precision is not None:
            self.precision.numbers += stored_numbers(precision, stored)
        if precision is not None and is_pooled:
            numbers = (read_tensor(precision, stored) if numbers is None else numbers).reshape(-1)
            self.precision.add(numbers, stands_for=spec.size // numbers.size)
        histogram = self.precision.histogram - histogram_before
        if len(spec.shape) > 1 and histogram.any():
            median = _histogram_quantiles(histogram)[_MEDIAN]
            rms = root_mean_square(self.squares - squares_before, spec.size)
            self.widths.append(MatrixWidth(median, rms))

    def report(self) -> LayerReport:
        """The layer's part of a report."""
        return LayerReport(
            name=self.name,
            tensors=self.tensors,
            parameters=self.parameters,
            rms=root_mean_square(self.squares, self.parameters - self.bad),
            largest=self.largest,
            bad=self.bad,
            precision=self.precision.report(),
            difference=self.difference.report(),
        )

    def _add_weights(self, weights: Array) -> float:
        finite = weights[np.isfinite(weights)]
        squares = float(finite @ finite)
        self.parameters += weights.size
        self.bad += weights.size - finite.size
        self.squares += squares
        self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
        return squares


class PrecisionTotals:
    """Sums over the precisions of a layer.

    Attributes:
        parameters: Parameters that have a precision.
        numbers: Stored precisions, of which one may stand for a row or a tensor.
        zeros: Parameters whose precision is zero.
        bad: Parameters whose precision is negative or not finite.
        squares: Sum of the squares of the weights that have a precision.
        smallest: Smallest good precision; infinite without one.
        largest: Largest good precision; minus infinity without one.
        histogram: Good precisions by the upper 16 bits of their float32.
    """

    def __init__(self) -> None:
        self.parameters = self.numbers = self.zeros = self.bad = 0
        self.squares = 0.0
        self.smallest, self.largest = np.inf, -np.inf
        self.histogram = np.zeros(_BINS, np.int64)

    def add(self, values: Array, stands_for: int = 1) -> None:
        """Add precisions, each of which stands for this number of parameters."""
        values = values.astype(np.float32)
        good = values[~is_bad_precision(values)]
        self.parameters += values.size * stands_for
        self.bad += (values.size - good.size) * stands_for
        self.zeros += int(np.count_nonzero(good == 0)) * stands_for
        if good.size:
            self.smallest = min(self.smallest, float(good.min()))
            self.largest = max(self.largest, float(good.max()))
        # + 0.0 turns a negative zero, whose bits sort last, into zero.
        bins = (good + np.float32(0)).view(np.uint32) >> 16
        self.histogram += stands_for * np.bincount(bins, minlength=_BINS)

    def report(self) -> PrecisionLayer | None:
        """The precision of the layer; None without one."""
        if not self.parameters:
            return None
        if self.smallest > self.largest:  # nothing but bad entries
            quantiles: tuple[float, ...] = ()
            sigma_ratio = None
        else:
            inner = [
                min(max(quantile, self.smallest), self.largest)
                for quantile in _histogram_quantiles(self.histogram)
            ]
            quantiles = (self.smallest, *inner, self.largest)
            median = inner[_MEDIAN]
            rms = root_mean_square(self.squares, self.parameters)
            sigma_ratio = median**-0.5 / rms if median > 0 and rms > 0 else None
        return PrecisionLayer(
            parameters=self.parameters,
            quantiles=quantiles,
            sigma_ratio=sigma_ratio,
            zeros=self.zeros,
            bad=self.bad,
        )


class DifferenceTotals:
    """Sums over the difference between two models, over entries that are finite in both.

    Attributes:
        parameters: Compared entries.
        weight_squares: Sum of the squares of the first model's entries.
        squares: Sum of the squares of the difference.
        largest: Largest absolute difference.
    """

    def __init__(self) -> None:
        self.parameters = 0
        self.weight_squares = self.squares = self.largest = 0.0

    def add(self, first: Array, second: Array) -> None:
        """Add entries of the first model (float64) and the same entries of the second."""
        finite = np.isfinite(first) & np.isfinite(second)
        first = first[finite]
        difference = second[finite].astype(np.float64) - first
        self.parameters += first.size
        self.weight_squares += float(first @ first)
        self.squares += float(difference @ difference)
        self.largest = max(self.largest, float(np.abs(difference).max(initial=0.0)))

    def report(self) -> DifferenceLayer | None:
        """The difference in the layer; None if nothing was compared."""
        return difference_of([self]) if self.parameters else None


def difference_of(totals: Iterable[DifferenceTotals]) -> DifferenceLayer:
    """The difference over several layers."""
    totals = list(totals)
    count = sum(t.parameters for t in totals)
    rms = root_mean_square(sum(t.squares for t in totals), count)
    weights_rms = root_mean_square(sum(t.weight_squares for t in totals), count)
    return DifferenceLayer(
        parameters=count,
        rms=rms,
        relative=rms / weights_rms if weights_rms > 0 else None,
        largest=max(t.largest for t in totals),
    )


def root_mean_square(squares: float, count: int) -> float:
    """sqrt(squares / count); zero without entries."""
    return float((squares / count) ** 0.5) if count else 0.0


def _histogram_quantiles(histogram: NDArray[np.int64]) -> list[float]:
    """Middles of the bins that hold the `QUANTILES`."""
    sums = histogram.cumsum()
    bins = np.searchsorted(sums, np.array(QUANTILES) * sums[-1]).astype(np.uint32)
    edges = np.stack([bins << 16, np.minimum(bins + 1, _INFINITY - 1) << 16])
    middles = edges.view(np.float32).astype(np.float64).mean(axis=0)
    return [0.0 if index == 0 else float(x) for index, x in zip(bins, middles, strict=True)]
