"""What a merge says it did."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.merge.increase import (
    Increase,
    notes_on_increases,
    predicted_increases,
    six_digits,
)
from mergekit_bayes.merge.tally import MergeTotals
from mergekit_bayes.plan import Input, MergePlan
from mergekit_bayes.records import Record
from mergekit_bayes.stream.worth import notes_on_precisions

# Ratios of sum H_t to sum H_0 outside this range are nearly always a mistake of units.
_PLAUSIBLE = (1e-3, 1e3)


class MergedModel(Record):
    """How one input entered the merge.

    Attributes:
        ref: Its path or Hub id, as given; `MIXTURE: RUN` for a component of a mixture.
        role: `base` or `task`.
        scale: The task's scale; None for the base.
        identity: Content hash of its mean, by sampled blocks.
        full: The same by all bytes, where `--verify` asked for it; of BASE+ADAPTER both hashes.
        commit: Commit of its Hub repository.
        estimator: How its curvature was found.
        unit: What one of its observations is.
        observations: How many observations its precision records.
        count: How many observations its likelihood precision stood for.
        ratio: `sum H_t / sum H_0`.
        mended: How many entries `--on-bad base` took from the base.
        mixture: Of a component, the mixture as given. Other models have no such key.
        share: Of a component of a mixture, the mean of its responsibilities over the entries in
            which the mixture counts. Other models, and those of a mixture that counts in none, have
            no such key.
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
    mixture: str | None = Field(default=None, exclude_if=lambda mixture: mixture is None)
    share: float | None = Field(default=None, exclude_if=lambda share: share is None)


class MergeReport(Record):
    """What a merge did.

    Attributes:
        version: Version of this package.
        path: The output.
        precision_path: Its precision; None where none is written.
        summary: What the merge did, in one line.
        method: The merging rule.
        formula: Its equation, or what it does.
        weights: `precision` or `uniform`.
        settings: All settings as they were used.
        models: The inputs, the base first.
        stages: The inputs of earlier merges, by the `ref` of the output that is merged here or in
            another one of them. Where there were none, there is no such key.
        merged_tensors: How many tensors are merged.
        copied: Tensors taken from the donor byte for byte, with the reason.
        left_out: Tensors that are not in the output, with the reason.
        ruled: Tensors that are merged by a rule (tied heads, `--on-missing`, `--vocab`), with what
            it decided.
        guard: rho of the guard on removal.
        guarded_share: Share of entries at which the guard acted (0 without a removal).
        largest_multiplier: Largest `|scale_t| S_t / S` of a removed task: how far the edit was
            amplified.
        changed_share: Share of merged entries at which some task with a scale differs from the
            base; None without a base.
        lost_share: Share of the changed ones at which rounding to the output's dtype gave back the
            base's value.
        predicted: The predicted increase of each model's loss on its own data; empty where no
            precisions are read.
        notes: Remarks for the reader.
    """

    version: str = __version__
    path: str
    precision_path: str | None
    summary: str = ""
    method: str
    formula: str
    weights: str
    settings: dict[str, Any]
    models: tuple[MergedModel, ...]
    stages: dict[str, tuple[MergedModel, ...]] = Field({}, exclude_if=lambda stages: not stages)
    merged_tensors: int
    copied: dict[str, str]
    left_out: dict[str, str]
    ruled: dict[str, str]
    guard: float
    guarded_share: float
    largest_multiplier: float
    changed_share: float | None
    lost_share: float | None
    predicted: tuple[Increase, ...] = ()
    notes: tuple[str, ...]


def make_report(plan: MergePlan, totals: MergeTotals) -> MergeReport:
    """The report of a merge that is complete."""
    notes = list(plan.notes)
    steps = [step for step in plan.steps if step.tied_to is None]
    models = tuple(_merged_model(plan, totals, model, notes) for model in plan.inputs)
    has_changes = plan.base is not None and totals.entries > 0
    lost_share = None
    # A rule that drops changes on purpose would count as lost what it dropped.
    if has_changes and totals.changed and plan.method.is_posterior:
        lost_share = totals.lost / totals.changed
        _note_lost(plan, lost_share, notes)
    _note_undo(plan, totals, notes)
    notes += notes_on_precisions(plan)
    notes += notes_on_increases(plan)
    return MergeReport(
        path=str(plan.target),
        precision_path=str(precision_path(plan.target)) if plan.info is not None else None,
        summary=plan.summary,
        method=plan.method.name,
        formula=plan.method.formula or plan.method.summary,
        weights="precision" if plan.method.needs_precision else "uniform",
        settings=plan.config.model_dump(
            exclude={"force", "out", "identities", "full_identities", "full_precision_identities"}
        )
        | {
            "param": dict(plan.settings),
            "side_files": plan.side_files.ref if plan.side_files is not None else None,
        },
        models=models,
        stages={
            ref: tuple(MergedModel.model_validate(model) for model in merged)
            for ref, merged in plan.stages.items()
        },
        merged_tensors=sum(step.copied is None for step in steps),
        copied={step.name: step.copied for step in steps if step.copied is not None},
        left_out=plan.left_out,
        ruled=plan.decisions,
        guard=plan.guard,
        guarded_share=totals.guarded_share,
        largest_multiplier=six_digits(totals.multiplier),
        changed_share=totals.changed / totals.entries if has_changes else None,
        lost_share=lost_share,
        predicted=predicted_increases(plan, totals.moves),
        notes=tuple(notes),
    )


def _merged_model(
    plan: MergePlan, totals: MergeTotals, model: Input, notes: list[str]
) -> MergedModel:
    """How one input entered the merge; remarks about it are added to `notes`."""
    posterior, info, is_base = model.posterior, model.precision_info, model is plan.base
    ratio = _ratio(plan, totals, model)
    if ratio is not None and not _PLAUSIBLE[0] <= abs(ratio) <= _PLAUSIBLE[1]:
        notes.append(
            f"'{model.ref}' adds {ratio:.2g} times the base's likelihood precision; check the units"
        )
    if names := totals.zero[model]:
        notes.append(f"the precision of '{model.ref}' is zero in all of {_some(names)}")
    replaced = totals.replaced[model]
    if replaced:
        entries = "entry" if replaced == 1 else "entries"
        notes.append(f"{replaced:,} bad {entries} of '{model.ref}' took the base's values")
    return MergedModel(
        ref=model.ref,
        role="base" if is_base else "task",
        scale=None if is_base else model.scale,
        identity=posterior.identity,
        full=posterior.full_identity if plan.config.verify else None,
        commit=posterior.commit,
        estimator=info.estimator if info else None,
        unit=info.unit if info else None,
        observations=info.observations if info else None,
        count=model.weighing.count,
        ratio=six_digits(ratio) if ratio else ratio,
        mended=replaced,
        mixture=None if model.mixed_in is None else model.mixed_in.ref,
        share=six_digits(totals.shares[model]) if model in totals.shares else None,
    )


def _ratio(plan: MergePlan, totals: MergeTotals, model: Input) -> float | None:
    """`sum H_t / sum H_0` of a task; None without a base that has an H."""
    base_sum = totals.likelihood[plan.base] if plan.base is not None else 0.0
    if model is plan.base or base_sum <= 0:
        return None
    return totals.likelihood[model] / base_sum


def _note_lost(plan: MergePlan, lost_share: float, notes: list[str]) -> None:
    """Say if much of the edit is not in the output, and why."""
    # What is removed again goes back to the base's value, by intention.
    undoes = plan.guard < plan.config.guard or (plan.info is not None and not plan.info.terms)
    if lost_share < 0.01 or undoes:
        return
    start = f"{lost_share:.1%} of the changed entries have the base's value in the output: "
    cancels = "the models' changes cancel there" if len(plan.tasks) > 1 else ""
    merged = [step for step in plan.steps if step.copied is None]
    if all(step.spec.dtype in ("F32", "F64") for step in merged):
        notes.append(start + (cancels or "the edit is smaller there than F32 resolves"))
        return
    rounded = "the edit is small for the dtype of the output, and was rounded off"
    notes.append(
        f"{start}{rounded}{f', or {cancels}' if cancels else ''}. Undoing the merge later is exact "
        "in F32 only (--dtype F32)"
    )


def _note_undo(plan: MergePlan, totals: MergeTotals, notes: list[str]) -> None:
    """Say if the guard acted although every removal undoes a term."""
    if plan.guard == plan.config.guard or not totals.guarded:
        return
    notes.append(
        f"the undo is not exact: its guard acted on {totals.guarded:,} of {totals.entries:,} "
        f"entries ({_percent(totals.guarded_share)}). What remains there is less than "
        f"{plan.guard:g} of the precision that was added and removed, too little to be told from "
        "rounding. Merge again from the models, without the one that is removed"
    )


def _percent(share: float) -> str:
    """A share above zero, which is never shown as zero."""
    return f"{share:.2%}" if share >= 5e-5 else "less than 0.01%"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
