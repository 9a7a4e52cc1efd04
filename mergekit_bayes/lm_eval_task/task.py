"""The task: prompts, sampled continuations of each, and their scores.

The protocol is that of `metrics.toxicity`. Two things are lm-eval's: it draws the continuations
with torch's generator, so that they depend on its `--seed` and batch size, and a prompt begins with
the special tokens that the tokenizer adds by itself, perhaps none.

Every number is the mean over prompts of that of each prompt, as in `score_toxicity`. lm-eval's own
mean of them comes with a standard error that counts prompts, and not continuations.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.lm_eval_task.settings import TaskSettings, read_settings
from mergekit_bayes.metrics.toxicity import score_toxicity
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.models.rows import load_rows

# The name of each number in lm-eval's table, and where `ToxicityReport` has it.
_METRICS = {
    "mean_score": "mean",
    "toxic_share": "share",
    "expected_max": "expected_max",
    "any_toxic": "any_toxic",
}


class Toxicity(ConfigurableTask):  # type: ignore[misc]  # lm-eval has no types
    """Toxicity of sampled continuations by each scorer.

    Args:
        config: What lm-eval gives a task of its own; `metadata` holds the settings.

    Raises:
        ConfigError: A setting is missing or invalid, or a scorer fails.
        CheckpointError: The prompts or a scorer cannot be read.
        MismatchError: A prompt is empty, which lm-eval cannot continue, or a column is missing.
    """

    VERSION = 1.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        settings = read_settings(config.get("metadata") or {})
        with quiet_libraries(bars=False):
            scorers = open_scorers(
                settings.scorer,
                settings.scorer_device,
                trust_remote_code=settings.scorer_trust_remote_code,
            )
            prompts = _read_prompts(settings)
        self._threshold = settings.threshold
        self._scorers = dict(zip(_suffixes(scorers), scorers, strict=True))
        super().__init__(
            config={
                "task": config.get("task"),
                "custom_dataset": lambda **_: {"test": prompts},
                "test_split": "test",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "",
                "output_type": "generate_until",
                "generation_kwargs": {
                    "until": [],
                    "do_sample": True,
                    "temperature": settings.temperature,
                    "top_p": settings.top_p,
                    "top_k": 0,
                    "max_gen_toks": settings.new_tokens,
                },
                "repeats": settings.continuations,
                "filter_list": [
                    {
                        "name": "sampled",
                        "filter": [{"function": "take_first_k", "k": settings.continuations}],
                    }
                ],
                # For a metric with a name that it does not know, lm-eval would load a script.
                "metric_list": [],
                "metadata": {"version": self.VERSION, **settings.model_dump(mode="json")},
            }
        )

    def process_results(
        self, doc: Mapping[str, str], results: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """The numbers of a prompt by each scorer.

        Args:
            doc: The prompt.
            results: Its continuations, the only item.
        """
        (texts,) = results
        numbers = {}
        for suffix, scorer in self._scorers.items():
            scores = np.array([scorer.score(list(texts))], np.float64)
            report = score_toxicity(
                scores, threshold=scorer.threshold(self._threshold), bootstrap=0
            )
            for name, field in _METRICS.items():
                numbers[name + suffix] = float(getattr(report, field).value)
        return numbers

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        """Every number is a mean over prompts."""
        return dict.fromkeys(self._names(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """No number is better where it is higher."""
        return dict.fromkeys(self._names(), False)

    def _names(self) -> list[str]:
        return [name + suffix for suffix in self._scorers for name in _METRICS]


def _read_prompts(settings: TaskSettings) -> datasets.Dataset:
    column = settings.prompt_column
    rows = load_rows(
        settings.prompts,
        where=settings.prompts_where or None,
        max_rows=settings.max_prompts,
        text=column,
    )
    prompts = list(rows[column])
    for i, prompt in enumerate(prompts):
        if not prompt.strip():
            raise MismatchError(
                f"'{settings.prompts}': prompt {i + 1} of {len(prompts)} is empty, and lm-eval "
                "continues no empty prompt. Take it out."
            )
    return datasets.Dataset.from_dict({"prompt": prompts})


def _suffixes(scorers: Sequence[Scorer]) -> list[str]:
    """What tells the scorers apart in the names of their numbers; nothing for a single one."""
    if len(scorers) == 1:
        return [""]
    names = []
    for scorer in scorers:
        # lm-eval writes a comma between a metric and its filter.
        kind, _, rest = scorer.spec.replace(",", ";").partition(":")
        # The panel and its member, or the file or folder, without the folders that hold it.
        parts = {"words": 1, "model": 1, "panel": 2}.get(kind)
        names.append(f"_{kind}:{'/'.join(Path(rest).parts[-parts:]) if parts else rest}")
    if len(set(names)) < len(names):
        raise ConfigError(
            f"the scorers {', '.join(s.spec for s in scorers)} have equal short names, by which "
            "lm-eval's table would not tell them apart. Rename a file or folder."
        )
    return names
