"""Which tensors are tied: one tensor under two names, or a head that repeats the embedding.

A tied output head may be stored in one file and left out of another. `tied_source` and `is_alias`
decide whether a tensor is tied.
"""

import re

from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.specs import TensorSource

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|cls\.predictions\.decoder)\.weight$")
_EMBEDDING = re.compile(
    r"(^|\.)(wte|embed_tokens|embed_in|word_embeddings|shared|tok_embeddings)\.weight$"
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
