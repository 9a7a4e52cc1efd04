"""The adaptation that makes a curve: its settings, its command line, and what it costs.

All looks at one curve are of one run. An adaptation that stops earlier makes the same steps, so
that a look can be made again by a run of so many steps.
"""

import shlex
from pathlib import Path
from typing import Any

import yaml

from mergekit_bayes.adapt.data import sources
from mergekit_bayes.adapt.refusals import OF_MEMORY, refuse_settings
from mergekit_bayes.adapt.settings import AdaptConfig
from mergekit_bayes.configs import parse_config
from mergekit_bayes.detox.settings import Curve, DetoxConfig, Method, weighs, without_ours
from mergekit_bayes.detox.steps import data_identity, scorer_identity, without
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.scorers import open_scorers
from mergekit_bayes.models.rows import load_rows

_OURS = (
    "model",
    "output",
    "remove",
    "until",
    "posterior",
    "precision",
    "keep_steps",
    "max_steps",
    "save_steps",
    "keep_checkpoints",
    "resume",
    "num_processes",
    "trust_remote_code",
    "force",
)
# The threshold is the filter's: checks of a removal have no goal.
_MEMORY = ("memory", "memory_self_generated", *OF_MEMORY, "threshold")
# What a method changes in the settings, and which of them it has no use for.
_CHANGES: dict[Method, dict[str, object]] = {
    "adapt": {},
    "adapt_weights": {"prior": "stored"},
    "adapt_pool": {"prior": "stored", "pool": "tensor"},
    "npo": {"prior": "none", "removal": "npo"},
}
_UNUSED: dict[Method, tuple[str, ...]] = {
    "adapt": (),
    "adapt_weights": _MEMORY,
    "adapt_pool": _MEMORY,
    "npo": (*_MEMORY, "pool", "contrast"),
}
# What changes no bit of a look, or is hashed by content.
_NO_RESULT = (
    "model",
    "output",
    "precision",
    "keep_steps",
    "max_steps",
    "logging_steps",
    "report_to",
    "force",
    "trust_remote_code",
)


def adapt_config(
    config: DetoxConfig,
    curve: Curve,
    output: str,
    steps: int,
    precision: str | None,
    keep: tuple[int, ...] = (),
) -> AdaptConfig:
    """The settings of the adaptation that removes the toxic text.

    Args:
        config: The removal.
        curve: The method.
        output: The folder to write.
        steps: Steps to make.
        precision: Where the base's precision is; None if no method needs it.
        keep: Steps whose models are stored too.

    Raises:
        ConfigError: A setting that detox makes itself, one that does not exist, or an adaptation
            with a memory without one.
    """
    given: dict[str, Any] = without_ours(config.adapt, AdaptConfig, "adapt", _OURS)
    has_memory = given.get("memory") is not None or given.get("memory_self_generated") is not None
    if curve.method == "adapt" and not has_memory:
        raise ConfigError(
            "adapt: the method adapt needs a memory: name rows that should stay as they are "
            "(memory) or have the model write some (memory_self_generated)."
        )
    given = without(given, *_UNUSED[curve.method]) | _CHANGES[curve.method]
    given |= {
        "model": config.base,
        "output": output,
        "remove": config.toxic.model_dump(),
        "posterior": "none",
        "max_steps": steps,
        "keep_steps": keep,
        "trust_remote_code": config.trust_remote_code,
    }
    if weighs(config, curve.method) and precision is not None and precision != config.base:
        given["precision"] = precision
    settings = parse_config(AdaptConfig, given, "adapt")
    try:
        refuse_settings(settings)
    except ConfigError as error:
        raise ConfigError(f"adapt: {error}") from None
    return settings


def refuse_adaptation(config: AdaptConfig) -> None:
    """Refuse rows that an adaptation would refuse, before anything heavy happens.

    Raises:
        CheckpointError: A file cannot be read.
        MismatchError: Rows without the named column, or none that is kept.
    """
    for rows in (config.remove, config.add, config.contrast, config.memory, config.held_out):
        if rows is not None:
            load_rows(rows.data, where=rows.where, text=config.text_column)


def adaptation_key(config: AdaptConfig) -> list[object]:
    """All but model and precision that decides the bits of an adaptation after any step."""
    names = [config.memory_filter] if config.memory_filter is not None else []
    scorers = open_scorers(names, trust_remote_code=config.trust_remote_code, single=True)
    return [
        without(config.model_dump(mode="json"), *_NO_RESULT),
        data_identity(sources(config)),
        [scorer_identity(scorer) for scorer in scorers],
    ]


def settings_file(config: DetoxConfig, curve: Curve) -> Path:
    """Where the settings of a curve's adaptation are, for `bmerge adapt`."""
    return Path(config.output) / f"{curve.method}.yaml"


def settings_text(config: AdaptConfig) -> str:
    """The YAML of that file; output and number of steps are left to the command line."""
    settings = config.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"output", "max_steps", "keep_steps", "force", "trust_remote_code"},
    )
    return yaml.safe_dump(settings, sort_keys=False)


def adapt_command(config: DetoxConfig, curve: Curve, steps: int) -> str:
    """The `bmerge adapt` line that makes a look; it lacks the output."""
    words = ["bmerge", "adapt", str(settings_file(config, curve)), "--set", f"max_steps={steps}"]
    return shlex.join(words)


def passes_of(config: AdaptConfig, steps: int) -> int:
    """Examples that so many steps send through a model: the adapted one, and the start beside it.

    Without what a memory costs that the model writes, and without a teacher's stored predictions.
    """
    by_start = len(config.asked) if config.teacher != "stored" else 0
    of_a_kind = steps * config.batch_size * config.gradient_accumulation
    return of_a_kind * (len(config.parts) + by_start)
