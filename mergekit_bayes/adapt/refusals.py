"""Settings that an adaptation refuses before anything is loaded."""

from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.errors import ConfigError


def refuse_settings(config: AdaptConfig) -> None:
    """Refuse settings that contradict each other.

    Raises:
        ConfigError: Nothing to remove or add, or a setting without another that it needs.
    """
    if config.remove is None and config.add is None:
        raise ConfigError("nothing to do. Name rows to remove (remove) or to add (add).")
    if (config.removal == "contrast") != (config.contrast is not None):
        raise ConfigError(
            "removal: contrast and the matched rows of contrast belong together. Give both, or "
            "neither."
        )
    if config.contrast is not None and config.remove is None:
        raise ConfigError("contrast: there are no rows to remove (remove).")
    has_memory = config.memory is not None or config.memory_self_generated is not None
    if config.until.toxic_share is not None and not (config.prompts and config.scorer):
        raise ConfigError("until: toxic_share needs prompts and a scorer.")
    if config.until.memory_kl is not None and not has_memory:
        raise ConfigError("until: memory_kl needs a memory (memory or memory_self_generated).")
    if config.until.held_out_rise is not None and config.remove is None:
        raise ConfigError("until: held_out_rise needs rows to remove (remove).")
    if config.teacher == "adapter" and config.lora is None:
        raise ConfigError("teacher: adapter needs an adapter (lora).")
    _refuse_memory(config, has_memory=has_memory)


def _refuse_memory(config: AdaptConfig, *, has_memory: bool) -> None:
    settings = {
        "memory_rows": config.memory_rows is not None,
        "memory_filter": config.memory_filter is not None,
        "memory_select": config.memory_select == "leverage",
    }
    for name, is_given in settings.items():
        if is_given and not has_memory:
            raise ConfigError(f"{name}: there is no memory (memory or memory_self_generated).")
    if config.memory_filter is not None and config.memory_self_generated is None:
        raise ConfigError(
            "memory_filter: it scores the texts that the model writes, and there are none. Set "
            "memory_self_generated, or leave it out."
        )
    if config.memory_select == "leverage" and config.memory_rows is None:
        raise ConfigError("memory_select: leverage chooses memory_rows examples. Say how many.")
