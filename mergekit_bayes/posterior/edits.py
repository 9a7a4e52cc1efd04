"""What an adaptation did to a posterior: the record of what was removed and added, and how."""

from typing import Literal

from mergekit_bayes.records import Frozen


class Identity(Frozen):
    """Content hash of a set of tensors.

    Attributes:
        blocks: SHA-256 over sixteen blocks of each tensor.
        full: SHA-256 over all bytes; None where it was not asked for.
    """

    blocks: str
    full: str | None = None


class EditedRows(Frozen):
    """Rows that an adaptation removed or added.

    Attributes:
        kind: What was done with them; `contrast` rows match the removed ones and were added, all
            together counted like the removed ones.
        label: Where they come from: Hub ids, and of local paths the last part.
        observations: Their number.
        sha256: SHA-256 of the encoded rows, in order.
    """

    kind: Literal["remove", "contrast", "add"]
    label: str
    observations: int
    sha256: str


class EditMemory(Frozen):
    """The memory on which an adaptation held the model.

    Attributes:
        kind: `rows`, `self_generated`, or `both`.
        observations: Those that were trained on.
        sha256: SHA-256 of the encoded rows that were trained on, in order.
    """

    kind: Literal["rows", "self_generated", "both"]
    observations: int
    sha256: str


class Edit(Frozen):
    """One adaptation.

    Attributes:
        rows: What it removed and added.
        removal: The removal's loss; None where nothing was removed.
        memory: The memory; None without one.
        kappa: Weight of one memory observation.
        tau: Weight of the K-prior.
        prior: The weight-space part of the K-prior: `stored`, `none`, or one number, 1/weight^2.
        pool: The form to which the stored precision was pooled for it.
        steps: Optimizer steps of the weights that were kept.
        base: N_0, observations that the start stood for.
        base_is_recorded: Whether that was on record or given; otherwise it was assumed.
        start: Identity of the start's weights.
        start_precision: Identity of the start's precision; None where the result has none of it.
        start_count: The factor before the data's part of that precision in the result.
    """

    rows: tuple[EditedRows, ...]
    removal: str | None = None
    memory: EditMemory | None = None
    kappa: float = 0.0
    tau: float = 1.0
    prior: Literal["stored", "none"] | float = "none"
    pool: Literal["tensor", "row"] | None = None
    steps: int
    base: float
    base_is_recorded: bool = False
    start: Identity | None = None
    start_precision: Identity | None = None
    start_count: float | None = None
