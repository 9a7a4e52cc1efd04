"""Which tensor of a model is which tensor of the donor, and which tensors the output leaves out."""

import re
from collections.abc import Mapping

from mergekit_bayes.checkpoint.model_config import read_config
from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming, renamed_note
from mergekit_bayes.checkpoint.specs import MERGEABLE
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.lora import adapted_mean
from mergekit_bayes.plan.inputs import Input, Inputs
from mergekit_bayes.plan.left_over import (
    is_heads,
    left_over_note,
    missing_in,
    refuse_left_over,
)
from mergekit_bayes.plan.missing_layers import explain_missing_layers
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.plan.tied_heads import Ties
from mergekit_bayes.posterior import Posterior

OTHER_BASE = (
    "All models of a merge share one architecture; was this one fine-tuned from another base?"
)


def map_names(donor: Posterior, model: Posterior, notes: list[str]) -> dict[str, str]:
    """The donor's names to the model's own, for every tensor of the model.

    A tensor that the donor lacks keeps its name.

    Raises:
        MismatchError: Two tensors of the model would have one name.
    """
    if model is donor:
        return {name: name for name in donor.mean.specs}
    renaming = _find_renaming(donor, model)
    if renaming.names:
        notes.append(
            f"{renamed_note(model.ref, renaming)}; they are written as '{donor.ref}' has them"
        )
    names: dict[str, str] = {}
    for stored in model.mean.specs:
        renamed = renaming(stored)
        if renamed in names:
            raise MismatchError(
                f"'{stored}' and '{names[renamed]}' of '{model.ref}' are both '{renamed}' of "
                f"'{donor.ref}'. Rename one."
            )
        names[renamed] = stored
    return names


def _find_renaming(donor: Posterior, model: Posterior) -> Renaming:
    """The renaming of a whole model; words are replaced only if its config names one type."""
    types = {_model_type(posterior) for posterior in (donor, model)} - {None}
    scope = Scope.REPLACED if len(types) < 2 else Scope.NESTED
    return find_renaming(donor.mean.specs, model.mean.specs, scope=scope)


def _model_type(posterior: Posterior) -> str | None:
    folder = posterior.parts[0].path if posterior.parts else posterior.path
    model_type = read_config(folder).get("model_type")
    return model_type if isinstance(model_type, str) else None


def find_left_out(
    config: MergeConfig,
    inputs: Inputs,
    names: Mapping[Input, Mapping[str, str]],
    ties: Ties,
    only: re.Pattern[str] | None,
    notes: list[str],
) -> dict[str, str]:
    """The tensors that only other models than the donor have, with the reason to leave them out.

    Args:
        config: The settings.
        inputs: The models.
        names: For each input, the donor's names to its own.
        ties: The tied tensors.
        only: The pattern of `--only`.
        notes: Remarks for the report are appended here.

    Raises:
        MismatchError: A model has a parameter that the donor lacks, and no rule leaves it out.
    """
    donor = inputs.donor.posterior
    left_out: dict[str, str] = {}
    for task in inputs:
        model, unmatched = task.posterior, list[str]()
        left_by_rule: list[str] = []
        for renamed, stored in names[task].items():
            if ties.is_written(renamed):
                continue
            if is_buffer(stored) or model.mean.specs[stored].dtype not in MERGEABLE:
                left_out[stored] = f"not a parameter; only '{model.ref}' has it"
            elif reason := ties.reason_to_leave_out(renamed, task):
                left_out[stored] = reason
            elif only is not None and not only.search(renamed):
                left_out[stored] = f"only '{model.ref}' has it"
            elif config.on_missing != "error":
                left_out[stored] = f"only '{model.ref}' has it"
                left_by_rule.append(stored)
            elif cause := ties.explain_missing(renamed, inputs.donor):
                raise MismatchError(
                    f"'{stored}' is in '{model.ref}' but not in '{donor.ref}'. {cause}"
                )
            else:
                unmatched.append(stored)
        missing = missing_in(task, donor, ties, only) if unmatched or left_by_rule else []
        if missing and left_by_rule:
            notes.append(left_over_note(model, donor, left_by_rule, missing, config.on_missing))
        if missing and unmatched:
            ambiguous = _find_renaming(donor, model).ambiguous
            raise refuse_left_over(model, donor, unmatched, missing, ambiguous)
        if unmatched:
            raise _unmatched(unmatched, task, inputs, names)
    return left_out


def _unmatched(
    unmatched: list[str], task: Input, inputs: Inputs, names: Mapping[Input, Mapping[str, str]]
) -> MismatchError:
    """The error of tensors that the donor lacks and no rule leaves out."""
    model, donor, has_base = task.posterior, inputs.donor.posterior, inputs.base is not None
    start = (
        f"'{unmatched[0]}' ({len(unmatched)} such) is in '{model.ref}' but not in '{donor.ref}'."
    )
    if has_base and is_heads(unmatched):
        return MismatchError(
            f"{start} The base has no such output layer, so that there is no change to add. "
            f"{_keep_head(unmatched, inputs, names)}; --on-missing base drops it."
        )
    # The tensors of the donor by the names that the model has for them.
    donors = [own for name, own in names[task].items() if name in donor.mean.specs]
    lost = explain_missing_layers(unmatched, donor, donors, model)
    if lost is not None and not lost.may_be_absent:
        return MismatchError(f"{start} {lost.cause}")
    cause = lost.cause if lost is not None else OTHER_BASE
    return MismatchError(
        f"{start} {cause} --on-missing {'base' if has_base else 'skip'} leaves it out."
    )


def _keep_head(heads: list[str], inputs: Inputs, names: Mapping[Input, Mapping[str, str]]) -> str:
    """How to keep output layers that a task has and the base has not."""
    other_base = "name a base that has it"
    if len(inputs.tasks) > 1:
        # An average is another merge, and one only of what all models have.
        can_average = all(
            task.scale > 0 and set(heads) <= {*names[task].values()} for task in inputs.tasks
        )
        return f"To keep it, {'merge without --base, or ' if can_average else ''}{other_base}"
    if adapted_mean(inputs.tasks[0].posterior) is not None:
        fold = "fold the adapter into its base with `PeftModel.merge_and_unload()`"
        return f"To keep it, {other_base}, or {fold} instead of a merge"
    return f"To keep it, {other_base}"
