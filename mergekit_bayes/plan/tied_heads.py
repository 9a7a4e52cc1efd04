"""Where a merge decides that an output head is tied to the input embedding.

A model with tied weights has one tensor for both. One checkpoint stores it under the embedding's
name only, another one under both names, and a third has untied them in training. The names alone
decide (`checkpoint.ties.tied_source`), and equal values where both are stored (`is_alias`).
"""

from collections.abc import Mapping

from mergekit_bayes.checkpoint.ties import is_alias, tied_source
from mergekit_bayes.posterior import Posterior


def stored_name(
    name: str, model: Posterior, names: Mapping[str, str]
) -> tuple[str | None, str | None]:
    """The name under which a model stores a tensor of the donor.

    Args:
        name: The donor's name.
        model: The model to look in.
        names: The donor's names to the model's own, for all tensors that both have.

    Returns:
        The model's name, None if it has no such tensor; and the decision to record, if the tensor
        is an output head that the model ties to its input embedding.
    """
    if name in names:
        return names[name], None
    embedding = tied_source(name, model.mean)
    decision = None if embedding is None else f"'{model.ref}' ties it to '{embedding}'"
    return embedding, decision


def reason_if_alias(name: str, model: Posterior) -> str | None:
    """Why a tensor that the donor lacks is left out, if it repeats the input embedding."""
    is_tied = is_alias(name, model.mean)
    return f"tied to the input embedding in '{model.ref}'" if is_tied else None


def explain_untied(name: str, model: Posterior, donor: Posterior, *, has_base: bool) -> str | None:
    """The message for a head that a model stores and the donor ties; None for other tensors."""
    embedding = tied_source(name, donor.mean)
    if embedding is None:
        return None
    way_out = "" if has_base else f" Name '{model.ref}' first to merge both."
    return f"'{donor.ref}' ties it to '{embedding}', '{model.ref}' has one of its own.{way_out}"


def precision_names(name: str, stored: str, model: Posterior) -> list[str]:
    """The names under which a model's precision of a tensor may be stored, the likeliest first.

    Args:
        name: The donor's name of the tensor.
        stored: The model's own name of it.
        model: The model.
    """
    aliases = model.info.aliases if model.info else {}
    candidates = (stored, name, aliases.get(stored), tied_source(stored, model.mean))
    return [candidate for candidate in candidates if candidate is not None]
