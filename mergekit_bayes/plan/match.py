"""Which tensor is which, which are merged, which are copied or left out, and which shapes do not fit."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.methods import Method
from mergekit_bayes.names import Renaming, find_renaming, is_alias, is_buffer, is_vocabulary, tied_source
from mergekit_bayes.plan.settings import MergeConfig, ScaleRule
from mergekit_bayes.posterior import Posterior, tokens_apart
from mergekit_bayes.tensors import MERGEABLE, TensorSpec, block_hash, read_chunk


class Found(NamedTuple):
    """A tensor of one of the plan's models."""

    model: int
    name: str


@dataclass(frozen=True)
class Step:
    """One tensor of the output. Sources are in the order of `MergePlan.models`; the donor is the first.

    Attributes:
        spec: As it is written.
        sources: Each model's tensor; the donor's where a task lacks it (its scale is then zero).
        precisions: Each model's precision, None for one number everywhere; None where no precision is written.
        pooled: Shape of the written precision: the tensor's own, one number a row, or one number.
        scales: One per task.
        merged: Entries that are merged, from the first on; the others are the donor's.
        copied: The reason, if all of the tensor is the donor's.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Found, ...]
    precisions: tuple[Found | None, ...] | None
    precision_shape: tuple[int, ...]
    scales: tuple[float, ...]
    merged: int
    copied: str | None = None

    @property
    def row(self) -> int:
        """Entries of one row: one slice of the first axis."""
        return self.spec.size // self.spec.shape[0] if self.spec.shape and self.spec.size else 1


class Matched(NamedTuple):
    steps: list[Step]
    left_out: dict[str, str]
    mended: dict[str, str]  # what a rule decided for a tensor that is merged

    def rule(self, name: str, what: str) -> None:
        before = self.mended.get(name)
        self.mended[name] = what if before is None else f"{before}; {what}"


def match_tensors(
    config: MergeConfig, method: Method, models: Sequence[Posterior], scales: Sequence[float],
    rules: Sequence[ScaleRule], notes: list[str],
) -> Matched:  # fmt: skip
    """What becomes of every tensor; raises where the rules do not say."""
    donor = models[0].mean
    for model in models:
        _refuse_quantised(model)
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
            own = tuple(x if sources[first + t].model == first + t else 0.0 for t, x in enumerate(own))
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
            precisions = _donor_precision(name, sources[0].name, models)
        elif method.needs_precision:
            precisions, alone = _precisions(config, name, sources, models)
            own = tuple(0.0 if first + t in alone else x for t, x in enumerate(own))
            if precisions is None:
                reason = "no model has a precision for it, and all agree"
            elif alone and not any(own):
                reason = "no task changed it"
                precisions = precisions[:1]
        if precisions is not None:
            shape = _precision_shape(config, spec, precisions, models, merged if reason is None else 0)
        found.steps.append(Step(name, written, sources, precisions, shape, own, 0 if reason else merged, reason))
    if only is not None and all(s.copied is not None for s in found.steps):
        raise ConfigError(f"--only '{config.only}' matches no tensor of '{models[0].ref}' that is merged.")
    if not parameters and donor.specs:
        raise MismatchError(
            f"'{models[0].ref}' and '{models[-1].ref}' have no parameter in common ('{next(iter(donor.specs))}' there, "
            f"'{next(iter(models[-1].mean.specs), 'none')}' here). Are they of one architecture?"
        )
    for rule in rules:
        if rule.text not in used:
            raise ConfigError(f"--scale '{rule.text}' matches no tensor of '{models[0].ref}'.")
    return found


def _other_tokens(models: Sequence[Posterior]) -> str | None:
    """Rows of embeddings are merged by number: what to say if one number stands for different tokens."""
    for model in models[1:]:
        apart = tokens_apart(models[0].path, model.path)
        if apart:
            number, one, other = apart[0]
            return (
                f"{len(apart):,} token numbers stand for other tokens in '{model.ref}' than in '{models[0].ref}' "
                f"({number} is {other!r} there, {one!r} here; tokenizer.json). Embeddings are merged by number: "
                f"--vocab base keeps those of '{models[0].ref}'."
            )
    return None


def _copy(name: str, spec: TensorSpec, reason: str) -> Step:
    return Step(name, spec, (Found(0, name),), None, spec.shape, (), 0, reason)


def _scales(
    config: MergeConfig, name: str, scales: Sequence[float], rules: Sequence[ScaleRule], used: set[str]
) -> tuple[float, ...]:
    own = list(scales)
    for rule in rules:
        if rule.pattern.search(name):
            for task in rule.tasks:
                own[task] = rule.scale
            used.add(rule.text)
    if config.base is None and sum(own) <= 0:
        raise ConfigError(
            f"--scale leaves '{name}' without a share of any model. Give one of them more than zero there, or name a "
            "--base to keep."
        )
    return tuple(own)


def _refuse_quantised(model: Posterior) -> None:
    """Raise `MismatchError` for weights whose numbers are not the weights themselves."""
    way_out = (
        "Save the model dequantised first (from_pretrained with dtype=torch.bfloat16, model.dequantize(), then "
        "save_pretrained)."
    )
    for name, spec in model.mean.specs.items():
        scale = next((name + s for s in _SCALES if name + s in model.mean.specs), None) if spec.size > 1 else None
        if scale is not None:
            raise MismatchError(f"'{name}' of '{model.ref}' is quantised: its values count times '{scale}'. {way_out}")
        if _QUANTISED.search(name):
            raise MismatchError(f"'{model.ref}' is quantised: it holds '{name}' ({spec.dtype}). {way_out}")
    try:
        config = json.loads((model.path / "config.json").read_text())
    except (OSError, ValueError):
        return  # a file, or a folder whose config is none of a merge's business
    if isinstance(config, dict) and config.get("quantization_config"):
        raise MismatchError(f"'{model.ref}' is quantised: its config.json has a quantization_config. {way_out}")


_SCALES = ("_scale", "_scale_inv", ".weight_scale")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|SCB|absmax|quant_map|nested_absmax)$|\.quant_state\.|_blocks$"
)


def _sources(
    config: MergeConfig, name: str, scales: Sequence[float], models: Sequence[Posterior],
    maps: Sequence[dict[str, str]], found: Matched,
) -> tuple[Found, ...] | None:  # fmt: skip
    """Each model's tensor; None if the tensor is left out. A task of scale zero is not asked for its own."""
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
                f"'{name}' is in '{models[0].ref}' but not in '{model.ref}'. All models of a merge share one "
                "architecture; was this one fine-tuned from another base? "
                + ("--on-missing base takes it as unchanged, " if config.base is not None else "")
                + "--on-missing skip leaves it out."
            )
    return tuple(result)


def _common(
    config: MergeConfig, name: str, spec: TensorSpec, sources: Sequence[Found], models: Sequence[Posterior],
    found: Matched,
) -> tuple[int, str | None]:  # fmt: skip
    """Entries to merge, and the reason if there are none. Lengths may differ by the rule for vocabularies only."""
    rows = []
    for source in sources:
        model = models[source.model]
        there = model.mean.specs[source.name]
        if there.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{name}' is {there.dtype} in '{model.ref}' ({model.mean.where(source.name)}); means are merged from "
                f"{', '.join(MERGEABLE)}. Cast that model to BF16 first."
            )
        if there.shape == spec.shape:
            rows.append(spec.shape[0] if spec.shape else 1)
            continue
        by_token = bool(spec.shape and there.shape and there.shape[1:] == spec.shape[1:]) and is_vocabulary(name)
        if not by_token or config.vocab == "error":
            way_out = (
                f"--vocab common merges the tokens that all have, --vocab base keeps those of '{models[0].ref}'."
                if by_token
                else "All models of a merge share one architecture; was this one fine-tuned from another base? "
                "--only chooses what is merged, where heads differ say."
            )
            raise MismatchError(
                f"'{name}' is {list(spec.shape)} in '{models[0].ref}' but {list(there.shape)} in '{model.ref}' "
                f"({model.mean.where(source.name)}). {way_out}"
            )
        rows.append(there.shape[0])
    if len(set(rows)) <= 1:
        return spec.size, None
    if config.vocab == "base":
        return 0, f"vocabularies differ ({', '.join(str(r) for r in rows)} rows); --vocab base"
    if min(rows) < spec.shape[0]:
        found.rule(name, f"{min(rows)} of {spec.shape[0]} rows are merged, the others are '{models[0].ref}''s own")
    else:
        found.rule(name, f"the first {min(rows)} rows of {max(rows)} are merged")
    return spec.size // spec.shape[0] * min(rows), None


def _name_map(donor: Posterior, model: Posterior, notes: list[str]) -> dict[str, str]:
    """Donor's name to the model's own name, for all that both hold."""
    if model is donor:
        return {n: n for n in donor.mean.specs}
    renaming = find_renaming(donor.mean.specs, model.mean.specs)
    if renaming != Renaming():
        what = f"without its prefix '{renaming.strip}'" if renaming.strip else f"with the prefix '{renaming.add}'"
        notes.append(f"names of '{model.ref}' are matched {what}, and written as '{donor.ref}' has them")
    result: dict[str, str] = {}
    for own in model.mean.specs:
        there = renaming(own, donor.mean.specs)
        if there in result:
            raise MismatchError(
                f"'{own}' and '{result[there]}' of '{model.ref}' are both '{there}' of '{donor.ref}'. Rename one."
            )
        result[there] = own
    return result


def _left_out(
    config: MergeConfig, donor: Posterior, models: Sequence[Posterior], maps: Sequence[dict[str, str]],
    only: re.Pattern[str] | None,
) -> dict[str, str]:  # fmt: skip
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
                f"'{extra[0]}' ({len(extra)} such) is in '{model.ref}' but not in '{donor.ref}'. {cause} "
                f"--on-missing {'skip' if config.base is None else 'base'} leaves it out."
            )
    return result


def _donor_precision(name: str, source: str, models: Sequence[Posterior]) -> tuple[Found | None, ...] | None:
    """For a tensor that is copied: only the donor's precision is needed, and none is written if it has none."""
    donor = models[0]
    if donor.precision is None:
        return (None,) if donor.isotropic is not None else None
    own = _precision_name(name, source, donor)
    if own is None:
        return None
    _check_shape(own, source, donor)
    return (Found(0, own),)


def _check_shape(own: str, source: str, model: Posterior) -> None:
    assert model.precision is not None
    there, expected = model.precision.specs[own], model.mean.specs[source].shape
    allowed = (expected, row_shape(expected), one_shape(expected), ())
    if there.dtype not in ("F32", "BF16", "F64") or there.shape not in allowed:
        raise PrecisionError(
            f"the precision of '{own}' in {model.precision.where(own)} is {there.dtype} {list(there.shape)}, "
            f"expected F32 or BF16 {list(expected)} like the mean's, one number a row {list(row_shape(expected))}, "
            f"or one number {list(one_shape(expected))}."
        )


def _precisions(
    config: MergeConfig, name: str, sources: Sequence[Found], models: Sequence[Posterior]
) -> tuple[tuple[Found | None, ...] | None, set[int]]:
    """Each model's precision of a tensor (None: one number), and the tasks that left the tensor alone.

    A task that has no precision for a tensor and the base's values in it was frozen there: it counts as unchanged. The
    precisions are None if no model has one and all means agree.
    """
    result: list[Found | None] = []
    missing: list[int] = []
    for i, source in enumerate(sources):
        model = models[source.model]
        if model.precision is None:
            result.append(None)
            continue
        own = _precision_name(name, source.name, model)
        if own is None:
            missing.append(i)
            result.append(None)
            continue
        _check_shape(own, source.name, model)
        result.append(Found(source.model, own))
    same = {i for i in missing if _agree(sources[i], sources[0], models)}
    with_files = [i for i, s in enumerate(sources) if models[s.model].precision is not None]
    if missing and missing == with_files and len(same) == len(missing):
        return None, set()
    if 0 not in missing and same == set(missing) and config.base is not None:
        return tuple(result[0] if i in same else found for i, found in enumerate(result)), same
    first = next((i for i in missing if i not in same), missing[0]) if missing else 0
    if not missing:
        return tuple(result), set()
    model = models[sources[first].model]
    looked = model.precision.files[0] if model.precision is not None else model.path
    raise PrecisionError(
        f"no precision for '{name}' of '{model.ref}' (looked in {looked}). "
        "Was it frozen in training? Make a full one with `bmerge precision`, or leave the tensor out with --only."
    )


def _agree(a: Found, b: Found, models: Sequence[Posterior]) -> bool:
    """Whether two tensors hold the same values, in one dtype or two, by their sampled blocks."""
    left, right = models[a.model].mean, models[b.model].mean
    one, other = left.specs[a.name], right.specs[b.name]
    if one == other:
        return block_hash(left, a.name) == block_hash(right, b.name)
    if one.shape != other.shape:
        return False
    size, last = one.size, max(one.size - _SAMPLE, 0)
    for start in {last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}:
        stop = min(start + _SAMPLE, size)
        if not np.array_equal(read_chunk(left, a.name, start, stop), read_chunk(right, b.name, start, stop)):
            return False
    return True


_SAMPLE, _SAMPLES = 1024, 16  # entries of a block, and blocks


def row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a precision with one number a row: a slice of the first axis."""
    return (*shape[:1], *(1 for _ in shape[1:]))


def one_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a precision that is one number for the tensor."""
    return tuple(1 for _ in shape)


def _precision_shape(
    config: MergeConfig, spec: TensorSpec, precisions: Sequence[Found | None], models: Sequence[Posterior], merged: int
) -> tuple[int, ...]:
    """The coarsest shape that holds the merged precision; pooled ones stay kilobytes."""
    shapes = set()
    for found in precisions:
        there = one_shape(spec.shape)
        if found is not None:
            source = models[found.model].precision
            assert source is not None
            there = source.specs[found.name].shape
        if config.pool == "tensor":
            there = one_shape(spec.shape)
        elif config.pool == "row" and math.prod(there) > 1:
            there = row_shape(spec.shape)
        shapes.add("entry" if there[1:] != row_shape(there)[1:] else "row" if math.prod(there) > 1 else "tensor")
    by_row = config.shrink is not None and config.shrink.startswith("row:")
    if "entry" in shapes:
        return spec.shape
    finer = "row" in shapes or by_row or 0 < merged < spec.size
    return row_shape(spec.shape) if finer else one_shape(spec.shape)


def _precision_name(name: str, source: str, model: Posterior) -> str | None:
    assert model.precision is not None
    specs = model.precision.specs
    aliases = model.info.aliases if model.info else {}
    candidates = [source, name, aliases.get(source), tied_source(source, model.mean)]
    for candidate in candidates:
        if candidate is not None and candidate in specs:
            return candidate
    renamed = find_renaming(model.mean.specs, specs)
    return next((n for n in specs if renamed(n, model.mean.specs) == source), None) if renamed != Renaming() else None
