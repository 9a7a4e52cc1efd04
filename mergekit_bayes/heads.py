"""How the outputs of a sequence classifier are read: one label, several, or numbers.

`config.json` says it in `problem_type`, which transformers writes once a classifier has been
trained. Many published heads lack it. Then the number of labels and their names can still say it,
or nothing does; whoever asks is told which, so that no reading is assumed in silence.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Likelihood = Literal["categorical", "bernoulli", "gaussian"]

_LIKELIHOODS: dict[str, Likelihood] = {
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
    "regression": "gaussian",
}
# A comment that is an insult or a threat is toxic as well, so such labels occur together (the
# label sets of the Jigsaw toxic-comment and unintended-bias data, and of the Perspective API).
_GENERAL = frozenset({"toxic", "toxicity"})
_KINDS = frozenset(
    {
        "identity_attack",
        "identity_hate",
        "insult",
        "obscene",
        "profanity",
        "severe_toxic",
        "severe_toxicity",
        "sexual_explicit",
        "sexually_explicit",
        "threat",
    }
)
# Groups that a comment of the unintended-bias data mentions, beside what is toxic in it.
_MENTIONS = frozenset(
    {
        "asian",
        "atheist",
        "bisexual",
        "black",
        "buddhist",
        "christian",
        "female",
        "heterosexual",
        "hindu",
        "homosexual_gay_or_lesbian",
        "intellectual_or_learning_disability",
        "jewish",
        "latino",
        "male",
        "muslim",
        "other_disability",
        "other_gender",
        "other_race_or_ethnicity",
        "other_religion",
        "other_sexual_orientation",
        "physical_disability",
        "psychiatric_or_mental_illness",
        "transgender",
        "white",
    }
)


class Head(NamedTuple):
    """How the outputs of a classifier are read, and what says so.

    Attributes:
        likelihood: "categorical" for softmax over exclusive labels, "bernoulli" for an independent
            sigmoid of each output, "gaussian" for numbers with the squared error; None where
            nothing decides between the first two.
        reason: What decided, or why nothing does; a clause for messages.
    """

    likelihood: Likelihood | None
    reason: str


def read_head(problem_type: str | None, labels: Mapping[int, str], outputs: int) -> Head:
    """Decide how the outputs of a classifier are read.

    The `problem_type` decides where it is written. Otherwise a head of one output is a regression,
    as transformers trains it; labels that occur together by their names (`toxic` beside `insult`,
    and no label that is unknown) are independent; two other labels are exclusive; and for more
    labels nothing decides.

    Args:
        problem_type: As in `config.json`, or None.
        labels: `id2label` of the config.
        outputs: Number of outputs.

    Example:
        >>> read_head(None, {0: "toxic", 1: "severe_toxic", 2: "insult"}, 3).likelihood
        'bernoulli'
        >>> read_head(None, {0: "toxic", 1: "insult", 2: "benign"}, 3).likelihood is None
        True
    """
    if problem_type in _LIKELIHOODS:
        return Head(_LIKELIHOODS[problem_type], f"config.json says {problem_type}")
    if outputs == 1:
        return Head("gaussian", "config.json names no problem_type, and there is one output")
    if (pair := _together(labels)) is not None:
        both = "' and '".join(pair)
        return Head("bernoulli", f"a text can be '{both}' at once")
    if outputs == 2:
        return Head("categorical", "config.json names no problem_type, and there are two labels")
    return Head(
        None,
        f"config.json names no problem_type, and nothing says whether its {outputs} labels exclude "
        "each other",
    )


def head_of(config: object) -> Head:
    """`read_head` of a model's config, as transformers or PEFT hands it out."""
    return read_head(
        getattr(config, "problem_type", None),
        getattr(config, "id2label", None) or {},
        getattr(config, "num_labels", 2),
    )


def _together(labels: Mapping[int, str]) -> tuple[str, str] | None:
    """Two labels that a text can have at once; None if there is a label not known to be such.

    One unknown label may be that of the texts that have none of the others, whatever it is called,
    and the labels are exclusive then.
    """
    names = {re.sub(r"[ -]", "_", str(text).strip().lower()): str(text) for text in labels.values()}
    general = [names[name] for name in sorted(_GENERAL & names.keys())]
    kinds = [names[name] for name in sorted(_KINDS & names.keys())]
    if not general or not kinds or not names.keys() <= _GENERAL | _KINDS | _MENTIONS:
        return None
    return general[0], kinds[0]
