"""How sure a difference is: simultaneous intervals over levels, and how much data would do.

A finding looks at several levels, so its intervals hold at all of them at once with 95 %. They are
as wide as the largest studentised deviation among the levels of a resample (max-t bootstrap;
Romano and Wolf, Stepwise multiple testing as formalized data snooping, Econometrica 2005), plus the
bound of the error of the interpolation, which more data does not shrink.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mergekit_bayes.metrics.base import Z
from mergekit_bayes.records import FloatArray, Record

_CONFIDENCE = 95.0  # per cent
_HALF = 0.5  # a difference of this share of what is paid must be visible,
_NATS = 0.01  # or of this many nats per token, if that is more
_COUNT = 5  # toxic continuations at a level, in independent ones, below which no interval is good


class Shortage(Record):
    """Why a comparison cannot tell, and what would do.

    Attributes:
        reason: `few toxic`: too few toxic continuations to tell the base's share from the level;
            `wide interval`: the interval would also hold a difference that matters; `coarse
            scales`: the interpolation between the scales is too uncertain.
        has: How much there is, in `unit`.
        needs: How much would do, about, in `unit`; None for coarse scales.
        unit: `continuations` of each model, `documents` of the held-out text and of the text that
            pays, or `scales`.
    """

    reason: Literal["few toxic", "wide interval", "coarse scales"]
    has: int
    needs: int | None
    unit: Literal["continuations", "documents", "scales"]


class Widths(NamedTuple):
    """Half-widths of the simultaneous intervals of one finding, nats per token, by level.

    Attributes:
        noise: From resampling; NaN without an interval.
        grid: From the interpolation between the scales.
    """

    noise: FloatArray
    grid: FloatArray


class Sample(NamedTuple):
    """The data behind an axis.

    Attributes:
        size: Continuations or documents.
        independent: As many independent ones would be worth; equal to `size` for documents.
        base: The base's toxic share; None on an axis that is no share.
        rows: Prompts or documents that are resampled.
        unit: What `size` counts.
    """

    size: int
    independent: float
    base: float | None
    rows: int
    unit: Literal["continuations", "documents"]


def simultaneous(differences: FloatArray, grids: FloatArray, rows: int, enough: float) -> Widths:
    """Half-widths that hold at all levels at once.

    Args:
        differences: (levels, 1 + resamples): the estimate, then its resamples; NaN where a curve
            does not reach the level.
        grids: (levels, 1 + resamples): the bound of the interpolation's error.
        rows: The smaller number of things that were resampled; few widen the interval as in
            Student's t.
        enough: Share of the resamples that must reach a level.
    """
    estimate, resampled = differences[:, 0], differences[:, 1:]
    finite = np.isfinite(resampled)
    usable = np.isfinite(estimate) & (finite.sum(axis=1) >= enough * resampled.shape[1])
    usable &= resampled.shape[1] > 0
    noise, grid = np.full(len(estimate), np.nan), np.full(len(estimate), np.nan)
    if not usable.any() or rows < 2:
        return Widths(noise, grid)
    deviations = np.where(finite, resampled - estimate[:, None], np.nan)[usable]
    errors = np.sqrt(np.nanmean(deviations**2, axis=1, keepdims=True))
    tiny = 1e-12 * (1 + np.abs(estimate[usable, None]))  # what rounding leaves is no spread
    studentised = np.nan_to_num(np.abs(deviations)) / np.maximum(errors, tiny)
    quantile = float(np.percentile(studentised.max(axis=0), _CONFIDENCE))
    few = math.sqrt(rows / (rows - 1)) * _student(rows - 1)
    noise[usable] = few * quantile * np.maximum(errors[:, 0], tiny[:, 0])
    grid[usable] = np.nanmax(
        np.stack([grids[usable, 0], np.nanmean(np.where(finite, grids[:, 1:], np.nan)[usable], 1)]),
        axis=0,
    )
    return Widths(noise, grid)


def few_toxic(sample: Sample, level: float) -> Shortage | None:
    """The shortage of toxic continuations for reading this toxic share, if there is one.

    The base's share must differ from the level by the score test (a level outside Wilson's
    interval), and at the level at least five independent continuations must be toxic.
    """
    if sample.base is None or sample.independent <= 0:
        return None
    gap = max(sample.base - level, 1e-9)
    needs = max(Z**2 * level * (1 - level) / gap**2, _COUNT / max(level, 1e-9))
    if sample.independent >= needs:
        return None
    return _shortage("few toxic", sample, needs / sample.independent)


def too_wide(sample: Sample, paid: Sequence[float], noise: float, grid: float) -> Shortage | None:
    """The shortage if an interval without a visible difference hides one that matters.

    Args:
        sample: The data of the axis.
        paid: What the two curves pay, nats per token.
        noise: The interval's half-width from resampling.
        grid: Its half-width from the interpolation.
    """
    matters = difference_that_matters(paid)
    if noise + grid <= matters:
        return None
    if grid > _HALF * matters:
        return Shortage(reason="coarse scales", has=0, needs=None, unit="scales")
    return _shortage("wide interval", sample, (noise / (matters - grid)) ** 2)


def remedy(shortage: Shortage | None) -> str:
    """How much data would do, as a sentence with a space before it."""
    if shortage is None:
        return ""
    if shortage.needs is None:
        return (
            " The scales or steps are too far apart there: raise extra_scales, or give more of "
            "them."
        )
    if shortage.unit == "documents":
        return (
            f" About {shortage.needs:,} held-out toxic documents would do ({shortage.has:,} were "
            "read), and as many times the documents of the text."
        )
    why = ", since few are toxic" if shortage.reason == "few toxic" else ""
    return (
        f" About {shortage.needs:,} continuations of each model would do ({shortage.has:,} were "
        f"made{why}); more prompts tell more than more continuations of each."
    )


def difference_that_matters(paid: Sequence[float]) -> float:
    """Half of the larger payment, but at least 0.01 nats per token."""
    return max(_HALF * max(abs(p) for p in paid), _NATS)


def independent(share: float, size: int, resampled: FloatArray) -> float:
    """How many independent continuations tell as much about the toxic share as these do.

    Continuations of one prompt resemble each other: size / design effect (Kish, 1965), where the
    design effect is the variance of the share over that of independent ones, and at least 1.
    """
    simple = share * (1 - share) / size
    effect = float(np.var(resampled)) / simple if simple > 0 and len(resampled) else 1.0
    return size / max(effect, 1.0)


def _shortage(reason: Literal["few toxic", "wide interval"], s: Sample, factor: float) -> Shortage:
    needs = s.size * factor
    digits = 10 ** max(math.floor(math.log10(needs)) - 1, 0)  # an estimate: two digits
    needs = math.ceil(needs / digits) * digits
    return Shortage(reason=reason, has=s.size, needs=int(needs), unit=s.unit)


def _student(freedom: int) -> float:
    """Student's over the normal's 97.5 % quantile (Cornish and Fisher; 4 % low at 3 degrees)."""
    n = max(freedom, 1)
    return 1 + (Z**2 + 1) / (4 * n) + (5 * Z**4 + 16 * Z**2 + 3) / (96 * n**2)
