"""Which tensor is which, which are merged, which are copied or left out, and which shapes do not fit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.names import Renaming, find_renaming, is_alias, is_buffer, tied_source
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.tensors import MERGEABLE, TensorSpec, block_hash


@dataclass(frozen=True)
class Step:
    """One tensor of the output. Sources are in the order of `MergePlan.models`; the donor is the first.

    `precisions` is None where no precision is written. A copy takes bytes from the donor alone.
    """

    name: str
    spec: TensorSpec
    sources: tuple[str, ...]
    precisions: tuple[str | None, ...] | None
    copied: str | None = None  # the reason, if the tensor is copied


def match_tensors(
    config: MergeConfig, models: Sequence[Posterior], scales: Sequence[float], notes: list[str]
) -> tuple[list[Step], dict[str, str]]:
    donor = models[0].mean
    maps = [_name_map(models[0], m, notes) for m in models]
    left_out = _left_out(models[0], models[1:], maps[1:])
    idle = config.base is not None and not any(scales)
    only = re.compile(config.only) if config.only else None
    steps = []
    for name, spec in donor.specs.items():
        copied = None
        if is_buffer(name) or (spec.dtype not in MERGEABLE and not spec.dtype.startswith("F8")):
            copied = f"not a parameter ({spec.dtype})"
            steps.append(Step(name, spec, (name,), None, copied))
            continue
        sources = tuple(_source_name(name, spec, m, maps[i], models[0]) for i, m in enumerate(models))
        if only is not None and not only.search(name):
            copied = "not matched by --only"
        elif idle:
            copied = "all scales are zero"
        precisions = None
        if config.weights == "precision" and copied is not None:
            precisions = _donor_precision(name, sources[0], models)
        elif config.weights == "precision":
            precisions = _precision_names(name, spec, sources, models)
            if precisions is None:
                copied = "no model has a precision for it, and all agree"
        steps.append(Step(name, spec, sources, precisions, copied))
    if only is not None and not any(s.copied is None for s in steps):
        raise ConfigError(f"--only '{config.only}' matches no tensor of '{models[0].ref}'.")
    return steps, left_out


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


def _left_out(donor: Posterior, models: Sequence[Posterior], maps: Sequence[dict[str, str]]) -> dict[str, str]:
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
            else:
                extra.append(own)
        if extra:
            raise MismatchError(
                f"'{extra[0]}' ({len(extra)} such) is in '{model.ref}' but not in '{donor.ref}'. "
                "All models of a merge share one architecture; was this one fine-tuned from another base?"
            )
    return result


def _source_name(name: str, spec: TensorSpec, model: Posterior, names: dict[str, str], donor: Posterior) -> str:
    own = names.get(name)
    if own is None:
        # A tied head that this file leaves out is its embedding; an untied one would be lost.
        own = tied_source(name, model.mean) if is_alias(name, donor.mean) else None
        if own is None:
            raise MismatchError(
                f"'{name}' is in '{donor.ref}' but not in '{model.ref}'. "
                "All models of a merge share one architecture; was this one fine-tuned from another base?"
            )
    found = model.mean.specs[own]
    if found.shape != spec.shape:
        raise MismatchError(
            f"'{name}' is {list(spec.shape)} in '{donor.ref}' but {list(found.shape)} in '{model.ref}' "
            f"({model.mean.where(own)}). All models of a merge share one architecture; was this one fine-tuned from "
            "another base?"
        )
    for dtype in (spec.dtype, found.dtype):
        if dtype not in MERGEABLE:
            raise MismatchError(
                f"'{name}' is {dtype} in one of the models; means are merged from {', '.join(MERGEABLE)}. "
                "Cast that model to BF16 first."
            )
    return own


def _donor_precision(name: str, source: str, models: Sequence[Posterior]) -> tuple[str | None, ...] | None:
    """Names for a tensor that is copied: only the donor's precision is needed, and none is written if it has none."""
    donor = models[0]
    if donor.precision is None:
        return (None,) * len(models)
    own = _precision_name(name, source, donor)
    return None if own is None else (own, *(None,) * (len(models) - 1))


def _precision_names(
    name: str, spec: TensorSpec, sources: Sequence[str], models: Sequence[Posterior]
) -> tuple[str | None, ...] | None:
    """Each model's name for a tensor's precision (None: isotropic); None if no model has one and all agree."""
    found: list[str | None] = []
    missing = []
    for model, source in zip(models, sources, strict=True):
        if model.precision is None:
            found.append(None)
            continue
        own = _precision_name(name, source, model)
        found.append(own)
        if own is None:
            missing.append(model)
            continue
        there = model.precision.specs[own]
        if there.shape != spec.shape or there.dtype not in MERGEABLE:
            raise PrecisionError(
                f"the precision of '{own}' in {model.precision.where(own)} is {there.dtype} {list(there.shape)}, "
                f"expected a float tensor {list(spec.shape)} like the mean's."
            )
    if not missing:
        return tuple(found)
    files = [m for m in models if m.precision is not None]
    specs = {m.mean.specs[s] for m, s in zip(models, sources, strict=True)}
    if len(missing) == len(files) and len(specs) == 1:
        hashes = {block_hash(m.mean, s) for m, s in zip(models, sources, strict=True)}
        if len(hashes) == 1:
            return None
    file = missing[0].precision
    raise PrecisionError(
        f"no precision for '{name}' of '{missing[0].ref}' (looked in {file.files[0] if file else ''}). Was it frozen "
        "in training? Make a full one with `bmerge precision`, or leave the tensor out of the merge with --only."
    )


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
