"""Differences between two models on the same prompts, each with several continuations.

The continuations of a prompt depend on each other, so that prompts are what an interval counts. Two
models may also differ on few prompts or on none, where a bootstrap has an interval of zero width,
as though they agreed on all other prompts: these intervals do not collapse.
"""

import numpy as np

from mergekit_bayes.metrics.base import Interval, Z, interval, participating, resampled_sums
from mergekit_bayes.records import FloatArray


def paired_change(before: FloatArray, after: FloatArray) -> Interval:
    """Mean of `after` less that of `before`, paired, with a 95 % interval.

    Numbers that are 0 or 1 are a share, for `paired_share_change`. Of others the mean difference d
    of each prompt counts, with half a prompt added at each of +r and -r and one at 0, as Agresti
    and Min add pairs to shares:

        centre = sum d / (n + 2)
        half   = z sqrt((sum d^2 + r^2) / (n + 2) - centre^2) / sqrt(n + 2)

    r is the largest |d|, or the standard deviation of the prompts' means, of both models together,
    if that is more: a prompt is feared to change by what was seen, and where hardly one changed by
    as much as prompts differ. What is rare and was never seen stays outside.

    Args:
        before: (prompts, continuations), not negative.
        after: (prompts, continuations), of the other model.

    Returns:
        The change; for fewer than two prompts without an interval.
    """
    if np.isin(before, (0, 1)).all() and np.isin(after, (0, 1)).all():
        return paired_share_change(before, after)
    means = np.stack([before.mean(axis=1), after.mean(axis=1)])
    d = means[1] - means[0]
    n, change = len(d), float(d.mean())
    if n < 2:
        return Interval(value=change)
    differ = float(means.std()) if np.ptp(means) else 0.0  # not 1e-18 of equal ones
    reach = max(float(np.abs(d).max()), differ) or float(means.max()) or 1.0
    centre = float(d.sum()) / (n + 2)
    variance = (float((d**2).sum()) + reach**2) / (n + 2) - centre**2
    return _around(change, centre, Z * float(np.sqrt(variance / (n + 2))))


def paired_share_change(before: FloatArray, after: FloatArray) -> Interval:
    """Change of a share between paired answers in groups, with a 95 % interval.

        D  = Var(d) k / (q - change^2), at most k;    d = mean of a group's changes, -1 to 1
        D' = (c D + 2 k) / (c + 2),    c = (sum x)^2 / sum x^2,    x = pairs of a group that differ

    with q the share of pairs that differ. Of the n k pairs, n k / D' count: the interval is that of
    Agresti and Min (Statistics in Medicine, 2005) for so many, as in `metrics.base`. The design
    effect D (Kish, 1965) cannot be measured from few groups, and counts for the c groups that
    differ, beside two whose pairs all agree on their change. With groups of one this is
    `metrics.base.share_change_interval`.

    Args:
        before: (n, k), 0 or 1.
        after: (n, k), 0 or 1.

    Returns:
        The change; for fewer than two groups without an interval.
    """
    (n, k), d = before.shape, (after - before).mean(axis=1)
    change = float((after - before).sum()) / (n * k)  # of whole numbers: no rounding before the end
    if n < 2:
        return Interval(value=change)
    differ = (after != before).sum(axis=1).astype(np.float64)
    of_one = float(differ.mean()) / k - change**2
    design = min(float(d.var(ddof=1)) * k / of_one, k) if of_one > 0 else k
    informative = participating(differ)
    design = (informative * design + 2 * k) / (informative + 2)
    gained = float((after > before).sum()) / design + 0.5
    lost = float((after < before).sum()) / design + 0.5
    count = n * k / design + 2
    half = Z * float(np.sqrt(gained + lost - (gained - lost) ** 2 / count)) / count
    return _around(change, (gained - lost) / count, half, most=1.0)


def paired_ratio_change(
    before: FloatArray, after: FloatArray, sizes: FloatArray, *, bootstrap: int, seed: int
) -> Interval:
    """Sum of `after` less that of `before`, over the sum of the sizes; documents are resampled.

    Args:
        before: (documents,), such as the bits of each.
        after: (documents,), of the other model.
        sizes: (documents,), such as the bytes of each.
        bootstrap: Number of resamples; 0 gives no interval.
        seed: Seed of the bootstrap.
    """
    columns = np.stack([after - before, sizes], axis=1)
    total, sums = columns.sum(axis=0), resampled_sums(columns, bootstrap, seed)
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample of empty texts only
        replicates = sums[:, 0] / sums[:, 1]
    return interval(float(total[0] / total[1]), replicates, len(columns))


def _around(value: float, centre: float, half: float, most: float = np.inf) -> Interval:
    # Rounding may put the value on the wrong side of an end.
    low, high = max(centre - half, -most), min(centre + half, most)
    return Interval(value=value, low=min(low, value), high=max(high, value))
