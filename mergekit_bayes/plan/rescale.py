"""The plan of a merge with other scales, without opening or matching the models again."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.plan.guard import choose_guard
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.options import ScaleRule, parse_scales
from mergekit_bayes.plan.plan import MergePlan
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Operand, Step

Signs: TypeAlias = tuple[bool | None, ...]


def with_scales(config: MergeConfig, scales: Sequence[float]) -> MergeConfig:
    """The settings with other scales of the tasks, one each; rules for some tensors stay."""
    rules = tuple(scale for scale in config.scale if isinstance(scale, str))
    return config.model_copy(update={"scale": (*scales, *rules)})


def signs_of(scales: Sequence[float]) -> Signs:
    """For each scale whether it adds (True), removes (False) or leaves the task out (None)."""
    return tuple(None if scale == 0 else scale > 0 for scale in scales)


def rescaled(plan: MergePlan, scales: Sequence[float]) -> MergePlan:
    """A plan with other scales, equal in all that decides the merged means to planning anew.

    What a plan decides about names, shapes and rows depends on the signs of the scales only, the
    guard of a removal also on their sizes. The record of the merged precision is left out.

    Args:
        plan: Of the same models; it keeps their files, which both plans then share.
        scales: One for each task, dimensionless, of the signs of the plan's own.

    Raises:
        ConfigError: The signs are others.
    """
    config = with_scales(plan.config, scales)
    before, rules = parse_scales(plan.config)
    if signs_of(scales) != signs_of(before):
        raise ConfigError(f"a plan with scales {list(before)} cannot have {list(scales)}.")
    guard = guard_by(plan, scales, rules)
    steps = tuple(_rescaled(step, scales, rules) for step in plan.steps)
    return replace(plan, config=config, guard=guard, steps=steps, info=None)


def guard_by(plan: MergePlan, scales: Sequence[float], rules: Sequence[ScaleRule]) -> float:
    """The guard that a plan with other scales has.

    Args:
        plan: Of the same models.
        scales: One for each task.
        rules: Scales that hold for some tensors only.
    """
    if plan.method.unguarded_precision is None:
        return plan.config.guard
    tasks = tuple(replace(t, scale=x) for t, x in zip(plan.tasks, scales, strict=True))
    return choose_guard(plan.config, Inputs(plan.base, tasks), rules, [])


def scales_in(step: Step, scales: Sequence[float], rules: Sequence[ScaleRule]) -> tuple[float, ...]:
    """The scales that tasks have in one tensor, by the step of a plan with other ones.

    Args:
        step: The tensor. A task of scale zero there keeps it: it has no such tensor.
        scales: One for each task.
        rules: Scales that hold for some tensors only, and go before.
    """
    ruled = {task for rule in rules if rule.pattern.search(step.source) for task in rule.tasks}
    return tuple(
        operand.scale if operand.scale == 0 or position in ruled else scale
        for position, (operand, scale) in enumerate(zip(step.tasks, scales, strict=True))
    )


def _rescaled(step: Step, scales: Sequence[float], rules: Sequence[ScaleRule]) -> Step:
    if step.copied is not None:
        return step
    tasks = tuple(
        operand._replace(scale=scale)
        for operand, scale in zip(step.tasks, scales_in(step, scales, rules), strict=True)
    )
    renewed = dict(zip(map(id, step.tasks), tasks, strict=True))
    rest: Operand | None = None if step.rest is None else renewed[id(step.rest)]
    return replace(step, tasks=tasks, rest=rest)
