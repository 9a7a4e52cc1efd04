"""What a preview is asked for, and what it refuses at once: nothing here loads a heavy library."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.replacing import refuse_inputs
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.plan import MergeConfig
from mergekit_bayes.plan.options import choose_method
from mergekit_bayes.plan.trajectory import along_trajectory
from mergekit_bayes.preview.designs import Named, vectors_of
from mergekit_bayes.preview.forming import Plans
from mergekit_bayes.preview.search import refuse_search
from mergekit_bayes.preview.settings import PreviewConfig
from mergekit_bayes.recipes import read_recipe


class Asked(NamedTuple):
    """The merges that a preview is asked for.

    Attributes:
        recipe: What they are merged by.
        predicted: The same with precisions that only `--predict-first` reads.
        vectors: Their scales.
    """

    recipe: MergeConfig
    predicted: MergeConfig
    vectors: Named


def read_asked(config: PreviewConfig) -> Asked:
    """Read the recipe and find the scales to preview; no model is opened.

    Raises:
        ConfigError: A setting of the recipe or the preview makes no sense.
        CheckpointError: The output exists and `force` is not set, or holds something to be read.
    """
    refuse_search(config)
    recipe = parse_config(MergeConfig, read_recipe(Path(config.recipe)), config.recipe)
    recipe = predicted = along_trajectory(recipe, [])
    if config.predict_first is not None and not choose_method(recipe)[0].needs_precision:
        recipe = recipe.model_copy(update={"precision": {}, "isotropic": {}})
    vectors = vectors_of(config, recipe)
    if Path(config.output).exists() and not config.force:
        raise CheckpointError(
            f"'{config.output}' exists. Choose another -o, or pass --force to replace it."
        )
    base = () if recipe.base is None else (recipe.base,)
    refuse_inputs(Path(config.output), [config.recipe, *recipe.models, *base])
    return Asked(recipe, predicted, vectors)


def refuse_early(config: PreviewConfig) -> None:
    """Refuse what can be known before the libraries that measure are loaded, which takes seconds.

    Raises:
        BmergeError: As `read_asked`, and as planning the first merge, such as of a mixture.
    """
    asked = read_asked(config)
    with (
        Scratch(Path(tempfile.gettempdir()), "bmerge-") as scratch,
        Plans(asked.recipe, scratch.new / "model") as plans,
    ):
        plans.at(next(iter(asked.vectors)))
