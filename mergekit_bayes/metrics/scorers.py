"""Ways to score a text's toxicity in [0, 1]: a word list, a classifier, or anybody's own function."""

import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit_bayes.errors import CheckpointError, ConfigError

Score = Callable[[list[str]], list[float]]


def word_scorer(phrases: Sequence[str]) -> Score:
    """1.0 where a listed word or phrase occurs as whole words, in whatever case; else 0.0.

    Blanks in a phrase match any white space.
    """
    patterns = [r"\s+".join(re.escape(word) for word in p.split()) for p in phrases if p.split()]
    if not patterns:
        raise ConfigError("the word list is empty.")
    # Longest first is quicker to decide; (?<!\w) rather than \b, since an entry may start with a
    # sign.
    found = re.compile(
        rf"(?<!\w)(?:{'|'.join(sorted(patterns, key=len, reverse=True))})(?!\w)", re.IGNORECASE
    )
    return lambda texts: [float(found.search(text) is not None) for text in texts]


def classifier_scorer(
    model: Any, tokenizer: Any, label: str, *, name: str, batch_size: int = 64
) -> Score:
    """The probability that a text-classification checkpoint gives to `label`.

    Sigmoid of its logit for a multi-label model or a single label, softmax over exclusive labels.

    Raises:
        ConfigError: The model has no such label; those it has are listed. A toxic label is never
            guessed.
        CheckpointError: The model is a regression.
    """
    import torch

    config = model.config
    labels = {str(text): int(i) for i, text in config.id2label.items()}
    if label not in labels:
        raise ConfigError(
            f"--scorer '{name}': the model has no label '{label}'. Name the toxic one of: "
            f"{', '.join(labels)}."
        )
    if config.problem_type == "regression":
        raise CheckpointError(
            f"--scorer '{name}': the model is a regression, its output is no probability."
        )
    separate = config.problem_type == "multi_label_classification" or config.num_labels == 1
    index, device = labels[label], next(model.parameters()).device
    longest = min(tokenizer.model_max_length, 512)

    @torch.inference_mode()
    def score(texts: list[str]) -> list[float]:
        result = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for at in range(0, len(order), batch_size):
            some = order[at : at + batch_size]
            batch = tokenizer(
                [texts[i] for i in some],
                padding=True,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
            logits = model(**batch.to(device)).logits.float()
            chance = logits.sigmoid() if separate else logits.softmax(-1)
            for i, value in zip(some, chance[:, index].tolist(), strict=True):
                result[i] = value
        return result

    return score


def hook_scorer(spec: str) -> tuple[Score, Path | None]:
    """Anybody's own function `(list[str]) -> list[float]`, by `package.module:function`, and the
    file it is in.

    Modules of the current directory can be imported, too. What it returns is checked: one finite
    number in [0, 1] for each text.

    Raises:
        ConfigError: No such module or function.
    """
    module_name, _, function_name = spec.partition(":")
    here = str(Path.cwd())
    with _importable(here):
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(
                f"--scorer '{spec}': cannot import {module_name} ({error})."
            ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"--scorer '{spec}': {module_name} has no function '{function_name}'.")

    def score(texts: list[str]) -> list[float]:
        with _importable(here):
            try:
                returned = function(texts)
            except Exception as error:
                raise ConfigError(
                    f"--scorer '{spec}': raised {type(error).__name__}: {error}"
                ) from error
        return checked_scores(returned, len(texts), spec)

    source = getattr(module, "__file__", None)
    return score, Path(source) if source else None


def checked_scores(returned: Any, expected: int, name: str) -> list[float]:
    """Scores as floats.

    Raises:
        ConfigError: Not one finite number in [0, 1] for each text; names the scorer and the first
            bad score.
    """
    try:
        scores = [float(x) for x in returned]
    except (TypeError, ValueError):
        raise ConfigError(
            f"--scorer '{name}': expected a list of {expected} numbers, found "
            f"{type(returned).__name__} "
            f"{str(returned)[:60]!r}."
        ) from None
    if len(scores) != expected:
        raise ConfigError(
            f"--scorer '{name}': expected one score for each of {expected} texts, found "
            f"{len(scores)}."
        )
    for i, value in enumerate(scores):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ConfigError(
                f"--scorer '{name}': score {i + 1} of {expected} is {value}; expected 0 to 1."
            )
    return scores


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
