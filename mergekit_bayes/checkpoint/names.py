"""Which tensors are tied, which are buffers, and which names of two checkpoints mean one tensor.

Names and shapes are all that a merge needs to know of an architecture. Two habits of the field get
in the way: a saved fine-tune may carry one common prefix that its Hub base lacks (`transformer.h.0`
against `h.0`), and a tied output head may be stored in one file and left out of another.
`tied_source` and `is_alias` decide whether a tensor is tied.
"""

import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.specs import TensorSource

# Constants that some checkpoints store (masks, position ids, rotary tables), which are not merged.
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
    r"(^|\.)(wte|embed_tokens|embed_tokens_per_layer|embed_in|word_embeddings|shared|tok_embeddings"
    r"|lm_head|embed_out|output_layer|proj_out|generator_lm_head|predictions"
    r"|(predictions|lm_head)\.decoder)\.(weight|bias)$"
    r"|^((backbone|model)\.)?(embeddings|output)\.weight$"
)


def tied_source(name: str, source: TensorSource) -> str | None:
    """The input embedding to which an output head is tied, by name; None if `name` is not a head.

    It also answers for a head that the file leaves out: pass the name that it would have.
    """
    if not _HEAD.search(name):
        return None
    embeddings = [n for n in source.specs if _EMBEDDING.search(n)]
    return embeddings[0] if len(embeddings) == 1 else None


def is_alias(name: str, source: TensorSource) -> bool:
    """Whether a stored output head is tied: it holds the same values as the input embedding."""
    embedding = tied_source(name, source)
    return (
        embedding is not None
        and source.specs[embedding] == source.specs[name]
        and block_hash(source, embedding) == block_hash(source, name)
    )


def is_buffer(name: str) -> bool:
    """Whether a tensor is a constant that no optimizer moves, judged by its name."""
    return bool(_BUFFER.search(name))


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has one row per token, judged by its name."""
    return bool(_VOCABULARY.search(name))


class Renaming(NamedTuple):
    """How another checkpoint's names become the donor's.

    Attributes:
        strip: The prefix that is removed.
        add: The prefix that is put in its place.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str, donor: Collection[str]) -> str:
        """The donor's name of a tensor; `name` itself if the donor has none."""
        if name in donor:
            return name
        renamed = self.add + name.removeprefix(self.strip)
        return renamed if renamed in donor else name


def find_renaming(donor: Collection[str], other: Collection[str]) -> Renaming:
    """The renaming by one common prefix that gives most of `other`'s tensors the donor's names.

    Names that agree already win a tie, so that they are left alone.
    """
    matches: Counter[Renaming] = Counter({Renaming(): len(set(donor) & set(other))})
    for name in other:
        matches.update(Renaming(strip=p) for p in _prefixes(name) if name[len(p) :] in donor)
    for name in donor:
        matches.update(Renaming(add=p) for p in _prefixes(name) if name[len(p) :] in other)
    return matches.most_common(1)[0][0]


def _prefixes(name: str) -> list[str]:
    """The beginnings of a name that end in a dot."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]
