"""Whether every precision belongs to its weights, and whether all of them are comparable."""

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.methods.base import Method
from mergekit_bayes.plan.inputs import Inputs, precision_info
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.info import INPUTS, note_on_losses


def check_precisions(config: MergeConfig, method: Method, inputs: Inputs, notes: list[str]) -> None:
    """Check the records of all precisions.

    Args:
        config: The settings.
        method: The merging rule.
        inputs: The models.
        notes: Remarks for the report are appended here.

    Raises:
        PrecisionError: A model without a precision, a precision of other weights, or precisions of
            different estimators or units.
    """
    for model in inputs:
        _check_record(config, method, model.posterior, notes)
    _check_comparable(inputs)
    _note_one_model(inputs, notes)
    if (note := note_on_losses({model.ref: model.precision_info for model in inputs})) is not None:
        notes.append(note)


def _note_one_model(inputs: Inputs, notes: list[str]) -> None:
    """Say which models are one by their weights."""
    first: dict[str, str] = {}
    for model in inputs:
        if model.posterior.info is None:  # then nothing has been hashed
            continue
        identity = model.posterior.identity
        if identity in first:
            notes.append(
                f"'{first[identity]}' and '{model.ref}' hold the same weights: one model, and each "
                "time that it is named it counts"
            )
        first.setdefault(identity, model.ref)


def _check_record(config: MergeConfig, method: Method, model: Posterior, notes: list[str]) -> None:
    if not model.has_precision:
        raise _missing_matrices(method, model) if method.needs_matrices else _missing(model)
    if model.info is None:
        if precision_info(model) is None:
            described = (
                "one number everywhere"
                if model.isotropic is not None
                else "a precision without information"
            )
            notes.append(
                f"'{model.ref}' has {described}: taken as it is, on the scale of the summed loss, "
                "prior 0"
            )
        return  # the precision of an adapter was checked when it was opened
    if model.identity != model.info.mean.blocks:
        file = model.precision.files[0] if model.precision else ""
        raise PrecisionError(
            f"the precision of '{model.ref}' ({file}) was taken at other weights than these: its "
            "record of them differs. Use the precision that belongs to them, or make one with "
            f"`bmerge precision {model.ref} --data TEXTS --force`."
        )
    if not config.verify:
        return
    if model.info.mean.full is None:
        notes.append(f"'{model.ref}' has no full hash on record; only sampled blocks were compared")
    elif model.full_identity != model.info.mean.full:
        raise PrecisionError(
            f"'{model.ref}' differs from the weights that its precision was taken at."
        )


def _missing(model: Posterior) -> PrecisionError:
    looked_for = precision_path(model.path)
    return PrecisionError(
        f"no precision for '{model.ref}' (looked for '{looked_for}'). Fine-tune it with IVON, make "
        f"one with `{_command(model)}`, name one with --precision {model.ref}=PATH, give one "
        f"number with --isotropic {model.ref}=X, or merge with --weights uniform."
    )


def _missing_matrices(method: Method, model: Posterior) -> PrecisionError:
    return PrecisionError(
        f"no precision for '{model.ref}' (looked for '{precision_path(model.path)}'), and --method "
        f"{method.name} weighs linear layers by precision matrices of their inputs. Make one with "
        f"`{_command(model)} --estimator {INPUTS}`, or name one with --precision {model.ref}=PATH."
    )


def _command(model: Posterior) -> str:
    """What makes a precision where it is looked for."""
    if model.path.is_file():  # a model is run from its folder
        return f"bmerge precision FOLDER --data TEXTS -o {precision_path(model.path)}"
    return f"bmerge precision {model.ref} --data TEXTS"


def _check_comparable(inputs: Inputs) -> None:
    refs: dict[tuple[str, str | None], str] = {}
    for model in inputs:
        info = model.precision_info
        if info is not None:
            refs[info.estimator, info.unit] = model.ref
    if len(refs) > 1:
        # What texts cannot make, that of an optimizer's state, is the one that is made again.
        (one, ref), (other, other_ref), *_ = sorted(refs.items(), key=lambda x: x[0][0] == "adam")
        estimator = "" if one[0] in ("ggn", other[0]) else f" --estimator {one[0]}"
        raise PrecisionError(
            f"precisions of different kinds do not add: '{ref}' has {one[0]} per {one[1]}, "
            f"'{other_ref}' {other[0]} per {other[1]}. Make them alike, for example with "
            f"`bmerge precision {other_ref} --data TEXTS{estimator} -o OTHER` and "
            f"--precision {other_ref}=OTHER."
        )
