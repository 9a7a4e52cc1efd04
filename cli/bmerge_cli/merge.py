"""`bmerge merge`: add, average or subtract models, by equal weights or by precision."""

from typing import Annotated, Any

import typer

from bmerge_cli.render import (
    Force,
    Json,
    Quiet,
    assignments,
    console,
    failures,
    number,
    print_json,
    progress_bar,
    table,
)
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import MergeConfig, MergeReport, carry_out
from mergekit_bayes.plan import MergePlan, plan_merge

NAME = "merge"


def command(
    models: Annotated[list[str], typer.Argument(help=".safetensors files, folders, or Hub ids (org/name[@revision]).")],
    base: Annotated[
        str | None, typer.Option(help="What the models were fine-tuned from; their changes add up.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="uniform: all entries count alike. precision: by their precision.")
    ] = "uniform",
    scale: Annotated[
        list[str] | None, typer.Option(help="One for all, or one per model by repeating. < 0 removes.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", "-o", help="A .safetensors file or a folder.")] = None,
    only: Annotated[str | None, typer.Option(help="Merge only tensors whose name matches this regex.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="MODEL=PATH: its precision lies elsewhere.")] = None,
    isotropic: Annotated[list[str] | None, typer.Option(help="MODEL=X: one number as its precision.")] = None,
    anchor: Annotated[
        str, typer.Option(help="What training pulled to: h0, none, zero-decay, recorded, or a number.")
    ] = "h0",
    guard: Annotated[float, typer.Option(help="Bounds the amplification of a removal by 1/guard.")] = 0.2,
    counts: Annotated[
        str, typer.Option(help="equal: per observation, times a common count. recorded: each its own.")
    ] = "equal",
    observations: Annotated[
        list[str] | None, typer.Option(help="MODEL=3x or MODEL=1000: how much its data counts.")
    ] = None,
    shrink: Annotated[
        str | None, typer.Option(help="X or row:X: add X times the tensor's (row's) mean precision.")
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="tensor or row: one precision for each, the control of entries.")
    ] = None,
    posterior: Annotated[bool, typer.Option("--posterior/--no-posterior", help="Write the merged precision.")] = True,
    verify: Annotated[bool, typer.Option("--verify", help="Compare full hashes, not only sampled blocks.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: an average, or with --base the sum of their changes.

    uniform: average, task arithmetic.  precision: precision-weighted average, gradient matching
    (Daheim et al., ICLR 2024). A precision lies in X.precision.safetensors or MODEL/posterior/.
    """
    with failures():
        for item in models:
            _refuse_number(item)
        config = parse_config(
            MergeConfig,
            {
                "models": models,
                "base": base,
                "weights": weights,
                "scale": [number(s, "--scale") for s in scale or ["1"]],
                "out": out,
                "only": only,
                "precision": assignments(precision or [], "--precision"),
                "isotropic": {
                    m: number(x, "--isotropic") for m, x in assignments(isotropic or [], "--isotropic").items()
                },
                "anchor": anchor,
                "guard": guard,
                "counts": counts,
                "observations": assignments(observations or [], "--observations"),
                "shrink": shrink,
                "pool": pool,
                "posterior": posterior,
                "force": force,
                "verify": verify,
            },
            "bmerge merge",
        )
        plan = plan_merge(config)
        try:
            screen = console(quiet=quiet)
            if dry_run:
                _show_plan(screen, plan)
                if as_json:
                    print_json(_plan_document(plan))
                return
            with progress_bar(screen, "merging") as advance:
                report = carry_out(plan, progress=advance)
        finally:
            plan.close()
        _show_report(screen, report)
        if as_json:
            print_json(report.model_dump(mode="json"))
        elif not quiet:
            typer.echo(report.path)


def _refuse_number(item: str) -> None:
    try:
        float(item)
    except ValueError:
        return
    raise ConfigError(f"'{item}' is a number, not a model. Repeat the flag for each model: --scale 1 --scale {item}.")


def _plan_document(plan: MergePlan) -> dict[str, Any]:
    return {
        "method": plan.method.name,
        "target": str(plan.target),
        "models": [_weight_row(plan, i) for i in range(len(plan.models))],
        "guard": plan.guard,
        "steps": [
            {"name": s.name, "dtype": s.spec.dtype, "shape": s.spec.shape, "copied": s.copied} for s in plan.steps
        ],
        "left_out": plan.left_out,
        "notes": plan.notes,
    }


def _weight_row(plan: MergePlan, i: int) -> dict[str, Any]:
    model, weighing = plan.models[i], plan.weighings[i]
    is_base = plan.base is not None and i == 0
    scale = None if is_base else plan.scales[i - (plan.base is not None)]
    row: dict[str, Any] = {"ref": model.ref, "role": "base" if is_base else "task", "scale": scale}
    if plan.method.needs_precision:
        info = model.info
        row |= {
            "estimator": info.estimator if info else "given",
            "unit": info.unit if info else None,
            "observations": info.observations if info else None,
            "counted": weighing.count,
            "anchor": info.anchor.model_dump() if info else None,
        }
    return row


def _show_plan(screen: Any, plan: MergePlan) -> None:
    rows = []
    for i in range(len(plan.models)):
        row = _weight_row(plan, i)
        rows.append([str(row["ref"]), str(row["role"]), _text(row["scale"])])
        if plan.method.needs_precision:
            recorded = row["anchor"] or {"kind": "-", "precision": None}
            pull = (
                recorded["kind"] if recorded["precision"] is None else f"{recorded['kind']} {recorded['precision']:.3g}"
            )
            rows[-1] += [
                f"{row['estimator']}/{row['unit'] or '-'}",
                _text(row["observations"]),
                _text(row["counted"]),
                pull,
            ]
    columns = ["model", "role", "scale"]
    if plan.method.needs_precision:
        columns += ["precision", "observations", "counted", "trained towards"]
    screen.print(table(columns, rows, title=f"{plan.method.name} -> {plan.target}"))
    merged = [s for s in plan.steps if s.copied is None]
    size = sum(s.spec.size for s in merged)
    screen.print(f"{len(merged)} tensors merged ({size:,} entries), {len(plan.steps) - len(merged)} copied, "
                 f"{len(plan.left_out)} left out")  # fmt: skip
    for step in plan.steps:
        if step.copied is not None:
            screen.print(f"  copied    {step.name}: {step.copied}", markup=False)
    for name, why in plan.left_out.items():
        screen.print(f"  left out  {name}: {why}", markup=False)
    for note in plan.notes:
        screen.print(f"  note      {note}", markup=False)


def _show_report(screen: Any, report: MergeReport) -> None:
    screen.print(
        f"{report.method}: {report.merged_tensors} tensors merged, {len(report.copied)} copied, "
        f"{len(report.left_out)} left out"
    )
    for model in report.models:
        if model.ratio is not None:
            screen.print(f"  {model.ref}: sum H / sum H_base = {model.ratio:.3g}", markup=False)
    removes = any(m.scale is not None and m.scale < 0 for m in report.models)
    if report.weights == "precision" and (removes or report.guarded_share > 0):
        screen.print(
            f"  guard {report.guard:g} acted on {report.guarded_share:.2%} of entries; "
            f"largest multiplier {report.largest_multiplier:.3g}"
        )
    for note in report.notes:
        screen.print(f"  note: {note}", markup=False)
    if report.precision_path:
        screen.print(f"  precision: {report.precision_path}", markup=False)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:,g}"
