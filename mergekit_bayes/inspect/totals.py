"""Sums over entries: norms, histograms and quantiles."""

from collections.abc import Mapping

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, read_chunk, read_tensor
from mergekit_bayes.checkpoint.specs import Array, TensorSource
from mergekit_bayes.inspect.report import QUANTILES, DifferenceLayer, Layer, PrecisionLayer
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.forms import is_form_of

_CHUNK = 1 << 18  # elements
_BINS = 1 << 16


class TensorMatch:
    """Which tensors of the second checkpoint belong to which of the first."""

    def __init__(
        self,
        path: str,
        source: TensorSource,
        names: Mapping[str, str],
        here: list[str],
        there: list[str],
    ):
        self.path, self.source, self.names = path, source, names
        self.only_here, self.only_there = here, there


class LayerTotals:
    """Sums over a layer, kept while streaming."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = self.parameters = self.bad = 0
        self.squares = self.largest = 0.0
        self.held = self.numbers = self.zeros = self.bad_precision = 0
        self.held_squares, self.least, self.most = 0.0, np.inf, -np.inf
        self.histogram = np.zeros(_BINS, np.int64)
        self.compared, self.compared_squares, self.gap_squares, self.gap = 0, 0.0, 0.0, 0.0

    def add(self, name: str, posterior: Posterior, there: TensorMatch | None) -> None:
        spec = posterior.mean.specs[name]
        self.tensors += 1
        precision = posterior.precision
        if precision is not None and not is_form_of(precision.specs.get(name), spec):
            precision = None
        pooled = precision is not None and precision.specs[name].size < spec.size
        partner = there.names.get(name) if there else None
        for start, stop in chunks(spec, _CHUNK):
            weights = read_chunk(posterior.mean, name, start, stop).astype(np.float64)
            finite = weights[np.isfinite(weights)]
            self.parameters += weights.size
            self.bad += weights.size - finite.size
            squares = float(finite @ finite)
            self.squares += squares
            self.largest = max(self.largest, float(np.abs(finite).max(initial=0.0)))
            if precision is not None:
                self.held_squares += squares
            if precision is not None and not pooled:
                self._add_precision(read_chunk(precision, name, start, stop))
            if there is not None and partner is not None:
                self._add_gap(weights, read_chunk(there.source, partner, start, stop))
        if precision is not None and pooled:
            values = read_tensor(precision, name).reshape(-1)
            self._add_precision(values, each=spec.size // values.size)

    def _add_precision(self, values: Array, each: int = 1) -> None:
        """Add precisions, each of which stands for so many parameters."""
        values = values.astype(np.float32)
        good = values[np.isfinite(values) & (values >= 0)]
        self.held += values.size * each
        self.numbers += values.size
        self.bad_precision += (values.size - good.size) * each
        self.zeros += int(np.count_nonzero(good == 0)) * each
        if good.size:
            self.least, self.most = (
                min(self.least, float(good.min())),
                max(self.most, float(good.max())),
            )
        # + 0.0 turns a negative zero, whose bits sort last, into zero.
        self.histogram += each * np.bincount(
            (good + np.float32(0)).view(np.uint32) >> 16, minlength=_BINS
        )

    def _add_gap(self, here: Array, there: Array) -> None:
        both = np.isfinite(here) & np.isfinite(there)
        here, gap = here[both], there[both].astype(np.float64) - here[both]
        self.compared += here.size
        self.compared_squares += float(here @ here)
        self.gap_squares += float(gap @ gap)
        self.gap = max(self.gap, float(np.abs(gap).max(initial=0.0)))

    def report(self) -> Layer:
        good = self.parameters - self.bad
        return Layer(
            name=self.name,
            tensors=self.tensors,
            parameters=self.parameters,
            rms=root_mean_square(self.squares, good),
            largest=self.largest,
            bad=self.bad,
            precision=self._precision() if self.held else None,
            difference=self._difference() if self.compared else None,
        )

    def _precision(self) -> PrecisionLayer:
        if self.least > self.most:  # nothing but bad entries
            return PrecisionLayer(
                parameters=self.held,
                quantiles=(),
                sigma_ratio=None,
                zeros=0,
                bad=self.bad_precision,
            )
        inner = [min(max(q, self.least), self.most) for q in _histogram_quantiles(self.histogram)]
        median, scale = inner[QUANTILES.index(0.5)], root_mean_square(self.held_squares, self.held)
        return PrecisionLayer(
            parameters=self.held,
            quantiles=(self.least, *inner, self.most),
            sigma_ratio=median**-0.5 / scale if median > 0 and scale > 0 else None,
            zeros=self.zeros,
            bad=self.bad_precision,
        )

    def _difference(self) -> DifferenceLayer:
        rms, scale = (
            root_mean_square(self.gap_squares, self.compared),
            root_mean_square(self.compared_squares, self.compared),
        )
        return DifferenceLayer(
            parameters=self.compared,
            rms=rms,
            relative=rms / scale if scale > 0 else None,
            largest=self.gap,
        )


def root_mean_square(squares: float, count: int) -> float:
    return float((squares / count) ** 0.5) if count else 0.0


def _histogram_quantiles(histogram: Array) -> list[float]:
    """Middles of the bins that hold the `QUANTILES`."""
    sums = histogram.cumsum()
    places = np.searchsorted(sums, np.array(QUANTILES) * sums[-1]).astype(np.uint32)
    edges = (
        np.stack([places << 16, np.minimum(places + 1, 0x7F7F) << 16])
        .view(np.float32)
        .astype(np.float64)
    )
    return [
        0.0 if place == 0 else float(x) for place, x in zip(places, edges.mean(axis=0), strict=True)
    ]
