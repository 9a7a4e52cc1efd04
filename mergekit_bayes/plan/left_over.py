"""Explains why tensors are left over in two models, after all names that can be have been paired.

Where each of two models has tensors that the other lacks, these are mostly the same tensors: under
other names, or fused in one and split in the other. To leave them out would keep the donor's values
without a word, so no message here proposes that.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.names import is_buffer, output_layer
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Input
from mergekit_bayes.plan.tied_heads import Ties
from mergekit_bayes.posterior import Posterior

_SAVE_ALIKE = (
    "Load both with one version of transformers (5 or later) and save them with "
    "save_pretrained(..., save_original_format=False)"
)


def missing_in(
    model: Input, donor: Posterior, ties: Ties, only: re.Pattern[str] | None
) -> list[str]:
    """The parameters of the donor that a model does not have, tied or not.

    Args:
        model: The model to look in.
        donor: The model whose tensors are merged.
        ties: The tied tensors: a donor's copy of one is not missing.
        only: The pattern of `--only`: other tensors are not merged and need not be there.
    """
    return [
        name
        for name, spec in donor.mean.specs.items()
        if spec.dtype in MERGEABLE
        and not is_buffer(name)
        and (only is None or only.search(name))
        and ties.stored_name(name, model)[0] is None
    ]


def refuse_left_over(
    model: Posterior,
    donor: Posterior,
    unmatched: Sequence[str],
    missing: Sequence[str],
    ambiguous: Mapping[str, Sequence[str]],
) -> MismatchError:
    """The error of two models that each have parameters which the other lacks.

    Args:
        model: One model.
        donor: The other model.
        unmatched: The names that only `model` has.
        missing: The names that only `donor` has.
        ambiguous: For tensors of `model` that would fit several of the donor's, the donor's names.
    """
    specs, donors = model.mean.specs, donor.mean.specs
    counts = f"{_counted(unmatched)} of '{model.ref}' and {_counted(missing)} of '{donor.ref}'"
    doubtful = next((name for name in unmatched if name in ambiguous), unmatched[0])
    partner = next(iter(ambiguous.get(doubtful, ())), missing[0])
    examples = (
        f"'{doubtful}' {list(specs[doubtful].shape)} there, "
        f"'{partner}' {list(donors[partner].shape)} here"
    )
    why = _explain(model, donor, unmatched, missing, ambiguous)
    return MismatchError(f"{counts} are not in the other model ({examples}). {why}")


def left_over_note(
    model: Posterior, donor: Posterior, unmatched: Sequence[str], missing: Sequence[str], rule: str
) -> str:
    """The warning of a report that parameters were left over in both of two models."""
    outcome = (
        f"the {len(missing):,} of '{donor.ref}' stay as they are"
        if rule == "base"
        else f"so are the {len(missing):,} that only '{donor.ref}' has"
    )
    return (
        f"WARNING: {_counted(unmatched)} that only '{model.ref}' has are left out, and {outcome} "
        f"('{unmatched[0]}' and '{missing[0]}'). If they are the same under other names, what "
        f"'{model.ref}' learned in them is lost"
    )


def _explain(
    model: Posterior,
    donor: Posterior,
    unmatched: Sequence[str],
    missing: Sequence[str],
    ambiguous: Mapping[str, Sequence[str]],
) -> str:
    specs = {name: model.mean.specs[name] for name in unmatched}
    donors = {name: donor.mean.specs[name] for name in missing}
    types = [read_config(m.path).get("model_type") for m in (model, donor)]
    if all(isinstance(kind, str) for kind in types) and types[0] != types[1]:
        return (
            f"'{model.ref}' is of type {types[0]} and '{donor.ref}' of type {types[1]}, by their "
            "config.json. Only models of one architecture can be merged."
        )
    if _is_stacked(specs, donors):
        return _stacked(donor.ref, model.ref)
    if _is_stacked(donors, specs):
        return _stacked(model.ref, donor.ref)
    if name := next((name for name in unmatched if name in ambiguous), None):
        rivals = " and ".join(f"'{rival}'" for rival in ambiguous[name][:2])
        return f"'{name}' would fit {rivals}, and no rule tells which. {_SAVE_ALIKE}."
    if is_heads(unmatched) and is_heads(missing):
        heads = sorted({head for n in (*unmatched, *missing) if (head := output_layer(n))})
        pattern = "|".join(re.escape(head) for head in heads)
        return (
            "They have different output layers. "
            rf"--only '^(?!({pattern})(\.|$))' merges all but these, and keeps those of "
            f"'{donor.ref}'."
        )
    if Counter(s.shape for s in specs.values()) == Counter(s.shape for s in donors.values()):
        return (
            "Their shapes agree, so they seem to be the same tensors under other names, but no "
            f"rule tells which is which. {_SAVE_ALIKE}, or rename them in one of the files."
        )
    if _entries(specs.values()) == _entries(donors.values()):
        return (
            f"Both hold {_entries(specs.values()):,} weights in them, which one stores fused and "
            f"the other split. {_SAVE_ALIKE}."
        )
    return (
        "All models of a merge share one architecture; was this one fine-tuned from another base? "
        f"If not, they were saved by different versions. {_SAVE_ALIKE}."
    )


def _counted(names: Sequence[str]) -> str:
    return f"{len(names):,} tensor{'s' * (len(names) != 1)}"


def _entries(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.size for spec in specs)


def _stacked(stacked: str, split: str) -> str:
    return f"'{stacked}' stores its experts stacked, '{split}' one by one. {_SAVE_ALIKE}."


def _is_stacked(split: Mapping[str, TensorSpec], stacked: Mapping[str, TensorSpec]) -> bool:
    """Whether one side has a tensor for every number of a list, and the other one for them all.

    The list is known by the word before its number and by the layer; the stacked tensor has one
    axis more, as long as the list.
    """
    lists: dict[tuple[str, ...], set[str]] = {}
    for name, spec in split.items():
        parts = name.split(".")
        for i, part in enumerate(parts):
            if i and part.isdecimal():
                key = (*_numbers(parts[:i]), parts[i - 1], str(len(spec.shape) + 1))
                lists.setdefault(key, set()).add(part)
    for name, spec in stacked.items():
        parts = name.split(".")
        for word in parts[:-1]:
            numbers = lists.get((*_numbers(parts), word, str(len(spec.shape))))
            if numbers and spec.shape[0] == len(numbers) and math.prod(spec.shape):
                return True
    return False


def _numbers(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part.isdecimal())


def is_heads(names: Collection[str]) -> bool:
    """Whether all of these tensors are of output layers, as the field's architectures name them."""
    return all(map(output_layer, names))
