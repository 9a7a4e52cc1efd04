"""The models of a recipe, each opened once."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import open_model, refuse_other_base
from mergekit_bayes.mergekit.bodies import is_stacked
from mergekit_bayes.mergekit.objects import Recipe, Tokenizer
from mergekit_bayes.mergekit.roles import Part
from mergekit_bayes.mergekit.stages import place_of
from mergekit_bayes.mergekit.token_plans import tokens_of
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.own_base import ON_OTHER_BASE
from mergekit_bayes.plan.plan import refuse_incomplete
from mergekit_bayes.plan.unions import TokenPlan
from mergekit_bayes.posterior import Posterior


class OpenedModels(NamedTuple):
    """The opened models of a recipe.

    Attributes:
        by_name: Each once, by how recipes write it.
        inputs: The base and the tasks as the report tells them: each model once for slices.
        of_source: The input of each source, by the number of its part and its place there, the
            base's first.
    """

    by_name: Mapping[str, Posterior]
    inputs: Inputs
    of_source: Mapping[tuple[int, int], Input]


def open_models(
    recipe: Recipe,
    parts: Sequence[Part],
    outputs: Mapping[str, str],
    stack: ExitStack,
    *,
    on_other_base: bool,
) -> OpenedModels:
    """Open each model once.

    Args:
        recipe: The recipe.
        parts: Its parts.
        outputs: The outputs of earlier documents, by name.
        stack: Closes the models.
        on_other_base: Whether an adapter may be applied to another base than it records.

    Raises:
        BmergeError: A model cannot be opened; the message names its key.
    """
    by_name: dict[str, Posterior] = {}
    for source in (source for part in parts for source in part.sources):
        name = str(source.model)
        if name not in by_name:
            ref = place_of(source.model, outputs, recipe.label)
            try:
                by_name[name] = stack.enter_context(open_model(ref, with_precision=False))
            except CheckpointError as error:
                key = f"{source.place}.model" if source.place else "base_model"
                raise type(error)(f"{recipe.label}: {key}: {error}") from None
            refuse_incomplete(by_name[name])
            if not on_other_base:
                refuse_other_base(by_name[name], ON_OTHER_BASE)
    base: Input | None = None
    of_name: dict[str, Input] = {}
    tasks: list[Input] = []
    of_source: dict[tuple[int, int], Input] = {}
    for number, part in enumerate(parts):
        for place, source in enumerate(part.sources):
            name = str(source.model)
            if source is part.base:
                base = base or Input(by_name[name], 0.0)
                if base.posterior is by_name[name]:
                    of_source[number, place] = base
                    continue
            # In whole models one that is listed twice is two tasks, each with its weight.
            if name not in of_name or not is_stacked(recipe):
                of_name[name] = Input(by_name[name], 1.0)
                tasks.append(of_name[name])
            of_source[number, place] = of_name[name]
    donor = of_name.get(str(recipe.base_model))
    if donor is not None:  # of a method without a base
        tasks.sort(key=lambda task: task is not donor)
    return OpenedModels(by_name, Inputs(base, tuple(tasks)), of_source)


def with_tokens(
    recipe: Recipe, tokenizer: Tokenizer, models: OpenedModels, outputs: Mapping[str, str]
) -> tuple[TokenPlan, OpenedModels]:
    """The models with the rows of the tokens that a recipe chooses."""
    base, named = models.inputs.base, models.by_name.get(str(recipe.base_model))
    try:
        donor = named if base is None else base.posterior
        tokens = tokens_of(tokenizer, models.by_name, donor, outputs)
    except (CheckpointError, ConfigError, MismatchError) as error:
        raise type(error)(f"{recipe.label}: tokenizer: {error}") from None
    by_name = dict(zip(models.by_name, tokens.models, strict=True))
    renewed = {id(models.by_name[name]): posterior for name, posterior in by_name.items()}
    inputs = {
        model: replace(model, posterior=renewed[id(model.posterior)]) for model in models.inputs
    }
    return tokens, OpenedModels(
        by_name,
        Inputs(
            None if base is None else inputs[base], tuple(inputs[t] for t in models.inputs.tasks)
        ),
        {place: inputs[model] for place, model in models.of_source.items()},
    )
