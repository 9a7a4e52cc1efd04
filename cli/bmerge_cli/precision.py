"""`bmerge precision`: give an existing checkpoint its precision."""

from typing import Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json, selection

NAME = "precision"


def command(
    model: Annotated[str, typer.Argument(help="A model folder, or a Hub id (which needs -o).")],
    data: Annotated[
        list[str],
        typer.Option(
            help="What the precision stands for: a file, folder or Hub data set; repeat it."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="A folder or .safetensors file; default MODEL/posterior."),
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE: keep rows with this value.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    label_column: Annotated[
        str, typer.Option(help="Column of the label (root-GGN does not need it).")
    ] = "label",
    examples: Annotated[int, typer.Option(min=1, help="Rows to look at, at random.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a backward pass.")] = 8,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 512,
    prior: Annotated[
        float, typer.Option(help="Isotropic prior precision to include, 1/weight^2.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the choice of rows and the signs.")] = 0,
    task: Annotated[str, typer.Option(help="auto, causal-lm or classification.")] = "auto",
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate the root-GGN diagonal of a checkpoint and store it as its precision."""
    with failures():
        from mergekit_bayes.configs import parse_config
        from mergekit_bayes.precision import PrecisionConfig, run_precision

        settings = parse_config(
            PrecisionConfig,
            {
                "model": model,
                "data": tuple(data),
                "output": out,
                "text_column": text_column,
                "label_column": label_column,
                "examples": examples,
                "batch_size": batch_size,
                "max_length": max_length,
                "prior": prior,
                "seed": seed,
                "task": task,
                "force": force,
                "where": selection(where or [], "--where") or None,
            },
            "bmerge precision",
        )
        report = run_precision(settings, quiet=quiet)
        console(quiet=quiet).print(
            f"{report.estimator} from {report.sampled:,} rows, for {report.observations:,} "
            f"{report.unit}s; median "
            f"precision {report.health['precision_median']:.3g}",
            markup=False,
        )
        if as_json:
            print_json(report.model_dump(mode="json"))
        elif not quiet:
            typer.echo(str(report.path))
