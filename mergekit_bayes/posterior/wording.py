"""A posterior's record in words, for the screen and the card."""

from mergekit_bayes.posterior.edits import Edit
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.posterior.information import Information, floors

_NOTHING = 1e-6  # observations: what rounding leaves of counts that cancel


def observations_in_words(info: PosteriorInfo) -> str:
    """For how many observations the data's part of a precision stands.

    The count of a merge on a base is what its tasks added to that of the base. It is negative after
    a removal. No terms are left where everything that was added was removed again; terms of equal
    counts may also cancel.
    """
    count, unit = info.observations, info.unit
    if count is None:
        return f"an unknown number of {unit or 'observation'}s"
    noun = f"{unit or 'observation'}{'s' * (abs(count) != 1)}"
    if info.merge is None or info.prior.kind != "base":
        return f"{_rounded(count)} {noun}"
    if not info.terms:
        return "the data of its base: what was added to them was removed again"
    if abs(count) < _NOTHING:
        return f"as many {unit or 'observation'}s as its base: equally many were added and removed"
    change = "in addition to those" if count > 0 else "fewer than the data"
    return f"{_rounded(abs(count))} {noun} {change} of its base"


def prior_in_words(info: PosteriorInfo) -> str:
    """What a stored precision contains besides the data's part."""
    prior = info.prior
    match prior.kind:
        case "none":
            return "no prior inside"
        case "isotropic":
            return f"inside it a prior of {prior.precision:.4g} an entry"
        case "base":
            extra = f" and a prior of {prior.precision:.4g} an entry" if prior.precision else ""
            return f"inside it the precision of its base{extra}"
        case _:
            return "the prior inside it is not known"


def is_of_training(info: PosteriorInfo) -> bool:
    """Whether the record of how a precision was made describes the model's training, too.

    That of an estimate from rows describes the estimate alone.
    """
    return "optimizer" in info.training or info.merge is not None


def anchor_in_words(info: PosteriorInfo) -> str:
    """What the training pulled the weights towards."""
    anchor = info.anchor
    if anchor.kind == "none":
        # Adam's moments say nothing of its weight decay.
        if not is_of_training(info) or info.estimator == "adam":
            return "what the training pulled towards is not known"
        return "the training pulled towards nothing"
    towards = "zero" if anchor.kind == "zero" else "the base"
    if anchor.precision is None:
        return f"the training pulled towards {towards}"
    return f"the training pulled towards {towards} with {anchor.precision:.4g} an entry"


def edit_in_words(edit: Edit, unit: str | None) -> str:
    """What an adaptation removed and added, and what held the model meanwhile.

    Args:
        edit: The adaptation.
        unit: What one observation is.
    """
    noun = f"{unit or 'observation'}s"
    verbs = {"remove": "removed", "contrast": "added to match", "add": "added"}
    done = [
        f"{verbs[rows.kind]} {rows.observations:,} {noun} of {rows.label}"
        + (f" ({edit.removal})" if rows.kind == "remove" and edit.removal else "")
        for rows in edit.rows
    ]
    held = []
    if (memory := edit.memory) is not None:
        whose = {"rows": "rows", "self_generated": "its own text", "both": "rows and its own text"}
        held.append(
            f"a memory of {memory.observations:,} {noun} ({whose[memory.kind]}), "
            f"kappa {edit.kappa:.4g}"
        )
    if edit.prior != "none":
        weights = "its stored precision" if edit.prior == "stored" else f"{edit.prior:.4g} a weight"
        held.append(weights + (f" (one number a {edit.pool})" if edit.pool else ""))
    source = "" if edit.base_is_recorded else ", assumed"
    holding = f"held by {' and '.join(held)}, tau {edit.tau:g}" if held else "held by nothing"
    return (
        f"{' and '.join(done)}; {holding}; {edit.steps:,} steps from a start that stood for "
        f"{_rounded(edit.base)} {noun}{source}"
    )


def information_in_words(found: Information, parameters: float, info: PosteriorInfo | None) -> str:
    """How far a precision is from one number, and how much of it the data said.

    Args:
        found: What its sample says.
        parameters: Number of parameters that have a precision.
        info: Its record.
    """
    parts = []
    if found.within is None:
        parts.append("its positive entries do not vary")
    if found.within is not None:
        inside = ""
        if found.explained is not None:
            inside = f" (in a matrix, rows and columns explain {max(found.explained, 0):.0%} of it)"
        parts.append(f"{found.within:.0%} of the variance of its log lies within tensors{inside}")
    parts.append(
        f"effective number of informative entries {found.informative * parameters:,.0f} of "
        f"{parameters:,.0f}"
    )
    values = floors(info)
    floor = "the prior alone" if len(values) == 1 else "the prior or the start alone"
    parts.append(f"{found.alone:.1%} " + (f"hold {floor}" if any(values) else "are zero"))
    return ", ".join(parts)


def _rounded(count: float) -> str:
    """A count without decimals, unless it is smaller than ten."""
    return f"{count:,.0f}" if abs(count) >= 10 else f"{count:,.3g}"
