"""Where the guard rho of a removal is chosen; `methods.gradient_matching` applies it.

It bounds how large the multiplier of an edit may become.
"""

import math
from collections.abc import Sequence

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.options import ScaleRule
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import PosteriorInfo

# Where a removal cancels a term that the merge lists, the exact precision is positive up to
# rounding.
UNDO_GUARD = 1e-6


def choose_guard(
    config: MergeConfig, inputs: Inputs, rules: Sequence[ScaleRule], notes: list[str]
) -> float:
    """The guard rho to use.

    It is `--guard`, or `UNDO_GUARD` where every removal cancels exactly the terms that merges among
    the tasks list. A component of a mixture cancels nothing exactly: its share is not known yet.

    Args:
        config: The settings.
        inputs: The models, weighed.
        rules: Scales that hold for some tensors only; with any of them no removal cancels exactly.
        notes: Remarks for the report are appended here.

    Raises:
        MismatchError: The base is a merge that contains the task to be removed.
    """
    removals = [task for task in inputs.tasks if task.scale < 0]
    if inputs.base is None or rules or not removals:
        return config.guard
    base = inputs.base.posterior
    removed: dict[str, float] = {}  # by the identity of the mean
    gains: dict[str, float] = {}
    pools: dict[str, str | None] = {}
    for task in removals:
        identity = task.posterior.identity
        removed[identity] = removed.get(identity, 0.0) - task.scale
        gains[identity] = task.weighing.gain * task.weighing.inner
        pools[identity] = None if task.precision_info is None else task.precision_info.pool
        if base.info is not None and any(t.mean.blocks == identity for t in base.info.terms):
            raise MismatchError(
                f"'{base.ref}' contains '{task.ref}', but the frame of a removal is the original "
                f"base: `bmerge merge {base.ref} {task.ref} --base BASE --weights precision "
                f"--scale 1 --scale {task.scale:g}`."
            )
    contained = dict.fromkeys(removed, 0.0)
    for task in inputs.tasks:
        info = task.posterior.info
        if task.scale <= 0 or task.mixture is not None or info is None:
            continue
        if not _is_exact(config, info):
            continue
        for term in info.terms:
            identity = term.mean.blocks
            gain = term.gain * task.weighing.gain
            if identity not in contained or term.pool != pools[identity]:
                continue
            if math.isclose(gain, gains[identity], rel_tol=1e-6):
                contained[identity] += task.scale * term.scale
    if any(contained[identity] < amount - 1e-9 for identity, amount in removed.items()):
        return config.guard
    notes.append(
        "every removal undoes a term that a merge lists, where the precision that remains is "
        f"positive up to rounding: the guard is {UNDO_GUARD:g} here, and --guard {config.guard:g} "
        "is not used"
    )
    return UNDO_GUARD


def _is_exact(config: MergeConfig, info: PosteriorInfo) -> bool:
    """Whether the terms of a merge were added without the guard and by this merge's settings.

    One that was pooled for storing has other numbers than those that its terms were added to.
    """
    trace = info.merge
    return (
        trace is not None
        and info.pool is None
        and trace.guarded_share == 0
        and not trace.uneven
        and (trace.only, trace.anchor) == (config.only, config.anchor)
    )
