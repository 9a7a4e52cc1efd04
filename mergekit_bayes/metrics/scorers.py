"""Ways to score a text's toxicity in [0, 1]: a word list, a classifier, or a given function."""

import importlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.heads import head_of
from mergekit_bayes.libraries import (
    TOKENIZER_FAILS,
    call_tokenizers,
    known_to,
    longest_text,
    outputs_of,
)
from mergekit_bayes.metrics.base import Score
from mergekit_bayes.ranks import on_main, spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Reading = Literal["softmax", "sigmoid"]
READINGS: tuple[Reading, ...] = ("softmax", "sigmoid")
FORMS = "words:FILE, model:PATH_OR_ID#LABEL, panel:NAME or package.module:function"


class LabelReading(NamedTuple):
    """How a classifier's logits become the probability of its toxic label.

    Attributes:
        reading: Softmax over exclusive labels, or the sigmoid of the label's own logit.
        reason: What decided that, a clause for the report.
    """

    reading: Reading
    reason: str


def word_scorer(phrases: Sequence[str]) -> Score:
    """Score 1.0 where a listed word or phrase occurs as whole words in any case, else 0.0.

    Args:
        phrases: Words and phrases; blanks in a phrase match any white space.

    Raises:
        ConfigError: The list is empty.
    """
    patterns = [r"\s+".join(re.escape(word) for word in p.split()) for p in phrases if p.split()]
    if not patterns:
        raise ConfigError("the word list is empty.")
    # Longest first is quicker to decide; (?<!\w) rather than \b, since an entry may start with a
    # sign.
    alternatives = "|".join(sorted(patterns, key=len, reverse=True))
    listed = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)
    return lambda texts: [float(listed.search(text) is not None) for text in texts]


def read_label(
    model: "PreTrainedModel", label: str, *, name: str, reading: Reading | None = None
) -> LabelReading:
    """How the probability of `label` is read from a text-classification checkpoint.

    Softmax over exclusive labels, the sigmoid of the label's logit for independent labels or for a
    single output. `heads.head_of` says which; where it cannot, the caller has to.

    Args:
        model: The classifier.
        label: Name of the toxic label; it is never guessed.
        name: The scorer, for messages.
        reading: The reading that the user chose; None lets the checkpoint decide.

    Raises:
        ConfigError: The model has no such label; the message lists its labels. Or nothing decides
            how they are read.
        CheckpointError: The model is a regression, or its config gives the label to no output of
            its own.
    """
    config = model.config
    labels = [str(text) for text in config.id2label.values()]
    if label not in labels:
        raise ConfigError(
            f"scorer '{name}': the model has no label '{label}'. Name the toxic one of: "
            f"{', '.join(labels)}."
        )
    outputs = [int(i) for i, text in config.id2label.items() if str(text) == label]
    if len(outputs) > 1 or not 0 <= outputs[0] < config.num_labels:
        raise CheckpointError(
            f"scorer '{name}': id2label of the config gives '{label}' the number "
            f"{' and '.join(map(str, outputs))}, and the {config.num_labels} outputs of the model "
            "are counted from 0. Correct id2label."
        )
    if config.problem_type == "regression":
        raise CheckpointError(
            f"scorer '{name}': the model is a regression, its output is no probability."
        )
    if reading is not None:
        return LabelReading(reading, "chosen in --scorer")
    if config.num_labels == 1:
        return LabelReading("sigmoid", "there is one output")
    head = head_of(config)
    if head.likelihood is None:
        raise ConfigError(
            f"scorer '{name}': {head.reason} ({', '.join(labels)}). If a text has exactly one of "
            f"them, write '{name}=softmax'; if it can have several, '{name}=sigmoid'."
        )
    return LabelReading("sigmoid" if head.likelihood == "bernoulli" else "softmax", head.reason)


def classifier_scorer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    label: str,
    *,
    name: str,
    batch_size: int = 64,
    reading: Reading | None = None,
    max_length: int = 512,
) -> Score:
    """Score by the probability that a text-classification checkpoint gives to `label`.

    Several ranks (`ranks.spread`) share the batches, and each gets all scores.

    Args:
        model: The classifier in eval mode.
        tokenizer: Its tokenizer.
        label: Name of the toxic label; it is never guessed.
        name: The scorer, for messages.
        batch_size: Texts classified together.
        reading: How the labels are read; None lets `read_label` decide.
        max_length: Tokens of a text at most; longer texts lose their end.

    Raises:
        ConfigError: As `read_label`.
        CheckpointError: As `read_label`.
    """
    import torch

    separate = read_label(model, label, name=name, reading=reading).reading == "sigmoid"
    labels = {str(text): int(i) for i, text in model.config.id2label.items()}
    index = labels[label]
    longest = longest_text(tokenizer, max_length)

    tokenise = partial(
        tokenizer, padding=True, truncation=True, max_length=longest, return_tensors="pt"
    )

    @torch.inference_mode()
    def classify(texts: list[str]) -> list[float]:
        batch = call_tokenizers(TOKENIZER_FAILS, partial(tokenise, texts))
        known_to(model, batch["input_ids"].tolist())
        logits = outputs_of(model, **batch.to(model.device)).logits.float()
        probability = logits.sigmoid() if separate else logits.softmax(-1)
        scores: list[float] = probability[:, index].tolist()
        return scores

    def score(texts: list[str]) -> list[float]:
        result = [0.0] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        groups = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        scores = spread(groups, lambda rows: classify([texts[i] for i in rows]))
        for rows, values in zip(groups, scores, strict=True):
            for i, value in zip(rows, values, strict=True):
                result[i] = value
        return result

    return score


def count_cut(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], max_length: int = 512
) -> int:
    """How many texts lose their end in `classifier_scorer`, which reads `max_length` tokens."""
    longest = longest_text(tokenizer, max_length)
    # One token more shows what is too long, without a warning of the tokenizer.
    tokenise = partial(tokenizer, list(texts), truncation=True, max_length=longest + 1)
    if not texts:
        return 0
    encoded = call_tokenizers(TOKENIZER_FAILS, tokenise)["input_ids"]
    return sum(len(ids) > longest for ids in encoded)


def hook_scorer(spec: str) -> tuple[Score, Path | None]:
    """Score by a given function `(list[str]) -> list[float]`, which rank 0 alone calls.

    Modules of the current directory can be imported too. The scores are checked: one finite number
    in [0, 1] for each text.

    Args:
        spec: `package.module:function`.

    Returns:
        The scorer, and the file that holds the function, if it is in a file.

    Raises:
        ConfigError: There is no such module or function, or the module fails.
    """
    module_name, _, function_name = spec.partition(":")
    folder = str(Path.cwd())
    with _importable(folder):
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # a module may raise anything, and its name may be none
            raise ConfigError(
                f"scorer '{spec}': cannot import {module_name} ({type(error).__name__}: {error}). "
                f"Expected {FORMS}."
            ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"scorer '{spec}': {module_name} has no function '{function_name}'.")

    def call(texts: list[str]) -> list[float]:
        with _importable(folder):
            try:
                returned = function(texts)
            except Exception as error:
                raise ConfigError(
                    f"scorer '{spec}': raised {type(error).__name__}: {error}"
                ) from error
        return checked_scores(returned, len(texts), spec)

    source = getattr(module, "__file__", None)
    # It may look at all texts, or count its calls.
    return lambda texts: on_main(lambda: call(texts)), Path(source) if source else None


def checked_scores(returned: object, expected: int, name: str) -> list[float]:
    """The scores as floats, once they are found to be valid.

    Args:
        returned: What the scorer returned.
        expected: Number of texts.
        name: The scorer, for messages.

    Raises:
        ConfigError: There is not one finite number in [0, 1] for each text. The message names the
            scorer and the first bad score.
    """
    try:
        scores = [float(x) for x in returned]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ConfigError(
            f"scorer '{name}': expected a list of {expected} numbers, found "
            f"{type(returned).__name__} {str(returned)[:60]!r}."
        ) from None
    if len(scores) != expected:
        raise ConfigError(
            f"scorer '{name}': expected one score for each of {expected} texts, found "
            f"{len(scores)}."
        )
    for i, value in enumerate(scores):
        if not (math.isfinite(value) and 0 <= value <= 1):
            raise ConfigError(
                f"scorer '{name}': score {i + 1} of {expected} is {value}; expected 0 to 1."
            )
    return scores


@contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
