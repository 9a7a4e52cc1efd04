"""What an evaluation reads beside its model: its data, scorers, judge and tasks, opened once."""

from dataclasses import dataclass

from mergekit_bayes.evaluate.judge import Judge, open_judge
from mergekit_bayes.evaluate.lm_eval import Tasks, read_tasks
from mergekit_bayes.evaluate.scorers import Scorer, open_scorers
from mergekit_bayes.evaluate.settings import Measures
from mergekit_bayes.evaluate.texts import Labelled, read_labelled, read_prompts, read_texts


@dataclass(frozen=True)
class Inputs:
    """The inputs of an evaluation, which several models can share.

    Attributes:
        texts: The documents of each set that perplexity is measured on.
        labelled: The labelled texts of each set to classify.
        prompts: The prompts to continue; none if toxicity is not measured.
        scorers: The open scorers, each tried on one text.
        judge: The model under which the continuations have a perplexity, if any.
        tasks: The tasks of lm-eval with their data, if any.
    """

    texts: dict[str, list[str]]
    labelled: dict[str, Labelled]
    prompts: list[str]
    scorers: list[Scorer]
    judge: Judge | None = None
    tasks: Tasks | None = None


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
        tasks=read_tasks(config),
    )
