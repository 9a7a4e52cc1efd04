"""What a merge says it did."""

from typing import Any

from mergekit_bayes import __version__
from mergekit_bayes.configs import Config
from mergekit_bayes.plan import MergePlan
from mergekit_bayes.posterior import precision_path

# Ratios of sum H_t to sum H_0 outside this range are nearly always a mistake of units.
_PLAUSIBLE = (1e-3, 1e3)


class MergedModel(Config):
    """How one input entered the merge.

    `count` is how many observations its likelihood precision stood for; `ratio` is `sum H_t / sum H_0`.
    """

    ref: str
    role: str
    scale: float | None
    estimator: str | None = None
    unit: str | None = None
    observations: float | None = None
    count: float | None = None
    ratio: float | None = None


class MergeReport(Config):
    """What a merge did.

    Attributes:
        guarded_share: Share of entries at which the guard acted (0 without a removal).
        largest_multiplier: Largest `|scale_t| S_t / S` of a removed task: how far the edit was amplified.
        left_out: Tensors that only other models than the donor hold, with the reason.
        copied: Tensors taken from the donor byte for byte, with the reason.
    """

    version: str = __version__
    path: str
    precision_path: str | None
    method: str
    weights: str
    settings: dict[str, Any]
    models: tuple[MergedModel, ...]
    merged_tensors: int
    copied: dict[str, str]
    left_out: dict[str, str]
    guard: float
    guarded_share: float
    largest_multiplier: float
    notes: tuple[str, ...]


class Totals:
    """Sums over all entries, kept while streaming."""

    def __init__(self, models: int) -> None:
        self.entries = 0
        self.guarded = 0
        self.multiplier = 0.0
        self.likelihood = [0.0] * models


def make_report(plan: MergePlan, totals: Totals) -> MergeReport:
    notes = list(plan.notes)
    models = []
    scales: tuple[float | None, ...] = ((None,) if plan.base is not None else ()) + plan.scales
    whole = totals.likelihood[0] if plan.base is not None else 0.0
    for i, (model, scale) in enumerate(zip(plan.models, scales, strict=True)):
        is_base = scale is None
        ratio = totals.likelihood[i] / whole if whole > 0 and not is_base else None
        if ratio is not None and not _PLAUSIBLE[0] <= ratio <= _PLAUSIBLE[1]:
            notes.append(f"'{model.ref}' adds {ratio:.2g} times the base's likelihood precision; check the units")
        info = model.info
        models.append(
            MergedModel(
                ref=model.ref,
                role="base" if is_base else "task",
                scale=scale,
                estimator=info.estimator if info else None,
                unit=info.unit if info else None,
                observations=info.observations if info else None,
                count=plan.weighings[i].count,
                ratio=ratio,
            )
        )
    written = plan.info is not None
    return MergeReport(
        path=str(plan.target),
        precision_path=str(precision_path(plan.target)) if written else None,
        method=plan.method.name,
        weights=plan.config.weights,
        settings=plan.config.model_dump(exclude={"force", "out"}),
        models=tuple(models),
        merged_tensors=sum(s.copied is None for s in plan.steps),
        copied={s.name: s.copied for s in plan.steps if s.copied is not None},
        left_out=plan.left_out,
        guard=plan.guard,
        guarded_share=totals.guarded / totals.entries if totals.entries else 0.0,
        largest_multiplier=totals.multiplier,
        notes=tuple(notes),
    )
