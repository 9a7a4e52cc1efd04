"""Which tensor of one checkpoint is which tensor of another, and which tensors are no parameters.

Names and shapes are all the architecture that a merge needs. Two facts of the field get in the way:
a saved fine-tune may carry one common prefix that its Hub base lacks (`transformer.h.0...`,
`h.0...`), and a tied output head may be stored in one file and left out of another.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.specs import TensorSource

# Constants that some checkpoints store: masks, position ids, rotary tables. Never merged.
_BUFFER = re.compile(
    r"(^|\.)(position_ids|token_type_ids|masked_bias|inv_freq|original_inv_freq|num_batches_tracked)$"
    r"|(^|\.)attn\.bias$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|cls\.predictions\.decoder)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(wte|embed_tokens|embed_in|word_embeddings|shared|tok_embeddings)\.weight$"
)
# Rows are tokens: embeddings, heads and their biases, as the field's architectures call them.
_VOCABULARY = re.compile(
    r"(^|\.)(wte|embed_tokens|embed_tokens_per_layer|embed_in|word_embeddings|shared|tok_embeddings|lm_head|embed_out"
    r"|output_layer|proj_out|generator_lm_head|predictions|(predictions|lm_head)\.decoder)\.(weight|bias)$"
    r"|^((backbone|model)\.)?(embeddings|output)\.weight$"
)


class Renaming(NamedTuple):
    """How another checkpoint's names become the donor's: cut `strip` off the front, put `add`
    there.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str, donor: Collection[str]) -> str:
        if name in donor:
            return name
        renamed = self.add + name.removeprefix(self.strip)
        return renamed if renamed in donor else name


def is_buffer(name: str) -> bool:
    """True for tensors that no optimizer moves, whatever their dtype."""
    return bool(_BUFFER.search(name))


def is_vocabulary(name: str) -> bool:
    """True for tensors with one row a token."""
    return bool(_VOCABULARY.search(name))


def find_renaming(donor: Collection[str], other: Collection[str]) -> Renaming:
    """The one prefix that makes most of `other`'s names the donor's; none when names agree as they
    are.
    """
    found: Counter[Renaming] = Counter({Renaming(): len(set(donor) & set(other))})
    for name in other:
        found.update(Renaming(strip=p) for p in _prefixes(name) if name[len(p) :] in donor)
    for name in donor:
        found.update(Renaming(add=p) for p in _prefixes(name) if name[len(p) :] in other)
    return found.most_common(1)[0][0]


def tied_source(name: str, source: TensorSource) -> str | None:
    """The input embedding that an output head is tied to, by name and shape; None if `name` is no
    head.

    Works for a head that the file leaves out, too: pass the name that it would have.
    """
    if not _HEAD.search(name):
        return None
    embeddings = [n for n in source.specs if _EMBEDDING.search(n)]
    return embeddings[0] if len(embeddings) == 1 else None


def is_alias(name: str, source: TensorSource) -> bool:
    """True if a stored output head holds the same values as the input embedding."""
    twin = tied_source(name, source)
    return (
        twin is not None
        and source.specs[twin] == source.specs[name]
        and block_hash(source, twin) == block_hash(source, name)
    )


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]
