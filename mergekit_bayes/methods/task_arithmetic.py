"""Task arithmetic (Ilharco et al., ICLR 2023): add or subtract what each task changed."""

from mergekit_bayes.gaussian import Gaussian
from mergekit_bayes.methods.base import Method, Scales, Tasks


def task_arithmetic(base: Gaussian, tasks: Tasks, scales: Scales, facts: None) -> Gaussian:
    """Add each task vector to the base; gradient matching with all precisions equal to the base's.

        mean = m0 + sum_t scale_t (m_t - m0)

    Args:
        base: What all tasks were fine-tuned from.
        tasks: Floats or arrays of one shape.
        scales: One per task, dimensionless; negative removes the task.
        facts: None.
    """
    mean = base.mean
    for i in range(len(tasks)):
        mean = mean + scales[i] * (tasks[i].mean - base.mean)
    return Gaussian(mean, base.precision)


TASK_ARITHMETIC = Method(
    "task_arithmetic",
    task_arithmetic,
    needs_base=True,
    needs_precision=False,
    summary="The base plus what each task changed; a negative scale removes "
    "(Ilharco et al., ICLR 2023).",
    example="bmerge merge A B --base BASE --scale 0.5",
    formula="m = m0 + sum_t scale_t (m_t - m0)",
    is_posterior=True,
    can_be_undone=True,
    turns=True,
)
