"""Plan the merge that a recipe of mergekit describes, as our merges are planned.

The tensors of all models are matched by the rules of every merge (other prefixes, tied heads, lost
layers). Layers of slices are first put under the names that they have in the output, without a
copy. What is particular to a recipe is that weights and settings may differ between tensors: they
become the scales of a step's operands, and its settings.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from mergekit_bayes.checkpoint.sources import pinned
from mergekit_bayes.checkpoint.stamps import documents_in, stamps_of
from mergekit_bayes.errors import ConfigError, shown
from mergekit_bayes.mergekit.bodies import is_stacked
from mergekit_bayes.mergekit.chat_templates import files_of_template
from mergekit_bayes.mergekit.laying import lay_out, match_laid, sliced_config
from mergekit_bayes.mergekit.objects import Recipe, Reference, Tokenizer
from mergekit_bayes.mergekit.opened import OpenedModels, open_models, with_tokens
from mergekit_bayes.mergekit.resolved import Resolver, refuse_missing, with_weights
from mergekit_bayes.mergekit.roles import SEED, Part, method_of, parts_of
from mergekit_bayes.mergekit.stages import place_of
from mergekit_bayes.mergekit.written import recipe_file
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan import MergeConfig, MergePlan
from mergekit_bayes.plan.beside import plan_beside
from mergekit_bayes.plan.inputs import Inputs
from mergekit_bayes.plan.lost_heads import refuse_lost_heads
from mergekit_bayes.plan.outputs import choose_target, split_shards
from mergekit_bayes.plan.plan import note_narrowing
from mergekit_bayes.plan.side_files import refuse_links
from mergekit_bayes.plan.unions import TokenPlan
from mergekit_bayes.plan.whole_tensors import memory_in_words

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
# Flags that decide bytes and that a recipe has no word for; of dtypes, those of 8 bits.
_RULES = ("on-missing", "on-bad", "on-config", "on-base")
_FLAGS = (*_RULES, "vocab", "side-files", "max-shard-size", "dtype")
_SHARD = "5GB"  # as transformers, where the layers are not those of one model


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
            `on_missing`, `on_config`, `on_bad`, `on_base`, `side_files`, `max_shard_size`). What
            the recipe says itself is not read from them.
        seed: Of a random method, in place of that of the recipe, `parameters.seed`, or 0.
        outputs: The outputs of earlier documents, by name.

    Returns:
        The plan, which holds the models' files open until it is closed.

    Raises:
        BmergeError: As `plan_merge`, for the recipe's keys.
    """
    method, parts = checked_parts(recipe, settings, seed)
    notes: list[str] = []
    with ExitStack() as stack:
        models = open_models(
            recipe, parts, outputs or {}, stack, on_other_base=settings.on_base == "apply"
        )
        tokens, tokenizer = None, recipe.tokenizer
        if tokenizer is None and settings.vocab == "union":
            tokenizer = Tokenizer()
        if tokenizer is not None:
            tokens, models = with_tokens(recipe, tokenizer, models, outputs or {})
            notes += tokens.notes
        inputs = models.inputs
        config = _config(recipe, settings, inputs, tokens)
        refuse_links(inputs)
        documents = stamps_of(file for path in inputs.folders for file in documents_in(path))
        target = choose_target(config, inputs)
        for posterior in models.by_name.values():
            notes += posterior.mean.notes
        refuse_lost_heads(inputs)
        laid = lay_out(recipe, config, parts, models)
        matched = match_laid(recipe, config, method, parts, models, laid, notes)
        resolver = Resolver(recipe, method, parts, laid, seed)
        steps = [resolver.resolved(step) for step in matched.steps]
        inputs, steps = with_weights(inputs, steps, notes)
        notes += _layers_in_words(parts)
        if (settled := resolver.in_words()) is not None:
            notes.append(settled)
        why = "as the recipe's tokenizer says" if tokens is not None else None
        why = "as --side-files says" if settings.side_files is not None else why
        sliced = sliced_config(recipe, models, inputs)
        beside = plan_beside(config, inputs, steps, target, tokens, notes, further=sliced, why=why)
        opened = list(models.by_name.values())
        made = files_of_template(recipe, opened, beside.side_files, beside.made, notes)
        if (memory := memory_in_words(method, steps)) is not None:
            notes.append(memory)
        if config.dtype is None:  # else the narrowing was asked for
            note_narrowing([step for step in steps if step.copied is None], inputs, notes)
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
            config_changes=beside.config_changes | matched.ties.config_changes,
            drawing_identities={model: model.posterior.identity for model in inputs},
            side_files=beside.side_files,
            documents=beside.copied | documents,
            made_files=made,
            recipe=_resolved_text(recipe, method, models, tokens, outputs or {}, settings, seed),
            does=_in_words(recipe, parts),
        )
        plan.refuse_changed()
        stack.pop_all()  # the plan closes them
        return plan


def checked_parts(
    recipe: Recipe, settings: MergeConfig, seed: int | None
) -> tuple[Method, tuple[Part, ...]]:
    """The method and the parts of a recipe, checked as far as no model is needed for it.

    Args:
        recipe: The recipe.
        settings: Those of the merge.
        seed: Of a random method; None for that of the recipe.

    Raises:
        ConfigError: The recipe lacks something, or leaves a setting nothing to do.
    """
    method = method_of(recipe)
    parts = parts_of(recipe, method)
    refuse_missing(recipe, method, parts)
    _refuse_flags(recipe, method, parts, settings, seed)
    return method, parts


def _refuse_flags(
    recipe: Recipe, method: Method, parts: Sequence[Part], settings: MergeConfig, seed: int | None
) -> None:
    """Refuse settings that a recipe leaves nothing to do."""
    if recipe.tokenizer is not None:
        for flag, value, default in (
            ("--side-files", settings.side_files, None),
            ("--vocab", settings.vocab, "error"),
        ):
            if value != default:
                raise ConfigError(
                    f"{flag} {value}: {recipe.label} chooses the tokens by its 'tokenizer'. Drop "
                    "one of them."
                )
    if parts[0].base is None:
        for flag, choice in (("on-missing", settings.on_missing), ("on-bad", settings.on_bad)):
            if choice == "base":
                raise ConfigError(
                    f"--{flag} base takes the base's values, and '{method.name}' of {recipe.label} "
                    "has no base. Drop it."
                )
    bounds = next((p for p in method.parameters if p.name == SEED), None)
    if seed is None:
        return
    if bounds is None:
        raise ConfigError(
            f"--param seed={seed}: '{method.name}' of {recipe.label} draws nothing. Drop it."
        )
    if not bounds.low <= seed <= bounds.high:
        raise ConfigError(
            f"--param seed={shown(seed)}: expected a whole number from {bounds.low:.0f} to "
            f"{bounds.high:.0f}."
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
    if is_stacked(recipe) and settings.max_shard_size is None:
        update["max_shard_size"] = _SHARD
    if tokens is not None:
        update["vocab"] = "union"  # the rows of all models are those of one list of tokens
        if any(model.posterior.ref == tokens.ref for model in inputs):
            update["side_files"] = tokens.ref
    elif settings.side_files is None and inputs.donor.posterior.path.is_dir():
        update["side_files"] = inputs.donor.posterior.ref
    return settings.model_copy(update=update)


def _resolved_text(
    recipe: Recipe,
    method: Method,
    models: OpenedModels,
    tokens: TokenPlan | None,
    outputs: Mapping[str, str],
    settings: MergeConfig,
    seed: int | None,
) -> str:
    """The recipe that gives the same bytes again, with Hub ids by their commits."""

    def named(reference: Reference) -> str:
        posterior, name = models.by_name.get(str(reference)), str(reference)
        if place_of(reference, outputs, recipe.label) != name:  # the output of a stage
            return name
        if posterior is not None:
            return posterior.pinned
        return name if tokens is None else pinned(name, tokens.folder)

    identities = {
        posterior.pinned: posterior.identity
        for posterior in models.by_name.values()
        if posterior.ref not in outputs.values()
    }
    flags = {flag: str(value) for flag in _FLAGS if (value := _given(settings, flag)) is not None}
    if recipe.dtype or recipe.out_dtype or settings.dtype in _DTYPES.values():
        flags.pop("dtype", None)
    if (owner := flags.get("side-files")) is not None:
        by_ref = {posterior.ref: posterior.pinned for posterior in models.by_name.values()}
        flags["side-files"] = by_ref.get(owner, owner)
    update: dict[str, object] = {}
    if recipe.dtype is None and recipe.out_dtype is None:
        names = {ours: name for name, ours in _DTYPES.items()}
        update["out_dtype"] = names.get(settings.dtype or "")
    if method.random and seed is not None:
        update["parameters"] = {**recipe.parameters, SEED: seed}
    return recipe_file(recipe.model_copy(update=update), named, flags, identities)


def _given(settings: MergeConfig, flag: str) -> object:
    """A setting of the merge; None where it is the usual one."""
    name = flag.replace("-", "_")
    value = getattr(settings, name)
    return None if value == MergeConfig.model_fields[name].default else value


def _in_words(recipe: Recipe, parts: Sequence[Part]) -> str:
    names = {str(source.model) for part in parts for source in part.sources}
    slices = f" in {_counted(len(parts), 'slice')}" if recipe.slices else ""
    models = _counted(len(names), "model")
    return f"{recipe.merge_method} of {models}{slices}, by {recipe.label}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count > 1)}"


def _span(start: int, end: int) -> str:
    return f"layer {start}" if end == start + 1 else f"layers {start} to {end - 1}"


def _layers_in_words(parts: Sequence[Part]) -> list[str]:
    """Which layers of the output are made of which layers, a line for each slice."""
    lines, first = [], 0
    for part in parts:
        ranges = [(str(s.model), *s.layers) for s in part.listed if s.layers is not None]
        if not ranges:
            continue
        length = ranges[0][2] - ranges[0][1]
        made = " and ".join(f"{_span(start, end)} of '{name}'" for name, start, end in ranges)
        lines.append(f"{_span(first, first + length)} of the output: {made}")
        first += length
    return lines
