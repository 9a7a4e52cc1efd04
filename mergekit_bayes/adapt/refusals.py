"""Settings and models that an adaptation refuses, as early as they are known."""

from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.load import Loaded

# Settings of the memory, without effect where there is none.
OF_MEMORY = (
    "memory_rows",
    "memory_select",
    "memory_filter",
    "memory_held_out",
    "kappa",
    "leap",
)


def refuse_settings(config: AdaptConfig) -> None:
    """Refuse settings that contradict each other, before anything is loaded.

    A setting that has no effect because another one is missing is refused too, if it is not at its
    default: somebody wanted something by it.

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
    _refuse_goals(config)
    _refuse_unused(config)
    _refuse_steps(config)


def refuse_model(config: AdaptConfig, loaded: Loaded) -> None:
    """Refuse what the model cannot do, once it is loaded.

    Raises:
        ConfigError: Prompts for a classifier; stored probabilities or a uniform distribution of
            outputs that have none.
    """
    if config.prompts is not None and loaded.task != "causal-lm":
        raise ConfigError(
            f"prompts: '{config.model}' is a classifier and continues no text. Use "
            "until: held_out_rise."
        )
    likelihood = trained_loss(loaded.model).likelihood
    if config.teacher == "stored" and likelihood != "categorical":
        raise ConfigError(
            f"teacher: stored keeps the largest probabilities of a softmax, and '{config.model}' "
            "has none. Use teacher: copy."
        )
    if config.removal == "kl_uniform" and likelihood == "gaussian":
        raise ConfigError(
            f"removal: kl_uniform needs outputs that are probabilities, and '{config.model}' "
            "predicts numbers. Use removal: npo."
        )


def _refuse_goals(config: AdaptConfig) -> None:
    until = config.until
    if (config.prompts is None) != (config.scorer is None):
        raise ConfigError(
            "prompts and scorer belong together: the scorer rates what the model says to the "
            "prompts. Give both, or neither."
        )
    if until.toxic_share is not None and config.prompts is None:
        raise ConfigError("until: toxic_share needs prompts and a scorer.")
    if until.held_out_rise is not None and config.remove is None:
        raise ConfigError("until: held_out_rise needs rows to remove (remove).")
    if until.memory_kl is not None and not config.has_memory:
        raise ConfigError("until: memory_kl needs a memory (memory or memory_self_generated).")
    if until.memory_kl is not None and not config.memory_held_out:
        raise ConfigError(
            "until: memory_kl is measured on the held-out part of the memory, and memory_held_out "
            "is 0. Raise it."
        )


def _refuse_unused(config: AdaptConfig) -> None:
    removes, prompts = config.remove is not None, config.prompts is not None
    needs: list[tuple[bool, tuple[str, ...], str]] = [
        (
            config.has_memory,
            OF_MEMORY,
            "there is no memory (memory or memory_self_generated)",
        ),
        (
            config.memory_self_generated is not None,
            ("memory_filter",),
            "it scores the texts that the model writes, and there are none. Set "
            "memory_self_generated, or leave it out",
        ),
        (
            config.memory_rows is not None,
            ("memory_select",),
            "leverage chooses memory_rows examples. Say how many",
        ),
        (removes, ("removal", "contrast", "held_out"), "there are no rows to remove (remove)"),
        (
            removes and config.removal in ("npo", "contrast"),
            ("npo_beta",),
            "it belongs to removal: npo or contrast",
        ),
        (
            prompts,
            ("prompt_column", "prompt_rows", "continuations", "new_tokens"),
            "there are no prompts to continue (prompts)",
        ),
        (
            config.scorer is not None or config.memory_filter is not None,
            ("threshold",),
            "nothing is scored (scorer or memory_filter)",
        ),
        (
            config.has_checks,
            ("check_every",),
            "there is nothing to check (until, prompts or held_out)",
        ),
        (
            config.teacher != "adapter" or config.lora is not None,
            ("teacher",),
            "there is no adapter that could be off (lora)",
        ),
        (config.teacher == "stored", ("top_k",), "it belongs to teacher: stored"),
        (
            config.base_observations is None,
            ("base_multiple",),
            "base_observations says already how much the base has seen. Leave one of both out",
        ),
    ]
    for is_met, names, reason in needs:
        for name in names:
            if not is_met and getattr(config, name) != type(config).model_fields[name].default:
                raise ConfigError(f"{name}: {reason}.")


def _refuse_steps(config: AdaptConfig) -> None:
    wrong = [step for step in config.keep_steps if not 1 <= step <= config.max_steps]
    if wrong:
        raise ConfigError(
            f"keep_steps: {wrong[0]} is no step of a run of {config.max_steps} (max_steps)."
        )
