"""Which tensors are tied: one tensor of the model under two or more names.

An output head may be the input embedding, an encoder and a decoder may share their embedding, and
the bias of a head may have two names. A file stores such a tensor once, or a copy under each name.
`find_ties` says which names an architecture ties, from the names alone; `resolve` says what a
checkpoint stores for each of them, from its values and from what its config says.

Source of the names: `_tied_weights_keys` of the architectures in transformers 5.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, read_chunk
from mergekit_bayes.checkpoint.identity import block_hash
from mergekit_bayes.checkpoint.model_config import text_config
from mergekit_bayes.checkpoint.names import (
    is_token_embedding,
    may_be_tied_head,
    may_be_token_embedding,
)
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, MERGEABLE, Array, TensorSource

# Embeddings of an encoder-decoder that are its `shared` one, after the prefix of that.
_SHARING = ("encoder.", "decoder.", "text_encoder.", "text_decoder.")
# Heads that have layers before the last one, whose bias has two names.
_DEEP_HEAD = re.compile(
    r"((^|.*\.)(lm_head|predictions))\.(dense|transform\.dense|decoder)\.(weight|bias)"
)

# Architectures whose config ties nothing where it does not say so; that of most others does.
_UNTIED_BY_DEFAULT = re.compile(
    r"bitnet|codegen|cohere_asr|dbrx|deepseek_v[23]|exaone4|falcon_h1|fsmt|glm4?|glm4_moe|gpt_neox"
    r"|gpt_oss|gptj|granite(moe)?|helium|jamba|llama4?|llava|mamba2|minimax|ministral|mistral|mixtral"
    r"|nemotron|olmo[23]?|olmoe|persimmon|phi3?|phimoe|qwen[23](_moe)?|qwen3_next|qwen(2|2_5|3)_vl"
    r"|reformer|rembert|seed_oss|stablelm"
)
# Architectures in which `tie_word_embeddings` also chooses whether the decoder's output is scaled,
# unless `scale_decoder_outputs` says so.
_SCALED_BY_TIE = ("t5", "longt5", "pop2piano")
_CHUNK = 1 << 18  # entries compared at a time


class Tie(NamedTuple):
    """Names of one tensor of the model.

    Attributes:
        source: The name under which it is usually stored: an embedding or a bias.
        copies: Its other names that are tied in every model of the architecture that lacks them.
        heads: Its other names that are tied unless the config says otherwise.
    """

    source: str
    copies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the usual one first."""
        return (self.source, *self.copies, *self.heads)


def find_ties(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Tie, ...]:
    """The tensors that have several names in an architecture.

    Args:
        shapes: The shapes of all tensors by name, of one checkpoint or of several of one
            architecture.

    Returns:
        The ties. They also have names that are not among `shapes`, where others show that the
        architecture has them.
    """
    deep_heads = {m[1]: None for name in shapes if (m := _DEEP_HEAD.fullmatch(name))}
    copies = {
        name: tuple(_sharing(name.removesuffix("shared.weight"), shapes))
        for name in shapes
        if re.search(r"(^|\.)shared\.weight$", name)
    }
    shared = {copy for names in copies.values() for copy in names}
    heads: dict[str, list[str]] = {}
    candidates = dict.fromkeys(
        (*filter(may_be_tied_head, shapes), *_decoders(deep_heads, "weight"))
    )
    for head in candidates:
        embedding = _embedding_of(head, shapes, shared)
        if embedding is not None:
            heads.setdefault(embedding, []).append(head)
    ties = [
        Tie(source, copies.get(source, ()), tuple(heads.get(source, ())))
        for source in dict.fromkeys((*copies, *heads))
    ]
    ties += [
        Tie(f"{head}.bias", (f"{head}.decoder.bias",))
        for head in deep_heads
        if f"{head}.bias" in shapes
    ]
    return tuple(tie for tie in ties if len(tie.names) > 1)


def _decoders(deep_heads: Collection[str], kind: str) -> list[str]:
    return [f"{head}.decoder.{kind}" for head in deep_heads]


def _sharing(prefix: str, names: Collection[str]) -> Iterator[str]:
    """The names that an encoder-decoder has for its shared embedding."""
    for part in _SHARING:
        if any(name.startswith(prefix + part) for name in names):
            yield f"{prefix}{part}embed_tokens.weight"


def _embedding_of(
    head: str, shapes: Mapping[str, tuple[int, ...]], shared: Collection[str]
) -> str | None:
    """The input embedding that a head may repeat; None if there is none, or no telling which.

    Of several it is the one nearest to the head by name, and the decoder's.
    """
    width = shapes[head][1:] if head in shapes else None
    # The names that mean nothing else come first.
    for is_embedding in (is_token_embedding, may_be_token_embedding):
        found = [
            name
            for name, shape in shapes.items()
            if is_embedding(name)
            and name not in shared
            and len(shape) == 2
            and width in (None, shape[1:])
        ]
        if found:
            distances = {name: _distance(head, name) for name in found}
            nearest = [name for name in found if distances[name] == min(distances.values())]
            decoders = [name for name in nearest if "decoder." in name]
            choice = nearest if len(nearest) == 1 else decoders
            return choice[0] if len(choice) == 1 else None
    return None


def _distance(head: str, embedding: str) -> tuple[int, int]:
    """How far apart two tensors are in the tree of modules."""
    one, other = head.split("."), embedding.split(".")
    pairs = zip(one, other, strict=False)
    common = next((i for i, pair in enumerate(pairs) if len(set(pair)) > 1), len(other))
    return -common, len(other)


def resolve(
    tie: Tie, source: TensorSource, stored: Mapping[str, str], *, ties_heads: bool | None
) -> dict[str, str | None]:
    """The tensor that a checkpoint has for each name of a tie.

    Args:
        tie: The names.
        source: The checkpoint.
        stored: The checkpoint's own names, by the tie's, of all that it stores.
        ties_heads: Whether its config ties heads to embeddings; None if that is unknown, which
            counts as true.

    Returns:
        By the tie's names, the checkpoint's own name of the tensor: two names that are tied have
        the same one. None for a tensor that it lacks: it is not stored, and the config says that it
        is no other. Empty if nothing of the tie is stored.
    """
    names: dict[str, str | None] = {}
    distinct: list[str] = []
    for name in tie.names:
        if name in stored:
            own = stored[name]
            equal = (other for other in distinct if have_same_values(source, other, own))
            names[name] = next(equal, own)
            if names[name] == own:
                distinct.append(own)
    if not names:
        return {}
    embeddings = [n for name in (tie.source, *tie.copies) if (n := names.get(name))]
    heads = [n for name in tie.heads if (n := names.get(name))]
    for name in tie.names:
        if name not in names:
            is_head = name in tie.heads
            if ties_heads is False:
                partners = [] if is_head else embeddings
            else:
                partners = [*embeddings, *heads]
            names[name] = next(iter(partners), None)
    return {name: names[name] for name in tie.names}


def have_same_values(source: TensorSource, one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint hold the same values; all of them are compared."""
    spec, other_spec = source.specs[one], source.specs[other]
    if spec.shape != other_spec.shape:
        return False
    if spec == other_spec:
        if block_hash(source, one) != block_hash(source, other):
            return False
    elif not {spec.dtype, other_spec.dtype} <= set(MERGEABLE):
        return False
    as_stored = spec == other_spec
    for start, stop in chunks(spec, _CHUNK):
        read = _read_bytes if as_stored else read_chunk
        if not np.array_equal(read(source, one, start, stop), read(source, other, start, stop)):
            return False
    return True


def _read_bytes(source: TensorSource, name: str, start: int, stop: int) -> Array:
    """Elements `start:stop` of a tensor as they are stored."""
    item = ITEM_SIZE[source.specs[name].dtype]
    raw = np.empty((stop - start) * item, np.uint8)
    source.read_bytes(name, start * item, raw.data)
    return raw


def stored_copies(source: TensorSource) -> dict[str, str]:
    """The stored copies of other tensors of a checkpoint: each name with that of the tensor."""
    copies: dict[str, str] = {}
    stored = {name: name for name in source.specs}
    for tie in find_ties({name: spec.shape for name, spec in source.specs.items()}):
        names = resolve(tie, source, stored, ties_heads=None)
        copies |= {n: own for n, own in names.items() if n in stored and own and own != n}
    return copies


def ties_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Whether a config ties the output head to the input embedding; None if it does not say.

    A model of several modalities may say so at the top, beside its language model's settings, or in
    both places, and is tied if one of them says so.
    """
    text = text_config(config)
    said = [c["tie_word_embeddings"] for c in (config, text) if "tie_word_embeddings" in c]
    said = [value for value in said if isinstance(value, bool)]
    if said:
        return any(said)
    types = (config.get("model_type"), text.get("model_type"))
    return False if any(_UNTIED_BY_DEFAULT.fullmatch(str(kind)) for kind in types) else None


def untying(config: Mapping[str, Any]) -> dict[str, object]:
    """The keys to set in a config, wherever it has them, so that it ties nothing.

    Empty if it ties nothing. Where the same key also scales the decoder's output, that stays as it
    is by a key of its own.
    """
    if ties_embeddings(config) is False:
        return {}
    changes: dict[str, object] = {"tie_word_embeddings": False}
    if config.get("model_type") in _SCALED_BY_TIE and "scale_decoder_outputs" not in config:
        changes["scale_decoder_outputs"] = config.get("tie_word_embeddings") is not False
    return changes
