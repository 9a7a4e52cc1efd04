"""An adaptation from its line to its report: of `bmerge adapt`, and of a merge with `--then`."""

import shlex

from bmerge_cli.render import Screen, table
from bmerge_cli.training import Line, train
from mergekit_bayes.adapt.settings import AdaptConfig, AdaptReport


def adapt(line: Line) -> None:
    """Carry out a line of this command, and print and push its result.

    Raises:
        BmergeError: The settings are invalid, or the adaptation or the push failed.
        Exit: Other processes were started, and have ended.
    """
    config = line.load(AdaptConfig)

    def run() -> AdaptReport:
        from mergekit_bayes.adapt.run import run_adapt

        return run_adapt(config, quiet=line.quiet)

    train(line, config, run, lambda report, screen: _describe(config, report, screen))


def _describe(config: AdaptConfig, report: AdaptReport, screen: Screen) -> None:
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
