"""Which tensor of a model is which tensor of the donor, and which tensors the output leaves out."""

import re
from collections.abc import Mapping

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MERGEABLE
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.plan.inputs import Input, Inputs
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
    renaming = find_renaming(donor.mean.specs, model.mean.specs)
    if renaming != Renaming():
        change = (
            f"without its prefix '{renaming.strip}'"
            if renaming.strip
            else f"with the prefix '{renaming.add}'"
        )
        notes.append(
            f"names of '{model.ref}' are matched {change}, and written as '{donor.ref}' has them"
        )
    names: dict[str, str] = {}
    for stored in model.mean.specs:
        renamed = renaming(stored, donor.mean.specs)
        if renamed in names:
            raise MismatchError(
                f"'{stored}' and '{names[renamed]}' of '{model.ref}' are both '{renamed}' of "
                f"'{donor.ref}'. Rename one."
            )
        names[renamed] = stored
    return names


def find_left_out(
    config: MergeConfig,
    inputs: Inputs,
    names: Mapping[Input, Mapping[str, str]],
    ties: Ties,
    only: re.Pattern[str] | None,
) -> dict[str, str]:
    """The tensors that only other models than the donor have, with the reason to leave them out.

    Args:
        config: The settings.
        inputs: The models.
        names: For each input, the donor's names to its own.
        ties: The tied tensors.
        only: The pattern of `--only`.

    Raises:
        MismatchError: A model has a parameter that the donor lacks, and no rule leaves it out.
    """
    donor = inputs.donor.posterior
    left_out: dict[str, str] = {}
    for task in inputs:
        model, unmatched = task.posterior, []
        for renamed, stored in names[task].items():
            if ties.is_written(renamed):
                continue
            if is_buffer(stored) or model.mean.specs[stored].dtype not in MERGEABLE:
                left_out[stored] = f"not a parameter; only '{model.ref}' has it"
            elif reason := ties.reason_to_leave_out(renamed, task):
                left_out[stored] = reason
            elif config.on_missing != "error" or (only is not None and not only.search(renamed)):
                left_out[stored] = f"only '{model.ref}' has it"
            elif cause := ties.explain_missing(renamed, inputs.donor):
                raise MismatchError(
                    f"'{stored}' is in '{model.ref}' but not in '{donor.ref}'. {cause}"
                )
            else:
                unmatched.append(stored)
        if unmatched:
            raise _unmatched(unmatched, model, donor, has_base=inputs.base is not None)
    return left_out


def _unmatched(
    names: list[str], model: Posterior, donor: Posterior, *, has_base: bool
) -> MismatchError:
    first, *_ = names
    return MismatchError(
        f"'{first}' ({len(names)} such) is in '{model.ref}' but not in '{donor.ref}'. {OTHER_BASE} "
        f"--on-missing {'base' if has_base else 'skip'} leaves it out."
    )
