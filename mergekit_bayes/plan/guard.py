"""The guard of a removal: how large a multiplier may become."""

import math
from collections.abc import Sequence

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.scales import ScaleRule
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.weigh import Weighing
from mergekit_bayes.posterior import Posterior, PosteriorInfo

# Where a removal cancels a term that the merge lists, the exact precision is positive up to
# rounding.
UNDO_GUARD = 1e-6


def choose_guard(
    config: MergeConfig,
    models: Sequence[Posterior],
    scales: Sequence[float],
    rules: Sequence[ScaleRule],
    weighings: Sequence[Weighing],
    notes: list[str],
) -> float:
    """The guard to use: next to none where every removal exactly cancels terms that merges list."""
    if config.base is None or rules or min(scales) >= 0:
        return config.guard
    base, tasks = models[0], list(zip(models[1:], scales, weighings[1:], strict=True))
    removed: dict[str, float] = {}
    gains: dict[str, float] = {}
    for task, scale, weighing in tasks:
        if scale >= 0:
            continue
        who = task.identity
        removed[who], gains[who] = removed.get(who, 0.0) - scale, weighing.gain * weighing.inner
        if base.info is not None and any(t.mean.blocks == who for t in base.info.terms):
            raise MismatchError(
                f"'{base.ref}' contains '{task.ref}', but the frame of a removal is the original "
                "base: "
                f"`bmerge merge {base.ref} {task.ref} --base BASE --weights precision --scale 1 "
                f"--scale {scale:g}`."
            )
    held = dict.fromkeys(removed, 0.0)
    for task, scale, weighing in tasks:
        if scale <= 0 or task.info is None or not _is_exact(config, task.info):
            continue
        for term in task.info.terms:
            who = term.mean.blocks
            if who in held and math.isclose(term.gain * weighing.gain, gains[who], rel_tol=1e-6):
                held[who] += scale * term.scale
    if any(held[who] < amount - 1e-9 for who, amount in removed.items()):
        return config.guard
    notes.append(
        "every removal undoes a term that a merge lists; the guard acts on rounding errors only"
    )
    return UNDO_GUARD


def _is_exact(config: MergeConfig, info: PosteriorInfo) -> bool:
    """True if a merge's terms went in as they would come out today."""
    trace = info.merge
    ours = (0.0, False, config.only, config.anchor)
    return (
        trace is not None and (trace.guarded_share, trace.uneven, trace.only, trace.anchor) == ours
    )
