"""How a card tells of an extraction: what the adapter holds of the change, and how to undo it."""

from collections.abc import Iterator

from mergekit_bayes.hub.facts import Facts
from mergekit_bayes.hub.folder import ExtractRecord
from mergekit_bayes.hub.local_paths import without_paths
from mergekit_bayes.hub.markdown import code, text

_NOTES = 20


def extraction(facts: Facts) -> str:
    """The list of what an extraction kept, as far as the folder says it."""
    record = facts.extraction
    summary, notes = (
        [text(without_paths(line, facts.places)) for line in lines[:_NOTES]]
        for lines in (record.summary, record.notes)
    )
    lines = (*_ranks(record), *summary, *_unloading(facts), *notes)
    return "\n".join(f"- {line}" for line in lines)


def _ranks(record: ExtractRecord) -> Iterator[str]:
    ranks = [layer.rank for layer in record.layers.values()]
    if ranks:
        is_one = min(ranks) == max(ranks)
        rank = f"rank {ranks[0]}" if is_one else f"ranks from {min(ranks)} to {max(ranks)}"
        count = f"{len(ranks)} layer{'s' * (len(ranks) > 1)}"
        yield f"{count}, of {rank}; every scaling is 1 (lora_alpha = r)"


def _unloading(facts: Facts) -> Iterator[str]:
    whole = facts.adapter.get("modules_to_save")
    if not whole:
        yield f"{code('model.unload()')} gives the base back, bit for bit"
