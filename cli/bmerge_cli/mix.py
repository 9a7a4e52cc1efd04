"""`bmerge mix`: several runs of one task as one posterior."""

from bmerge_cli import values
from bmerge_cli.flags import Settings, argument, flags_of, option, parse_flags
from bmerge_cli.render import Json, Quiet, console, failures, print_result, progress_bar, table
from mergekit_bayes.mix import MixConfig, run_mix


@failures()
@flags_of(
    MixConfig,
    argument("runs", read=values.models),
    option("out", "--out", "-o"),
    option("weights", read=values.vector),
    option("force"),
)
def command(settings: Settings, as_json: Json = False, quiet: Quiet = False) -> None:
    """Join several runs of one task into one posterior: a mixture of theirs.

    The runs are copied into the folder, which a merge takes as one model: `bmerge merge MIX OTHER
    --base BASE --weights precision` weighs the runs in each tensor by how well they fit what is
    merged. Other programs, and merges of other kinds, load it as the run of the largest weight.

    Not taken are mixtures by `bmerge push`, `bmerge preview` and `bmerge merge --predict`, with
    negative scales, and by `bmerge mix` itself; nor does it take runs whose precisions are
    matrices.
    """
    config = parse_flags(MixConfig, settings, "bmerge mix")
    screen = console(quiet=quiet)
    with progress_bar(console(quiet=quiet or as_json), "copying") as advance:
        report = run_mix(config, progress=advance)
    rows = [
        [label, f"{weight:.3g}", "plain model" * (number == report.plain)]
        for number, (label, weight) in enumerate(zip(report.labels, report.weights, strict=True))
    ]
    screen.print(table(["run", "weight", ""], rows))
    for note in report.notes:
        screen.print(f"note: {note}", markup=False)
    print_result(report, report.path, as_json=as_json, quiet=quiet)
