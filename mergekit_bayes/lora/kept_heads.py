"""Heads that an adapter leaves as they are although it trains the embedding they are tied to.

PEFT trains a copy of the embedding (`modules_to_save`), and a head that was tied to it stays the
base's embedding. The base stores one tensor for both, so that the folded model has one more. Where
the vocabulary was resized, such a head has other rows than the embedding, and there is no model of
both.
"""

from collections.abc import Collection, Iterator, Mapping

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.specs import CheckpointSource
from mergekit_bayes.checkpoint.ties import Tie, find_ties, ties_embeddings
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora.adapted import AdaptedSource
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.writers import FOLD
from mergekit_bayes.posterior import Posterior

_WITHOUT_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_USUAL_HEAD = "lm_head.weight"  # of a model for causal language modelling
_SAVE = "Save it again with `model.save_pretrained(OUT, save_embedding_layers=True)`. Or: "
Shapes = Mapping[str, tuple[int, ...]]  # of tensors by name


class HeadKeepingSource(AdaptedSource):
    """A base with an adapter folded in, and heads that stay the base's embedding.

    Args:
        base: The base's tensors.
        adapter: The adapter.
        heads: Each such head, with the name of the embedding in the base.
    """

    def __init__(self, base: CheckpointSource, adapter: Adapter, heads: dict[str, str]) -> None:
        """Match the adapter with the base; the source then owns both."""
        super().__init__(base, adapter)
        self._heads = heads
        self._specs = {**self._specs, **{h: base.specs[source] for h, source in heads.items()}}

    def where(self, name: str) -> str:
        """The file or files of which a tensor is made, for messages."""
        if name in self._heads:
            return self.base.where(self._heads[name])
        return super().where(name)

    def file_of(self, name: str) -> int:
        """Index of the base's shard to which a tensor belongs; 0 if only the adapter has it."""
        return super().file_of(self._heads.get(name, name))

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        if name in self._heads:
            self.base.read_bytes(self._heads[name], offset, out)
        else:
            super().read_bytes(name, offset, out)


def with_kept_heads(base: Posterior, adapter: Adapter) -> AdaptedSource:
    """The base with the adapter folded in, and with the heads that the adapter unties.

    Raises:
        ConfigError: The layout of a square weight is ambiguous.
        MismatchError: A layer or tensor of the adapter does not fit the base, or the head has
            other rows than the embedding.
    """
    mean = AdaptedSource(base.mean, adapter)
    heads = _kept_heads(base, mean)
    _refuse_other_rows(base, mean, heads)
    return HeadKeepingSource(base.mean, adapter, heads) if heads else mean


def _kept_heads(base: Posterior, mean: AdaptedSource) -> dict[str, str]:
    """The heads that stay the base's embedding, each with the name of the embedding."""
    config, settings = read_config(base.path), mean.adapter.config
    changed = {*mean.adapted, *mean.replaced} & base.mean.specs.keys()
    if (
        ties_embeddings(config) is False
        or settings.get("ensure_weight_tying")
        or settings.get("task_type") in _WITHOUT_HEAD
    ):
        return {}
    shapes = {name: spec.shape for name, spec in mean.specs.items()}
    architectures = str(config.get("architectures"))
    # The base does not store the head; what else it stores, or its class, says that it has one.
    is_causal = "ForCausalLM" in architectures or "LMHead" in architectures
    ties = (*find_ties(shapes), *(_usual_ties(changed, shapes) if is_causal else ()))
    heads: dict[str, str] = {}
    for tie in ties:
        if tie.source in changed:
            heads |= {head: tie.source for head in tie.heads if head not in shapes}
    return heads


def _usual_ties(changed: Collection[str], shapes: Shapes) -> Iterator[Tie]:
    """The ties of the changed embeddings to the usual head, which no tensor of `shapes` shows.

    All tensors are searched once for each width of an embedding, not for each changed tensor.
    """
    widths = {}
    for name in changed:
        shape = shapes[name]
        alone = find_ties({_USUAL_HEAD: shape, name: shape}) if len(shape) == 2 else ()
        if any(tie.source == name for tie in alone):
            widths[shape[1:]] = shape
    for shape in widths.values():
        yield from find_ties({_USUAL_HEAD: shape, **shapes})


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
