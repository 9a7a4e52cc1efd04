"""What a merge of adapters reports."""

from mergekit_bayes import __version__
from mergekit_bayes.lora.inputs import Space, Weights
from mergekit_bayes.records import Frozen

FORMULA: dict[tuple[Space, Weights], str] = {
    ("product", "uniform"): "dW = sum_t c_t s_t B_t A_t, cut to rank R",
    ("product", "precision"): (
        "dW = sum_t c_t S_t s_t B_t A_t / sum_t c_t S_t, S_t = 1 / (V_W + floor), cut to rank R"
    ),
    ("concat", "uniform"): "B = [c_1 s_1 B_1, ...], A = [A_1; ...]",
    ("factor", "uniform"): (
        "shared factor: sum_t c_t of the other; one start: sum_t c_t / sum_t c_t of each"
    ),
    ("factor", "precision"): (
        "shared factor: sum_t c_t S_t / sum_t c_t S_t of the other; one start: of each"
    ),
}


class MergedLayer(Frozen):
    """One layer of a merged adapter.

    Attributes:
        norm: Frobenius norm of the merged change.
        error: Distance of what is stored from the merged change, relative to `norm`: what the rank
            cuts off (product), rounding (concat, shared factor), or the cross terms of averaged
            factors (one start).
        adapters: Number of adapters that hold the layer.
    """

    norm: float
    error: float
    adapters: int


class AdapterReport(Frozen):
    """What a merge of adapters did.

    Attributes:
        version: Version of this package.
        path: The folder written.
        space: The space in which changes were added.
        weights: What weighed them.
        formula: The formula of that space and weights.
        adapters: The adapters as given.
        scales: The scale of each adapter.
        counts: Number of observations for which each adapter's precision was counted.
        rank: Rank of the result.
        largest_error: The largest `error` of a layer.
        layers: The layers by module.
        whole: What became of each tensor that the adapters hold beside their factors.
        notes: What a user should know about the merge.
    """

    version: str = __version__
    path: str
    space: Space
    weights: Weights
    formula: str
    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    rank: int
    largest_error: float
    layers: dict[str, MergedLayer]
    whole: dict[str, str]
    notes: tuple[str, ...]
