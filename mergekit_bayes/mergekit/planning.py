"""Plan the merge that a recipe of mergekit describes, as our merges are planned.

The tensors of all models are matched by the rules of every merge (other prefixes, tied heads, lost
layers). Layers of slices are first put under the names that they have in the output, without a
copy. What is particular to a recipe is that weights and settings may differ between tensors: they
become the scales of a step's operands, and its settings.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

from mergekit_bayes.checkpoint.model_config import layer_count, read_config
from mergekit_bayes.checkpoint.stamps import documents_in, stamps_of
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import open_model
from mergekit_bayes.mergekit.layer_configs import LayerOrigin, config_changes
from mergekit_bayes.mergekit.layers import (
    ModelNames,
    OutputTensor,
    layer_sources,
    map_models,
    map_slices,
)
from mergekit_bayes.mergekit.objects import Recipe, Reference, Tokenizer
from mergekit_bayes.mergekit.resolved import Resolver, refuse_missing, with_weights
from mergekit_bayes.mergekit.roles import SEED, Part, method_of, parts_of
from mergekit_bayes.mergekit.stacked import Origin, StackedSource
from mergekit_bayes.mergekit.token_plans import tokens_of
from mergekit_bayes.mergekit.written import recipe_yaml
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan import MergeConfig, MergePlan
from mergekit_bayes.plan.corrections import correct_config
from mergekit_bayes.plan.heads import head_changes
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.lost_heads import refuse_lost_heads
from mergekit_bayes.plan.match import match_tensors
from mergekit_bayes.plan.model_configs import compare_configs
from mergekit_bayes.plan.outputs import choose_target, split_shards
from mergekit_bayes.plan.plan import refuse_incomplete
from mergekit_bayes.plan.side_files import choose_side_files, config_input, refuse_links
from mergekit_bayes.plan.steps import MatchedTensors, Operand, Step, TensorRef
from mergekit_bayes.plan.unions import TokenPlan
from mergekit_bayes.plan.united import side_files_of
from mergekit_bayes.plan.whole_tensors import memory_in_words
from mergekit_bayes.posterior import Posterior

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
_SHARD = "5GB"  # as transformers, where the layers are not those of one model


class _Models(NamedTuple):
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


def plan_recipe(
    recipe: Recipe,
    settings: MergeConfig,
    *,
    seed: int | None = None,
    outputs: Mapping[str, str] | None = None,
) -> MergePlan:
    """Open the models of a recipe and decide the merge.

    Args:
        recipe: What is merged.
        settings: Where the output goes, and the rules of every merge (`force`, `verify`,
            `on_missing`, `on_config`, `on_bad`, `side_files`, `max_shard_size`). What the recipe
            says itself is not read from them.
        seed: Of a random method, in place of that of the recipe, `parameters.seed`, or 0.
        outputs: The outputs of earlier documents, by name.

    Returns:
        The plan, which holds the models' files open until it is closed.

    Raises:
        BmergeError: As `plan_merge`, for the recipe's keys.
    """
    method = method_of(recipe)
    if recipe.modules:
        raise ConfigError(
            f"{recipe.label}: modules: only 'default' is read, which is all of a model. Parts of a "
            "model are paired by their names: write `models`."
        )
    parts = parts_of(recipe, method)
    refuse_missing(recipe, method, parts)
    notes: list[str] = []
    with ExitStack() as stack:
        models = _open(recipe, parts, outputs or {}, stack)
        tokens = None
        if recipe.tokenizer is not None:
            tokens, models = _with_tokens(recipe.tokenizer, models)
            notes += tokens.notes
        inputs = models.inputs
        config = _config(recipe, settings, inputs, tokens)
        refuse_links(inputs)
        documents = stamps_of(file for path in inputs.folders for file in documents_in(path))
        target = choose_target(config, inputs)
        for posterior in models.by_name.values():
            notes += posterior.mean.notes
        refuse_lost_heads(inputs)
        laid = _laid(recipe, models)
        matched = _match(recipe, config, method, parts, models, laid, notes)
        resolver = Resolver(recipe, method, parts, laid, seed)
        steps = [resolver.resolved(step) for step in matched.steps]
        inputs, steps, _ = with_weights(inputs, steps, notes)
        compare_configs(config, inputs, steps, notes)
        changes = correct_config(inputs, steps, notes) | head_changes(config, inputs, steps, notes)
        changes |= _sliced_config(recipe, models, inputs)
        side_files = choose_side_files(config, inputs, steps, target, notes)
        made: dict[str, str | None] = {}
        if tokens is not None:
            side_files, made = side_files_of(side_files, tokens)
            changes |= tokens.config_changes
        if side_files is not None:
            copied = side_files.gathered.files.values()
            documents |= stamps_of(file for file in copied if file not in documents)
        if (memory := memory_in_words(method, steps)) is not None:
            notes.append(memory)
        plan = MergePlan(
            config=config,
            method=method,
            settings=resolver.constant,
            inputs=inputs,
            guard=config.guard,
            shrink=None,
            steps=tuple(steps),
            shards=split_shards(config, steps, inputs.donor.posterior, target),
            left_out=matched.left_out,
            decisions=matched.decisions,
            notes=tuple(notes),
            target=target,
            info=None,
            config_changes=changes | matched.ties.config_changes,
            drawing_identities={model: model.posterior.identity for model in inputs},
            side_files=side_files,
            documents=documents,
            made_files=made,
            recipe=_resolved_text(recipe, method, models, seed),
            does=_in_words(recipe, parts),
        )
        plan.refuse_changed()
        stack.pop_all()  # the plan closes them
        return plan


def _open(
    recipe: Recipe, parts: Sequence[Part], outputs: Mapping[str, str], stack: ExitStack
) -> _Models:
    """Open each model once."""
    by_name: dict[str, Posterior] = {}
    for source in (source for part in parts for source in part.sources):
        name = str(source.model)
        if name not in by_name:
            ref = _place(recipe, source.model, outputs)
            by_name[name] = stack.enter_context(open_model(ref, with_precision=False))
            refuse_incomplete(by_name[name])
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
            if name not in of_name or not recipe.slices:
                of_name[name] = Input(by_name[name], 1.0)
                tasks.append(of_name[name])
            of_source[number, place] = of_name[name]
    return _Models(by_name, Inputs(base, tuple(tasks)), of_source)


def _place(recipe: Recipe, model: Reference, outputs: Mapping[str, str]) -> str:
    """Where a model is: an earlier output, a path, or a Hub id."""
    path = outputs.get(model.path, model.path)
    if any(mark in text for text in (path, model.adapter or "") for mark in "+@"):
        raise ConfigError(
            f"{recipe.label}: model '{model}': '+' and '@' in a path cannot be told from those "
            "before an adapter and a revision. Rename the folder."
        )
    return str(model.model_copy(update={"path": path}))


def _with_tokens(tokenizer: Tokenizer, models: _Models) -> tuple[TokenPlan, _Models]:
    """The models with the rows of the tokens that a recipe chooses."""
    base = models.inputs.base
    tokens = tokens_of(tokenizer, models.by_name, None if base is None else base.posterior)
    by_name = dict(zip(models.by_name, tokens.models, strict=True))
    renewed = {id(models.by_name[name]): posterior for name, posterior in by_name.items()}
    inputs = {
        model: replace(model, posterior=renewed[id(model.posterior)]) for model in models.inputs
    }
    return tokens, _Models(
        by_name,
        Inputs(
            None if base is None else inputs[base], tuple(inputs[t] for t in models.inputs.tasks)
        ),
        {place: inputs[model] for place, model in models.of_source.items()},
    )


def _config(
    recipe: Recipe, settings: MergeConfig, inputs: Inputs, tokens: TokenPlan | None
) -> MergeConfig:
    dtype = recipe.out_dtype or recipe.dtype
    update: dict[str, object] = {
        "models": tuple(task.posterior.ref for task in inputs.tasks),
        "base": inputs.base.posterior.ref if inputs.base is not None else None,
        "dtype": _DTYPES[dtype] if dtype is not None else settings.dtype,
        "scale": (1.0,),
        "posterior": False,
    }
    if recipe.slices and settings.max_shard_size is None:
        update["max_shard_size"] = _SHARD
    if tokens is not None:
        update["vocab"] = "union"  # the rows of all models are those of one list of tokens
        if any(model.posterior.ref == tokens.ref for model in inputs):
            update["side_files"] = tokens.ref
    elif settings.side_files is None and inputs.donor.posterior.path.is_dir():
        update["side_files"] = inputs.donor.posterior.ref
    return settings.model_copy(update=update)


def _match(
    recipe: Recipe,
    config: MergeConfig,
    method: Method,
    parts: Sequence[Part],
    models: _Models,
    laid: Mapping[str, OutputTensor],
    notes: list[str],
) -> MatchedTensors:
    """Match the tensors of all models, by the names that they have in the output."""
    if not recipe.slices:
        return match_tensors(config, method, models.inputs, (), notes)
    stacked = _stacked(recipe, parts, models, laid)
    matched = match_tensors(config, method, stacked, (), notes)
    places = {model: place for place, model in enumerate(stacked)}

    def real(operand: Operand | None, step: Step) -> Operand | None:
        if operand is None:
            return None
        return _real(operand, step, places, laid, models)

    steps = []
    for step in matched.steps:
        tasks = [found for task in step.tasks if (found := real(task, step)) is not None]
        rest = None if step.rest is None else real(step.rest, step)
        steps.append(replace(step, base=real(step.base, step), tasks=tuple(tasks), rest=rest))
    matched.steps[:] = steps
    return matched


def _stacked(
    recipe: Recipe, parts: Sequence[Part], models: _Models, laid: Mapping[str, OutputTensor]
) -> Inputs:
    """The n-th sources of all slices as one model each."""
    count = max(len(part.sources) for part in parts)
    inputs = []
    for place in range(count):
        origins: dict[str, Origin] = {}
        first: Posterior | None = None
        for name, one in laid.items():
            sources = parts[one.slice].sources
            # Where a slice has fewer sources its first one stands in, and is dropped again.
            source = sources[place if place < len(sources) else 0]
            posterior = models.by_name[str(source.model)]
            listed = recipe.slices[one.slice].sources
            at = next(i for i, other in enumerate(listed) if other is source)
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
    operand: Operand,
    step: Step,
    places: Mapping[Input, int],
    laid: Mapping[str, OutputTensor],
    models: _Models,
) -> Operand | None:
    """An operand by the model that it really comes from; None where it only stands in."""
    place, source = places[operand.input], operand.mean.source
    assert isinstance(source, StackedSource)
    part = laid[operand.mean.name].slice
    if (part, place) not in models.of_source:
        return None
    model, origin = models.of_source[part, place], source.origin(operand.mean.name)
    return operand._replace(input=model, mean=TensorRef(model, origin.name))


def _laid(recipe: Recipe, models: _Models) -> dict[str, OutputTensor]:
    """Where each tensor of the output comes from, by its name there."""
    if not recipe.slices:
        tensors = map_models([_names(models.inputs.donor.posterior)])
    else:
        rows = [
            [_names(models.by_name[str(source.model)]) for source in piece.sources]
            for piece in recipe.slices
        ]
        tensors = map_slices(recipe.slices, rows, recipe.label)
    return {tensor.name: tensor for tensor in tensors}


def _names(model: Posterior) -> ModelNames:
    return ModelNames(model.ref, model.mean.specs, layer_count(_model_config(model)))


def _model_config(model: Posterior) -> dict[str, Any]:
    return read_config(model.parts[0].path if model.parts else model.path)


def _sliced_config(recipe: Recipe, models: _Models, inputs: Inputs) -> dict[str, object]:
    """What other layers change in the written config."""
    owner = config_input(inputs)
    if not recipe.slices or owner is None:
        return {}
    layers = []
    for index, number in layer_sources(recipe.slices):
        posterior = models.by_name[str(recipe.slices[index].sources[0].model)]
        layers.append(LayerOrigin(posterior.ref, _model_config(posterior), number))
    return config_changes(_model_config(owner.posterior), layers)


def _resolved_text(recipe: Recipe, method: Method, models: _Models, seed: int | None) -> str:
    """The recipe that gives the same bytes again, with Hub ids by their commits."""

    def named(reference: Reference) -> str:
        posterior = models.by_name.get(str(reference))
        return str(reference) if posterior is None else posterior.pinned

    if method.random and seed is not None:
        parameters = {**recipe.parameters, SEED: seed}
        recipe = recipe.model_copy(update={"parameters": parameters})
    return recipe_yaml(recipe, named)


def _in_words(recipe: Recipe, parts: Sequence[Part]) -> str:
    names = {str(source.model) for part in parts for source in part.sources}
    slices = f" in {len(parts)} slices" if recipe.slices else ""
    return f"{recipe.merge_method} of {len(names)} models{slices}, by {recipe.label}"
