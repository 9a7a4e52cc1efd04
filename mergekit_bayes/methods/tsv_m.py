"""TSV-M: task singular vectors, whitened (Gargiulo et al., CVPR 2025)."""

import numpy as np

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method, Scales, Tasks
from mergekit_bayes.methods.matrices import orthonormal, rounding_noise, singular
from mergekit_bayes.methods.means import mean_change


def tsv_m(base: Gaussian, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Give each task an equal share of a layer's singular directions, and make them orthogonal.

        scale_t (m_t - m0) = U_t diag(s_t) V_t,  the largest min(outputs, inputs) / T of each
        U, s, V = all U_t side by side, all s_t, all V_t below each other
        mean    = m0 + O(U) diag(s) O(V),  O(X) the nearest matrix with orthonormal directions

    Equal scales are the published coefficient, which is chosen on validation data. T counts the
    tasks of a scale other than zero. Two points are left open as published and settled here: a
    task keeps one direction at least, and directions that it did not change are no part of it.

    Args:
        base: What all tasks were fine-tuned from: mean (outputs, inputs).
        tasks: The same of each task.
        scales: One per task, dimensionless; negative removes the task.
        facts: None.
    """
    voting = [(task, scale) for task, scale in zip(tasks, scales, strict=True) if scale != 0]
    if not voting:
        return base
    share = max(1, min(base.mean.shape) // len(voting))
    noise = rounding_noise(base.mean)
    kept = [
        singular(scale * (task.mean - base.mean), abs(scale) * noise).top(share)
        for task, scale in voting
    ]
    left = orthonormal(np.concatenate([part.left for part in kept], axis=1))
    values = np.concatenate([part.values for part in kept])
    right = orthonormal(np.concatenate([part.right for part in kept]))
    return Gaussian(base.mean + (left * values) @ right, base.precision)


TSV_M = Method(
    "tsv_m",
    mean_change,
    needs_base=True,
    needs_precision=False,
    summary="Each task's top singular directions of every layer, made orthogonal "
    "(TSV-M, Gargiulo et al., CVPR 2025).",
    example="bmerge merge A B --base BASE --method tsv_m",
    formula="m = m0 + O(U) diag(s) O(V), of the largest singular values of scale_t (m_t - m0)",
    matrix=tsv_m,
    needs_matrices=True,
    turns=True,
)
