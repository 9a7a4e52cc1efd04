"""`bmerge finetune`: train with IVON (or AdamW) and keep the posterior."""

from pathlib import Path
from typing import Annotated

import typer

from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json

NAME = "finetune"


def command(
    config: Annotated[Path, typer.Argument(help="YAML settings; its keys are the fields of FinetuneConfig.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value, beats the file; repeat it.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a language model or classifier; the checkpoint folder gets a posterior/ inside.

    On many GPUs: accelerate launch -m bmerge_cli.main finetune CONFIG.yaml
    """
    with failures():
        from mergekit_bayes.configs import load_config
        from mergekit_bayes.finetune import FinetuneConfig, run_finetune

        settings = load_config(FinetuneConfig, config, [*(overrides or []), *(["force=true"] if force else [])])
        report = run_finetune(settings, quiet=quiet)
        screen = console(quiet=quiet)
        screen.print(f"{report.steps} steps, mean training loss {report.loss:.4g}", markup=False)
        if report.estimator is not None:
            screen.print(
                f"posterior: {report.estimator} over {report.observations:,} {report.unit}s, median precision "
                f"{report.health['precision_median']:.3g}",
                markup=False,
            )
        if as_json:
            print_json(report.model_dump(mode="json"))
        elif not quiet:
            typer.echo(str(report.path))
