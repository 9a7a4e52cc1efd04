"""The constants of a pass over one tensor, from the plan."""

import math

import numpy as np

from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.kernels.base import Kind, Numbers, task_key
from mergekit_bayes.methods.base import Facts
from mergekit_bayes.plan import MergePlan, Step


def kind_of(plan: MergePlan, step: Step) -> Kind:
    """Which pass a step needs."""
    weighs, has_base = plan.method.needs_precision, plan.base is not None
    return Kind(
        method=plan.method,
        weighs=weighs,
        has_base=has_base,
        anchored=any(task.weighing.anchor.precision is not None for task in plan.tasks),
        # A merge among the models may be a removal itself.
        removes=plan.method.unguarded_precision is not None
        and (
            any(task.scale < 0 for task in step.tasks)
            or not all(model.weighing.reshape for model in plan.inputs)
        ),
        pulled=weighs and any(any(task.recorded_pull) for task in plan.tasks),
    )


def real_of(step: Step) -> type[np.float32] | type[np.float64]:
    """The type of number in which a step is computed."""
    return np.float64 if step.spec.dtype == "F64" else np.float32


def numbers_of(
    plan: MergePlan,
    step: Step,
    facts: Facts,
    real: type[np.float32] | type[np.float64] | None = None,
) -> Numbers:
    """The constants of a step.

    Args:
        plan: The merge.
        step: The tensor.
        facts: What the first pass measured for the method.
        real: The type of number; None for the one in which entries are computed.
    """
    weighings = [model.weighing for model in plan.inputs]
    base_gain = plan.inputs.donor.weighing.gain
    keys: tuple[np.uint64, ...] = ()
    if plan.method.random:
        seed = int(plan.settings["seed"])
        keys = tuple(
            task_key(seed, step.source, plan.drawing_identities[task.input]) for task in step.tasks
        )
    return Numbers(
        scales=tuple(task.scale for task in step.tasks),
        facts=facts,
        gains=tuple(w.gain for w in weighings),
        contained=tuple(
            w.contained + (0.0 if w.contains_base is None else DELTA_0) for w in weighings
        ),
        base_shares=tuple(
            0.0 if w.contains_base is None else w.contains_base / base_gain for w in weighings
        ),
        floors=tuple(0.0 if w.reshape else -math.inf for w in weighings),
        priors=tuple(w.prior + DELTA_0 for w in weighings),
        anchors=tuple(
            -1.0 if w.anchor.precision is None else w.anchor.precision for w in weighings
        ),
        decays=tuple(w.anchor.decay for w in weighings),
        keys=keys,
    ).cast(real or real_of(step))
