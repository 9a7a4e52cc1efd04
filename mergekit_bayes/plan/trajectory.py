"""The checkpoints of one training run as the models of an average."""

import re
import statistics
from collections.abc import Sequence
from itertools import pairwise

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan.settings import MergeConfig

_SHOWN = 8  # shares that a note names
_STEP = re.compile(r"(\d+)(\.safetensors)?/*$")


def along_trajectory(config: MergeConfig, notes: list[str]) -> MergeConfig:
    """The settings of the average that `trajectory` asks for, or the same settings without it.

    The checkpoints are put in the order of their steps, which a shell's pattern does not keep. With
    `decay` d a checkpoint at step s has the share `d^((s_last - s) / g)` of the last one, g the
    median distance of two: an exponential moving average over the checkpoints that were kept.

    Args:
        config: The settings.
        notes: What was decided, for the report, is appended here.

    Raises:
        ConfigError: A checkpoint's name ends in no step, two are of one step, or a setting says
            otherwise.
    """
    if not config.trajectory:
        if config.decay is not None:
            raise ConfigError("--decay is for the checkpoints of one run: add --trajectory.")
        return config
    for setting in ("base", "scale"):
        if getattr(config, setting) != MergeConfig.model_fields[setting].default:
            raise ConfigError(
                f"--trajectory averages the checkpoints of one run and has no use for --{setting}. "
                "Drop one of the two."
            )
    if config.method in METHODS and METHODS[config.method].needs_base:
        raise ConfigError(
            f"--trajectory averages the checkpoints of one run, and --method {config.method} adds "
            "their changes to a base. Drop one of the two."
        )
    steps = {model: _step(model) for model in config.models}
    models = sorted(steps, key=lambda model: steps[model])
    distances = [steps[b] - steps[a] for a, b in pairwise(models)]
    if len(models) < len(config.models) or 0 in distances:
        same = next((m for m in models if config.models.count(m) > 1), None)
        pair = (same, same) if same else _of_one_step(models, distances)
        raise ConfigError(f"--trajectory: '{pair[0]}' and '{pair[1]}' are of one step.")
    update: dict[str, object] = {"models": tuple(models), "trajectory": False, "decay": None}
    by = "shares alike"
    if config.decay is not None and distances:
        gap = statistics.median(distances)
        scales = [config.decay ** ((steps[models[-1]] - steps[model]) / gap) for model in models]
        update["scale"] = tuple(scales)
        by = (
            f"shares falling by {config.decay:g} over {gap:,g} steps, the median distance of two: "
            f"{_shares([steps[model] for model in models], scales)}"
        )
    if len(models) > 1:
        first, last = steps[models[0]], steps[models[-1]]
        notes.append(f"{len(models)} checkpoints from step {first:,} to {last:,}, {by}")
    return config.model_copy(update=update)


def _shares(steps: Sequence[int], scales: Sequence[float]) -> str:
    """The shares of the last checkpoints by their steps; those before have smaller ones."""
    shown = [f"{s:,} has {x / sum(scales):.3g}" for s, x in zip(steps, scales, strict=True)]
    left_out = "... " if len(shown) > _SHOWN else ""
    return left_out + ", ".join(shown[-_SHOWN:])


def _step(model: str) -> int:
    match = _STEP.search(model)
    if match is None:
        raise ConfigError(
            f"--trajectory: the name of '{model}' ends in no step, as that of RUN/checkpoint-500 "
            "does. Rename it, or merge without --trajectory."
        )
    return int(match[1])


def _of_one_step(models: Sequence[str], distances: Sequence[int]) -> tuple[str, str]:
    at = distances.index(0)
    return models[at], models[at + 1]
