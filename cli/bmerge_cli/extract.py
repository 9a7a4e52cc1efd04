"""`bmerge extract`: the change of a fine-tune or an edit as a LoRA adapter."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from bmerge_cli import values
from bmerge_cli.delivery import PushTo, delivering
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.render import Json, Quiet, Screen, console, failures, steps_bar, table
from mergekit_bayes.extract.settings import ExtractConfig

if TYPE_CHECKING:
    from mergekit_bayes.extract import ExtractedLayer, ExtractReport

NAME = "extract"


@failures()
@flags_of(
    ExtractConfig,
    argument("model"),
    option("base"),
    option("out", "--out", "-o"),
    option("rank", low=1),
    option("tolerance"),
    option("weights"),
    option("precision"),
    option("sweeps", low=0),
    option("embeddings"),
    option("rest"),
    option("dtype", read=values.dtype),
    option("force"),
)
def command(
    settings: Settings, push_to: PushTo = None, as_json: Json = False, quiet: Quiet = False
) -> None:
    """Write what a tuned or edited model changed of its base as a LoRA adapter, which PEFT loads.

    The change of each linear layer becomes two factors of a small rank. Where MODEL has a precision
    it weighs the entries, so that the rank loses as little as possible of the loss, and what it
    loses is told in nats, by the precision: `bmerge evaluate OUT` measures what it costs. An edit,
    such as `bmerge adapt` or a removal by `bmerge merge`, can so be shipped beside its base, and
    undone by unloading it.

    Left out, and told with their share: embeddings and heads without --embeddings, norms, biases
    and other tensors without --rest.
    """
    screen = console(quiet=quiet)
    with delivering(push_to, settings.get("out")) as delivery:
        if delivery.out is not None:
            settings["out"] = delivery.out
        config = parse_flags(ExtractConfig, settings, "bmerge extract")
        from mergekit_bayes.extract.run import run_extract

        with steps_bar(console(quiet=quiet or as_json)) as advance:
            report = run_extract(config, progress=lambda done, of: advance("extracting", done, of))
        _show(screen, report)
        delivery.finish(report, report.path, screen, as_json=as_json, quiet=quiet)


def _show(screen: Screen, report: "ExtractReport") -> None:
    from mergekit_bayes.extract.totals import amount, unit_text

    columns = ["layers", "number", "rank", "change", "lost", "share", "norm lost"]
    for unit in dict.fromkeys(layer.unit for layer in report.layers.values()):
        members = [(name, layer) for name, layer in report.layers.items() if layer.unit == unit]
        screen.print(table(columns, list(_rows(members)), title=unit_text(report, unit)))
    for line in report.summary:
        screen.print(line, markup=False)
    unchanged = (
        f"{report.unchanged:,} tensor{'s are' if report.unchanged != 1 else ' is'} unchanged"
    )
    screen.print(f"{amount(report.parameters, 'number')} stored; {unchanged}", markup=False)
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)


def _rows(layers: "Iterable[tuple[str, ExtractedLayer]]") -> Iterator[list[str]]:
    """One row for each kind of module, by the last part of its name."""
    groups: dict[str, list[ExtractedLayer]] = defaultdict(list)
    for module, layer in layers:
        groups[module.rpartition(".")[2]].append(layer)
    for kind, members in groups.items():
        ranks = [layer.rank for layer in members]
        change = sum(layer.change or 0.0 for layer in members)
        lost = sum(layer.lost or 0.0 for layer in members)
        norm = sum(layer.norm**2 for layer in members) ** 0.5
        lost_norm = sum(layer.lost_norm**2 for layer in members) ** 0.5
        is_known = any(layer.change is not None for layer in members)
        is_one = min(ranks) == max(ranks)
        yield [
            kind,
            str(len(members)),
            str(ranks[0]) if is_one else f"{min(ranks)} to {max(ranks)}",
            f"{change:.4g}" if is_known else "-",
            f"{lost:.4g}" if is_known else "-",
            f"{lost / change:.2%}" if change > 0 else "-",
            f"{lost_norm / norm:.2%}" if norm > 0 else "-",
        ]
