"""The parts of an adapter, told from the names of its tensors on disk.

    <module>.lora_A.weight, lora_B.weight         the factors of a layer
    <module>.lora_B.bias                          what a layer adds to its module's bias (lora_bias)
    <module>.lora_embedding_A, lora_embedding_B   the factors of a table of embeddings
    <module>.lora_magnitude_vector                the magnitudes of a layer's outputs (DoRA)
    <module>.token_adapter.trainable_tokens_delta rows of a table that were trained

PEFT leaves the adapter's name out of a saved file; a raw state dict has it (`lora_A.default`).
"""

import re
from typing import NamedTuple

ROWS = "rows"  # the part that replaces rows of its module's table
_ADAPTER = r"(\.(?P<adapter>[^.]+))?"
_PATTERNS = {
    part: re.compile(rf"(?P<module>.+)\.{ending}")
    for part, ending in {
        "A": rf"lora_A{_ADAPTER}\.weight",
        "B": rf"lora_B{_ADAPTER}\.weight",
        "bias": rf"lora_B{_ADAPTER}\.bias",
        "embedding_A": rf"lora_embedding_A{_ADAPTER}",
        "embedding_B": rf"lora_embedding_B{_ADAPTER}",
        "magnitude": r"lora_magnitude_vector(\.(?!weight$)(?P<adapter>[^.]+))?(\.weight)?",
        ROWS: rf"token_adapter\.trainable_tokens_delta{_ADAPTER}",
    }.items()
}


class Part(NamedTuple):
    """A part of an adapter.

    Attributes:
        module: Name of the module in the model.
        part: What the tensor is: a key of the table above.
        adapter: Name of the adapter, where the tensor's name has it.
    """

    module: str
    part: str
    adapter: str | None


def part_of(name: str) -> Part | None:
    """The part that a tensor of an adapter is; None if it is none of those above.

    Args:
        name: Name of the tensor, without what PEFT and its wrappers put before the module's.
    """
    for part, pattern in _PATTERNS.items():
        match = pattern.fullmatch(name)
        if match:
            return Part(match["module"], part, match["adapter"])
    return None
