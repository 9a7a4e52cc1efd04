"""What an evaluation reads beside its model: texts, prompts, scorers and tasks, opened once."""

from dataclasses import dataclass

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
        tasks: The tasks of lm-eval with their data, if any.
    """

    texts: dict[str, list[str]]
    labelled: dict[str, Labelled]
    prompts: list[str]
    scorers: list[Scorer]
    tasks: Tasks | None = None


def read_inputs(config: Measures) -> Inputs:
    """Read the data and open the scorers that a config names.

    Raises:
        ConfigError: A scorer fails, or is none, or there is no such task.
        CheckpointError: A file, a task or a scorer's model cannot be read.
        MismatchError: A column is missing, or a scorer is not a classifier.
    """
    return Inputs(
        texts=read_texts(config),
        labelled=read_labelled(config),
        prompts=read_prompts(config),
        scorers=open_scorers(
            config.scorer, config.device, trust_remote_code=config.trust_remote_code
        ),
        tasks=read_tasks(config),
    )
