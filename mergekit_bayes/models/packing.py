"""Pack short documents into long rows, with documents kept apart.

In a packed row position ids start again at 0 with each document, and no token attends to another
document. transformers derives the mask from the position ids where a batch has no attention mask;
whether a model and its attention do so is tried before it is trusted.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.libraries import call, embedding_rows
from mergekit_bayes.models.encode import IGNORED, Example
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.modes import evaluating

_TRIED = 6  # tokens of each document that a model is tried on


def pack_documents(examples: Sequence[Example], length: int) -> list[dict[str, Any]]:
    """Pack examples of a language model into rows of at most `length` tokens.

    Best fit, the longest first: each goes where the least room is left that it fits into. None is
    cut. The first token of a document is not scored, as in a row of its own.

    Args:
        examples: Lists `input_ids` and `labels`; none is longer than `length`.
        length: Tokens of a row at most.

    Returns:
        Rows with `position_ids` beside tokens and labels.
    """
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # tokens that are left in a row, and its place in `rows`
    for i in order:
        size = len(examples[i]["input_ids"])
        place = bisect_left(rooms, (size, 0))
        if place == len(rooms):
            rows.append([])
            room, row = length, len(rows) - 1
        else:
            room, row = rooms.pop(place)
        rows[row].append(i)
        insort(rooms, (room - size, row))
    return [_joined([examples[i] for i in row]) for row in rows]


def _joined(examples: Sequence[Example]) -> dict[str, Any]:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in examples:
        ids += example["input_ids"]
        labels += [IGNORED, *example["labels"][1:]]
        positions += range(len(example["input_ids"]))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def refuse_leaks(loaded: Loaded, batch_size: int) -> None:
    """Try whether the model keeps packed documents apart.

    The second of two documents is run behind two different first ones and alone. Its outputs may
    differ by rounding only.

    Args:
        loaded: The model.
        batch_size: Rows of a batch: flash attention looks at position ids in batches of one row
            only.

    Raises:
        ConfigError: They differ: the model does not look at position ids, or its attention not at
            the mask that follows from them.
    """
    why = _leak(loaded, are_several=batch_size > 1)
    if why is None:
        return
    is_alone_right = batch_size > 1 and _leak(loaded, are_several=False) is None
    single = "batch_size: 1, with which it does, or " if is_alone_right else ""
    attention = getattr(loaded.model.config, "_attn_implementation", None) or "its attention"
    raise ConfigError(
        f"pack: documents: '{loaded.path}' with attention {attention} does not keep packed "
        f"documents apart: {why}. Choose {single}another attn_implementation (sdpa or eager), or "
        "pack: false."
    )


def _leak(loaded: Loaded, *, are_several: bool) -> str | None:
    """How documents in a batch of one row, or of several, see each other; None if they do not."""
    length = min(_TRIED, loaded.context // 2)
    count = max(2, embedding_rows(loaded.model) or len(loaded.tokenizer))
    tokens = torch.randint(
        count, (3, length), generator=torch.Generator().manual_seed(0), device="cpu"
    )
    first, other, second = tokens.to(loaded.device)
    positions = torch.arange(length, device=loaded.device)
    with evaluating(loaded.model):
        alone = _outputs(loaded, second[None], positions)[0]
        rows = torch.stack([torch.cat([start, second]) for start in (first, other)])
        batches = [rows] if are_several else rows[:, None]
        outputs = [_outputs(loaded, batch, positions.repeat(2)) for batch in batches]
        behind = torch.cat(outputs)[:, length:]
    # Other sums in the same order are the same; documents in one row may be summed in another.
    rounding = torch.finfo(loaded.model.dtype).eps * float(alone.abs().max())
    leak = float((behind[0] - behind[1]).abs().max())
    moved = float((behind[0] - alone).abs().max())
    if not leak <= 4 * rounding:
        return f"the outputs of a document depend on the one before it (by {leak:.2g})"
    if not moved <= 64 * rounding:
        return f"its positions do not start again (outputs differ by {moved:.2g})"
    return None


@torch.no_grad()
def _outputs(loaded: Loaded, rows: Tensor, positions: Tensor) -> Tensor:
    """Logits of rows, (rows, length, C), float32."""
    ids = positions.expand(len(rows), -1)
    output = call(
        f"pack: documents: '{loaded.path}' cannot be run with position ids",
        lambda: loaded.model(input_ids=rows, position_ids=ids, use_cache=False),
        "Choose pack: false.",
    )
    logits: Tensor = output.logits.float()
    return logits
