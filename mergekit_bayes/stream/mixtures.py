"""Merge mixtures by expectation-maximisation, one tensor at a time.

The posterior of task t is a mixture of K_t components, and the merge seeks a maximum of

    F(theta) = (1 - sum_t a_t) log N(theta; m_0, S_0^-1) + sum_t a_t log sum_k pi_tk N_tk(theta)

in each tensor, N_tk(theta) = N(theta; m_tk, S_tk^-1), by repeating

    r_tk  =  pi_tk N_tk(theta) / sum_j pi_tj N_tj(theta)          the responsibilities
    theta =  the merge of all components with the scales a_t r_tk

from r_tk = pi_tk on, the merge of averaged natural parameters. The responsibilities of a task sum
to one, so that the second line is the rule of single posteriors. It is the maximum of a lower bound
of F that touches F at the theta before (Dempster, Laird and Rubin, 1977): F never falls, where no
guard acts. In a tensor of many entries nearly all responsibilities are 0 or 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, is_bad_mean, is_bad_precision
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.kernels.base import Array, Chunk
from mergekit_bayes.kernels.plain import gaussians
from mergekit_bayes.methods.measuring import OrderedMap
from mergekit_bayes.plan import MergePlan, Step
from mergekit_bayes.records import FloatArray
from mergekit_bayes.stream.bad_entries import replace_bad_entries
from mergekit_bayes.stream.chunks import FirstPassResult, Reader
from mergekit_bayes.stream.numbers import kind_of, numbers_of

ROUNDS = 10  # at most; each reads the tensor once
_WINDOW = 1 << 16  # entries
_SETTLED = 1e-9  # change of a responsibility that is none

Groups = Mapping[int, Sequence[int]]  # the tasks that are components of a mixture, by its number


def settled(
    plan: MergePlan,
    step: Step,
    measured: FirstPassResult,
    reader: Callable[[], Reader],
    ordered_map: OrderedMap,
    *,
    rounds: int = ROUNDS,
) -> FirstPassResult:
    """What is measured of a step, with the responsibilities r_tk and the scales `a_t r_tk`.

    Everything is computed in float64 and added up in windows in their order, so that neither chunks
    nor threads change a bit.

    Args:
        plan: The merge.
        step: The tensor.
        measured: What the first pass measured of it.
        reader: Gives the calling thread's reader.
        ordered_map: Runs windows of entries, perhaps on several threads.
        rounds: How often responsibilities are computed at most.

    Returns:
        The same where no mixture counts in the tensor.

    Raises:
        CheckpointError: A mean cannot be merged.
        PrecisionError: A precision cannot, or the posterior of a component is not proper.
    """
    groups = _groups(step)
    if not groups:
        return measured
    windows = [(i, min(i + _WINDOW, step.merged)) for i in range(0, step.merged, _WINDOW)]
    # A component that left the tensor as it was has scale zero, and the base's posterior there.
    members = {i: step.tasks[i].scale != 0 for group in groups.values() for i in group}
    weights = np.array([task.input.weight for task in step.tasks])
    shares, now = weights, step
    for _ in range(rounds):

        def densities(window: tuple[int, int], now: Step = now) -> FloatArray:
            return _log_densities(plan, now, measured, reader(), members, *window)

        found = sum(ordered_map(densities, windows), np.zeros(len(step.tasks)))
        before, shares = shares, _responsibilities(groups, np.log(weights) + found)
        now = _with_shares(step, groups, shares)
        if abs(shares - before).max() <= _SETTLED:
            break
    kept = tuple(float(share) if i in members else 0.0 for i, share in enumerate(shares))
    return replace(measured, step=now, shares=kept)


def _groups(step: Step) -> Groups:
    """The components of each mixture that counts in a tensor."""
    groups: dict[int, list[int]] = {}
    for position, task in enumerate(step.tasks):
        if task.input.mixture is not None:
            groups.setdefault(task.input.mixture, []).append(position)
    return {m: g for m, g in groups.items() if any(step.tasks[i].scale for i in g)}


def _responsibilities(groups: Groups, logs: FloatArray) -> FloatArray:
    """The share of each component, by log of weight times density; 1 for any other task."""
    shares = np.ones_like(logs)
    for group in groups.values():
        of_group = np.exp(logs[group] - logs[group].max())
        shares[group] = of_group / of_group.sum()
    return shares


def _with_shares(step: Step, groups: Groups, shares: FloatArray) -> Step:
    """The step in which each component has its share of its mixture's scale.

    One that left the tensor as it was keeps scale zero, and adds nothing either way.
    """
    tasks = list(step.tasks)
    for group in groups.values():
        for i in group:
            share = float(shares[i]) / tasks[i].input.weight
            tasks[i] = tasks[i]._replace(scale=tasks[i].scale * share)
    return replace(step, tasks=tuple(tasks))


def _log_densities(
    plan: MergePlan,
    step: Step,
    measured: FirstPassResult,
    reader: Reader,
    members: Mapping[int, bool],
    start: int,
    stop: int,
) -> FloatArray:
    """`log N_tk(theta)` in some entries but for a constant, at theta by the scales of the step.

    Members are the components by position, and whether each has a posterior of its own.
    """
    chunk = reader.chunk(step, measured, start, stop)
    if _has_bad(chunk):
        numbers = numbers_of(plan, step, measured.facts)
        chunk, _ = replace_bad_entries(plan, step, measured, chunk, numbers)
    chunk = chunk._replace(means=_wide(chunk.means), extras=chunk.extras.astype(np.float64))
    numbers = numbers_of(plan, step, measured.facts, np.float64)
    base, tasks = gaussians(kind_of(plan, step), chunk, numbers)
    theta = plan.method.combine(base, tasks, numbers.scales, measured.facts).mean
    found = np.zeros(len(tasks))
    for i, is_own in members.items():
        component = tasks[i] if is_own else base
        assert component is not None
        found[i] = _log_density(component, theta)
        if not np.isfinite(found[i]):
            raise PrecisionError(
                f"the precision of '{step.name}' of '{step.tasks[i].input.ref}' is not positive "
                "everywhere, as that of a mixture's component is. Mix its other runs."
            )
    return found


@np.errstate(all="ignore")  # what is not finite is refused
def _log_density(component: Gaussian, theta: Array) -> float:
    move, precision = theta - component.mean, component.precision
    return float(np.log(precision).sum() - (precision * move) @ move) / 2


def _has_bad(chunk: Chunk) -> bool:
    return bool(
        is_bad_mean(_wide(chunk.means)).any() or is_bad_precision(_wide(chunk.precisions)).any()
    )


def _wide(stored: Array) -> FloatArray:
    """Numbers as they are stored, bits of bfloat16 or floats, in float64."""
    values: Array = decode(stored, "BF16") if stored.dtype == np.uint16 else stored
    return values.astype(np.float64)
