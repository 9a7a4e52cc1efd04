"""`bmerge finetune`: train with IVON (or AdamW) and keep the posterior."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bmerge_cli.push import Delivery, PushTo
from bmerge_cli.render import Force, Json, Quiet, console, failures, print_json

NAME = "finetune"


def command(
    config: Annotated[
        Path, typer.Argument(help="YAML settings; its keys are the fields of FinetuneConfig.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, beats the file; repeat it.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue from the newest whole checkpoint in OUTPUT.checkpoints."
        ),
    ] = False,
    num_processes: Annotated[
        int | None,
        typer.Option(
            "--num-processes", min=1, help="Train replicas: one a GPU, or on the CPU's cores."
        ),
    ] = None,
    push_to: PushTo = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune a language model or classifier; the checkpoint folder gets a posterior/ inside.

    By default IVON takes its curvature every 8 steps and once more, over 64 batches, at the end.
    That costs 1.1 times AdamW's time a step, and at the end as much as 64 steps (measured on a CPU;
    antithetic: true costs 2 times).

    On several GPUs: --num-processes N, or accelerate launch --multi_gpu -m bmerge_cli.main finetune
    CONFIG.yaml
    """
    with failures():
        from mergekit_bayes.configs import load_config
        from mergekit_bayes.errors import BmergeError
        from mergekit_bayes.finetune import FinetuneConfig, ranks, run_finetune

        switches = {"force": force, "resume": resume, "num_processes": num_processes}
        given = [f"{name}={str(value).lower()}" for name, value in switches.items() if value]
        settings = load_config(FinetuneConfig, config, [*(overrides or []), *given])
        screen = console(quiet=quiet or not ranks.is_main())
        delivery = Delivery(push_to if ranks.is_main() else None, str(settings.output))
        if (settings.num_processes or 1) > 1 and not ranks.launched():
            words = [str(config), *(word for item in overrides or [] for word in ("--set", item))]
            words += [f"--set={item}" for item in given]
            words += [flag for flag, on in (("--json", as_json), ("--quiet", quiet)) if on]
            words += (
                ["--push-to", push_to] if push_to is not None else []
            )  # rank 0 pushes and prints
            command = [sys.executable, "-m", "bmerge_cli.main", NAME, *words]
            raise typer.Exit(ranks.launch(command, settings.num_processes or 1))
        if (gpus := ranks.idle_gpus()) > 0:
            screen.print(
                f"one GPU of {gpus + 1} is used; --num-processes {gpus + 1} trains on all of them",
                markup=False,
            )
        try:
            report = run_finetune(settings, quiet=quiet)
        except BmergeError:
            if ranks.is_main():
                raise
            raise typer.Exit(2) from None  # rank 0 raises the same and prints it
        if not ranks.is_main():
            return
        screen.print(f"{report.steps} steps, mean training loss {report.loss:.4g}", markup=False)
        if report.estimator is not None:
            screen.print(
                f"posterior: {report.estimator} over {report.observations:,} {report.unit}s, "
                "median precision "
                f"{report.health['precision_median']:.3g}",
                markup=False,
            )
        pushed = delivery.push(screen)
        if as_json:
            print_json(report.model_dump(mode="json") | pushed)
        elif not quiet:
            typer.echo(delivery.url or str(report.path))
