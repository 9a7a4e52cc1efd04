"""What the precisions of a merge are worth, from a fixed sample of their entries.

A precision that is no curvature is named, and so is a pair of them on different scales. Where the
precisions would weigh the models nearly alike everywhere, one line says that `--weights uniform`
gives the same. All of it costs a few milliseconds.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import likelihood_precision, own_posterior, task_posterior
from mergekit_bayes.methods.base import FactInputs
from mergekit_bayes.plan import Input, MergePlan, Step
from mergekit_bayes.posterior.alignment import needs_weights
from mergekit_bayes.posterior.forms import Form
from mergekit_bayes.posterior.grids import Grid, read_grids, sampled_names
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.posterior.information import (
    Information,
    doubts,
    floors,
    information,
    is_enough,
    median,
)
from mergekit_bayes.stream.numbers import numbers_of

_LAYERS = 2  # numbered layers that are looked at
_ALIKE = 0.05  # relative deviation of weights from uniform ones that makes no difference
# Largest ratio of curvature per observation between two models that is no mistake of units, by what
# an observation is; measured by scripts/experiments/planted_precisions.py.
_RATIOS = {"token": 4.0, "example": 70.0}

_Array = NDArray[np.float64]
Samples = dict[Input, dict[str, Grid]]


@np.errstate(all="ignore")  # bad entries are reported elsewhere
def notes_on_precisions(plan: MergePlan) -> list[str]:
    """Remarks on the precisions of a merge, for its report.

    Args:
        plan: The merge, whose sources are open. Precisions that are coarser than one number an
            entry, or are computed, are not looked at.
    """
    if not plan.method.needs_precision:
        return []
    steps = {s.name: s for s in plan.steps if s.copied is None and s.tied_to is None}
    steps = {name: steps[name] for name in sampled_names(steps, _LAYERS)}
    samples = _read(plan, steps.values())
    found = {
        model: information(grids, model.precision_info, _weights(model, grids, steps))
        for model, grids in samples.items()
    }
    notes = [
        f"the precision of '{model.ref}' is doubtful: {doubt}"
        for model, one in found.items()
        for doubt in doubts(one)
    ]
    notes += _other_scales(samples, found)
    if not notes and (line := _uniform(plan, steps, samples, found)) is not None:
        notes.append(line)
    return notes


def _read(plan: MergePlan, steps: Collection[Step]) -> Samples:
    samples: Samples = {}
    for position, model in enumerate(plan.inputs):
        names = {}
        for step in steps:
            operand = step.operands[position]
            precision = operand.precision
            if precision is not None and precision.form is Form.ENTRY and operand.owns_precision:
                names[step.name] = precision
        source = model.posterior.precision
        if source is not None and not source.is_computed and names:
            stored = {name: p.name for name, p in names.items() if p.source is source}
            samples[model] = read_grids(source, stored)
    return samples


def _weights(model: Input, grids: Mapping[str, Grid], steps: Mapping[str, Step]) -> dict[str, Grid]:
    """The same entries of a model's mean, where they are needed."""
    stored = {
        operand.mean.name: name
        for name in needs_weights(grids)
        for operand in steps[name].operands
        if operand.input is model and operand.mean.input is model
    }
    if model.posterior.mean.is_computed:
        return {}
    return read_grids(model.posterior.mean, {name: mean for mean, name in stored.items()})


def _other_scales(samples: Samples, found: Mapping[Input, Information]) -> list[str]:
    """Name the models whose curvature per observation is far from that of the first."""
    counted = {
        model: (grids, count)
        for model, grids in samples.items()
        if is_enough(found[model]) and (count := _count(model.precision_info)) is not None
    }
    notes: list[str] = []
    for model, (grids, count) in counted.items():
        first = next(iter(counted))
        others, other_count = counted[first]
        info = model.precision_info
        ratio = _ratio(grids, others, floors(info)[0], floors(first.precision_info)[0])
        ratio *= other_count / count
        limit = _RATIOS.get(str(info.unit if info else None), max(_RATIOS.values()))
        if ratio and not 1 / limit <= ratio <= limit:
            unit = (info.unit if info else None) or "observation"
            notes.append(
                f"the curvature of '{model.ref}' is {ratio:.2g} times that of '{first.ref}' per "
                f"{unit}, by the median over entries (sum H / sum H_base follows the largest): "
                f"either one of them is in another unit or stands for another number of {unit}s "
                "than its record says, or the models differ that much"
            )
    return notes


def _count(info: PosteriorInfo | None) -> float | None:
    """The count by which a precision of one model's data is scaled; None where it is not known."""
    if info is None or info.terms or info.prior.kind not in ("none", "isotropic"):
        return None
    return info.ess or info.observations


def _ratio(
    one: Mapping[str, Grid], other: Mapping[str, Grid], prior: float, other_prior: float
) -> float:
    """The median ratio of what lies above the priors, where it does in both; 0 without any."""
    ratios = []
    for name in one.keys() & other.keys():
        a, b = one[name].values - prior, other[name].values - other_prior
        if a.shape == b.shape and one[name].is_matrix:
            both = (a > 0) & (b > 0) & np.isfinite(a) & np.isfinite(b)
            ratios.append(np.log(a[both]) - np.log(b[both]))
    middle = median(np.sort(np.concatenate(ratios)).tolist()) if ratios else None
    return 0.0 if middle is None else float(np.exp(middle))


def _uniform(
    plan: MergePlan,
    steps: Mapping[str, Step],
    samples: Samples,
    found: Mapping[Input, Information],
) -> str | None:
    """The line that says that precisions weigh all models nearly alike; None if they do not."""
    models = list(plan.inputs)
    is_linear = plan.method.reduction is None and not plan.method.random
    if not is_linear or plan.shrink is not None or plan.config.pool is not None:
        return None
    if set(samples) != set(models) or not all(map(is_enough, found.values())):
        return None
    if len(plan.tasks) < 2 or any(task.scale <= 0 for task in plan.tasks):
        return None
    names = [
        name
        for name in steps
        if all(name in samples[model] for model in models)
        and len({samples[model][name].shape for model in models}) == 1
    ]
    # Tensors of the same scales and dtype have the same constants, and are looked at together.
    alike: dict[object, list[str]] = {}
    for name in names:
        step = steps[name]
        alike.setdefault((step.spec.dtype, *(t.scale for t in step.tasks)), []).append(name)
    deviations = [
        _deviation(
            plan,
            steps[together[0]],
            [np.concatenate([samples[m][n].values.ravel() for n in together]) for m in models],
        )
        for together in alike.values()
    ]
    if not deviations:
        return None
    deviation = float(np.sqrt(np.mean(np.concatenate(deviations))))
    if not deviation < _ALIKE:
        return None
    ranks = [
        rank_correlation(samples[models[0]][name].values, samples[model][name].values)
        for model in models[1:]
        for name in names
        if samples[model][name].is_matrix
    ]
    known = [rank for rank in ranks if rank is not None]
    correlation = f"rank correlation {median(known):.2f}, " if known else ""
    within = np.mean([one.within or 0.0 for one in found.values()])
    listed = ", ".join(f"'{model.ref}'" for model in models[:-1])
    return (
        f"precisions of {listed} and '{models[-1].ref}': {correlation}entries explain {within:.0%} "
        "of the variance: weights will hardly differ from --weights uniform (by "
        f"{deviation:.1%})"
    )


def _deviation(
    plan: MergePlan, step: Step, stored: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Squared relative deviation of every task's weights from uniform ones, in some entries.

    The weight of a task is what the method makes of a mean of 1 for this task and 0 elsewhere.
    """
    method, has_base = plan.method, plan.base is not None
    facts = None
    if method.facts is not None:
        counts = tuple(task.weighing.count or 1.0 for task in plan.tasks)
        facts = method.facts(FactInputs(plan.settings, plan.guard, counts, np.zeros(0)))
    numbers = numbers_of(plan, step, facts)
    zero = np.zeros_like(stored[0])
    likelihoods: list[_Array] = []
    for i, precision in enumerate(stored):
        of_base = likelihoods[0] if likelihoods else zero
        likelihoods.append(likelihood_precision(numbers, i, precision, of_base, 0.0))
    base, alike = None, None
    if has_base:
        base = own_posterior(zero, numbers.priors[0], likelihoods[0])
        alike = Gaussian(zero, zero + 1)
    squares = []
    scales = tuple(float(scale) for scale in numbers.scales)
    for t in range(len(plan.tasks)):
        means = [zero + (t == other) for other in range(len(plan.tasks))]
        tasks = tuple(
            task_posterior(base, mean, likelihoods[i + 1])
            if base is not None
            else own_posterior(mean, numbers.priors[i], likelihoods[i])
            for i, mean in enumerate(means)
        )
        equal = tuple(Gaussian(mean, zero + 1) for mean in means)
        weight = method.combine(base, tasks, scales, facts).mean
        uniform = method.combine(alike, equal, scales, facts).mean
        squares.append(((weight - uniform) / uniform).ravel() ** 2)
    return np.concatenate(squares)
