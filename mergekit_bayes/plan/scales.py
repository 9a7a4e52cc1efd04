"""The scale of each task: one number, and rules that change it tensor by tensor."""

import re
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.plan.settings import MergeConfig


class ScaleRule(NamedTuple):
    """A scale for the tensors of a task whose name matches: `MODEL:REGEX=X`.

    Attributes:
        tasks: Indices of the tasks; more than one where a model is named twice.
        pattern: Matches the names of tensors.
        scale: Dimensionless; negative removes.
        text: The rule as given, for messages.
    """

    tasks: tuple[int, ...]
    pattern: re.Pattern[str]
    scale: float
    text: str


def check_scales(config: MergeConfig) -> tuple[tuple[float, ...], tuple[ScaleRule, ...]]:
    """One scale per task, and the rules that change it tensor by tensor.

    Raises:
        ConfigError: Too few models, a number of scales that does not fit the models, or a rule
            that cannot be read.
    """
    count = len(config.models)
    if count == 0 or (count == 1 and config.base is None):
        raise ConfigError("a merge needs two models, or one and a --base.")
    scales = tuple(s for s in config.scale if not isinstance(s, str)) or (1.0,)
    rules = tuple(_parse_rule(s, config.models) for s in config.scale if isinstance(s, str))
    if len(scales) not in (1, count):
        raise ConfigError(
            f"--scale: {len(scales)} given for {count} models. Give one for all, or one per model "
            "by repeating the flag in the models' order: --scale 1 --scale -0.5."
        )
    return (scales * count if len(scales) == 1 else scales), rules


def _parse_rule(text: str, models: tuple[str, ...]) -> ScaleRule:
    """Read `MODEL:REGEX=X`; of models that begin alike the longest is meant."""
    front, separator, number = text.rpartition("=")
    by_length = sorted(models, key=len, reverse=True)
    model = next((m for m in by_length if front.startswith(m + ":")), None)
    if not separator or model is None:
        raise ConfigError(
            f"--scale '{text}': expected a number, or MODEL:REGEX=X with a model as given: "
            f"{', '.join(models)}."
        )
    regex = front[len(model) + 1 :]
    tasks = tuple(i for i, m in enumerate(models) if m == model)
    try:
        return ScaleRule(tasks, re.compile(regex), float(number), text)
    except re.error as error:
        raise ConfigError(
            f"--scale '{text}': '{regex}' is no regular expression ({error})."
        ) from None
    except ValueError:
        raise ConfigError(f"--scale '{text}': '{number}' is not a number.") from None
