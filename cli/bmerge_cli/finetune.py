"""`bmerge finetune`: train with IVON (or AdamW) and keep the posterior."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bmerge_cli.delivery import Delivery, PushTo
from bmerge_cli.flags import Settings, flags_of, option
from bmerge_cli.render import Json, Overrides, Quiet, console, failures
from mergekit_bayes.configs import load_config
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.finetune.settings import FinetuneConfig

NAME = "finetune"


@failures(
    "with save_steps, the same line and --resume goes on from the last checkpoint; without, the "
    "run starts again"
)
@flags_of(
    FinetuneConfig,
    option("resume"),
    option("num_processes", low=1),
    option("trust_remote_code"),
    option("force"),
)
def command(
    config: Annotated[
        Path, typer.Argument(help="YAML settings; its keys are the fields of FinetuneConfig.")
    ],
    overrides: Overrides = None,
    *,
    settings: Settings,
    push_to: PushTo = None,
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
    from mergekit_bayes.finetune import launcher, ranks

    # As text, so that the same words can start the other processes.
    words = list(overrides or [])
    words += [f"{key}={str(value).lower()}" for key, value in settings.items()]
    loaded = load_config(FinetuneConfig, config, words)
    screen = console(quiet=quiet or not ranks.is_main())
    delivery = Delivery(push_to if ranks.is_main() else None, str(loaded.output))
    if (loaded.num_processes or 1) > 1 and not launcher.launched():
        line = [str(config), *(f"--set={word}" for word in words)]
        line += [flag for flag, given in (("--json", as_json), ("--quiet", quiet)) if given]
        if push_to is not None:  # the first process pushes and prints
            line += ["--push-to", push_to]
        code = launcher.launch(
            [sys.executable, "-m", "bmerge_cli.main", NAME, *line], loaded.num_processes or 1
        )
        raise typer.Exit(code)
    # After the launch: a process that only starts others does not load what trains.
    from mergekit_bayes.finetune.run import run_finetune

    if (gpus := launcher.idle_gpus()) > 0:
        screen.print(
            f"one GPU of {gpus + 1} is used; --num-processes {gpus + 1} trains on all of them",
            markup=False,
        )
    try:
        report = run_finetune(loaded, quiet=quiet)
    except BmergeError:
        if ranks.is_main():
            raise
        raise typer.Exit(2) from None  # the first process raises the same and prints it
    if not ranks.is_main():
        return
    steps = f"{report.steps} step{'s' * (report.steps != 1)}"
    screen.print(f"{steps}, mean training loss {report.loss:.4g}", markup=False)
    if report.estimator is not None:
        screen.print(
            f"posterior: {report.estimator} over {report.observations:,} {report.unit}s, "
            f"median precision {report.health['precision_median']:.3g} (1/weight^2)",
            markup=False,
        )
    delivery.finish(report, report.path, screen, as_json=as_json, quiet=quiet)
