"""What an extraction reports."""

from pathlib import Path

from mergekit_bayes import __version__
from mergekit_bayes.posterior import Identity
from mergekit_bayes.records import Frozen


class ExtractedLayer(Frozen):
    """One adapted weight.

    Attributes:
        kind: `linear layer`, `embedding` or `head`.
        rank: Rank of its factors.
        unit: Unit of its losses, as of the report; of a precision of inputs another one where the
            tensor has one number an entry.
        change: The loss that leaving its change out costs; None where the tensor has no precision
            although others have one.
        lost: The loss that the factors cost.
        norm: Frobenius norm of the change.
        lost_norm: Frobenius norm of what the factors lack.
        sweeps: How many sweeps of least squares improved the factors.
    """

    kind: str
    rank: int
    unit: str
    change: float | None
    lost: float | None
    norm: float
    lost_norm: float
    sweeps: int = 0

    @property
    def share(self) -> float:
        """What the rank loses of the layer's loss; of its squares where no precision is known."""
        if self.change is None or self.lost is None:
            lost, change = self.lost_norm**2, self.norm**2
        else:
            lost, change = self.lost, self.change
        return lost / change if change > 0 else 0.0


class OtherChange(Frozen):
    """A changed tensor that has no factors.

    Attributes:
        why: Why it has none, or how it is stored.
        stored: Whether the adapter holds it all the same.
        unit: As of `ExtractedLayer`.
        change: As of `ExtractedLayer`.
        norm: Frobenius norm of its change.
    """

    why: str
    stored: bool
    unit: str
    change: float | None
    norm: float


class Losses(Frozen):
    """The losses of one unit, by the precision.

    Attributes:
        change: The loss that leaving all changes out costs.
        layers_change: The part of it of the layers that have factors.
        layers_lost: What the rank of their factors loses.
        left_out: The loss of the changed tensors that the adapter does not hold.
    """

    change: float
    layers_change: float
    layers_lost: float
    left_out: float


class ExtractReport(Frozen):
    """What was extracted.

    Attributes:
        version: Version of this package.
        path: The folder of the adapter.
        model: The tuned model as it was named.
        base: The base as it was named.
        model_identity: Content hash of the tuned model.
        base_identity: Content hash of the base.
        precision_identity: Content hash of the precision; None where nothing weighed.
        unit: Unit of `change` and `lost`: `nats` (of the loss summed over the precision's
            observations), `half the squared outputs` (a precision of inputs, likewise), or `half
            the squared change` (of the weights, uniform).
        observations: Over how many observations the precision sums; None where that is not known,
            or nothing weighed.
        observation_unit: What one of them is, `token` or `example`.
        rank: The largest rank that was allowed; None for any.
        tolerance: The largest share of a layer's loss that could be lost, if one was given.
        change: The loss that leaving all changes out costs, of the tensors that have the unit.
        lost: The loss that the adapter costs: by the rank, and by what it leaves out.
        losses: The two apart, for each unit that tensors have.
        norm: Frobenius norm of the change of the model.
        lost_norm: Frobenius norm of what the adapter lacks.
        parameters: Number of stored numbers.
        unchanged: Number of tensors that are the same in both models.
        layers: The adapted weights, by PEFT's name of the module.
        others: What else changed, by the base's name of the tensor.
        summary: What the rank loses and what is left out, a line for each unit.
        notes: Remarks for the reader.
    """

    version: str = __version__
    path: Path
    model: str
    base: str
    model_identity: Identity
    base_identity: Identity
    precision_identity: str | None
    unit: str
    observations: float | None
    observation_unit: str | None
    rank: int | None
    tolerance: float | None
    change: float
    lost: float
    losses: dict[str, Losses]
    norm: float
    lost_norm: float
    parameters: int
    unchanged: int
    layers: dict[str, ExtractedLayer]
    others: dict[str, OtherChange]
    summary: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
