"""What a merge says it did."""

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.plan import MergePlan, known_info
from mergekit_bayes.records import Config
from mergekit_bayes.stream.units import Unit

# Ratios of sum H_t to sum H_0 outside this range are nearly always a mistake of units.
_PLAUSIBLE = (1e-3, 1e3)


class MergedModel(Config):
    """How one input entered the merge.

    Attributes:
        identity: Who its mean is, by sampled blocks; `full` by all bytes, where `--verify` asked
            for it.
        commit: Of the Hub's repository.
        count: How many observations its likelihood precision stood for.
        ratio: `sum H_t / sum H_0`.
        mended: Entries that `--on-bad base` took from the base.
    """

    ref: str
    role: str
    scale: float | None
    identity: str
    full: str | None = None
    commit: str | None = None
    estimator: str | None = None
    unit: str | None = None
    observations: float | None = None
    count: float | None = None
    ratio: float | None = None
    mended: int = 0


class MergeReport(Config):
    """What a merge did.

    Attributes:
        guarded_share: Share of entries at which the guard acted (0 without a removal).
        largest_multiplier: Largest `|scale_t| S_t / S` of a removed task: how far the edit was
            amplified.
        changed_share: Share of merged entries at which some task with a scale differs from the
            base.
        lost_share: Share of the changed ones at which rounding to the output's dtype gave back the
            base's value.
        left_out: Tensors that are not in the output, with the reason.
        copied: Tensors taken from the donor byte for byte, with the reason.
        ruled: Tensors that are merged by a rule (tied heads, --on-missing, --vocab), with what it
            decided.
    """

    version: str = __version__
    path: str
    precision_path: str | None
    method: str
    formula: str
    weights: str
    settings: dict[str, Any]
    models: tuple[MergedModel, ...]
    merged_tensors: int
    copied: dict[str, str]
    left_out: dict[str, str]
    ruled: dict[str, str]
    guard: float
    guarded_share: float
    largest_multiplier: float
    changed_share: float | None
    lost_share: float | None
    notes: tuple[str, ...]


class Totals:
    """Sums over all units; the same whatever wrote them, since they are added in the order of the
    units.
    """

    def __init__(
        self, plan: MergePlan, units: Sequence[Unit], tallies: Mapping[int, dict[str, Any]]
    ) -> None:
        models = len(plan.models)
        self.entries = self.changed = self.lost = self.guarded = 0
        self.multiplier = 0.0
        self.mended = [0] * models
        self.likelihood = [0.0] * models
        self.zero: list[list[str]] = [[] for _ in range(models)]  # names of tensors, per model
        self.weighed = [0] * models  # tensors of which a model's own precision counted
        by_step: dict[int, tuple[int, list[float]]] = {}
        for unit in units:
            tally = tallies[unit.id]
            self.entries += tally["entries"]
            self.changed += tally["changed"]
            self.lost += tally["lost"]
            self.guarded += tally["guarded"]
            self.multiplier = max(self.multiplier, tally["multiplier"])
            for i, count in enumerate(tally["mended"]):
                self.mended[i] += count
            if tally["stored"] and plan.method.needs_precision:
                entries, sums = by_step.get(unit.step, (0, [0.0] * models))
                added = [a + b for a, b in zip(sums, tally["stored"], strict=True)]
                by_step[unit.step] = (entries + tally["entries"], added)
        for step, (entries, sums) in by_step.items():
            self._add_likelihood(plan, step, entries, sums)

    def _add_likelihood(self, plan: MergePlan, step: int, entries: int, sums: list[float]) -> None:
        of_base = 0.0
        precisions = plan.steps[step].precisions or (None,) * len(sums)
        for i, (weighing, total, found) in enumerate(
            zip(plan.weighings, sums, precisions, strict=True)
        ):
            if (found.model != i) if found is not None else (plan.models[i].isotropic is None):
                continue  # the base's own stands in, where the task left the tensor alone
            self.weighed[i] += 1
            if total == 0:
                self.zero[i].append(plan.steps[step].name)
            likelihood = weighing.gain * (total - entries * weighing.contained)
            if weighing.contains_base is not None:
                inside = (
                    entries * DELTA_0 + of_base * weighing.contains_base / plan.weighings[0].gain
                )
                likelihood -= weighing.gain * inside
            elif plan.shrink is not None and weighing.reshape:
                likelihood *= 1 + plan.shrink.amount
            of_base = likelihood if i == 0 else of_base
            self.likelihood[i] += likelihood

    def refuse_zero(self, plan: MergePlan) -> None:
        """Raise `PrecisionError` for a model whose precision is zero everywhere."""
        for model, names, count in zip(plan.models, self.zero, self.weighed, strict=True):
            if names and len(names) == count and model.precision is not None:
                raise PrecisionError(
                    f"the precision of '{model.ref}' ({model.precision.files[0]}) is zero "
                    "everywhere. "
                    f"Make it anew with `bmerge precision {model.ref} --data TEXTS --force`."
                )

    @property
    def guarded_share(self) -> float:
        return self.guarded / self.entries if self.entries else 0.0


def make_report(plan: MergePlan, totals: Totals) -> MergeReport:
    """The report of a merge that is done."""
    notes = list(plan.notes)
    models = []
    scales: tuple[float | None, ...] = ((None,) if plan.base is not None else ()) + plan.scales
    whole = totals.likelihood[0] if plan.base is not None else 0.0
    for i, (model, scale) in enumerate(zip(plan.models, scales, strict=True)):
        is_base = plan.base is not None and i == 0
        ratio = totals.likelihood[i] / whole if whole > 0 and not is_base else None
        if ratio is not None and not _PLAUSIBLE[0] <= abs(ratio) <= _PLAUSIBLE[1]:
            notes.append(
                f"'{model.ref}' adds {ratio:.2g} times the base's likelihood precision; check the "
                "units"
            )
        if names := totals.zero[i]:
            notes.append(f"the precision of '{model.ref}' is zero in all of {_some(names)}")
        if totals.mended[i]:
            notes.append(
                f"{totals.mended[i]:,} bad entries of '{model.ref}' took the base's values"
            )
        info = known_info(model)
        models.append(
            MergedModel(
                ref=model.ref,
                role="base" if is_base else "task",
                scale=scale,
                identity=model.identity,
                full=model.info.mean.full if plan.config.verify and model.info else None,
                commit=model.commit,
                estimator=info.estimator if info else None,
                unit=info.unit if info else None,
                observations=info.observations if info else None,
                count=plan.weighings[i].count,
                ratio=ratio
                and float(f"{ratio:.6g}"),  # sums of float32 in any order are not known better
                mended=totals.mended[i],
            )
        )
    written, based = plan.info is not None, plan.base is not None and totals.entries > 0
    # A rule that drops changes on purpose would count as lost what it dropped.
    lost = (
        totals.lost / totals.changed
        if based and totals.changed and plan.method.is_posterior
        else None
    )
    undoes = plan.guard < plan.config.guard  # what is taken out again goes back to the base's value
    if lost is not None and lost >= 0.01 and not undoes:
        notes.append(
            f"{lost:.1%} of the changed entries were rounded back to the base's value: the edit is "
            "small for the dtype "
            "of the output, and undoing it later is exact in F32 only (--dtype F32)"
        )
    return MergeReport(
        path=str(plan.target),
        precision_path=str(precision_path(plan.target)) if written else None,
        method=plan.method.name,
        formula=plan.method.formula or plan.method.summary,
        weights="precision" if plan.method.needs_precision else "uniform",
        settings=plan.config.model_dump(exclude={"force", "out", "identities"})
        | {"param": dict(plan.settings)},
        models=tuple(models),
        merged_tensors=sum(s.copied is None for s in plan.steps),
        copied={s.name: s.copied for s in plan.steps if s.copied is not None},
        left_out=plan.left_out,
        ruled=plan.mended,
        guard=plan.guard,
        guarded_share=totals.guarded_share,
        largest_multiplier=float(f"{totals.multiplier:.6g}"),
        changed_share=totals.changed / totals.entries if based else None,
        lost_share=lost,
        notes=tuple(notes),
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{n}'" for n in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
