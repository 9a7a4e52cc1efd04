"""`bmerge convert`: PyTorch's pickled checkpoints into safetensors."""

from typing import Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json, progress_bar

NAME = "convert"


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
    with failures():
        from mergekit_bayes.convert import run_convert

        screen = console(quiet=quiet)
        with progress_bar(screen, "converting") as advance:
            report = run_convert(model, out, force, progress=advance)
        files = f"{len(report.files)} file{'s' * (len(report.files) > 1)}"
        line = f"{report.tensors} tensors, {report.bytes / 1e6:,.1f} MB, in {files}"
        if report.tied:
            line += "; tied and stored once: " + ", ".join(
                f"{a} = {b}" for a, b in report.tied.items()
            )
        screen.print(line, markup=False)
        if as_json:
            print_json(report.model_dump(mode="json"))
        elif not quiet:
            typer.echo(str(report.path))
