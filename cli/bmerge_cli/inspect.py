"""`bmerge inspect`: what is in a checkpoint and its posterior, and how far another one is from it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from bmerge_cli.render import Json, Quiet, console, failures, print_json, table

if TYPE_CHECKING:
    from mergekit_bayes.inspect import InspectReport, PrecisionSummary
    from mergekit_bayes.inspect.report import Layer

NAME = "inspect"


def command(
    model: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a folder, or a Hub id (org/name[@revision])."),
    ],
    other: Annotated[str | None, typer.Argument(help="Another one, to compare with.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Where its precision lies, if not beside the model.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show parameters, dtypes, who made the precision, its health and quantiles by layer.

    With OTHER, show the size of the difference by layer. Of a Hub id alone only the headers are
    read.
    """
    with failures():
        from mergekit_bayes.inspect.run import run_inspect

        report = run_inspect(model, other, precision)
        _show(console(quiet=quiet), report)
        if as_json:
            print_json(report.model_dump(mode="json"))


def _show(screen: Any, report: "InspectReport") -> None:
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in report.dtypes.items())
    screen.print(report.path, markup=False, style="bold")
    screen.print(
        f"{report.parameters:,} parameters ({dtypes}) in {report.tensors} tensors, "
        f"{len(report.files)} "
        f"file{'s' * (len(report.files) != 1)}, {report.bytes / 1e6:,.1f} MB"
    )
    for what, names in (("no parameters", report.buffers), ("tied copies", report.tied)):
        if names:
            screen.print(
                f"{what}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}", markup=False
            )
    if report.precision is not None:
        _show_precision(screen, report.precision)
    values = report.identity is not None  # else only headers were read
    rows = [
        [x.name, f"{x.parameters:,}", _short(x.rms), _short(x.largest)][: 4 if values else 2]
        for x in report.layers
    ]
    screen.print(
        table(
            ["layer", "parameters", "RMS", "max abs"][: 4 if values else 2], rows, title="\nweights"
        )
    )
    if report.precision is not None and values:
        columns = ["layer", "min", "5 %", "25 %", "50 %", "75 %", "95 %", "max", "sigma / RMS"]
        rows = [_precision_row(x, len(columns)) for x in report.layers]
        screen.print(table(columns, rows, title="\nprecision, 1/weight^2"))
    if report.comparison is not None:
        c = report.comparison
        rows = [
            [
                x.name,
                f"{x.difference.rms:.3g}",
                _text(x.difference.relative),
                f"{x.difference.largest:.3g}",
            ]
            for x in report.layers
            if x.difference is not None
        ]
        rows.append(["all", f"{c.rms:.3g}", _text(c.relative), f"{c.largest:.3g}"])
        title = f"\ndifference to {c.path}"
        screen.print(table(["layer", "RMS", "RMS / RMS of weights", "max abs"], rows, title=title))
        for where, names in (("here", c.only_here), ("there", c.only_there)):
            if names:
                screen.print(
                    f"only {where}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}",
                    markup=False,
                )
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)


def _show_precision(screen: Any, precision: "PrecisionSummary") -> None:
    info = precision.info
    screen.print(f"\nprecision: {precision.files[0]}", markup=False)
    if precision.not_samplable:
        screen.print(f"  not samplable: {precision.not_samplable}", markup=False)
    if info is None:
        return
    belongs = {True: "of these weights", False: "OF OTHER WEIGHTS", None: "of weights unread"}[
        precision.belongs
    ]
    count = "unknown" if info.observations is None else f"{info.observations:,g}"
    sampled = "" if info.sampled is None else f", {info.sampled:,g} looked at"
    screen.print(
        f"  {info.estimator}, {belongs}, for {count} observations (unit: "
        f"{info.unit or 'unknown'}){sampled}"
    )
    anchor = "unknown" if info.anchor.precision is None else f"{info.anchor.precision:.4g}"
    screen.print(
        f"  prior {info.prior.kind} {info.prior.precision:.4g}; trained towards {info.anchor.kind} "
        f"({anchor}); "
        f"scale (ess) {_text(info.ess)}"
    )
    for title, values in (("training", info.training), ("health", info.health)):
        if values:
            screen.print(
                f"  {title}: {', '.join(f'{k} {_text(v)}' for k, v in values.items())}",
                markup=False,
            )
    for term in info.terms:
        screen.print(f"  term {term.label}, scale {term.scale:g}", markup=False)


def _precision_row(layer: "Layer", width: int) -> list[str]:
    found = layer.precision
    if found is None or not found.quantiles:
        return [layer.name, *["-"] * (width - 1)]
    return [layer.name, *(f"{q:.3g}" for q in found.quantiles), _text(found.sigma_ratio)]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
