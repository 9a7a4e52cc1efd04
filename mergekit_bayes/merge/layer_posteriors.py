"""The posteriors of a linear layer from its stored matrices: prior, base and ridge.

What a method is given of a model is its likelihood precision on the prior that the method expects,
as in the passes over entries (`kernels/base.py`): here matrices, in full or of low rank, or sums of
Kronecker products.
"""

from collections.abc import Sequence

import numpy as np

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.gaussian import DELTA_0, Gaussian
from mergekit_bayes.kernels.base import Array, Numbers
from mergekit_bayes.methods.kronecker import KroneckerSum, Spectrum
from mergekit_bayes.methods.matrices import divided, norm, one_like
from mergekit_bayes.plan import Input, MergePlan, Step
from mergekit_bayes.stream.matrices import Precision

# Added to the base's curvature (without a base: to every one), as a share of its norm: directions
# that no input has been seen in fall back to task arithmetic, or the average, and what rounding to
# float32 leaves there does not count.
RIDGE = 1e-5
# To each factor of a product, of every model, as a share of its norm: the least eigenvalues of two
# factors multiply, and few rows tell of them. Chosen on validation rows (docs/merging.md,
# 2026-11-29): with a tenth of it a merge's head moves far, and more is nearer to one constant.
FACTOR_RIDGE = 3e-3


def posteriors(
    step: Step,
    weights: Sequence[Array],
    likelihoods: Sequence[Precision],
    ridge: Precision | None,
    numbers: Numbers,
) -> list[Gaussian]:
    """All models, each with its likelihood precision on the prior that the method expects.

    Args:
        step: The tensor, for messages.
        weights: Of each model, (outputs, inputs), the base's first.
        likelihoods: As `likelihoods_of` gives them.
        ridge: What `missing_ridge` adds to the base; None without a base.
        numbers: The constants of the step.

    Raises:
        MismatchError: A prior or anchor that is no Kronecker product.
    """
    if ridge is None:
        precisions = [
            _equal(DELTA_0, weight.shape)
            if isinstance(likelihood, KroneckerSum) and not likelihood.terms
            else with_prior(step, likelihood, prior)
            for weight, likelihood, prior in zip(weights, likelihoods, numbers.priors, strict=True)
        ]
        return [Gaussian(*each) for each in zip(weights, precisions, strict=True)]
    precision = with_prior(step, likelihoods[0], numbers.priors[0])
    base = Gaussian(weights[0], precision + ridge)
    models = [base]
    for i, (weight, likelihood) in enumerate(zip(weights[1:], likelihoods[1:], strict=True), 1):
        anchor, decay = numbers.anchors[i], numbers.decays[i]
        precision = base.precision + likelihood
        if anchor < 0:
            models.append(Gaussian(weight, precision))
        else:
            moved = (weight - base.mean) @ with_prior(step, likelihood, anchor) + decay * weight
            models.append(Gaussian(base.mean + divided(moved, precision), precision))
    return models


def likelihoods_of(
    plan: MergePlan, step: Step, matrices: Sequence[Precision], numbers: Numbers
) -> list[Precision]:
    """H of each model, with the ridge of those that have one.

    The base has one, or every model of an average, and with Kronecker products every model.

    Raises:
        MismatchError: A model is a removal by Kronecker products that the guard bounded.
    """
    found: list[Precision] = []
    for position, (model, matrix) in enumerate(zip(plan.inputs, matrices, strict=True)):
        if isinstance(matrix, KroneckerSum) and not matrix.is_positive():
            raise MismatchError(
                f"'{step.name}': '{model.ref}' is a removal that the guard bounded, and its "
                "precision as it is stored does not tell how. Merge its models and the others in "
                "one merge, or remove by precisions of --estimator inputs."
            )
        of_base = found[0] if plan.base is not None and found else None
        likelihood = likelihood_of(numbers, position, matrix, of_base)
        is_product = isinstance(matrix, KroneckerSum)
        has_ridge = plan.base is None or position == 0 or is_product
        found.append(with_ridge(model, likelihood) if has_ridge else likelihood)
    return found


def missing_ridge(
    plan: MergePlan, likelihoods: Sequence[Precision], numbers: Numbers, shape: tuple[int, ...]
) -> Precision | None:
    """What the ridge of the base lacks to that of a task with a larger precision."""
    if plan.base is None:
        return None
    of_base, *of_tasks = likelihoods
    if isinstance(of_base, KroneckerSum):  # every model has its own ridge
        return KroneckerSum(()) if of_base.terms else _equal(DELTA_0, shape)
    sizes = [norm(task) for task, x in zip(of_tasks, numbers.scales, strict=True) if x]
    lacks = max(0.0, max(sizes, default=0.0) - norm(of_base))
    return RIDGE * lacks * one_like(of_base)


def _equal(number: float, shape: tuple[int, ...]) -> KroneckerSum:
    """One number on every entry, for models that have nothing in a layer."""
    return KroneckerSum.of([(number * np.eye(shape[0]), np.eye(shape[1]))])


def without_ridge(merged: Gaussian, ridge: Precision | None, numbers: Numbers) -> Gaussian:
    """A merge whose precision is without the ridge, which a later merge adds by its own models."""
    precision = merged.precision
    if ridge is None or min(numbers.scales) < 0:  # after a removal nothing may be left to take
        return merged
    if isinstance(precision, Spectrum):
        return merged._replace(precision=precision._replace(exact=precision.exact - ridge))
    return merged._replace(precision=precision - ridge)


def likelihood_of(
    numbers: Numbers, position: int, stored: Precision, of_base: Precision | None
) -> Precision:
    """H of a model, `gain (S - contained I - share H_0)`; see `Numbers`."""
    if not isinstance(stored, KroneckerSum):
        stored = stored - numbers.contained[position] * one_like(stored)
    share = float(numbers.base_shares[position])
    if share and of_base is not None:
        stored = stored - share * of_base
    return float(numbers.gains[position]) * stored


def with_prior(step: Step, likelihood: Precision, prior: float) -> Precision:
    """A likelihood precision and a number on every entry."""
    if not isinstance(likelihood, KroneckerSum):
        return likelihood + prior * one_like(likelihood)
    if prior <= 1000 * DELTA_0:  # every average adds one DELTA_0 to what it records
        return likelihood
    raise MismatchError(
        f"'{step.name}': a prior or anchor of {prior:g} on every entry is no Kronecker product. "
        "Use precisions without a prior, and --anchor h0 or none."
    )


def with_ridge(model: Input, likelihood: Precision) -> Precision:
    """H of a model with a little more in every direction."""
    return _ridged(likelihood) if model.weighing.reshape else likelihood  # a merge has it inside


def _ridged(likelihood: Precision) -> Precision:
    """A likelihood precision with a little of its norm in every direction."""
    if isinstance(likelihood, KroneckerSum):
        pairs = [
            (_with_share(left, FACTOR_RIDGE), _with_share(right, FACTOR_RIDGE))
            for left, right in likelihood.terms
        ]
        return KroneckerSum.of(pairs)
    return likelihood + RIDGE * norm(likelihood) * one_like(likelihood)


def _with_share(matrix: Array, share: float) -> Array:
    ridged: Array = matrix + share * np.linalg.norm(matrix) * np.eye(len(matrix))
    return ridged
