"""Which tensor is which, which are merged, which are copied or left out, and which shapes do not
fit.
"""

import re
from collections.abc import Sequence

from mergekit_bayes.checkpoint.names import (
    Renaming,
    find_renaming,
    is_alias,
    is_buffer,
    is_vocabulary,
    tied_source,
)
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.checkpoint.tokenizers import tokens_apart
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.precisions import donor_precision, match_precisions, precision_shape
from mergekit_bayes.plan.scales import ScaleRule
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.steps import Found, Matched, Step
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.quantised import refuse_quantised


def match_tensors(
    config: MergeConfig,
    method: Method,
    models: Sequence[Posterior],
    scales: Sequence[float],
    rules: Sequence[ScaleRule],
    notes: list[str],
) -> Matched:
    """What becomes of every tensor; raises where the rules do not say."""
    donor = models[0].mean
    for model in models:
        refuse_quantised(model)
    other_tokens = _other_tokens(models)
    maps = [_name_map(models[0], m, notes) for m in models]
    only = re.compile(config.only) if config.only else None
    left_out = _left_out(config, models[0], models[1:], maps[1:], only)
    used: set[str] = set()
    parameters = 0
    found = Matched([], left_out, {})
    for name, spec in donor.specs.items():
        if is_buffer(name) or spec.dtype not in MERGEABLE:
            found.steps.append(_copy(name, spec, f"not a parameter ({spec.dtype})"))
            continue
        written = TensorSpec(config.dtype or spec.dtype, spec.shape)
        own = _scales(config, name, scales, rules, used)
        first = len(models) - len(own)
        sources: tuple[Found, ...] = (Found(0, name),)
        merged, reason = 0, None
        if only is not None and not only.search(name):
            reason = "not matched by --only"  # nobody else is asked: heads may differ
        elif config.base is None or any(own):
            asked = _sources(config, name, own, models, maps, found)
            if asked is None:
                continue
            sources = asked
            own = tuple(
                x if sources[first + t].model == first + t else 0.0 for t, x in enumerate(own)
            )
            merged, reason = _common(config, name, spec, sources, models, found)
            if other_tokens is not None and is_vocabulary(name):
                if config.vocab != "base":
                    raise MismatchError(other_tokens)
                reason = "tokenizers differ; --vocab base"
        if reason is None and config.base is not None and not any(own):
            reason = "all scales are zero"
        parameters += 1
        precisions, shape = None, spec.shape
        if method.needs_precision and reason is not None:
            precisions = donor_precision(name, sources[0].name, models)
        elif method.needs_precision:
            precisions, alone = match_precisions(config, name, sources, models)
            own = tuple(0.0 if first + t in alone else x for t, x in enumerate(own))
            if precisions is None:
                reason = "no model has a precision for it, and all agree"
            elif alone and not any(own):
                reason = "no task changed it"
                precisions = precisions[:1]
        if precisions is not None:
            shape = precision_shape(
                config, spec, precisions, models, merged if reason is None else 0
            )
        found.steps.append(
            Step(name, written, sources, precisions, shape, own, 0 if reason else merged, reason)
        )
    if only is not None and all(s.copied is not None for s in found.steps):
        raise ConfigError(
            f"--only '{config.only}' matches no tensor of '{models[0].ref}' that is merged."
        )
    if not parameters and donor.specs:
        raise MismatchError(
            f"'{models[0].ref}' and '{models[-1].ref}' have no parameter in common "
            f"('{next(iter(donor.specs))}' there, "
            f"'{next(iter(models[-1].mean.specs), 'none')}' here). Are they of one architecture?"
        )
    for rule in rules:
        if rule.text not in used:
            raise ConfigError(f"--scale '{rule.text}' matches no tensor of '{models[0].ref}'.")
    return found


def _other_tokens(models: Sequence[Posterior]) -> str | None:
    """Rows of embeddings are merged by number: what to say if one number stands for different
    tokens.
    """
    for model in models[1:]:
        apart = tokens_apart(models[0].path, model.path)
        if apart:
            number, one, other = apart[0]
            return (
                f"{len(apart):,} token numbers stand for other tokens in '{model.ref}' than in "
                f"'{models[0].ref}' "
                f"({number} is {other!r} there, {one!r} here; tokenizer.json). Embeddings are "
                "merged by number: "
                f"--vocab base keeps those of '{models[0].ref}'."
            )
    return None


def _copy(name: str, spec: TensorSpec, reason: str) -> Step:
    return Step(name, spec, (Found(0, name),), None, spec.shape, (), 0, reason)


def _scales(
    config: MergeConfig,
    name: str,
    scales: Sequence[float],
    rules: Sequence[ScaleRule],
    used: set[str],
) -> tuple[float, ...]:
    own = list(scales)
    for rule in rules:
        if rule.pattern.search(name):
            for task in rule.tasks:
                own[task] = rule.scale
            used.add(rule.text)
    if config.base is None and sum(own) <= 0:
        raise ConfigError(
            f"--scale leaves '{name}' without a share of any model. Give one of them more than "
            "zero there, or name a "
            "--base to keep."
        )
    return tuple(own)


def _sources(
    config: MergeConfig,
    name: str,
    scales: Sequence[float],
    models: Sequence[Posterior],
    maps: Sequence[dict[str, str]],
    found: Matched,
) -> tuple[Found, ...] | None:
    """Each model's tensor; None if the tensor is left out. A task of scale zero is not asked for
    its own.
    """
    result = []
    for i, (model, names) in enumerate(zip(models, maps, strict=True)):
        if config.base is not None and i > 0 and scales[i - 1] == 0:
            result.append(Found(0, name))
            continue
        own = names.get(name) or tied_source(name, model.mean)
        if own is not None:
            if name not in names:
                found.rule(name, f"'{model.ref}' ties it to '{own}'")
            result.append(Found(i, own))
        elif config.on_missing == "skip":
            found.left_out[name] = f"'{model.ref}' has none"
            return None
        elif config.on_missing == "base":
            found.rule(name, f"'{model.ref}' has none and counts as unchanged")
            result.append(Found(0, name))
        else:
            raise MismatchError(
                f"'{name}' is in '{models[0].ref}' but not in '{model.ref}'. All models of a merge "
                "share one "
                "architecture; was this one fine-tuned from another base? "
                + ("--on-missing base takes it as unchanged, " if config.base is not None else "")
                + "--on-missing skip leaves it out."
            )
    return tuple(result)


def _common(
    config: MergeConfig,
    name: str,
    spec: TensorSpec,
    sources: Sequence[Found],
    models: Sequence[Posterior],
    found: Matched,
) -> tuple[int, str | None]:
    """Entries to merge, and the reason if there are none. Lengths may differ by the rule for
    vocabularies only.
    """
    rows = []
    for source in sources:
        model = models[source.model]
        there = model.mean.specs[source.name]
        if there.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{name}' is {there.dtype} in '{model.ref}' ({model.mean.where(source.name)}); "
                "means are merged from "
                f"{', '.join(MERGEABLE)}. Cast that model to BF16 first."
            )
        if there.shape == spec.shape:
            rows.append(spec.shape[0] if spec.shape else 1)
            continue
        by_token = bool(
            spec.shape and there.shape and there.shape[1:] == spec.shape[1:]
        ) and is_vocabulary(name)
        if not by_token or config.vocab == "error":
            way_out = (
                "--vocab common merges the tokens that all have, --vocab base keeps those of "
                f"'{models[0].ref}'."
                if by_token
                else "All models of a merge share one architecture; was this one fine-tuned from another base? "
                "--only chooses what is merged, where heads differ say."
            )
            raise MismatchError(
                f"'{name}' is {list(spec.shape)} in '{models[0].ref}' but {list(there.shape)} in "
                f"'{model.ref}' "
                f"({model.mean.where(source.name)}). {way_out}"
            )
        rows.append(there.shape[0])
    if len(set(rows)) <= 1:
        return spec.size, None
    if config.vocab == "base":
        return 0, f"vocabularies differ ({', '.join(str(r) for r in rows)} rows); --vocab base"
    if min(rows) < spec.shape[0]:
        found.rule(
            name,
            f"{min(rows)} of {spec.shape[0]} rows are merged, the others are '{models[0].ref}''s "
            "own",
        )
    else:
        found.rule(name, f"the first {min(rows)} rows of {max(rows)} are merged")
    return spec.size // spec.shape[0] * min(rows), None


def _name_map(donor: Posterior, model: Posterior, notes: list[str]) -> dict[str, str]:
    """Donor's name to the model's own name, for all that both hold."""
    if model is donor:
        return {n: n for n in donor.mean.specs}
    renaming = find_renaming(donor.mean.specs, model.mean.specs)
    if renaming != Renaming():
        what = (
            f"without its prefix '{renaming.strip}'"
            if renaming.strip
            else f"with the prefix '{renaming.add}'"
        )
        notes.append(
            f"names of '{model.ref}' are matched {what}, and written as '{donor.ref}' has them"
        )
    result: dict[str, str] = {}
    for own in model.mean.specs:
        there = renaming(own, donor.mean.specs)
        if there in result:
            raise MismatchError(
                f"'{own}' and '{result[there]}' of '{model.ref}' are both '{there}' of "
                f"'{donor.ref}'. Rename one."
            )
        result[there] = own
    return result


def _left_out(
    config: MergeConfig,
    donor: Posterior,
    models: Sequence[Posterior],
    maps: Sequence[dict[str, str]],
    only: re.Pattern[str] | None,
) -> dict[str, str]:
    result: dict[str, str] = {}
    for model, names in zip(models, maps, strict=True):
        extra = []
        for there, own in names.items():
            if there in donor.mean.specs:
                continue
            if is_buffer(own) or model.mean.specs[own].dtype not in MERGEABLE:
                result[own] = f"not a parameter; only '{model.ref}' has it"
            elif is_alias(own, model.mean):
                result[own] = f"tied to the input embedding in '{model.ref}'"
            elif config.on_missing != "error" or (only is not None and not only.search(there)):
                result[own] = f"only '{model.ref}' has it"
            else:
                extra.append(own)
        if extra:
            tied = tied_source(extra[0], donor.mean)
            cause = (
                f"'{donor.ref}' ties it to '{tied}', '{model.ref}' has one of its own."
                + (f" Name '{model.ref}' first to merge both." if config.base is None else "")
                if tied is not None
                else "All models of a merge share one architecture; was this one fine-tuned from another base?"
            )
            raise MismatchError(
                f"'{extra[0]}' ({len(extra)} such) is in '{model.ref}' but not in '{donor.ref}'. "
                f"{cause} "
                f"--on-missing {'skip' if config.base is None else 'base'} leaves it out."
            )
    return result
