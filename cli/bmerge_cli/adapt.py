"""`bmerge adapt`: remove and add knowledge in a few steps, the rest held by a K-prior."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bmerge_cli.delivery import PushTo
from bmerge_cli.flags import Settings, flags_of, option
from bmerge_cli.processes import one_voice
from bmerge_cli.render import Json, Overrides, Quiet, console, failures, print_json, table
from bmerge_cli.training import Line, train
from mergekit_bayes.adapt.settings import AdaptConfig, AdaptReport

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
    loaded = line.load(AdaptConfig)
    if dry_run:
        from mergekit_bayes.adapt.dry_run import plan_adapt

        plan = plan_adapt(loaded, quiet=quiet)
        if as_json:
            print_json(plan.model_dump(mode="json"))
        else:
            _show_plan(console(quiet=quiet), plan)
        return

    def run() -> AdaptReport:
        from mergekit_bayes.adapt.run import run_adapt

        return run_adapt(loaded, quiet=quiet)

    train(line, loaded, run, lambda report, screen: _describe(loaded, report, screen))


def _describe(config: AdaptConfig, report: AdaptReport, screen: Console) -> None:
    """Print what was done, what was kept and why, and what to do next."""
    screen.print(_units(report))
    if report.checks:
        columns = [
            name
            for name in ("toxic_share", "held_out_rise", "memory_kl")
            if any(getattr(check, name) is not None for check in report.checks)
        ]
        rows = [
            [f"{check.step:,}", *(_measured(name, getattr(check, name)) for name in columns)]
            for check in report.checks
        ]
        screen.print(table(["step", *(_heading(name, report.unit) for name in columns)], rows))
    screen.print(_kept(config, report))
    if report.refused_steps:
        screen.print(
            f"{report.refused_steps:,} step{'s' * (report.refused_steps > 1)} undone: the KL "
            "divergence on the memory leapt, and the learning rate was halved"
        )
    if (error := report.reconstruction_error) is not None:
        size = f"{error:.3g}" if error > 0 else "below its noise"
        screen.print(
            f"gradient-reconstruction error of the K-prior: {size} (relative, squared; on the "
            "held-out memory)"
        )
    if report.estimator is not None:
        screen.print(
            f"posterior: {report.estimator}, median precision "
            f"{report.health['precision_median']:.3g} (1/weight^2)"
        )
    elif config.posterior != "none":
        screen.print(f"posterior: none is stored: {report.without_precision}")
    screen.print(f"check it: {_evaluation(config)}")
    screen.print(f"undo it: {_undo(config)}")


def _units(report: AdaptReport) -> str:
    counts = (
        (report.removed, "removed"),
        (report.added, "added"),
        (report.memory, "in the memory"),
    )
    parts = [f"{count:,} {name}" for count, name in counts if count]
    held = [f"kappa {report.kappa:.4g}"] if report.memory else []
    if report.prior != "none":
        held.append(f"prior {report.prior}")
    held += [f"tau {report.tau:g}", f"learning rate {report.learning_rate:.3g}"]
    return (
        f"{', '.join(parts)} ({report.unit}s); the start stands for {report.base:,.0f}; "
        f"{', '.join(held)}"
    )


def _heading(name: str, unit: str) -> str:
    headings = {"held_out_rise": "held-out rise", "memory_kl": "memory KL"}
    return f"{headings[name]}, nats/{unit}" if name in headings else "toxic share"


def _measured(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1%}" if name == "toxic_share" else f"{value:.4f}"


def _kept(config: AdaptConfig, report: AdaptReport) -> str:
    steps = f"{report.steps:,} step{'s' * (report.steps != 1)}"
    if report.reached is None and config.has_goals:  # of which only the budget is one
        if report.kept_step == 0 and report.steps:
            return (
                f"{steps} made, and the first check was above the budget of memory_kl: the start "
                "is stored as it was. Raise the budget, or lower check_every or the learning rate"
            )
        kept = f"step {report.kept_step:,}, the last check within the budget of memory_kl"
        return f"{steps} made; {kept}, is stored"
    if report.reached is None:
        return f"{steps} made (no goal was set); step {report.kept_step:,} is stored"
    if report.reached:
        return f"a goal was reached after {steps}; step {report.kept_step:,} is stored"
    kept = f"step {report.kept_step:,}, the best of the checks, is stored"
    if config.until.memory_kl is not None and report.steps < config.max_steps:
        return (
            f"no goal was reached in {steps}, where the budget of memory_kl "
            f"({config.until.memory_kl:g}) was spent; {kept}. Raise it to go further, or give a "
            "larger memory"
        )
    return (
        f"no goal was reached in {steps}; {kept}. Raise max_steps ({config.max_steps:,}) or the "
        "learning rate to go further"
    )


def _evaluation(config: AdaptConfig) -> str:
    """The line that measures the result; what it should be measured on is the user's to name."""
    words = ["bmerge", "evaluate", str(config.output), "--perplexity", "RELATED.jsonl"]
    words += ["--perplexity", "UNRELATED.jsonl"]
    if config.scorer is not None:
        words += ["--toxicity", "TEST_PROMPTS.jsonl", "--scorer", config.scorer]
    return shlex.join(words)


def _undo(config: AdaptConfig) -> str:
    if config.lora is not None:
        return f"load {config.model} without the adapter"
    return f"{config.model} is as it was"


def _show_plan(screen: Console, plan: "AdaptPlan") -> None:
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
