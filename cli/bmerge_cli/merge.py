"""`bmerge merge`: add, average or subtract models, by equal weights or by precision."""

from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from bmerge_cli.push import Delivery, PushTo, delivering
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
from mergekit_bayes.checkpoint.sources import CHECKPOINT, is_hub_id, resolve
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora import is_adapter
from mergekit_bayes.merge import (
    MergeConfig,
    MergeReport,
    carry_out,
    join,
    parse_part,
    part_of_launcher,
)
from mergekit_bayes.plan import Input, MergePlan, partial_path, plan_merge
from mergekit_bayes.recipes import read_recipe

NAME = "merge"


def command(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            help=".safetensors files, folders, BASE+ADAPTER, Hub ids (org/name[@revision]); or one recipe.yaml."
        ),
    ],
    base: Annotated[
        str | None, typer.Option(help="What the models were fine-tuned from; their changes add up.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="uniform: all entries count alike. precision: by their precision.")
    ] = "uniform",
    scale: Annotated[
        list[str] | None,
        typer.Option(
            help="One for all, or one per model by repeating; < 0 removes. MODEL:REGEX=X: for matching tensors."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Another rule than --weights chooses: see `bmerge methods`.")
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a setting of the method.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            "-o",
            help="A .safetensors file or a folder; by default merged.safetensors or merged.",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Merge only tensors whose name matches this regex.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="MODEL=PATH: its precision lies elsewhere.")
    ] = None,
    isotropic: Annotated[
        list[str] | None, typer.Option(help="MODEL=X: one number as its precision.")
    ] = None,
    anchor: Annotated[
        str,
        typer.Option(help="What training pulled to: h0, none, zero-decay, recorded, or a number."),
    ] = "h0",
    guard: Annotated[
        float, typer.Option(help="Bounds the amplification of a removal by 1/guard.")
    ] = 0.2,
    counts: Annotated[
        str,
        typer.Option(help="equal: per observation, times a common count. recorded: each its own."),
    ] = "equal",
    observations: Annotated[
        list[str] | None, typer.Option(help="MODEL=3x or MODEL=1000: how much its data counts.")
    ] = None,
    shrink: Annotated[
        str | None,
        typer.Option(help="X or row:X: add X times the tensor's (row's) mean precision."),
    ] = None,
    pool: Annotated[
        str | None,
        typer.Option(help="tensor or row: one precision for each, the control of entries."),
    ] = None,
    on_missing: Annotated[
        str,
        typer.Option(
            help="A tensor that a model lacks: error, base (unchanged there) or skip (left out)."
        ),
    ] = "error",
    vocab: Annotated[
        str,
        typer.Option(
            help="Vocabularies of different length: error, base (kept) or common (tokens of all)."
        ),
    ] = "error",
    on_bad: Annotated[
        str,
        typer.Option(
            help="NaN, infinity or a negative precision: error, or base (unchanged there)."
        ),
    ] = "error",
    dtype: Annotated[
        str | None,
        typer.Option(help="F64, F32, F16, BF16, F8_E4M3 or F8_E5M2, instead of the base's own."),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Such as 5GB; by default the base's shards.")
    ] = None,
    posterior: Annotated[
        bool, typer.Option("--posterior/--no-posterior", help="Write the merged precision.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare full hashes, not only sampled blocks.")
    ] = False,
    space: Annotated[
        str,
        typer.Option(
            help="Adapters alone: product (of the factors), concat (exact sum) or factor."
        ),
    ] = "product",
    rank: Annotated[
        int | None, typer.Option(help="Adapters alone: the rank of the merged one.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="By default one a core, at most 4.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: do the I-th of N parts; a call without it joins them.")
    ] = None,
    sync: Annotated[
        bool, typer.Option("--sync", help="Wait for the disk: survives a power cut, too.")
    ] = False,
    push_to: PushTo = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models: an average, or with --base the sum of their changes.

    uniform: average, task arithmetic.  precision: precision-weighted average, gradient matching
    (Daheim et al., ICLR 2024). A precision lies in X.precision.safetensors or MODEL/posterior/.
    Adapters alone merge into an adapter: a sum, or with precision weights an average.
    A merge that was stopped is resumed by the same line; until it is whole it lies in OUT.partial.
    With --push-to and no -o it is made in a temporary folder.
    """
    with failures(), delivering(None if dry_run else push_to, out) as delivery:
        for item in models:
            _refuse_number(item)
        values: dict[str, Any] = {
            "models": models,
            "base": base,
            "weights": weights,
            "method": method,
            "param": assignments(param or [], "--param", "NAME"),
            "scale": [s if "=" in s else number(s, "--scale") for s in scale or ["1"]],
            "out": delivery.out,
            "only": only,
            "precision": assignments(precision or [], "--precision"),
            "isotropic": {
                m: number(x, "--isotropic")
                for m, x in assignments(isotropic or [], "--isotropic").items()
            },
            "anchor": anchor,
            "guard": guard,
            "counts": counts,
            "observations": assignments(observations or [], "--observations"),
            "shrink": shrink,
            "pool": pool,
            "on_missing": on_missing,
            "vocab": vocab,
            "on_bad": on_bad,
            "dtype": _DTYPES.get(dtype.lower(), dtype.upper()) if dtype else None,
            "max_shard_size": max_shard_size,
            "posterior": posterior,
            "space": space,
            "rank": rank,
            "force": force,
            "verify": verify,
        }
        given = {
            k
            for k in values
            if str(context.get_parameter_source(k)).endswith(("COMMANDLINE", "ENVIRONMENT"))
        }
        if delivery.temporary is not None:
            if shard is not None or part_of_launcher() is not None:
                raise ConfigError(
                    "--push-to: parts of a merge meet in one folder; name it with -o."
                )
            given.add("out")
        config = _config(values, given)
        screen = console(quiet=quiet)
        if _adapters_alone(config):
            if dry_run or shard is not None or threads is not None or sync:
                raise ConfigError(
                    "--dry-run, --shard, --threads and --sync are for whole models, not adapters "
                    "alone."
                )
            _merge_adapters(config, given, screen, delivery, as_json=as_json, quiet=quiet)
            return
        if (config.space, config.rank) != ("product", None):
            raise ConfigError("--space and --rank are for adapters alone; these are whole models.")
        part = parse_part(shard) if shard is not None else None
        if dry_run:  # a plan replaces nothing
            config = config.model_copy(update={"force": True})
        with closing(plan_merge(config)) as plan:
            if dry_run:
                _show_plan(screen, plan)
                if as_json:
                    print_json(_plan_document(plan))
                return
            launched = part_of_launcher() if part is None else None
            leads = launched is None or launched.number == 1
            screen = screen if leads else console(quiet=True)
            with progress_bar(screen, "merging") as advance:
                options: dict[str, Any] = {"progress": advance, "threads": threads, "sync": sync}
                options["say"] = lambda text: screen.print(text, markup=False)
                try:
                    if launched is not None:
                        report = join(plan, launched, **options)
                    else:
                        report = carry_out(plan, part=part, **options)
                except KeyboardInterrupt:
                    screen.print(
                        f"stopped; the same line goes on from '{partial_path(plan.target)}'",
                        markup=False,
                    )
                    raise typer.Exit(130) from None
        if report is None:
            if part is not None:
                screen.print(
                    f"part {part.number} of {part.of} is done; the same line without --shard joins "
                    "the parts"
                )
            return
        _show_report(screen, report)
        pushed = delivery.push(screen)
        if as_json:
            print_json(report.model_dump(mode="json") | pushed)
        elif not quiet:
            typer.echo(delivery.url or report.path)


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "fp32": "F32",
    "fp16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def _config(values: dict[str, Any], given: set[str]) -> MergeConfig:
    """Flags, or a recipe whose settings the given flags beat."""
    models = values["models"]
    recipes = [m for m in models if m.endswith((".yaml", ".yml"))]
    if not recipes:
        return parse_config(MergeConfig, values, "bmerge merge")
    if len(models) > 1:
        raise ConfigError(f"'{recipes[0]}' is a recipe and names its own models. Give it alone.")
    recipe = read_recipe(Path(recipes[0]))
    return parse_config(
        MergeConfig, recipe | {k: values[k] for k in given - {"models"}}, recipes[0]
    )


def _adapters_alone(config: MergeConfig) -> bool:
    if config.base is not None:
        return False
    return all(is_hub_id(m) or Path(m).expanduser().is_dir() for m in config.models) and all(
        is_adapter(resolve(m, CHECKPOINT)) for m in config.models
    )


def _merge_adapters(
    config: MergeConfig,
    given: set[str],
    screen: Any,
    delivery: Delivery,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    from mergekit_bayes.lora import merge_adapters

    ours = {"models", "weights", "scale", "out", "precision", "counts", "space", "rank", "force"}
    if foreign := sorted(given - ours):
        raise ConfigError(
            f"--{foreign[0].replace('_', '-')} is for whole models; adapters alone take --weights, "
            "--scale, --counts, "
            "--precision, --space and --rank. Put the base before each to merge whole models: "
            "BASE+ADAPTER."
        )
    if any(isinstance(s, str) for s in config.scale):
        raise ConfigError("--scale: adapters alone take one number each, no MODEL:REGEX=X.")
    with progress_bar(screen, "merging") as advance:
        report = merge_adapters(
            config.models,
            Path(config.out or "merged"),
            scales=[float(s) for s in config.scale],
            weights=config.weights,
            space=config.space,
            rank=config.rank,
            counts=config.counts,
            precision=config.precision,
            identities=config.identities,
            precision_identities=config.precision_identities,
            force=config.force,
            progress=advance,
        )
    screen.print(
        f"{report.formula}\n{len(report.layers)} layers, rank {report.rank}; the largest relative "
        "error of a layer "
        f"is {report.largest_error:.3g}",
        markup=False,
    )
    for note in report.notes:
        screen.print(f"  note: {note}", markup=False)
    pushed = delivery.push(screen)
    if as_json:
        print_json(report.model_dump(mode="json") | pushed)
    elif not quiet:
        typer.echo(delivery.url or report.path)


def _refuse_number(item: str) -> None:
    try:
        float(item)
    except ValueError:
        return
    raise ConfigError(
        f"'{item}' is a number, not a model. Repeat the flag for each model: --scale 1 --scale "
        f"{item}."
    )


def _plan_document(plan: MergePlan) -> dict[str, Any]:
    return {
        "method": plan.method.name,
        "settings": plan.settings,
        "target": str(plan.target),
        "shards": [len(names) for names in plan.shards],
        "models": [_weight_row(plan, model) for model in plan.inputs],
        "guard": plan.guard,
        "steps": [
            {"name": s.name, "dtype": s.spec.dtype, "shape": s.spec.shape, "copied": s.copied}
            for s in plan.steps
        ],
        "left_out": plan.left_out,
        "ruled": plan.decisions,
        "notes": plan.notes,
    }


def _weight_row(plan: MergePlan, model: Input) -> dict[str, Any]:
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


def _show_plan(screen: Any, plan: MergePlan) -> None:
    rows = []
    for model in plan.inputs:
        row = _weight_row(plan, model)
        rows.append([str(row["ref"]), str(row["role"]), _text(row["scale"])])
        if plan.method.needs_precision:
            recorded = row["anchor"] or {"kind": "-", "precision": None}
            pull = (
                recorded["kind"]
                if recorded["precision"] is None
                else f"{recorded['kind']} {recorded['precision']:.3g}"
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
    for rule in plan.config.scale:
        if isinstance(rule, str):
            screen.print(f"  scale     {rule}", markup=False)
    merged = [s for s in plan.steps if s.copied is None]
    size = sum(s.spec.size for s in merged)
    screen.print(
        f"{len(merged)} tensors merged ({size:,} entries), {len(plan.steps) - len(merged)} copied, "
        f"{len(plan.left_out)} left out"
    )
    for step in plan.steps:
        if step.copied is not None:
            screen.print(f"  copied    {step.name}: {step.copied}", markup=False)
    for name, why in plan.decisions.items():
        screen.print(f"  ruled     {name}: {why}", markup=False)
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
    if report.ruled:
        screen.print(
            f"  {len(report.ruled)} tensors by a rule, {next(iter(report.ruled))} first: see the "
            "report"
        )
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
