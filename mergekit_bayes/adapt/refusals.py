"""Settings and models that an adaptation refuses, as early as they are known."""

from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.checkpoint.sources import CHECKPOINT, resolve
from mergekit_bayes.curvature.outputs import trained_loss
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import split_ref
from mergekit_bayes.models.limits import ADAPTER_CONFIG
from mergekit_bayes.models.load import Loaded, is_classifier
from mergekit_bayes.models.pretrained import base_of, load_adapter_config

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


def refuse_start(config: AdaptConfig) -> None:
    """Refuse a start that is not one whole model, before it is loaded.

    An adapter would be lost under a new one, and the weight-space part holds weights, not factors.

    Raises:
        CheckpointError: There is no such model, or its config cannot be read.
        ConfigError: An adapter, alone or with its base, or a classifier without a head.
    """
    refs = split_ref(config.model)
    if refs is None and ((path := resolve(config.model, CHECKPOINT)) / ADAPTER_CONFIG).exists():
        refs = base_of(path, load_adapter_config(path)), config.model
    if refs is not None:
        base, adapter = refs
        raise ConfigError(
            f"'{adapter}' is an adapter, and an adaptation starts from a whole model. Fold it into "
            f"its base first: `bmerge merge {base}+{adapter} -o WHOLE`."
        )
    remote = config.trust_remote_code
    if config.task == "classification" and not is_classifier(
        config.model, trust_remote_code=remote
    ):
        raise ConfigError(
            f"'{config.model}' has no head of a classifier, and there is nothing in a new one to "
            "keep. Train it first, by `bmerge finetune`."
        )


def refuse_model(config: AdaptConfig, loaded: Loaded) -> None:
    """Refuse what the model cannot do, once it is loaded.

    Raises:
        ConfigError: Prompts for a classifier; a classifier that does not choose one label, whose
            labels are no class numbers and whose losses transformers scales by their number.
    """
    if config.prompts is not None and loaded.task != "causal-lm":
        raise ConfigError(
            f"prompts: '{config.model}' is a classifier and continues no text. Use "
            "until: held_out_rise."
        )
    loss = trained_loss(loaded.model)
    if loss.likelihood != "categorical":
        raise ConfigError(
            f"'{config.model}' is trained by {loss.describe()}, and only classifiers that choose "
            "one label of two or more are adapted. If it is one, say so in its config.json: "
            '"problem_type": "single_label_classification".'
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
