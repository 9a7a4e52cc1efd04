"""Iso-C: an isotropic merge in the common subspace (Marczak et al., ICML 2025)."""

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method, Scales, Tasks
from mergekit_bayes.methods.matrices import rounding_noise, singular
from mergekit_bayes.methods.means import mean_change


def iso_c(base: Gaussian, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Add the sum of the task vectors, its singular values all replaced by their mean.

        sum_t scale_t (m_t - m0) = U diag(s) V
        mean = m0 + mean(s) U V

    Equal scales are the published coefficient, which is chosen on validation data. Directions that
    the sum does not change stay as they are, and do not count in mean(s).

    Args:
        base: What all tasks were fine-tuned from: mean (outputs, inputs).
        tasks: The same of each task.
        scales: One per task, dimensionless; negative removes the task.
        facts: None.
    """
    changes = [scale * (task.mean - base.mean) for task, scale in zip(tasks, scales, strict=True)]
    noise = rounding_noise(base.mean) * sum(map(abs, scales))
    left, values, right = singular(sum(changes), noise)
    if not len(values):
        return base
    return Gaussian(base.mean + values.mean() * (left @ right), base.precision)


ISO_C = Method(
    "iso_c",
    mean_change,
    needs_base=True,
    needs_precision=False,
    summary="The sum of task vectors with equal singular values in every layer "
    "(Iso-C, Marczak et al., ICML 2025).",
    example="bmerge merge A B --base BASE --method iso_c",
    formula="m = m0 + mean(s) U V,  U diag(s) V = sum_t scale_t (m_t - m0)",
    matrix=iso_c,
    needs_matrices=True,
    turns=True,
)
