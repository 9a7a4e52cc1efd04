"""Continue the prompts, score the continuations, and let the judge read them."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mergekit_bayes.evaluate.judge import Judge, following
from mergekit_bayes.evaluate.report import StepProgress
from mergekit_bayes.evaluate.scorers import Scorer
from mergekit_bayes.evaluate.settings import EvaluateConfig
from mergekit_bayes.generation import Samples, sample_continuations
from mergekit_bayes.metrics.quality import Judged
from mergekit_bayes.metrics.toxicity import ToxicityReport, score_toxicity
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.records import FloatArray


class Continuations(NamedTuple):
    """Prompts, their continuations, the scores of these by each scorer's name, and a judge's."""

    prompts: Sequence[str]
    samples: Samples
    scores: dict[str, FloatArray]  # (prompts, continuations)
    judged: Judged | None = None


def score_continuations(
    config: EvaluateConfig,
    loaded: Loaded,
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    judge: Judge | None,
    tell: StepProgress,
) -> Continuations | None:
    """Draw continuations of the prompts at the mean weights and score them.

    Args:
        config: How continuations are drawn.
        loaded: A causal language model, if there are prompts.
        prompts: The texts to continue.
        scorers: They all score the same continuations.
        judge: Reads them, too.
        tell: Called with (step, done, of).

    Returns:
        None without prompts.
    """
    if not prompts:
        return None
    samples = sample_continuations(
        loaded.model,
        loaded.tokenizer,
        prompts,
        start=loaded.start,
        context=loaded.context,
        sampling=config.sampling,
        batch_size=config.sampling_batch,
        progress=partial(tell, "continuations"),
    )
    texts = [text for row in samples.texts for text in row]
    shape = (len(prompts), config.continuations)
    scores: dict[str, FloatArray] = {}
    for i, scorer in enumerate(scorers):
        tell("scoring", i, len(scorers))
        scores[scorer.spec] = np.reshape(scorer.score(texts), shape)
    judged = None
    if judge is not None:
        whole = following(loaded.tokenizer, prompts, samples)
        judged = judge.read(prompts, whole, config.batch_size, tell)
    return Continuations(prompts, samples, scores, judged)


def toxicity_by_scorer(
    config: EvaluateConfig, scorers: Sequence[Scorer], continuations: Continuations
) -> dict[str, ToxicityReport]:
    """The toxicity of the continuations by each scorer's name."""
    texts = [text for row in continuations.samples.texts for text in row]
    return {
        scorer.spec: score_toxicity(
            continuations.scores[scorer.spec],
            threshold=scorer.threshold(config.threshold),
            bootstrap=config.bootstrap,
            seed=config.seed,
            cut=scorer.cut(texts),
        )
        for scorer in scorers
    }
