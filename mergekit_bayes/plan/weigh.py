"""Whose precision is it, and how much does it count? Stored precisions become comparable likelihood precisions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError, MismatchError, PrecisionError
from mergekit_bayes.plan.settings import MergeConfig
from mergekit_bayes.posterior import Identity, Posterior, PosteriorInfo, precision_path
from mergekit_bayes.tensors import identity

# Where a removal cancels a term that the merge lists, the exact precision is positive up to rounding.
UNDO_GUARD = 1e-6


class Pull(NamedTuple):
    """What a task's training pulled towards, in the units of its counted precision.

    `precision` None is the published choice P = S0, under which re-basing leaves the mean where it is.
    """

    precision: float | None = None
    decay: float = 0.0


@dataclass(frozen=True)
class Weighing:
    """How a likelihood precision follows from a stored one: `H = gain * (S - contained)`, then shrink.

    Attributes:
        gain: Count used, over the count by which S is scaled.
        contained: The scalar prior inside S, on S's own scale.
        prior: The same prior in units of one full data set; it is added back and never counted.
        contains_base: For a merge: S contains the base posterior with its H at this gain (else None).
        reshape: False for a merge, which was pooled and shrunk when it was made.
        count: Observations that H stands for after counting; None if nobody knows.
    """

    gain: float = 1.0
    contained: float = 0.0
    prior: float = 0.0
    contains_base: float | None = None
    reshape: bool = True
    count: float | None = None
    pull: Pull = field(default_factory=Pull)


def check_precisions(config: MergeConfig, models: Sequence[Posterior], notes: list[str]) -> None:
    for model in models:
        if not model.has_precision:
            looked = precision_path(model.path)
            raise PrecisionError(
                f"no precision for '{model.ref}' (looked for '{looked}'). Fine-tune it with IVON, make one with "
                f"`bmerge precision {model.ref} --data TEXTS`, name one with --precision {model.ref}=PATH, give one "
                f"number with --isotropic {model.ref}=X, or merge with --weights uniform."
            )
        if model.info is None:
            kind = "one number everywhere" if model.isotropic is not None else "a precision without information"
            notes.append(f"'{model.ref}' has {kind}: taken as it is, on the scale of the summed loss, prior 0")
            continue
        if identity(model.mean) != model.info.mean.blocks:
            raise PrecisionError(
                f"the precision of '{model.ref}' ({model.precision.files[0] if model.precision else ''}) was taken at "
                "other weights than these: its record of them differs. Use the precision that belongs to them, or "
                f"make one with `bmerge precision {model.ref} --data TEXTS --force`."
            )
        if config.verify:
            if model.info.mean.full is None:
                notes.append(f"'{model.ref}' has no full hash on record; only sampled blocks were compared")
            elif identity(model.mean, full=True) != model.info.mean.full:
                raise PrecisionError(f"'{model.ref}' differs from the weights that its precision was taken at.")
    kinds = {(m.info.estimator, m.info.unit): m.ref for m in models if m.info is not None}
    if len(kinds) > 1:
        (a, ref_a), (b, ref_b) = list(kinds.items())[:2]
        raise PrecisionError(
            f"precisions of different kinds do not add: '{ref_a}' has {a[0]} per {a[1]}, '{ref_b}' {b[0]} per {b[1]}. "
            f"Make them alike, for example with `bmerge precision {ref_b} --data TEXTS -o OTHER` and "
            f"--precision {ref_b}=OTHER."
        )


def weigh(config: MergeConfig, models: Sequence[Posterior], notes: list[str]) -> list[Weighing]:
    base = models[0] if config.base is not None else None
    common = common_count(config, models)
    result: list[Weighing] = []
    for model in models:
        result.append(_weigh_one(config, model, base, common, notes))
    return result


def common_count(config: MergeConfig, models: Sequence[Posterior]) -> float | None:
    """The count that `--counts equal` gives to every likelihood precision.

    The smallest one on record, so that nobody is made surer than their data; being a minimum, it is the same
    whether models are merged at once or one after another. Models whose count is set by hand do not vote.
    """
    recorded = []
    for model in models:
        if model.info is None or _is_number(config.observations.get(model.ref, "x")):
            continue
        count = model.info.merge.common_count if model.info.merge else model.info.observations
        if count:
            recorded.append(count)
    return min(recorded, default=None)


def _weigh_one(
    config: MergeConfig, model: Posterior, base: Posterior | None, common: float | None, notes: list[str]
) -> Weighing:
    wanted = config.observations.get(model.ref, "1x")
    factor = _factor(wanted, model)
    info = model.info
    if info is None:
        if factor is None:
            raise ConfigError(
                f"--observations {model.ref}={wanted}: its precision records no count to set. Multiply it instead: "
                f"{model.ref}=3x."
            )
        return Weighing(gain=factor, pull=_pull(config, model, factor))
    trace = info.merge
    unit = (trace.common_count if trace else info.ess) or 1.0  # the count by which S is scaled
    own = (trace.common_count if trace else info.observations) or unit
    held = (info.observations or unit) / own  # a merge counts as the sum of its scales, anything else as 1
    if factor is None:
        count = float(wanted) / (held or 1.0)
    else:
        count = factor * (own if config.counts == "recorded" or common is None else common)
    gain = count / unit
    if trace is None:
        scalar = info.prior.precision if info.prior.kind == "isotropic" else 0.0
        return Weighing(
            gain=gain,
            contained=scalar,
            prior=scalar * own / unit,
            count=count,
            pull=_pull(config, model, gain),
        )
    return _weigh_merge(config, model, info, base, gain, count * held, notes)


def _weigh_merge(
    config: MergeConfig, model: Posterior, info: PosteriorInfo, base: Posterior | None,
    gain: float, count: float, notes: list[str],
) -> Weighing:  # fmt: skip
    assert info.merge is not None
    if (info.merge.shrink, info.merge.pool) != (config.shrink, config.pool):
        raise MismatchError(
            f"'{model.ref}' was merged with --shrink {info.merge.shrink} --pool {info.merge.pool}, this merge has "
            f"--shrink {config.shrink} --pool {config.pool}. Use the same, so that all count alike."
        )
    prior = info.prior
    if prior.kind == "isotropic":
        return Weighing(gain, prior.precision, prior.precision, reshape=False, count=count)
    if prior.kind == "none":
        return Weighing(gain, reshape=False, count=count)
    if base is None or model is base:
        # The base inside cannot be told apart here, or is the history of a new base: S counts as a whole.
        return Weighing(gain, reshape=False, count=count)
    if prior.kind == "unknown" or prior.base != Identity(blocks=identity(base.mean)) or (
        prior.base_precision != precision_identity(base)
    ):  # fmt: skip
        raise MismatchError(
            f"'{model.ref}' is a merge in the frame of another base or base precision than '{base.ref}'. "
            "Chains stay exact only in one frame: use the base that it was merged with."
        )
    if config.anchor != "h0":
        notes.append(f"'{model.ref}' is a merge and carries its terms' anchors already")
    return Weighing(gain, prior.precision, contains_base=prior.base_count, reshape=False, count=count)


def _factor(wanted: str, model: Posterior) -> float | None:
    """The multiple that `3x` asks for; None for a plain number."""
    text = wanted.removesuffix("x")
    if not _is_number(text) or float(text) <= 0:
        raise ConfigError(f"--observations {model.ref}={wanted}: expected a multiple like 3x, or a positive count.")
    return float(text) if wanted.endswith("x") else None


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False


def _pull(config: MergeConfig, model: Posterior, gain: float) -> Pull:
    if config.anchor == "h0" or model.ref == config.base:
        return Pull()
    if config.anchor == "none":
        return Pull(0.0)
    if config.anchor not in ("recorded", "zero-decay"):
        return Pull(float(config.anchor))
    stored = model.info.anchor if model.info is not None else None
    if stored is None or stored.precision is None or (config.anchor == "zero-decay" and stored.kind != "zero"):
        raise PrecisionError(
            f"--anchor {config.anchor}: '{model.ref}' does not record a quadratic pull"
            f"{' to zero' if config.anchor == 'zero-decay' else ''}. Use --anchor h0, none or a number."
        )
    if stored.kind == "zero":
        return Pull(0.0, decay=gain * stored.precision)
    return Pull(gain * stored.precision)


def choose_guard(config: MergeConfig, models: Sequence[Posterior], scales: Sequence[float], notes: list[str]) -> float:
    """The guard to use: next to none where every removal cancels a term that a merge lists."""
    removed = {m.ref: s for m, s in zip(models[-len(scales) :], scales, strict=True) if s < 0}
    if not removed:
        return config.guard
    base, tasks = models[0], models[1:]
    held: dict[str, float] = {}
    for task, scale in zip(tasks, scales, strict=True):
        for term in task.info.terms if task.info and scale > 0 else ():
            held[term.mean.blocks] = held.get(term.mean.blocks, 0.0) + scale * term.scale
    cancelled = True
    for task in tasks:
        if task.ref not in removed:
            continue
        who = identity(task.mean)
        if base.info is not None and any(t.mean.blocks == who for t in base.info.terms):
            raise MismatchError(
                f"'{base.ref}' contains '{task.ref}', but the frame of a removal is the original base: "
                f"`bmerge merge {base.ref} {task.ref} --base BASE --weights precision --scale 1 --scale "
                f"{removed[task.ref]:g}`."
            )
        cancelled = cancelled and held.get(who, 0.0) + removed[task.ref] > -1e-9
    if cancelled:
        notes.append("every removal undoes a term that a merge lists; the guard acts on rounding errors only")
    return UNDO_GUARD if cancelled else config.guard


def precision_identity(model: Posterior) -> Identity:
    if model.precision is None:
        return Identity(blocks=f"isotropic {model.isotropic}")
    return Identity(blocks=identity(model.precision))
