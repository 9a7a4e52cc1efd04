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
        change: The loss that leaving its change out costs, in the report's unit; None where the
            tensor has no precision although others have one.
        lost: The loss that the factors cost.
        norm: Frobenius norm of the change.
        lost_norm: Frobenius norm of what the factors lack.
        sweeps: How many sweeps of least squares improved the factors.
    """

    kind: str
    rank: int
    change: float | None
    lost: float | None
    norm: float
    lost_norm: float
    sweeps: int = 0


class OtherChange(Frozen):
    """A changed tensor that has no factors.

    Attributes:
        why: Why it has none, or how it is stored.
        stored: Whether the adapter holds it all the same.
        change: As of `ExtractedLayer`.
        norm: Frobenius norm of its change.
    """

    why: str
    stored: bool
    change: float | None
    norm: float


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
        unit: Unit of all losses: `nats` (of the loss summed over the precision's observations),
            `squared outputs` (a precision of inputs), or `squared weights` (halved, uniform).
        rank: The largest rank that was allowed; None for any.
        tolerance: The largest share of a layer's loss that could be lost, if one was given.
        change: The loss that leaving all changes out costs.
        lost: The loss that the adapter costs: of factors, and of what it leaves out.
        norm: Frobenius norm of the change of the model.
        lost_norm: Frobenius norm of what the adapter lacks.
        parameters: Number of stored numbers.
        unchanged: Number of tensors that are the same in both models.
        layers: The adapted weights, by PEFT's name of the module.
        others: What else changed, by the base's name of the tensor.
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
    rank: int | None
    tolerance: float | None
    change: float
    lost: float
    norm: float
    lost_norm: float
    parameters: int
    unchanged: int
    layers: dict[str, ExtractedLayer]
    others: dict[str, OtherChange]
    notes: tuple[str, ...] = ()
