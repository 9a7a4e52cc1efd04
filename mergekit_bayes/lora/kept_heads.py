"""Heads that an adapter leaves as they are although it trains the embedding they are tied to.

PEFT trains a copy of the embedding (`modules_to_save`), and a head that was tied to it stays the
base's embedding. The base stores one tensor for both, so that the folded model has one more. Where
the vocabulary was resized, such a head has other rows than the embedding, and there is no model of
both.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.names import USUAL_HEAD, is_vocabulary
from mergekit_bayes.checkpoint.ties import Tie, find_ties, have_same_values, ties_embeddings
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora.adapted import AdaptedSource
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.kept_ties import refuse_apart
from mergekit_bayes.lora.tokens import TrainedRows
from mergekit_bayes.lora.writers import FOLD
from mergekit_bayes.posterior import Posterior

_WITHOUT_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_TIED_BY_PEFT = ("embed_tokens", "lm_head")  # names of the modules that it looks for
_SAVE = "Save it again with `model.save_pretrained(OUT, save_embedding_layers=True)`. Or: "
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name


def with_kept_heads(base: Posterior, adapter: Adapter) -> AdaptedSource:
    """The base with the adapter folded in, and with the heads that the adapter unties.

    Raises:
        CheckpointError: The adapter keeps an embedding and a head tied, and they differ in it.
        ConfigError: The layout of a square weight is ambiguous, or a head has factors and its
            embedding trained rows.
        MismatchError: A layer or tensor of the adapter does not fit the base, or the head has
            other rows than the embedding.
    """
    own = _own_heads(base, adapter)
    mean = AdaptedSource(base.mean, adapter, own, base.ref)
    if rows := _rows_of_heads(base, mean):
        adapter = replace(adapter, rows={**adapter.rows, **rows})
        mean = AdaptedSource(base.mean, adapter, own, base.ref)
    kept = _kept_heads(base, mean)
    _refuse_other_rows(base, mean, kept)
    if ties_embeddings(read_config(base.path)) is not False:  # else PEFT has nothing to tie
        refuse_apart(mean)
    return AdaptedSource(base.mean, adapter, own | kept, base.ref) if kept else mean


def _rows_of_heads(base: Posterior, mean: AdaptedSource) -> dict[str, TrainedRows]:
    """The rows of heads that are tied to embeddings of which rows were trained.

    PEFT trains the rows of an embedding and of what is tied to it as one, unless the head has rows
    of its own. A head that the base does not store follows by itself, unless it is adapted.
    """
    config = read_config(base.path)
    if not mean.rows or ties_embeddings(config) is False:
        return {}
    shapes = {name: spec.shape for name, spec in base.mean.specs.items()}
    embeddings = mean.rows.keys() & shapes.keys()
    return {
        head: mean.rows[tie.source]
        for tie in _ties(config, embeddings, shapes)
        for head in tie.heads
        if tie.source in embeddings
        and head not in mean.rows.keys() | mean.replaced.keys()
        and (
            have_same_values(base.mean, tie.source, head)
            if head in shapes
            else head in mean.adapted
        )
    }


def _own_heads(base: Posterior, adapter: Adapter) -> dict[str, str]:
    """The heads that the base does not store and the adapter changes, each with its embedding.

    PEFT's model computes with the embedding and the head apart, so that the head becomes a tensor
    of its own.
    """
    config = read_config(base.path)
    weights = {f"{module}.weight" for module in adapter.layers} | adapter.rows.keys()
    absent = {n for n in weights if is_vocabulary(n) and n not in base.mean.specs}
    if not absent or ties_embeddings(config) is False:
        return {}
    shapes = {name: spec.shape for name, spec in base.mean.specs.items()}
    heads = {head: tie.source for tie in _ties(config, shapes, shapes) for head in tie.heads}
    return {h: e for h, e in heads.items() if h in absent and e in shapes}


def _ties(config: Mapping[str, object], changed: Collection[str], shapes: Shapes) -> Iterator[Tie]:
    """The ties of an architecture, with those of some embeddings to a head that is not stored."""
    yield from find_ties(shapes)
    # The base does not store the head; what else it stores, or its class, says that it has one.
    architectures = str(config.get("architectures"))
    if "ForCausalLM" in architectures or "LMHead" in architectures:
        yield from _usual_ties(changed, shapes)


def _kept_heads(base: Posterior, mean: AdaptedSource) -> dict[str, str]:
    """The heads that stay the base's embedding, each with the name of the embedding.

    A head follows the rows of its embedding that were trained one by one, unless it has its own.
    """
    config, settings = read_config(base.path), mean.adapter.config
    changed = {*mean.adapted, *mean.replaced} & base.mean.specs.keys()
    if ties_embeddings(config) is False or settings.get("task_type") in _WITHOUT_HEAD:
        return {}
    shapes = {name: spec.shape for name, spec in mean.specs.items()}
    heads: dict[str, str] = {}
    for tie in _ties(config, changed, shapes):
        if tie.source in changed and not _is_kept_tied(mean, tie.source):
            heads |= {head: tie.source for head in tie.heads if head not in shapes}
    return heads


def _is_kept_tied(mean: AdaptedSource, embedding: str) -> bool:
    """Whether PEFT keeps a head tied to a changed embedding (`ensure_weight_tying`).

    It does where the config itself names a module of two names, among those that are saved or, if
    none is there, among the targets (PEFT 0.21). Parameters are never tied; else it only warns.
    """
    config: Mapping[str, object] = mean.adapter.config
    placed = mean.adapted.get(embedding)
    if not config.get("ensure_weight_tying") or (placed is not None and placed.layer.is_parameter):
        return False
    is_saved = _names_an_embedding(config.get("modules_to_save"))
    if placed is None:
        return is_saved
    return not is_saved and _names_an_embedding(config.get("target_modules"))


def _names_an_embedding(modules: object) -> bool:
    """Whether a list of modules, or a regular expression, names one that PEFT takes for tied."""
    if isinstance(modules, str):
        return any(re.fullmatch(modules, name) for name in _TIED_BY_PEFT)
    names = modules if isinstance(modules, list) else []
    return any(str(name).rpartition(".")[2] in _TIED_BY_PEFT for name in names)


def _usual_ties(changed: Collection[str], shapes: Shapes) -> Iterator[Tie]:
    """The ties of the changed embeddings to the usual head, which no tensor of `shapes` shows.

    All tensors are searched once for each width of an embedding, not for each changed tensor.
    """
    widths = {}
    for name in changed:
        shape = shapes[name]
        alone = find_ties({USUAL_HEAD: shape, name: shape}) if len(shape) == 2 else ()
        if any(tie.source == name for tie in alone):
            widths[shape[1:]] = shape
    for shape in widths.values():
        yield from find_ties({USUAL_HEAD: shape, **shapes})


def _refuse_other_rows(base: Posterior, mean: AdaptedSource, kept: Mapping[str, str]) -> None:
    """Refuse an embedding and a head (or other tensors that may be tied) of different rows.

    A model whose task needs no head for tokens does not use the one that its base may have.

    Raises:
        MismatchError: The adapter holds some of them with other rows, and not all.
    """
    if not mean.replaced or mean.adapter.config.get("task_type") in _WITHOUT_HEAD:
        return
    stored = {name: spec.shape for name, spec in base.mean.specs.items()}
    shapes = {name: spec.shape for name, spec in mean.specs.items()}
    groups = [tie.names for tie in find_ties(shapes)] + [(e, head) for head, e in kept.items()]
    shapes |= {head: stored[embedding] for head, embedding in kept.items()}
    for names in groups:
        first, *others = [name for name in names if name in shapes]
        other = next((n for n in others if shapes[n][:1] != shapes[first][:1]), None)
        if other is not None and len({stored[name][:1] for name in names if name in stored}) < 2:
            # Beside adapted heads and below biases PEFT does not save what was resized.
            is_saved = len(shapes[first]) > 1 and not mean.adapted.keys() & {*names}
            raise MismatchError(
                f"'{mean.adapter.ref}' on its base has '{first}' of {list(shapes[first])} and "
                f"'{other}' of {list(shapes[other])}, whose rows are equal in a model: the "
                "vocabulary was resized in training, and the adapter does not hold all that was "
                "resized. " + (f"{_SAVE}{FOLD[0].lower()}{FOLD[1:]}" if is_saved else FOLD)
            )
