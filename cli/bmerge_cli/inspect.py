"""`bmerge inspect`: what is in a checkpoint and its posterior, and how far another one is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli.render import GAP, Json, Quiet, Screen, console, failures, print_json, table
from mergekit_bayes.posterior.wording import (
    anchor_in_words,
    edit_in_words,
    information_in_words,
    is_of_training,
    observations_in_words,
    prior_in_words,
)

if TYPE_CHECKING:
    from mergekit_bayes.inspect import (
        Comparison,
        DifferenceLayer,
        InspectReport,
        LayerReport,
        PrecisionSummary,
    )
    from mergekit_bayes.posterior import PosteriorInfo

_NAMES = 30  # characters of a layer's name that are worth more than further quantiles
_SHORTEST_NAME = 8
_QUANTILES = ("min", "5%", "25%", "50%", "75%", "95%", "max")
_SHOWN = ((0, 1, 2, 3, 4, 5, 6), (0, 1, 3, 5, 6), (0, 3, 6), (3,))  # of them, for narrower screens
# Health numbers of IVON's own estimate, which are zero where `curvature: ggn` takes its place.
_NOT_OF_GGN = ("init_fraction", "kappa", "hess_noise")
_LARGEST_COUNT = 1e15
_DAMPED = ("hess_min", "hess_median", "hess_max")


@failures()
def command(
    model: Annotated[
        str,
        typer.Argument(help="A .safetensors file, a folder, or a Hub id (org/name[@revision])."),
    ],
    other: Annotated[str | None, typer.Argument(help="Another one, to compare with.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Where the model's precision is, if not beside it.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show parameters, dtypes, the origin of the precision, its health and quantiles by layer.

    With OTHER, show the size of the difference by layer. Of a Hub id alone only the headers are
    read.
    """
    from mergekit_bayes.inspect.run import run_inspect

    report = run_inspect(model, other, precision)
    _show(console(quiet=quiet), report)
    if as_json:
        print_json(report.model_dump(mode="json"))


def _show(screen: Screen, report: "InspectReport") -> None:
    dtypes = ", ".join(f"{n:,} {dtype}" for dtype, n in report.dtypes.items())
    files = f"{len(report.files)} file{'s' * (len(report.files) != 1)}"
    screen.print(report.path, markup=False, style="bold")
    screen.print(
        f"{report.parameters:,} parameters ({dtypes}) in {report.tensors} tensors, {files}, "
        f"{report.bytes / 1e6:,.1f} MB"
    )
    if report.mixture:
        rows = [[run.label, f"{run.weight:.3g}", run.path] for run in report.mixture]
        title = "\na mixture, of which the plain model is shown below"
        screen.print(table(["run", "weight", "component"], rows, title=title))
    _show_names(screen, "no parameters", report.buffers)
    _show_names(screen, "tied copies", report.tied)
    if report.precision is not None:
        _show_precision(screen, report.precision, report.parameters)
    if report.identity is None:  # only headers were read
        rows = [[layer.name, f"{layer.parameters:,}"] for layer in report.layers]
        _show_by_layer(screen, ["layer", "parameters"], rows, "\nweights")
    else:
        _show_layers(screen, report)
    if report.comparison is not None:
        _show_comparison(screen, report, report.comparison)
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)


def _show_names(screen: Screen, label: str, names: Sequence[str]) -> None:
    """The first few of these names, if there are any."""
    if names:
        more = ", ..." * (len(names) > 4)
        screen.print(f"{label}: {', '.join(names[:4])}{more}", markup=False)


def _show_precision(screen: Screen, precision: "PrecisionSummary", parameters: int) -> None:
    info = precision.info
    screen.print(f"\nprecision: {precision.files[0]}", markup=False)
    if precision.information is not None:
        words = information_in_words(precision.information, parameters * precision.covered, info)
        screen.print(f"  {words}", markup=False)
    if info is not None:
        _show_record(screen, precision, info)
    if precision.not_samplable:
        draw = "to draw weights from it (`bmerge evaluate --samples`), give --prior X"
        draw = "weights cannot be drawn from it" if precision.matrices else draw
        screen.print(f"  {draw}: {precision.not_samplable}", markup=False)
    elif info is not None and info.predictive is not None:
        width = precision.draws_over_rms
        ratio = "" if width is None else f", sigma / RMS {width:.2g}"
        screen.print(
            "  draws for predictions (bmerge evaluate --samples): prior "
            f"{info.predictive.prior:.3g}, temperature {info.predictive.temperature:.3g}{ratio}"
        )


def _show_record(screen: Screen, precision: "PrecisionSummary", info: "PosteriorInfo") -> None:
    """Who made a precision, of what, and how."""
    weights = {True: "of these weights", False: "OF OTHER WEIGHTS", None: "of weights unread"}
    sampled = "" if info.sampled is None else f", estimated from {info.sampled:,g} rows"
    screen.print(
        f"  {info.estimator}, {weights[precision.belongs]}, for {observations_in_words(info)}"
        f"{sampled}"
    )
    # Readers count by `observations / ess`, which is 1 for most posteriors.
    scale = "" if info.ess in (None, info.observations) else f"; scaled by an ess of {info.ess:,g}"
    screen.print(f"  {prior_in_words(info)}; {anchor_in_words(info)}{scale}")
    made = "training" if is_of_training(info) else "estimate"
    for title, numbers in ((made, info.training), ("health", _health(info))):
        if numbers:
            pairs = ", ".join(f"{name} {_setting(name, value)}" for name, value in numbers.items())
            screen.print(f"  {title}: {pairs}", markup=False)
    for term in info.terms:
        screen.print(f"  term {term.label}, scale {term.scale:g}", markup=False)
    for edit in info.edits:
        screen.print(f"  adapted: {edit_in_words(edit, info.unit)}", markup=False)


def _health(info: "PosteriorInfo") -> Mapping[str, object]:
    """The health numbers that exist for this training, by names that say what is in them."""
    is_ggn = info.training.get("curvature") == "ggn"
    health: dict[str, object] = {}
    for name, value in info.health.items():
        if is_ggn and name in _NOT_OF_GGN and value == 0:
            continue
        shown = f"{name} of the training" if name == "sigma_over_rms" else name
        is_damped = name in _DAMPED and info.training.get("damping")
        health[f"damped {name}" if is_damped else shown] = value
    return health


def _show_layers(screen: Screen, report: "InspectReport") -> None:
    """Size and precision of the weights, layer by layer."""
    rows = [
        [layer.name, f"{layer.parameters:,}", _short(layer.rms), _short(layer.largest)]
        for layer in report.layers
    ]
    _show_by_layer(screen, ["layer", "parameters", "RMS", "max abs"], rows, "\nweights")
    if report.precision is not None and report.precision.covered:
        rows = [_precision_row(layer) for layer in report.layers]
        columns, rows = _fewer_quantiles(["layer", *_QUANTILES, "sigma / RMS"], rows, screen.width)
        title = "\nstored precision, 1/weight^2, which merges read"
        _show_by_layer(screen, columns, rows, title)


def _precision_row(layer: "LayerReport") -> list[str]:
    precision = layer.precision
    if precision is None or not precision.quantiles:
        return [layer.name, *["-"] * (len(_QUANTILES) + 1)]
    return [layer.name, *map(_short, precision.quantiles), _text(precision.sigma_ratio)]


def _fewer_quantiles(
    columns: list[str], rows: list[list[str]], width: int
) -> tuple[list[str], list[list[str]]]:
    """As many quantiles as leave room for the layers' names on a screen of this width."""
    names = min(_NAMES, max(len(row[0]) for row in rows))
    for shown in _SHOWN:
        picked = [0, *(1 + quantile for quantile in shown), len(columns) - 1]
        heads, cells = ([[r[i] for i in picked] for r in part] for part in ([columns], rows))
        if _room_for_names(heads[0], cells, width) >= names:
            break
    return heads[0], cells


def _show_by_layer(
    screen: Screen, columns: Sequence[str], rows: Sequence[list[str]], title: str
) -> None:
    """Print a table whose names of layers are cut in the middle before a number is broken."""
    room = max(_SHORTEST_NAME, _room_for_names(columns, rows, screen.width))
    rows = [[_middle_cut(name, room), *numbers] for name, *numbers in rows]
    screen.print(table(columns, rows, title=title))


def _room_for_names(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> int:
    """Characters that the other columns leave to the first one."""
    numbers = list(zip(columns, *rows, strict=True))[1:]
    return width - sum(GAP + max(map(len, column)) for column in numbers)


def _middle_cut(name: str, room: int) -> str:
    """A name of at most this length, with the start and the end of the whole one."""
    if len(name) <= room:
        return name
    end = (room - 2) // 2
    return f"{name[: room - 3 - end]}...{name[-end:]}"


def _show_comparison(screen: Screen, report: "InspectReport", other: "Comparison") -> None:
    """How far the other model is, layer by layer and in all."""
    rows = [
        _difference_row(layer.name, layer.difference)
        for layer in report.layers
        if layer.difference is not None
    ]
    rows.append(_difference_row("all", other))
    columns = ["layer", "RMS", "RMS / RMS of weights", "max abs"]
    _show_by_layer(screen, columns, rows, f"\ndifference to {other.path}")
    _show_names(screen, "only here", other.only_here)
    _show_names(screen, "only there", other.only_there)


def _difference_row(name: str, size: "DifferenceLayer | Comparison") -> list[str]:
    return [name, f"{size.rms:.3g}", _text(size.relative), f"{size.largest:.3g}"]


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _setting(name: str, value: object) -> str:
    """An entry of a record; counts, which may be stored as floats, are shown in full."""
    if not isinstance(value, int | float) or isinstance(value, bool) or name == "seed":
        return _text(value)
    is_count = abs(value) < _LARGEST_COUNT and value == int(value)
    return f"{value:,.0f}" if is_count else _text(value)
