"""How a card tells of an extraction: what the adapter holds of the change, and how to undo it."""

from collections.abc import Iterator

from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import ExtractRecord
from mergekit_bayes.hub.local_paths import without_paths
from mergekit_bayes.hub.markdown import code, text

_NOTES = 20
_UNITS = {
    "nats": "nats of the summed loss, to second order",
    "squared outputs": "squared outputs of the layers",
    "squared weights": "half the squared norm",
}


def extraction(facts: Facts) -> str:
    """The list of what an extraction kept, as far as the folder says it."""
    lines = [*_lines(facts.extraction), *_unloading(facts)]
    notes = [text(without_paths(n, facts.places)) for n in facts.extraction.notes[:_NOTES]]
    return "\n".join(f"- {line}" for line in (*lines, *notes))


def _lines(record: ExtractRecord) -> Iterator[str]:
    ranks = [layer.rank for layer in record.layers.values()]
    if ranks:
        is_one = min(ranks) == max(ranks)
        rank = f"rank {ranks[0]}" if is_one else f"ranks from {min(ranks)} to {max(ranks)}"
        yield f"{len(ranks)} layers, of {rank}; every scaling is 1 (lora_alpha = r)"
    unit = _UNITS.get(record.unit, "")
    if record.change > 0 and unit:
        yield (
            f"the whole change counts {record.change:.4g} ({unit}), of which the adapter lacks "
            f"{record.lost:.4g} ({record.lost / record.change:.2%})"
        )


def _unloading(facts: Facts) -> Iterator[str]:
    whole = facts.adapter.get("modules_to_save")
    if not whole:
        yield f"{code('model.unload()')} gives the base back, bit for bit"
