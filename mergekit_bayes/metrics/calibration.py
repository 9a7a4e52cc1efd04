"""The calibration error of a classifier, by bins; squared, without the bias of finite samples.

The expected calibration error of Guo et al. (2017) adds up absolute gaps, so a finite sample of a
calibrated model has one above zero, and a resample of it an even larger one: a bootstrap interval
covers the truth of calibrated models never. The squared error has an unbiased estimate (Broecker,
*Estimating reliability and resolution of probability forecasts through decomposition of the
empirical score*, Climate Dynamics 2012; Kumar, Liang and Ma, *Verified uncertainty calibration*,
NeurIPS 2019), and its distribution is known well enough for an interval.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.metrics.base import Interval, Z
from mergekit_bayes.records import FloatArray, Record

Labels = NDArray[np.int64]


class Bin(Record):
    """Examples whose confidence is in [low, high); the last bin includes its upper end.

    Attributes:
        low: Lower end.
        high: Upper end.
        examples: Number of examples.
        confidence: Their mean confidence; None without an example.
        accuracy: Their share of right predictions; None without an example.
    """

    low: float
    high: float
    examples: int
    confidence: float | None
    accuracy: float | None


def squared_calibration_error(p: FloatArray, labels: Labels, bins: int) -> Interval:
    """The reliability of the top label, debiased, with a 95 % interval.

        theta = sum_b P(b) E[d | b]^2,    d = [argmax p = y] - max p
        T     = 1/n sum_b ( (sum_b d)^2 - sum_b d^2 ) / (n_b - 1)

    over equal-width bins b of the confidence max p. T is unbiased for theta, up to bins of one
    example, and therefore negative about every other time for a calibrated model. theta is the part
    of the Brier score of the top label that better numbers would save; it is at most the squared
    error of the unbinned confidence. With s_b^2 the variance of d in a bin,

        Var T = 2/n^2 sum_b s_b^4 + k theta / n,    k = 4 sum_b P(b) s_b^2

    or a larger k where the variance of the linear part of T says so. The interval holds each theta
    with |T - theta| <= 1.96 sd(theta), as Wilson's does for shares. A bin without an error shows no
    variance, so that s_b^2 is at least that of a share with two more right and two more wrong
    predictions (Agresti and Coull, 1998). The interval reaches to T where no such theta does.

    Args:
        p: (n, classes), probabilities.
        labels: (n,), the true classes.
        bins: Number of bins of confidence.

    Returns:
        T with its interval; for fewer than two examples without one. Zero inside the interval
        means that no error of calibration is visible.
    """
    gaps = _Gaps.of(p, labels, bins)
    n, estimate = len(gaps.gap), gaps.estimate()
    if n < 2:
        return Interval(value=estimate)
    linear, quadratic = _variances([(1.0, gaps)])
    shares = gaps.sizes / n
    slope = 4 * float((shares * gaps.variance).sum())
    if estimate > 2 * np.sqrt(quadratic):
        slope = max(slope, linear * n / estimate)
    centre = estimate + Z * Z * slope / (2 * n)
    spread = quadratic + slope * estimate / n + (Z * Z * slope / (2 * n)) ** 2 / (Z * Z)
    half = Z * float(np.sqrt(max(spread, quadratic)))
    # T may lie below all theta that are likely: it is negative where each bin hits its share.
    low, high = min(centre - half, estimate), max(centre + half, estimate)
    return Interval(value=estimate, low=low, high=high)


def squared_calibration_change(
    before: FloatArray, after: FloatArray, labels: Labels, bins: int
) -> Interval:
    """`squared_calibration_error` of one prediction minus that of another, on the same examples.

        Var = Var[ psi_after - psi_before ] / n + 2/n^2 E[ g(x, x')^2 ]
        psi = 2 E[d | b] d - E[d | b]^2
        g   = [b = b'] e e' / P(b) of `after` minus the same of `before`,    e = d - E[d | b]

    the two parts of Hoeffding's decomposition of the difference of U-statistics, the first one
    without what noise in the means of the bins adds to it. The interval is normal.

    Args:
        before: (n, classes), probabilities.
        after: (n, classes), other probabilities of the same examples.
        labels: (n,), the true classes.
        bins: Number of bins of confidence.

    Returns:
        The difference with its 95 % interval; for fewer than two examples without one.
    """
    first, second = _Gaps.of(before, labels, bins), _Gaps.of(after, labels, bins)
    change = second.estimate() - first.estimate()
    if len(labels) < 2:
        return Interval(value=change)
    half = Z * float(np.sqrt(sum(_variances([(1.0, second), (-1.0, first)]))))
    return Interval(value=change, low=change - half, high=change + half)


def calibration_bins(p: FloatArray, labels: Labels, bins: int) -> tuple[Bin, ...]:
    """Confidence and accuracy by equal-width bins of confidence.

    Args:
        p: (n, classes), probabilities.
        labels: (n,), the true classes.
        bins: Number of bins.
    """
    index, confidence, right = confidence_bins(p, bins), p.max(axis=1), p.argmax(axis=1) == labels
    result = []
    for b in range(bins):
        inside = index == b
        filled = bool(inside.any())
        result.append(
            Bin(
                low=b / bins,
                high=(b + 1) / bins,
                examples=int(inside.sum()),
                confidence=float(confidence[inside].mean()) if filled else None,
                accuracy=float(right[inside].mean()) if filled else None,
            )
        )
    return tuple(result)


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean gap between confidence and accuracy, weighted by the examples of the bins."""
    gaps = [
        b.examples * abs(b.accuracy - b.confidence)
        for b in bins
        if b.accuracy is not None and b.confidence is not None
    ]
    return sum(gaps) / sum(b.examples for b in bins)


def confidence_bins(p: FloatArray, bins: int) -> Labels:
    """The bin that the confidence of each example falls into; the last one includes 1."""
    index: Labels = np.minimum((p.max(axis=1) * bins).astype(np.int64), bins - 1)
    return index


class _Gaps(NamedTuple):
    """Right or not minus confidence, by example and by bin."""

    bin_of: Labels  # (n,), the bin of each example
    predicted: Labels  # (n,)
    gap: FloatArray  # (n,), d
    residual: FloatArray  # (n,), e, scaled so that its mean square is the unbiased variance
    sizes: FloatArray  # (bins,), examples in each
    mean: FloatArray  # (bins,), of d
    variance: FloatArray  # (bins,), of d, not less than that of a share
    unseen: FloatArray  # (bins,), what was added to the variance of the sample

    @classmethod
    def of(cls, p: FloatArray, labels: Labels, bins: int) -> "_Gaps":
        index, predicted = confidence_bins(p, bins), p.argmax(axis=1)
        right = (predicted == labels).astype(np.float64)
        gap = right - p.max(axis=1)
        count = np.bincount(index, minlength=bins).astype(np.float64)
        filled, freedom = np.maximum(count, 1), np.maximum(count - 1, 1)
        mean = np.bincount(index, gap, bins) / filled
        residual = (gap - mean[index]) * np.sqrt(filled / freedom)[index]
        sample = np.bincount(index, residual**2, bins) / filled
        share = (np.bincount(index, right, bins) + 2) / (count + 4)
        unseen = np.where(count > 0, np.maximum(share * (1 - share) - sample, 0), 0)
        return cls(index, predicted, gap, residual, count, mean, sample + unseen, unseen)

    def estimate(self) -> float:
        """T, the unbiased estimate."""
        bins = len(self.sizes)
        sums = np.bincount(self.bin_of, self.gap, bins)
        squares = np.bincount(self.bin_of, self.gap**2, bins)
        return float(((sums**2 - squares) / np.maximum(self.sizes - 1, 1)).sum() / len(self.gap))


def _variances(terms: list[tuple[float, _Gaps]]) -> tuple[float, float]:
    """Variance of a signed sum of estimates on the same examples: linear and quadratic part.

    The variance that a bin does not show counts as shared by two predictions in so far as both
    name the same class, since they are then right and wrong together.
    """
    n = len(terms[0][1].gap)
    psi = sum(
        (sign * (2 * g.mean[g.bin_of] * g.gap - g.mean[g.bin_of] ** 2) for sign, g in terms),
        start=np.zeros(n),
    )
    linear, quadratic = float(psi.var(ddof=1)) / n, 0.0
    for sign, a in terms:
        for other_sign, b in terms:
            # Only pairs of bins that hold examples, since there may be many bins.
            pairs, cell = np.unique(a.bin_of * len(b.sizes) + b.bin_of, return_inverse=True)
            i, j = np.divmod(pairs, len(b.sizes))
            agree = np.bincount(cell, (a.predicted == b.predicted).astype(np.float64)) / n
            unseen = agree * np.sqrt(a.unseen[i] * b.unseen[j])
            moment = np.bincount(cell, a.residual * b.residual) / n + unseen
            both = sign * other_sign
            linear += both * 4 * float((unseen * a.mean[i] * b.mean[j]).sum()) / n
            quadratic += both * 2 * float((moment**2 / (a.sizes[i] * b.sizes[j])).sum())
    # Noise in the means of the bins adds twice the quadratic part to the linear one.
    quadratic = max(quadratic, 0.0)
    return max(linear - 2 * quadratic, 0.0), quadratic
