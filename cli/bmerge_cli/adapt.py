"""`bmerge adapt`: remove and add knowledge in a few steps, the rest held by a K-prior."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli.adapting import adapt
from bmerge_cli.delivery import PushTo
from bmerge_cli.flags import Settings, flags_of, option
from bmerge_cli.processes import one_voice
from bmerge_cli.render import Json, Overrides, Quiet, Screen, console, failures, print_json, table
from bmerge_cli.training import Line
from mergekit_bayes.adapt.settings import AdaptConfig

if TYPE_CHECKING:
    from mergekit_bayes.adapt.dry_run import AdaptPlan

NAME = "adapt"
_MIB = 2**20


@failures(
    "with save_steps, the same line and --resume goes on from the last checkpoint; without, the "
    "run starts again"
)
@one_voice
@flags_of(
    AdaptConfig,
    option("resume"),
    option("num_processes", low=1),
    option("trust_remote_code"),
    option("force"),
)
def command(
    config: Annotated[
        Path, typer.Argument(help="YAML settings; its keys are the fields of AdaptConfig.")
    ],
    overrides: Overrides = None,
    *,
    settings: Settings,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Load model and rows, print what would be done and stored, and stop.",
        ),
    ] = False,
    push_to: PushTo = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove or add what rows of text say, in a few steps, and keep the rest of the model.

    A memory of other text, the stored precision, or both hold what should stay (a K-prior; Khan and
    Swaroop, NeurIPS 2021). The run ends by itself where a goal is reached (until), and the best
    step is stored.

    On several GPUs: --num-processes N, or accelerate launch --multi_gpu -m bmerge_cli.main adapt
    CONFIG.yaml
    """
    line = Line(NAME, config, overrides, settings, push_to, as_json, quiet)
    if not dry_run:
        adapt(line)
        return
    from mergekit_bayes.adapt.dry_run import plan_adapt

    plan = plan_adapt(line.load(AdaptConfig), quiet=quiet)
    if as_json:
        print_json(plan.model_dump(mode="json"))
    else:
        _show_plan(console(quiet=quiet), plan)


def _show_plan(screen: Screen, plan: "AdaptPlan") -> None:
    """Print a plan."""
    trained = "" if plan.trained == plan.parameters else f", {plan.trained:,} of them trained"
    precision = "none" if plan.posterior is None else plan.posterior
    screen.print(
        f"{plan.model}: {plan.task}, {plan.parameters:,} weights{trained}; stored precision: "
        f"{precision}"
    )
    rows = [
        [
            f"{part.name}: {', '.join(part.sources)}",
            f"{part.rows:,}",
            f"{part.examples:,}",
            f"{part.observations:,}",
            f"{part.held_out:,}",
        ]
        for part in plan.parts
    ]
    screen.print(table(["rows of", "rows", "examples", f"{plan.unit}s", "held out"], rows))
    if plan.memory_self_generated:
        screen.print(
            f"memory: the model will write {plan.memory_self_generated:,} texts; they are not "
            "counted above"
        )
    source = "recorded" if plan.base_is_recorded else "assumed"
    kappa = "N_0 over the memory's count" if plan.kappa is None else f"{plan.kappa:.4g}"
    screen.print(
        f"units: N_r {plan.removed:,}, N_a {plan.added:,}, N_0 {plan.base:,.0f} ({source}) "
        f"{plan.unit}s; kappa {kappa}, tau {plan.tau:g}"
    )
    loss = "" if plan.removal is None else f"removal {plan.removal}, "
    prior = plan.prior if isinstance(plan.prior, str) else f"{plan.prior:g}"
    screen.print(
        f"{loss}prior {prior}, teacher {plan.teacher}, {plan.optimizer}, learning rate "
        f"{plan.learning_rate:.3g}"
    )
    passes = plan.passes
    screen.print(
        f"at most {plan.steps:,} steps: {passes.trained:,} examples forward and backward, "
        f"{passes.teacher:,} forward through the start"
    )
    if plan.checks:
        screen.print(
            f"at most {plan.checks:,} checks: {passes.checked:,} held-out examples, "
            f"{passes.continuations:,} continuations"
        )
    if passes.flushed or passes.reconstructed:
        screen.print(
            f"at the end: {passes.flushed:,} examples for the precision, {passes.reconstructed:,} "
            "for the gradient-reconstruction error"
        )
    size = plan.bytes
    screen.print(
        f"in memory: weights {_mib(size.weights)}, start {_mib(size.teacher)}, gradients "
        f"{_mib(size.gradients)}, optimizer {_mib(size.optimizer)}, last step {_mib(size.undo)}, "
        f"best check {_mib(size.best)}, prior {_mib(size.prior)}; "
        "activations come on top"
    )
    for goal in plan.goals:
        screen.print(f"ends at: {goal}")
    if not plan.goals:
        screen.print("ends at: the last step; no goal is set (until)")
    for path, what in plan.stored.items():
        screen.print(f"stores {path}: {what}")
    if plan.without_precision is not None:
        screen.print(f"stores no precision: {plan.without_precision}")


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
