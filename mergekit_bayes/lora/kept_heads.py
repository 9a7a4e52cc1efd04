"""Heads that an adapter leaves as they are although it trains the embedding they are tied to.

PEFT trains a copy of the embedding (`modules_to_save`), and a head that was tied to it stays the
base's embedding. The base stores one tensor for both, so that the folded model has one more.
"""

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.specs import CheckpointSource
from mergekit_bayes.checkpoint.ties import find_ties, ties_embeddings
from mergekit_bayes.lora.adapted import AdaptedSource
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.posterior import Posterior

_WITHOUT_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_USUAL_HEAD = "lm_head.weight"  # of a model for causal language modelling


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
        MismatchError: A layer or tensor of the adapter does not fit the base.
    """
    mean = AdaptedSource(base.mean, adapter)
    heads = _kept_heads(base, mean)
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
    is_causal = "ForCausalLM" in architectures or "LMHead" in architectures
    heads: dict[str, str] = {}
    for name in changed:
        # The base does not store the head; what else it stores, or its class, says that it has one.
        usual = {_USUAL_HEAD: shapes[name]} if is_causal and len(shapes[name]) == 2 else {}
        for tie in find_ties({**usual, **shapes}):
            if tie.source == name:
                heads |= {head: name for head in tie.heads if head not in shapes}
    return heads
