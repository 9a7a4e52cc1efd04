"""By how much a merge is predicted to raise the loss of each model that goes into it.

Around the weights m of a model with N observations, the summed loss of its own data is taken as
quadratic, with its likelihood precision H. A merge m* then raises it, in nats an observation, by

    (g' d + d' H d / 2) / N,    d = m* - m,    g = -P (m - m0)

where P is the pull to the base m0 that its record tells of: training ended where the gradient g of
the data and the pull cancel (Daheim et al., ICLR 2024, section 3). For a pull P to zero, g = -P m.
Without a recorded pull, and for the base, g = 0. It is exact for a quadratic loss whose curvature
is that precision: diagonal, or a Kronecker product for each linear layer.

A quadratic around m is measured nowhere but at m. Where the merge is farther from m than the base
is, in the norm of H, it is farther away than training went, and the prediction is not trusted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mergekit_bayes.checkpoint.layers import group_layers
from mergekit_bayes.merge.tally import MOVES
from mergekit_bayes.plan import Input, MergePlan
from mergekit_bayes.posterior.forms import Form
from mergekit_bayes.posterior.info import INPUTS
from mergekit_bayes.records import FloatArray, Record

SHOWN_LAYERS = 5
_ROUNDING = 1e-5  # relative errors of the sums are below this

_ENTRIES = (
    "the predicted increase leaves out how entries act together: it tells merges of different "
    "sizes apart at best, and can be thousands of times too small. Precisions of --estimator "
    "kronecker tell more"
)
_LAYERS = (
    "the predicted increase leaves out how layers act together: it orders merges, and can be tens "
    "of times too small"
)


class Increase(Record):
    """The predicted increase of one model's loss on its own data.

    It holds over the tensors that are merged, and counts the others as unchanged.

    Attributes:
        ref: The model's path or Hub id, as given.
        role: `base` or `task`.
        unit: What one observation is: `token` or `example`; None where its precision does not say.
        count: N, the observations that its precision stands for in the merge; None if unknown.
        nats: The increase, in nats an observation; None where nothing can be said: without a count
            above zero, where none of its own tensors is merged, or for the covariance of inputs,
            which is no curvature of the loss.
        distance: `|m* - m| / |m0 - m|` in the norm of H; None for the base, without one, and where
            the norm is not one, since H is negative.
        trusted: Whether the merge is no farther from the model than the base is; None for the base
            and without one, where there is no such distance to compare with, and without `nats`.
        layers: The layers with the largest shares of `nats`, the largest first.
        left_out: How many merged tensors are not counted, because the model has no precision of
            its own there, or scale 0.
    """

    ref: str
    role: str
    unit: str | None = None
    count: float | None = None
    nats: float | None = None
    distance: float | None = None
    trusted: bool | None = None
    layers: dict[str, float] = {}
    left_out: int = 0


def predicted_increases(
    plan: MergePlan,
    moves: Mapping[int, Sequence[float]],
    *,
    most_layers: int | None = SHOWN_LAYERS,
) -> tuple[Increase, ...]:
    """The predicted increase of each model's loss.

    Args:
        plan: The merge, by precisions.
        moves: For each step, by its index in the plan, `MOVES` sums of each model, as
            `kernels.base.Tally` defines them.
        most_layers: How many layers are listed; None for all.

    Returns:
        One for each input, the base first; empty without `moves`.
    """
    if not moves:
        return ()
    sums = {index: np.reshape(line, (-1, MOVES)) for index, line in sorted(moves.items())}
    return tuple(
        _of_model(plan, position, model, sums, most_layers)
        for position, model in enumerate(plan.inputs)
    )


def notes_on_increases(plan: MergePlan) -> list[str]:
    """What the predictions leave out, or why there are none."""
    if not plan.method.needs_precision:
        return []
    if any(is_of_inputs(model) for model in plan.inputs):
        return [
            "no increase of the loss is predicted from the covariance of inputs, which is no "
            "curvature of it"
        ]
    notes = []
    is_of_products = any(step.form is Form.KRONECKER for step in plan.steps)
    if any(model.weighing.count for model in plan.inputs):
        notes.append(_LAYERS if is_of_products else _ENTRIES)
    refs = [f"'{task.ref}'" for task in plan.tasks if task.recorded_pull.precision]
    if plan.base is None and refs:
        notes.append(
            f"the predicted increase is without the gradient of {', '.join(refs)}, whose training "
            "pulled to a base that is not known here"
        )
    return notes


def is_of_inputs(model: Input) -> bool:
    """Whether its precision is the covariance of inputs, which is no curvature of the loss."""
    info = model.precision_info
    return info is not None and info.estimator == INPUTS


def _of_model(
    plan: MergePlan,
    position: int,
    model: Input,
    sums: Mapping[int, FloatArray],
    most_layers: int | None,
) -> Increase:
    is_base, info = model is plan.base, model.precision_info
    own = {
        plan.steps[index].name: lines[position]
        for index, lines in sums.items()
        if _is_own(plan, index, position)
    }
    count = model.weighing.count
    found = Increase(
        ref=model.ref,
        role="base" if is_base else "task",
        unit=info.unit if info is not None else None,
        count=count,
        left_out=len(sums) - len(own),
    )
    if not own:
        return found
    moved, reach, *products = _total(own.values())
    if not all(map(math.isfinite, (moved, reach, *products))):  # beyond float32 in a block
        return found
    update: dict[str, object] = {}
    has_distance = plan.base is not None and not is_base
    if has_distance and reach > 0 and moved >= 0:
        update["distance"] = six_digits(math.sqrt(moved / reach))
    if count is not None and count > 0 and not is_of_inputs(model):
        if has_distance:
            update["trusted"] = moved <= reach * (1 + _ROUNDING)
        layers = {
            layer: _nats(plan, model, [own[name] for name in names], count)
            for layer, names in group_layers(own).items()
        }
        largest = sorted(layers, key=lambda layer: -abs(layers[layer]))[:most_layers]
        update["nats"] = six_digits(_nats(plan, model, own.values(), count))
        update["layers"] = {layer: six_digits(layers[layer]) for layer in largest}
    return found.model_copy(update=update)


def _is_own(plan: MergePlan, index: int, position: int) -> bool:
    """Whether a step's mean and precision are the model's own, and not a stand-in."""
    operand = plan.steps[index].operands[position]
    return operand.owns_precision and operand.mean.input is operand.input


def _total(lines: Iterable[FloatArray]) -> list[float]:
    """The sums over some steps, in their order."""
    total = [0.0] * MOVES
    for line in lines:
        total = [a + float(b) for a, b in zip(total, line, strict=True)]
    return total


def _nats(plan: MergePlan, model: Input, lines: Iterable[FloatArray], count: float) -> float:
    moved, _, to_base, to_zero = _total(lines)
    pulled = 0.0
    if model is not plan.base:
        pull = model.recorded_pull
        pulled = (pull.precision or 0.0) * to_base + pull.decay * to_zero
    return (moved / 2 - pulled) / count


def six_digits(number: float) -> float:
    """A number as precisely as a sum of float32 in any order is known."""
    return float(f"{number:.6g}")
