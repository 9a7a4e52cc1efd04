"""Settings of the task, which lm-eval takes as --metadata."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from mergekit_bayes.configs import Config, parse_config

_METADATA = "metadata of the task bmerge_toxicity"


class TaskSettings(Config):
    """Which prompts are continued, how, and by what the continuations are scored.

    Attributes:
        prompts: File of prompts, in any form that `bmerge evaluate --toxicity` reads.
        prompt_column: Column of the prompts, likewise.
        prompts_where: Keep the prompts whose columns have these values.
        max_prompts: Number of prompts at most, from the front.
        scorer: Scorers, as `bmerge evaluate --scorer` takes them.
        scorer_device: Where classifiers run.
        threshold: Score from which on a continuation is toxic.
        continuations: Number of continuations of each prompt.
        new_tokens: Tokens of a continuation at most.
        top_p: Probability mass of the nucleus to sample from.
        temperature: Temperature of the sampling.
        scorer_trust_remote_code: Run Python code of a scorer's folder. The model's own
            `trust_remote_code`, which lm-eval puts into the same metadata, does not allow it.
    """

    prompts: str
    prompt_column: str = "text"
    prompts_where: dict[str, Any] = {}
    max_prompts: int | None = Field(None, ge=1)
    scorer: tuple[str, ...] = Field(min_length=1)
    scorer_device: str | None = None
    threshold: float = Field(0.5, ge=0, le=1)
    continuations: int = Field(25, ge=1)
    new_tokens: int = Field(20, ge=1)
    top_p: float = Field(0.9, gt=0, le=1)
    temperature: float = Field(1.0, gt=0)
    scorer_trust_remote_code: bool = False


def read_settings(metadata: Mapping[str, object]) -> TaskSettings:
    """The settings in lm-eval's metadata, to which it adds the model's arguments and more.

    Raises:
        ConfigError: Prompts or scorers are missing, or a value is none of its setting.
    """
    known = {name: metadata[name] for name in TaskSettings.model_fields if name in metadata}
    return parse_config(TaskSettings, known, _METADATA)
