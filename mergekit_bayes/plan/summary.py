"""What a merge does, in one line."""

from collections.abc import Sequence

from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.steps import Step
from mergekit_bayes.posterior.forms import Form


def summarise(method: Method, inputs: Inputs, *, has_rules: bool) -> str:
    """What a merge of whole models does: an average, or a base plus changes, and how it is weighed.

    Args:
        method: The merging rule.
        inputs: The models.
        has_rules: Whether some tensors have scales of their own (`--scale MODEL:REGEX=X`).
    """
    scales = _scales_of_models(inputs)
    count = len(scales)
    models = f"{count} model{'s' * (count > 1)}"
    if mixtures := len({task.mixture for task in inputs.tasks} - {None}):
        models += f", of which {mixtures} {'is a mixture' if mixtures == 1 else 'are mixtures'}"
    others = "; some tensors by scales of their own" if has_rules else ""
    weighed = ", weighted by precision" if method.needs_precision else ""
    if inputs.base is None:
        # In natural parameters a merge is a plain average or sum; other rules go by their names.
        kind = "average" if method.is_posterior else method.name
        return f"{kind} of {models}{shares(scales)}{weighed}{others}"
    if not method.takes_scales:
        return f"{method.name} of '{inputs.base.ref}' and {models}{others}"
    change = f"change{'s' * (count > 1)}"
    by = "" if method.is_posterior else f", by {method.name}"
    return (
        f"'{inputs.base.ref}' plus the {change} of {models} ({scale_text(scales)}){by}{weighed}"
        f"{others}"
    )


def _scales_of_models(inputs: Inputs) -> list[float]:
    """The scale of each model as named, which the components of a mixture share."""
    scales: dict[object, float] = {}
    for task in inputs.tasks:
        model = task if task.mixture is None else task.mixture
        scales[model] = scales.get(model, 0.0) + task.scale
    return list(scales.values())


def matrices_in_words(steps: Sequence[Step]) -> str | None:
    """How many tensors are merged as whole matrices and what the largest takes; None without."""
    whole = {step.name: step for step in steps if step.axis is not None and step.tied_to is None}
    if not whole:
        return None
    largest = max(whole.values(), key=_nbytes)
    filled = [s for s in whole.values() if s.form is Form.MATRIX and Form.LOW_RANK in _forms(s)]
    words = (
        f"{len(whole)} tensors are merged as whole matrices; the largest, '{largest.name}', takes "
        f"up to about {_nbytes(largest) / 1e6:,.3g} MB of memory in each thread"
    )
    if filled:
        reasons = sorted({_why_in_full(step) for step in filled})
        words += (
            f"; {len(filled)} of them have precisions of low rank, which are made matrices in "
            f"full: {', or '.join(reasons)}"
        )
    return words


def _why_in_full(step: Step) -> str:
    if any(task.scale < 0 for task in step.tasks):
        return "a task is removed"
    if Form.MATRIX in _forms(step):
        return "a model's are in full"
    return "their ranks add up to half of the inputs"


def _forms(step: Step) -> set[Form]:
    """Of the precisions of all models."""
    return {o.precision.form for o in step.operands if o.precision is not None}


def _nbytes(step: Step) -> int:
    """What the merge of one layer takes in float64, in all models and in between.

    The weights w and the numbers of a precision p of each model are there as read, and as they are
    added up; a decomposition or a solution takes several more of the largest.
    """
    models, weights = len(step.operands), step.spec.size
    if step.precision_spec is None:  # a method may make covariances of the inputs of its own
        assert step.axis is not None
        matrix = step.spec.shape[step.axis] ** 2
        return 8 * (models * (3 * weights + 2 * matrix) + 4 * weights + 3 * matrix)
    numbers, more = step.precision_spec.size, 9
    if step.form is Form.LOW_RANK:
        return _low_rank_nbytes(step)
    if step.form is Form.KRONECKER:  # which has the terms of all models already
        numbers, more = -(-numbers // models), 4
    return 8 * (models * (3 * numbers + weights) + more * numbers + 5 * weights)


def _low_rank_nbytes(step: Step) -> int:
    """The same for precisions of low rank.

    All factors lie there as read, stacked, and scaled for the solution; beside them and the weights
    that are added up are matrices of the size of their rank.
    """
    assert step.precision_shape is not None
    *_, rows, n = step.precision_shape[: len(step.spec.shape)]
    models, weights = len(step.operands), step.spec.size
    return 8 * ((models + 7) * weights + 5 * rows * (n + rows) + 2 * models * n)


def shares(scales: Sequence[float]) -> str:
    """The shares of an average, in brackets; empty if all are equal."""
    if len(set(scales)) == 1:
        return ""
    total = sum(scales)
    return f" (shares {', '.join(f'{scale / total:.3g}' for scale in scales)})"


def scale_text(scales: Sequence[float]) -> str:
    """The scales of a sum: one for all, or one each."""
    if len(set(scales)) == 1:
        return f"scale {scales[0]:g}{' each' * (len(scales) > 1)}"
    return f"scales {', '.join(f'{scale:g}' for scale in scales)}"
