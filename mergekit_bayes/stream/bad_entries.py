"""Entries that cannot be merged: a mean that is not finite, a precision that is negative or not
finite.

`--on-bad error` names the first of a tensor and counts them; `--on-bad base` lets the task change
nothing there.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, decode, read_chunk
from mergekit_bayes.checkpoint.specs import CheckpointSource
from mergekit_bayes.errors import BmergeError, CheckpointError, PrecisionError
from mergekit_bayes.kernels.base import Array, Numbers
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.stream.chunks import real_of


def no_mean(values: Array) -> Array:
    """Which entries are no mean."""
    return ~np.isfinite(values)


def no_precision(values: Array) -> Array:
    """Which entries are no precision; zero of either sign is one."""
    return ~(np.isfinite(values) & (values >= 0))


def mend_means(means: Array) -> None:
    """Give bad entries of the tasks the base's value, in place; (models, n), the base first."""
    for mean in means[1:]:
        bad = no_mean(decode(mean, "BF16") if mean.dtype == np.uint16 else mean)
        mean[bad] = means[0][bad]


def unchanged(numbers: Numbers, i: int, of_base: Any, extra: Any) -> Any:
    """The stored precision at which model i's data added nothing: its likelihood precision is zero."""
    return numbers.contained[i] + numbers.base_shares[i] * of_base - extra / numbers.gains[i]


def refuse_bad(plan: MergePlan, step: Step, i: int) -> None:
    """Raise `CheckpointError` or `PrecisionError` if model i has a bad entry in a step: which one,
    and how many.
    """
    source = step.sources[i]
    model = plan.models[source.model]
    way_out = "Make it anew."
    if source.model > 0 and plan.base is not None:
        way_out = "Make it anew, or take the base's values there with --on-bad base."
    elif plan.base is None:
        way_out = (
            "Make it anew, or merge with --base, where --on-bad base takes the base's values there."
        )
    kind = real_of(step) if step.copied is None else np.float64
    what = f"{model.mean.where(source.name)}: '{source.name}'"
    _scan(
        model.mean,
        source.name,
        kind,
        no_mean,
        CheckpointError,
        what,
        f"Did its training diverge? {way_out}",
    )
    found = step.precisions[i] if step.precisions is not None else None
    precision = plan.models[found.model].precision if found is not None else None
    if found is not None and precision is not None:
        what = f"the precision of '{found.name}' in {precision.where(found.name)}"
        about = f"A precision is finite and not negative. {way_out}"
        _scan(precision, found.name, np.float32, no_precision, PrecisionError, what, about)


def _scan(
    source: CheckpointSource,
    name: str,
    kind: type[np.floating[Any]],
    is_bad: Callable[[Array], Array],
    error: type[BmergeError],
    what: str,
    way_out: str,
) -> None:
    count, first = 0, None
    for start, stop in chunks(source.specs[name], 1 << 18):
        values = read_chunk(source, name, start, stop)
        with np.errstate(over="ignore"):
            bad = is_bad(values.astype(kind, copy=False))
        count += int(np.count_nonzero(bad))
        if first is None and bad.any():
            at = int(np.argmax(bad))
            first = (values[at], start + at)
    if first is None:
        return
    more = f", the first of {count:,} bad entries" if count > 1 else ""
    if abs(first[0]) < np.inf and first[0] > np.finfo(np.float32).max:
        way_out = "It is merged in F32, which ends at 3.4e38." + (
            " Write --dtype F64." if is_bad is no_mean else ""
        )
    raise error(f"{what} is {first[0]} at flat index {first[1]}{more}. {way_out}")
