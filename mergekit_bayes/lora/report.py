"""What a merge of adapters reports."""

from collections.abc import Sequence

from mergekit_bayes import __version__
from mergekit_bayes.lora.inputs import Space, Weights
from mergekit_bayes.lora.rules import USUAL, Rule
from mergekit_bayes.records import Frozen

_MUCH = 0.1  # relative error of a layer above which a note tells what the rank cuts off
FORMULA: dict[tuple[Space, Weights], str] = {
    ("product", "uniform"): "dW = sum_t c_t s_t B_t A_t, cut to rank R",
    ("product", "precision"): (
        "dW = sum_t c_t S_t s_t B_t A_t / sum_t c_t S_t, S_t = 1 / (V_W + floor), cut to rank R"
    ),
    ("concat", "uniform"): "B = [c_1 s_1 B_1, ...], A = [A_1; ...]",
    ("core", "uniform"): "dW = U M V', M = METHOD of all U' s_t B_t A_t V by c_t, cut to rank R",
    ("factor", "uniform"): (
        "shared factor: sum_t c_t of the other; one start: sum_t c_t / sum_t c_t of each"
    ),
    ("factor", "precision"): (
        "shared factor: sum_t c_t S_t / sum_t c_t S_t of the other; one start: of each"
    ),
}
_SYMBOLS = "with A_t, B_t the factors of adapter t, c_t its scale, s_t its lora_alpha / r"
SYMBOLS: dict[tuple[Space, Weights], str] = {
    ("product", "uniform"): f"{_SYMBOLS}, R the rank (--rank)",
    ("product", "precision"): (
        f"{_SYMBOLS}, V_W the variance of s_t B_t A_t (weight^2), R the rank (--rank)"
    ),
    ("concat", "uniform"): _SYMBOLS,
    ("core", "uniform"): (
        f"{_SYMBOLS}, U the left singular vectors of [s_1 B_1, ...], V the right ones of "
        "[A_1; ...], R the rank (--rank)"
    ),
    ("factor", "uniform"): f"{_SYMBOLS} (which counts to B_t)",
    ("factor", "precision"): (
        f"{_SYMBOLS} (which counts to B_t), S_t the precision of the factor (1/weight^2)"
    ),
}


def formula(space: Space, weights: Weights, rule: Rule | None) -> str:
    """The formula of a merge in some space, by some weights and, in core space, by some method."""
    text = FORMULA[space, weights]
    return text if rule is None else text.replace("METHOD", rule.method.name)


def describe_rule(rule: Rule) -> str | None:
    """What a user should know of a method in core space; None if it is what it is elsewhere."""
    if rule.is_equivariant:
        return None
    return (
        f"{rule.method.name} goes by coordinates: in core space by common directions of the "
        "adapters, not by entries of the weights, so that the merge is another one than on the base"
    )


def summarise(
    space: Space,
    weights: Weights,
    scales: Sequence[float],
    *,
    averaged: bool,
    rule: Rule | None = None,
) -> str:
    """What a merge of adapters does, in one line.

    Args:
        space: The space in which changes are added.
        weights: What weighs them.
        scales: One per adapter.
        averaged: Whether factors are averaged because they started from one A.
        rule: In core space, the method by which they are merged.
    """
    count, is_one = len(scales), len(set(scales)) == 1
    adapters = f"{count} adapter{'s' * (count > 1)}"
    if weights == "precision" or averaged:
        shares = ", ".join(f"{scale / sum(scales):.3g}" for scale in scales)
        weighed = ", weighted by precision" if weights == "precision" else ""
        kind = "average of the factors of" if space == "factor" else "average of the changes of"
        return f"{kind} {adapters}" + ("" if is_one else f" (shares {shares})") + weighed
    if rule is not None and rule.method.name != USUAL.name:
        shown = ", ".join(f"{scale:g}" for scale in (scales[:1] if is_one else scales))
        scaled = f" (scale {shown})" if rule.method.takes_scales else ""
        return f"{rule.text} of the changes of {adapters}{scaled}, in their core space"
    each = f"scale {scales[0]:g}{' each' * (count > 1)}" if is_one else None
    each = each or f"scales {', '.join(f'{scale:g}' for scale in scales)}"
    hint = f"; --scale {1 / count:.4g} averages them" if count > 1 and set(scales) == {1} else ""
    return f"sum of the changes of {adapters} ({each}{hint})"


class MergedLayer(Frozen):
    """One layer of a merged adapter.

    Attributes:
        norm: Frobenius norm of the merged change.
        error: Distance of what is stored from the merged change, relative to `norm`: what the rank
            cuts off (product, core), rounding (concat, shared factor), or the cross terms of
            averaged factors (one start; by precision, the distance from the average of the changes
            by precision).
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
        method: In core space, the method that merged them; empty elsewhere.
        param: Its settings.
        summary: What the merge did, in one line.
        formula: The formula of that space and weights.
        symbols: What the symbols of the formula are.
        adapters: The adapters as given.
        scales: The scale of each adapter.
        counts: Number of observations for which each adapter's precision was counted.
        rank: Rank of the result.
        exact_rank: The rank from which on nothing is cut off; None where nothing is cut.
        largest_error: The largest `error` of a layer.
        layers: The layers by module.
        whole: What became of each tensor that the adapters hold beside their factors.
        notes: What a user should know about the merge.
    """

    version: str = __version__
    path: str
    space: Space
    weights: Weights
    method: str = ""
    param: dict[str, float | str] = {}
    summary: str = ""
    formula: str
    symbols: str = ""
    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    rank: int
    exact_rank: int | None = None
    largest_error: float
    layers: dict[str, MergedLayer]
    whole: dict[str, str]
    notes: tuple[str, ...]

    @property
    def is_a_sum(self) -> bool:
        """Whether the merged change is the sum of the scaled changes, but for its rank."""
        return self.weights == "uniform" and self.method in ("", USUAL.name)

    @property
    def rank_note(self) -> str | None:
        """That the rank cuts off much of a layer; None if it does not."""
        exact = self.exact_rank
        if exact is None or self.rank >= exact or self.largest_error <= _MUCH:
            return None
        layer = max(self.layers, key=lambda module: self.layers[module].error)
        concat = " (so is --space concat)" if self.is_a_sum else ""
        return (
            f"rank {self.rank} cuts off up to {self.largest_error:.0%} of a layer's merged change "
            f"('{layer}'); --rank {exact} is exact{concat}"
        )

    def with_rank_note(self) -> "AdapterReport":
        """The report, with `rank_note` as the first of its notes."""
        notes = [note for note in (self.rank_note,) if note is not None]
        return self.model_copy(update={"notes": (*notes, *self.notes)})
