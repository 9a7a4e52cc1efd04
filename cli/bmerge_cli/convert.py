"""`bmerge convert`: PyTorch's pickled checkpoints into safetensors."""

from typing import Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_result, progress_bar


@failures()
def command(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with pytorch_model.bin or its shards, one such file, or a Hub id."
        ),
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="A folder; for a file, a .safetensors file.")
    ],
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a checkpoint in PyTorch's pickles to safetensors, with the same shards, names and
    bits.

    Reads tensors only: a pickle that holds anything else is refused, so no code runs. Tied tensors
    are stored once.
    """
    from mergekit_bayes.convert import run_convert

    screen = console(quiet=quiet)
    with progress_bar(screen, "converting") as advance:
        report = run_convert(model, out, force, progress=advance)
    files = f"{len(report.files)} file{'s' * (len(report.files) > 1)}"
    line = f"{report.tensors} tensors, {report.bytes / 1e6:,.1f} MB, in {files}"
    if report.tied:
        pairs = ", ".join(f"{alias} = {name}" for alias, name in report.tied.items())
        line += f"; tied and stored once: {pairs}"
    screen.print(line, markup=False)
    print_result(report, report.path, as_json=as_json, quiet=quiet)
