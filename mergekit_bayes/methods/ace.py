"""ACE-Merging: input covariances read off the task vectors, no data (Xu et al., CVPR 2026)."""

from typing import NamedTuple

import numpy as np

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import FactInputs, Method, Parameter, Scales, Tasks
from mergekit_bayes.methods.matrices import singular
from mergekit_bayes.methods.means import mean_change

FAR = 100.0  # times all changes of a layer, beyond which its strengthened directions mean nothing


class Estimate(NamedTuple):
    """How covariances are estimated.

    Attributes:
        epsilon: What is added to each, weight^2, > 0.
        threshold: How uneven the sizes of task vectors must be for each to be brought to one size.
        share: Share of the singular directions that are strengthened where they are.
    """

    epsilon: float
    threshold: float
    share: float


def ace(base: Gaussian, tasks: Tasks, scales: Scales, facts: Estimate) -> Gaussian:
    """Average a layer's task vectors by the covariances of its inputs, as they tell them.

        d_t  = m_t - m0,  e_t = d_t minus its mean over the outputs,  S_t = e_t' e_t
        R_t  = S_t + epsilon I,  C = the mean row of sum_t S_t in every row
        P    = (sum_t scale_t e_t R_t) (sum_t R_t + C)^-1
        mean = m0 + P

    A change by gradient descent is a sum over inputs, so that S_t stands for their covariance.
    Where log |d_t|^2 has a variance above `threshold` times its squared mean, S_t and R_t are
    divided by tr(S_t) and C by the mean of |d_t|^2, too, and the directions strengthened:

        U diag(s) V = P + sum_t scale_t d_t (S_t - sum_u R_u / T),  the largest `share` of them
        mean        = m0 + P + mean(s) U V

    This is the authors' released code with its defaults; their paper chooses epsilon for each
    family of models, from 1e-5 to 4e-2. Where it is much larger than every S_t, the mean of the e_t
    is added. Equal scales are the published coefficient, 1. A task that changes a layer by the same
    for all outputs, or not at all, does not count there; without any other, the layer takes the
    mean of the changes, as other tensors do.

    Args:
        base: What all tasks were fine-tuned from: mean (outputs, inputs).
        tasks: The same of each task.
        scales: One per task, dimensionless; negative removes the task.
        facts: How covariances are estimated.

    Raises:
        ArithmeticError: A task changed the layer by so little that the strengthened directions,
            which grow with `epsilon / tr(S_t)`, would be far larger than all changes.
    """
    changes = [(scale, t.mean - base.mean) for t, scale in zip(tasks, scales, strict=True)]
    centred = [(scale, d, d - d.mean(axis=0)) for scale, d in changes if scale != 0]
    voting = [each for each in centred if each[2].any()]
    if not voting:
        return mean_change(base, tasks, scales, facts)
    sizes = np.array([np.vdot(d, d) for _, d, _ in voting])
    logs = np.log(sizes)
    is_uneven = len(logs) > 1 and logs.var(ddof=1) > facts.threshold * logs.mean() ** 2
    one, covariances, ridged = np.eye(base.mean.shape[1]), [], []
    for _, _, e in voting:
        covariance = e.T @ e
        size = np.trace(covariance) if is_uneven else 1.0
        covariances.append(covariance / size)
        ridged.append((covariance + facts.epsilon * one) / size)
    common = sum(covariances).mean(axis=0) / (sizes.mean() if is_uneven else 1.0)
    weighted = sum(scale * e @ r for (scale, _, e), r in zip(voting, ridged, strict=True))
    change = np.linalg.solve((sum(ridged) + common).T, weighted.T).T
    if is_uneven:
        average = sum(ridged) / len(voting)
        apart = zip(voting, covariances, strict=True)
        fused = change + sum(scale * d @ (s - average) for (scale, d, _), s in apart)
        left, values, right = singular(fused).top(int(min(fused.shape) * facts.share))
        strengthened = values.mean() * left @ right if len(values) else np.zeros_like(change)
        changed = np.linalg.norm(sum(abs(scale) * abs(d) for scale, d, _ in voting))
        if np.linalg.norm(strengthened) > FAR * changed:
            raise ArithmeticError(
                f"a task changed it by so little beside --param epsilon={facts.epsilon:g} that the "
                f"directions that ACE strengthens would move it over {FAR:g} times as far as all "
                "tasks. Take a smaller epsilon, or a larger threshold, which leaves them as they "
                "are"
            )
        change = change + strengthened
    return Gaussian(base.mean + change, base.precision)


def _estimate(inputs: FactInputs) -> Estimate:
    epsilon, threshold, share = (float(inputs.settings[name]) for name in Estimate._fields)
    return Estimate(epsilon, threshold, share)


ACE = Method(
    "ace",
    mean_change,
    needs_base=True,
    needs_precision=False,
    summary="Each layer by input covariances that its task vectors tell, without data "
    "(ACE-Merging, Xu et al., CVPR 2026).",
    example="bmerge merge A B --base BASE --method ace",
    formula="m = m0 + (sum_t scale_t e_t R_t) (sum_t R_t + C)^-1,  R_t = e_t' e_t + epsilon I",
    parameters=(
        Parameter("epsilon", 0.01, "what is added to every covariance, in weight^2", 1e-12),
        Parameter("threshold", 0.3, "unevenness from which all changes get one size", 0),
        Parameter("share", 0.3, "share of directions that are then strengthened", 0, 1),
    ),
    facts=_estimate,
    matrix=ace,
    needs_matrices=True,
)
