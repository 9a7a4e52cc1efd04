"""`bmerge finetune`: train with IVON (or AdamW) and keep the posterior."""

from pathlib import Path
from typing import Annotated

import typer

from bmerge_cli.delivery import PushTo
from bmerge_cli.flags import Settings, flags_of, option
from bmerge_cli.processes import one_voice
from bmerge_cli.render import Json, Overrides, Quiet, Screen, failures
from bmerge_cli.training import Line, train
from mergekit_bayes.finetune.settings import FinetuneConfig, FinetuneReport

NAME = "finetune"


@failures(
    "with save_steps, the same line and --resume goes on from the last checkpoint; without, the "
    "run starts again"
)
@one_voice
@flags_of(
    FinetuneConfig,
    option("resume"),
    option("num_processes", low=1),
    option("shard"),
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
    CONFIG.yaml. A model larger than one of them: --shard as well, or accelerate launch --use_fsdp
    --fsdp_version 2
    """
    line = Line(NAME, config, overrides, settings, push_to, as_json, quiet)
    loaded = line.load(FinetuneConfig)

    def run() -> FinetuneReport:
        from mergekit_bayes.finetune.run import run_finetune

        return run_finetune(loaded, quiet=quiet)

    train(line, loaded, run, _describe)


def _describe(report: FinetuneReport, screen: Screen) -> None:
    steps = f"{report.steps} step{'s' * (report.steps != 1)}"
    screen.print(f"{steps}, mean training loss {report.loss:.4g}", markup=False)
    if report.evaluation:
        at = "" if report.best_step is None else f" at step {report.best_step}, which is stored"
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in report.evaluation.items())
        screen.print(f"held out: {numbers}{at}", markup=False)
    if report.estimator is not None:
        screen.print(
            f"posterior: {report.estimator} over {report.observations:,} {report.unit}s, "
            f"median precision {report.health['precision_median']:.3g} (1/weight^2)",
            markup=False,
        )
