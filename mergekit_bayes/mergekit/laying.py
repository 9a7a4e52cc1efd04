"""Put the layers of all models under the names that they have in the output, and match them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.checkpoint.model_config import layer_count
from mergekit_bayes.checkpoint.ties import ties_embeddings
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.mergekit.bodies import Body, bodies_of, is_stacked, refuse_uncovered
from mergekit_bayes.mergekit.layer_configs import LayerOrigin, config_changes
from mergekit_bayes.mergekit.layers import (
    ModelNames,
    OutputTensor,
    layer_sources,
    map_models,
    map_slices,
)
from mergekit_bayes.mergekit.objects import Recipe, Source
from mergekit_bayes.mergekit.opened import OpenedModels
from mergekit_bayes.mergekit.roles import Part
from mergekit_bayes.mergekit.slice_fits import refuse_misfits
from mergekit_bayes.mergekit.slice_heads import config_of, with_heads
from mergekit_bayes.mergekit.stacked import Origin, StackedSource
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan import MergeConfig
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.match import match_tensors
from mergekit_bayes.plan.side_files import config_input
from mergekit_bayes.plan.steps import MatchedTensors, Operand, Step, TensorRef
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import refuse_emptied, refuse_quantised

Laid = Mapping[str, OutputTensor]  # where each tensor of the output comes from, by its name there


def lay_out(
    recipe: Recipe, config: MergeConfig, parts: Sequence[Part], models: OpenedModels
) -> dict[str, OutputTensor]:
    """Where each tensor of the output comes from; its `slice` is the number of its part.

    Args:
        recipe: The recipe.
        config: The settings of the merge.
        parts: Its parts.
        models: Its models.

    Raises:
        BmergeError: Layers that a model does not have, or tensors that are in no module.
    """
    if not is_stacked(recipe):
        donor = models.inputs.donor.posterior
        return {tensor.name: tensor for tensor in map_models([_names(donor)])}
    for model in models.by_name.values():  # a stack of several models shows this of the first one
        refuse_emptied(model)
        refuse_quantised(model)
    bodies, first = bodies_of(recipe), 0
    laid: dict[str, OutputTensor] = {}
    for body in bodies:
        count = len(body.slices) or 1
        tensors = _body_tensors(recipe, config, body, parts[first : first + count], models)
        for tensor in tensors:
            if body.makes(tensor.name):
                laid[tensor.name] = tensor._replace(slice=first + tensor.slice)
        first += count
    donor = models.inputs.donor.posterior
    refuse_uncovered(recipe, bodies, donor.mean.specs)
    return laid


def _body_tensors(
    recipe: Recipe,
    config: MergeConfig,
    body: Body,
    parts: Sequence[Part],
    models: OpenedModels,
) -> list[OutputTensor]:
    def named(sources: Sequence[Source]) -> list[ModelNames]:
        return [_names(models.by_name[str(source.model)]) for source in sources]

    if body.models:
        return map_models(named(parts[0].listed))
    rows = [named(piece.sources) for piece in body.slices]
    tensors = map_slices(body.slices, rows, recipe.label)
    refuse_misfits(body.slices, rows, models.by_name, recipe.label)
    owner = config_input(models.inputs)
    return with_heads(
        tensors,
        body.slices,
        models.by_name,
        unties=owner is not None and ties_embeddings(config_of(owner.posterior)) is False,
        may_lack=config.on_missing != "error",
        label=recipe.label,
    )


def _names(model: Posterior) -> ModelNames:
    return ModelNames(model.ref, model.mean.specs, layer_count(config_of(model)))


def match_laid(
    recipe: Recipe,
    config: MergeConfig,
    method: Method,
    parts: Sequence[Part],
    models: OpenedModels,
    laid: Laid,
    notes: list[str],
) -> MatchedTensors:
    """Match the tensors of all models, by the names that they have in the output.

    Args:
        recipe: The recipe.
        config: The settings of the merge.
        method: Its method.
        parts: Its parts.
        models: Its models.
        laid: Where the tensors of the output come from.
        notes: Remarks for the report are appended here.

    Raises:
        BmergeError: As `match_tensors`.
    """
    if not is_stacked(recipe):
        return match_tensors(config, method, models.inputs, (), notes)
    stacked = _stacked(parts, models, laid)
    matched = match_tensors(config, method, stacked, (), notes)
    places = {model: place for place, model in enumerate(stacked)}

    matched.steps[:] = [_with_operands(step, places, laid, models) for step in matched.steps]
    return matched


def _with_operands(
    step: Step, places: Mapping[Input, int], laid: Laid, models: OpenedModels
) -> Step:
    real = {id(o): _real(step, o, places, laid, models) for o in step.operands}
    tasks = tuple(found for task in step.tasks if (found := real[id(task)]) is not None)
    base = None if step.base is None else real[id(step.base)]
    rest = None if step.rest is None else real[id(step.rest)]
    return replace(step, base=base, tasks=tasks, rest=rest)


def _stacked(parts: Sequence[Part], models: OpenedModels, laid: Laid) -> Inputs:
    """The n-th sources of all parts as one model each."""
    count = max(len(part.sources) for part in parts)
    inputs = []
    for place in range(count):
        origins: dict[str, Origin] = {}
        first: Posterior | None = None
        for name, one in laid.items():
            part = parts[one.slice]
            # Where a part has fewer sources its first one stands in, and is dropped again.
            source = part.sources[place if place < len(part.sources) else 0]
            posterior = models.by_name[str(source.model)]
            at = next(i for i, other in enumerate(part.listed) if other is source)
            if (own := one.sources[at]) is not None:
                origins[name] = Origin(posterior.mean, own)
                first = first or posterior
        assert first is not None
        mean = StackedSource(origins)
        inputs.append(replace(first, mean=mean, precision=None, info=None, parts=()))
    has_base = parts[0].base is not None
    base = Input(inputs[0], 0.0) if has_base else None
    tasks = tuple(Input(posterior, 1.0) for posterior in inputs[has_base:])
    return Inputs(base, tasks)


def _real(
    step: Step, operand: Operand, places: Mapping[Input, int], laid: Laid, models: OpenedModels
) -> Operand | None:
    """An operand by the model that it really comes from; None where it only stands in.

    Where the model lacks the tensor, it is the donor's.
    """
    source = operand.mean.source
    assert isinstance(source, StackedSource)
    # What was found to be tied to another tensor is so in its values; whose they are is said here.
    name = step.source if step.source in source.specs else operand.mean.name
    part = laid[step.source if step.source in laid else name].slice
    if (part, places[operand.input]) not in models.of_source:
        return None
    model, place = models.of_source[part, places[operand.input]], places[operand.mean.input]
    owner = models.of_source[part, place]
    if models.of_source[laid[name].slice, place].posterior is not owner.posterior:
        raise MismatchError(
            f"'{step.source}' is not in '{owner.ref}', and the '{name}' of another slice is not "
            "taken for it. Save that model with all of its tensors."
        )
    return operand._replace(input=model, mean=TensorRef(owner, source.origin(name).name))


def sliced_config(recipe: Recipe, models: OpenedModels, inputs: Inputs) -> dict[str, object]:
    """What other layers change in the written config.

    Args:
        recipe: The recipe.
        models: Its models.
        inputs: The models, of which one gives the config.

    Raises:
        MismatchError: The config cannot say what holds of the new layers.
    """
    owner = config_input(inputs)
    slices = next((body.slices for body in bodies_of(recipe) if body.slices), ())
    if not slices or owner is None:
        return {}
    layers = []
    for index, number in layer_sources(slices):
        posterior = models.by_name[str(slices[index].sources[0].model)]
        layers.append(LayerOrigin(posterior.ref, config_of(posterior), number))
    return config_changes(config_of(owner.posterior), layers)
