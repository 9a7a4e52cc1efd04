"""What `bmerge merge` shows: its plan as a table or a document, and its reports."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bmerge_cli.render import Screen, table
from mergekit_bayes.merge import MergeReport, Part, PredictionReport
from mergekit_bayes.merge.increase import Increase
from mergekit_bayes.methods import METHODS
from mergekit_bayes.plan import Input, MergePlan
from mergekit_bayes.stream.units import units_of

if TYPE_CHECKING:
    from mergekit_bayes.lora import AdapterReport

# Why a prediction is not trusted; see merge/increase.
_TOO_FAR = "the merge is farther from the model than the base is, by the model's own precision"
_NOTHING = 1e-9  # nats that rounding alone gives
_ROUNDING = 1e-5  # relative errors below this are those of float32 factors


def plan_document(plan: MergePlan, part: Part | None = None) -> dict[str, object]:
    """A plan as the document of `--dry-run --json`, with the share of a part."""
    share = {} if part is None else {"part": _share(plan, part)}
    return share | {
        "summary": plan.summary,
        "method": plan.method.name,
        "settings": plan.settings,
        "target": str(plan.target),
        "shards": [len(names) for names in plan.shards],
        "models": _model_rows(plan),
        "side_files": plan.side_files.ref if plan.side_files is not None else None,
        "guard": plan.guard,
        "steps": [
            {"name": s.name, "dtype": s.spec.dtype, "shape": s.spec.shape, "copied": s.copied}
            for s in plan.steps
        ],
        "left_out": plan.left_out,
        "ruled": plan.decisions,
        "notes": plan.notes,
    }


def _share(plan: MergePlan, part: Part) -> dict[str, int]:
    """How many units and entries of a plan a part takes."""
    units = units_of(plan)
    taken = [unit for unit in units if part.takes(unit.position)]
    return {
        "number": part.number,
        "of": part.of,
        "units": len(taken),
        "all_units": len(units),
        "entries": sum(unit.stop - unit.start for unit in taken),
    }


def show_plan(screen: Screen, plan: MergePlan, part: Part | None = None) -> None:
    """Print a plan: the models, each tensor that is not simply merged, and the share of a part."""
    if screen.quiet:  # a table is rich's, which a quiet command does not load
        return
    columns = ["model", "role", "scale"]
    models = _model_rows(plan)
    rows = [[str(m["ref"]), str(m["role"]), _text(m["scale"])] for m in models]
    if plan.method.needs_precision:
        columns += ["precision", "observations", "counted", "trained towards"]
        for row, model in zip(rows, models, strict=True):
            row += _precision_cells(model)
    screen.print(plan.summary, markup=False)
    screen.print(table(columns, rows, title=f"{plan.method.name} -> {plan.target}"))
    for rule in plan.config.scale:
        if isinstance(rule, str):
            screen.print(f"  scale     {rule}", markup=False)
    steps = [s for s in plan.steps if s.tied_to is None]
    merged = [s for s in steps if s.copied is None]
    size = sum(s.spec.size for s in merged)
    screen.print(
        f"{len(merged)} tensors merged ({size:,} entries), {len(steps) - len(merged)} copied, "
        f"{len(plan.left_out)} left out"
    )
    if part is not None:
        share = _share(plan, part)
        screen.print(
            f"part {part.number} of {part.of} does {share['units']:,} of {share['all_units']:,} "
            f"units of work ({share['entries']:,} entries)"
        )
    for step in steps:
        if step.copied is not None:
            screen.print(f"  copied    {step.name}: {step.copied}", markup=False)
    for name, reason in plan.decisions.items():
        screen.print(f"  ruled     {name}: {reason}", markup=False)
    for name, reason in plan.left_out.items():
        screen.print(f"  left out  {name}: {reason}", markup=False)
    for note in plan.notes:
        screen.print(f"  note      {note}", markup=False)


def show_report(screen: Screen, report: MergeReport) -> None:
    """Print what a merge of whole models did."""
    screen.print(report.summary, markup=False)
    screen.print(
        f"{report.method}: {report.merged_tensors} tensors merged, {len(report.copied)} copied, "
        f"{len(report.left_out)} left out"
    )
    for model in report.models:
        if model.ratio is not None:
            share = "" if model.share is None else f", {model.share:.1%} of its mixture"
            screen.print(
                f"  {model.ref}: sum H / sum H_base = {model.ratio:.3g}{share}", markup=False
            )
    if count := len(report.ruled):
        screen.print(
            f"  {count} tensor{'s' * (count > 1)} by a rule, {next(iter(report.ruled))} first: see "
            "the report"
        )
    removes = any(m.scale is not None and m.scale < 0 for m in report.models)
    weighs = report.weights == "precision" and "guard" not in METHODS[report.method].ignores
    if weighs and (removes or report.guarded_share > 0):
        screen.print(
            f"  {guard_in_words(report)} acted on {_percent(report.guarded_share)} of entries; "
            f"largest multiplier {report.largest_multiplier:.3g}"
        )
    for line in _predicted(report.predicted):
        screen.print(f"  {line}", markup=False)
    _show_notes(screen, report.notes)
    if report.precision_path:
        screen.print(f"  precision: {report.precision_path}", markup=False)


def show_predictions(screen: Screen, report: PredictionReport) -> None:
    """Print what merges by several sets of scales are predicted to cost each model."""
    if screen.quiet:
        return
    first = report.sets[0].predicted
    rows = [
        [", ".join(f"{x:g}" for x in one.scale), *map(_predicted_cell, one.predicted)]
        for one in report.sets
    ]
    title = f"{report.method}: predicted increase of each model's loss on its own data"
    screen.print(table(["scales", *(p.ref for p in first)], rows, title=f"{title}, {_unit(first)}"))
    if report.base is None:
        screen.print("  without a base nothing says how far the predictions hold")
    elif any(p.trusted is False for one in report.sets for p in one.predicted):
        screen.print(f"  ? = not to be trusted: {_TOO_FAR}")
    for rule in report.rules:
        screen.print(f"  scale     {rule}", markup=False)
    _show_notes(screen, report.notes)


def _predicted(predicted: Sequence[Increase]) -> list[str]:
    """The predicted increases of a merge in a line, and whose are not to be trusted in another."""
    known = [p for p in predicted if p.nats is not None]
    if not known:
        return []
    each = ", ".join(f"'{p.ref}' {p.nats:+.3g}" for p in known)
    lines = [f"predicted increase of the loss, {_unit(known)}: {each}"]
    if far := [f"'{p.ref}'" for p in known if p.trusted is False]:
        lines.append(f"not to be trusted for {', '.join(far)}: {_TOO_FAR}")
    return lines


def _predicted_cell(one: Increase) -> str:
    if one.nats is None:
        return "-"
    number = "0" if abs(one.nats) < _NOTHING else f"{one.nats:+.4g}"
    return f"{number}{' ?' if one.trusted is False else ''}"


def _unit(predicted: Sequence[Increase]) -> str:
    """The unit of the predictions; models of different ones are refused before."""
    units = {p.unit for p in predicted if p.unit is not None}
    return _per(units.pop() if units else "observation")


def _per(unit: str) -> str:
    return f"nats {'a' if unit == 'token' else 'an'} {unit}"


def guard_in_words(report: MergeReport) -> str:
    """The guard of a merge, and that an undo has a guard of its own."""
    if report.guard == report.settings["guard"]:
        return f"guard {report.guard:g}"
    return f"guard {report.guard:g} (of an undo, instead of --guard)"


def _percent(share: float) -> str:
    """A share in per cent; one above zero is never shown as zero."""
    return "less than 0.01%" if 0 < share < 5e-5 else f"{share:.2%}"


def show_adapters(screen: Screen, report: "AdapterReport") -> None:
    """Print what a merge of adapters did."""
    exact = report.exact_rank
    lost = f"the largest relative error of a layer is {report.largest_error:.3g}"
    is_cut = exact is not None and report.rank < exact and report.largest_error > _ROUNDING
    if is_cut and report.rank_note is None:
        concat = " (so is --space concat)" if report.is_a_sum else ""
        lost += f", which rank {report.rank} cuts off; --rank {exact} is exact{concat}"
    screen.print(
        f"{report.summary}\n  {report.formula}\n  {report.symbols}\n"
        f"{len(report.layers)} layers, rank {report.rank}; {lost}",
        markup=False,
    )
    _show_notes(screen, report.notes)


def _show_notes(screen: Screen, notes: tuple[str, ...]) -> None:
    for note in notes:
        screen.print(f"  note: {note}", markup=False)


def _model_rows(plan: MergePlan) -> list[dict[str, Any]]:
    return [_model_row(plan, model) for model in plan.inputs]


def _model_row(plan: MergePlan, model: Input) -> dict[str, Any]:
    """How one input enters the merge; without precisions, only its role and scale."""
    is_base = model is plan.base
    scale = None if is_base else model.scale
    row: dict[str, Any] = {"ref": model.ref, "role": "base" if is_base else "task", "scale": scale}
    if plan.method.needs_precision:
        info = model.posterior.info
        row |= {
            "estimator": info.estimator if info else "given",
            "unit": info.unit if info else None,
            "observations": info.observations if info else None,
            "counted": model.weighing.count,
            "anchor": info.anchor.model_dump() if info else None,
        }
    return row


def _precision_cells(row: dict[str, Any]) -> list[str]:
    anchor = row["anchor"] or {"kind": "-", "precision": None}
    strength = "" if anchor["precision"] is None else f" {anchor['precision']:.3g}"
    return [
        f"{row['estimator']}/{row['unit'] or '-'}",
        _text(row["observations"]),
        _text(row["counted"]),
        f"{anchor['kind']}{strength}",
    ]


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}"
