"""One `BASE+ADAPTER` alone is merged on its own base: the adapter is folded in."""

from mergekit_bayes.lora import split_ref
from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan.settings import MergeConfig

ON_OTHER_BASE = "add --on-base apply"  # what to do where an adapter is meant for another base


def on_own_base(config: MergeConfig) -> MergeConfig:
    """The settings with the base of the only model, `BASE+ADAPTER`, where none is named.

        theta = W + scale (s B A)

    A rule that takes no base is left without one, and refuses a single model itself.

    Raises:
        CheckpointError: The model is neither a path, a Hub id nor two of them with a `+` between.
    """
    if config.base is not None or len(config.models) != 1:
        return config
    method = METHODS.get(config.method or "")
    if method is not None and not (method.needs_base or method.takes_base):
        return config
    refs = split_ref(config.models[0])
    return config if refs is None else config.model_copy(update={"base": refs[0]})
