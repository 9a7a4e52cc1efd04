"""What an evaluation reads beside its model: its data, scorers, judge and tasks, opened once."""

from dataclasses import dataclass
from functools import cached_property

from mergekit_bayes.evaluate.judge import Judge, open_judge
from mergekit_bayes.evaluate.lm_eval import Tasks, read_tasks
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.evaluate.settings import Measures
from mergekit_bayes.evaluate.texts import Labelled, read_labelled, read_prompts, read_texts
from mergekit_bayes.metrics.identity_terms import IdentityBias, measure_bias


@dataclass(frozen=True)
class Inputs:
    """The inputs of an evaluation, which several models can share.

    Attributes:
        texts: The documents of each set that perplexity is measured on.
        labelled: The labelled texts of each set to classify.
        prompts: The prompts to continue; none if toxicity is not measured.
        scorers: The open scorers, each tried on one text.
        judge: The model under which the continuations have a perplexity, if any.
        threshold: The score from which a text is toxic, by scorers that have none of their own.
        tasks: The tasks of lm-eval with their data, if any.
    """

    texts: dict[str, list[str]]
    labelled: dict[str, Labelled]
    prompts: list[str]
    scorers: list[Scorer]
    judge: Judge | None = None
    threshold: float = 0.5
    tasks: Tasks | None = None

    @cached_property
    def bias(self) -> dict[str, IdentityBias]:
        """The bias of each classifier among the scorers, by its name, measured when first asked."""
        return {
            scorer.spec: measure_bias(scorer.score, threshold=scorer.threshold(self.threshold))
            for scorer in self.scorers
            if scorer.info.kind == "model"
        }


def read_inputs(config: Measures) -> Inputs:
    """Read the data, and open the scorers and the judge that a config names.

    Raises:
        ConfigError: A scorer fails, or is none, there is no such task, or the judge's context has
            no room.
        CheckpointError: A file, a task, a scorer's model or the judge cannot be read.
        MismatchError: A column is missing, a scorer is not a classifier, or the judge is one.
    """
    return Inputs(
        texts=read_texts(config),
        labelled=read_labelled(config),
        prompts=read_prompts(config),
        scorers=open_scorers(
            config.scorer, config.device, trust_remote_code=config.trust_remote_code
        ),
        judge=open_judge(
            config.judge,
            config.device,
            config.dtype,
            new_tokens=config.new_tokens,
            trust_remote_code=config.trust_remote_code,
        )
        if config.judge is not None
        else None,
        threshold=config.threshold,
        tasks=read_tasks(config),
    )
