"""The steps of a method that has a rule for whole tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.tensors import Setting
from mergekit_bayes.plan.steps import Step


def with_settings(
    method: Method, settings: Mapping[str, Setting], steps: Sequence[Step]
) -> list[Step]:
    """Give all tensors that are merged by a rule for whole tensors the method's settings.

    Args:
        method: The merging rule.
        settings: Its settings, the same in every tensor.
        steps: The tensors of the output.

    Raises:
        MismatchError: A tensor of which only some rows are merged, and the rule needs all of it.
    """
    if method.tensor is None:
        return list(steps)
    return [
        step if step.copied is not None else with_own_settings(method, settings, step)
        for step in steps
    ]


def with_own_settings(method: Method, settings: Mapping[str, Setting], step: Step) -> Step:
    """Give a tensor that is merged by a rule for whole tensors its settings.

    Raises:
        MismatchError: Only some of its rows are merged, and the rule needs all of it.
    """
    assert method.tensor is not None
    if method.tensor.needs(settings) == "tensor" and step.merged != step.spec.size:
        raise MismatchError(
            f"'{step.name}' has other rows in one of the models, and {method.name} merges whole "
            "tensors. Leave it out with --only, give all models the same rows with --vocab "
            "union, or keep those of one with --vocab base."
        )
    return replace(step, settings=settings)


def memory_in_words(method: Method, steps: Sequence[Step]) -> str | None:
    """What the largest tensor takes where a rule needs whole ones; None where it does not."""
    rule = method.tensor
    if rule is None:
        return None
    merged = [step for step in steps if step.settings is not None]
    whole = [step for step in merged if rule.needs(step.settings or {}) == "tensor"]
    if not whole:
        return None
    largest = max(whole, key=_nbytes)
    return (
        f"{method.name} merges whole tensors; the largest, '{largest.name}', takes up to about "
        f"{_nbytes(largest) / 1e6:,.3g} MB of memory in each thread"
    )


def _nbytes(step: Step) -> int:
    """What a rule takes of one tensor: every model as stored and as a change, and a few more."""
    return (8 if step.spec.dtype == "F64" else 4) * (2 * len(step.operands) + 6) * step.spec.size
