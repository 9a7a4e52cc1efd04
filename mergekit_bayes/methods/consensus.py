"""Consensus task arithmetic: what several tasks use (Wang et al., ICML 2024)."""

from typing import NamedTuple

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.gaussian import Gaussian, constant, select
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Scales, Tasks


class Votes(NamedTuple):
    """When an entry counts.

    Attributes:
        threshold: lambda: least size of a change that is used, over the sum of all others.
        least: Number of tasks that must use an entry.
    """

    threshold: float
    least: float


def consensus(base: Gaussian, tasks: Tasks, scales: Scales, facts: Votes) -> Gaussian:
    """Add the task vectors where several tasks use an entry, and leave it alone elsewhere.

        d_t  = m_t - m0,  D = sum_t d_t
        task t uses an entry where |d_t| >= lambda |D - d_t|, its TALL mask
        mean = m0 + sum_t scale_t d_t where at least k tasks use the entry, else m0

    Equal scales are the published coefficient, which is chosen on validation data (from 0.1 to 1).
    So is a lambda for each task, among 0.2, 0.3, 0.4, 0.5 and 0.6; here all tasks have one, by
    default the middle of these. A task of scale zero has no part in D and uses nothing.

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless; negative removes the task.
        facts: lambda and k.
    """
    zero, one = constant(0, base.mean), constant(1, base.mean)
    total, merged, users = zero, zero, zero
    for t in range(len(tasks)):
        delta = tasks[t].mean - base.mean
        total = total + select(scales[t] != 0, delta, zero)
        merged = merged + scales[t] * delta
    for t in range(len(tasks)):
        delta = tasks[t].mean - base.mean
        uses = (scales[t] != 0) & (abs(delta) >= facts.threshold * abs(total - delta))
        users = users + select(uses, one, zero)
    return Gaussian(base.mean + select(users >= facts.least, merged, zero), base.precision)


def _votes(inputs: FactInputs) -> Votes:
    least, tasks = float(inputs.settings["k"]), len(inputs.counts)
    if least > tasks:
        raise ConfigError(
            f"--param k={least:.0f}: no entry is used by {least:.0f} of {tasks} tasks, and the "
            "merge would be the base. Give more models, or a smaller k."
        )
    return Votes(float(inputs.settings["lambda"]), least)


CONSENSUS = Method(
    "consensus",
    consensus,
    needs_base=True,
    needs_precision=False,
    summary="Task arithmetic in those entries that several tasks use "
    "(TALL masks, Wang et al., ICML 2024).",
    example="bmerge merge A B C --base BASE --method consensus --scale 0.4",
    formula="m = m0 + [#(|d_t| >= lambda |D - d_t|) >= k] sum_t scale_t d_t,  d_t = m_t - m0, "
    "D = sum_t d_t",
    parameters=(
        Parameter("k", 2, "number of tasks that must use an entry", 0),
        Parameter(
            "lambda", 0.4, "least size of a change that is used, over the sum of all others", 0
        ),
    ),
    facts=_votes,
)
