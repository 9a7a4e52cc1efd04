"""`bmerge detox`: remove toxicity by subtraction or correction, and report what each pays."""

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bmerge_cli.processes import one_voice, start_processes
from bmerge_cli.render import (
    Force,
    Json,
    Overrides,
    Quiet,
    TrustRemoteCode,
    console,
    failures,
    print_json,
    table,
)
from mergekit_bayes.configs import load_config
from mergekit_bayes.documents import parse_json
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.records import NUM_PROCESSES

if TYPE_CHECKING:
    from rich.table import Table

    from mergekit_bayes.detox.report import DetoxReport
    from mergekit_bayes.metrics.base import Interval


@failures("the same line goes on, and repeats no step that was finished")
@one_voice
def command(
    config: Annotated[
        Path, typer.Argument(help="YAML settings; its keys are the fields of DetoxConfig.")
    ],
    overrides: Overrides = None,
    push_to: Annotated[
        str | None,
        typer.Option(
            "--push-to",
            help="org/name: push the candidate of lowest perplexity at the lowest equal toxic "
            "share.",
        ),
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help=NUM_PROCESSES)
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove toxicity by script, by subtraction (fine-tune on toxic text, subtract at several
    scales) or correction (adapt in a few steps); evaluate and report.

    Steps that an earlier run did with the same inputs and settings are not repeated; --force
    repeats all of them.

    On several GPUs: --num-processes N, or accelerate launch --multi_gpu -m bmerge_cli.main detox
    CONFIG.yaml. They share the evaluations, which take most of the time; all else is made in one
    process, so that the results are those of one.
    """
    from mergekit_bayes.detox import DetoxConfig, run_detox
    from mergekit_bayes.detox.report import in_words, verdicts

    words = [*(overrides or []), *(["force=true"] if force else [])]
    words += ["trust_remote_code=true"] if trust_remote_code else []
    words += [] if num_processes is None else [f"num_processes={num_processes}"]
    settings = load_config(DetoxConfig, config, words)
    start_processes(settings.num_processes)
    screen = console(quiet=quiet)
    if push_to is not None:
        from mergekit_bayes.hub import check_login

        check_login(push_to)  # before hours of work, not after
    report = run_detox(
        settings,
        quiet=not screen.is_interactive,
        progress=lambda line: screen.print(line, markup=False),
    )
    for line in verdicts(report):
        screen.print(line, markup=False)
    for scorer in report.base.toxicity:
        screen.print(_summary(report, scorer))
    if report.kept is not None:
        k = report.kept
        screen.print(f"kept: {k.path} ({k.curve}, {in_words(k.unit, k.scale)})", markup=False)
    if push_to is not None:
        _push(report, push_to)
    if as_json:
        print_json(parse_json(report.model_dump_json()))
    elif not quiet:
        typer.echo(str(Path(report.path) / "report.md"))


def _push(report: "DetoxReport", repo: str) -> None:
    """Push the chosen candidate: a merge is made again, by the line that the report gives for it.

    An adaptation takes its steps to make again, and the kept folder of one says how it was made.
    """
    from mergekit_bayes.launcher import without_launcher

    words = [*shlex.split(_chosen(report)), "--push-to", repo]
    if report.kept is not None and report.kept.unit == "step":
        words = ["bmerge", "push", report.kept.path, repo]
    done = subprocess.run(
        [sys.executable, "-m", "bmerge_cli.main", *words[1:], "--quiet"],
        env=without_launcher(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or [""])[-1]
        raise CheckpointError(
            f"the push to '{repo}' failed ({last_line}). To do it again: `{shlex.join(words)}`."
        )


def _chosen(report: "DetoxReport") -> str:
    """The line that makes the candidate to push, which is the one that is kept."""
    best = report.best()
    if best is None or best[1].command is None:
        raise ConfigError(
            "--push-to: no candidate can be chosen, since none reaches a level of the toxic share. "
            f"Choose one in {report.path}/report.md, and push it by its line and --push-to."
        )
    return best[1].command


def _summary(report: "DetoxReport", scorer: str) -> "Table":
    """Perplexities at equal toxicity: at the lowest toxic share that all, or most, curves reach."""
    from mergekit_bayes.detox.settings import HELD_OUT

    names = [name for name in report.base.perplexity if name != HELD_OUT]
    level = report.level_of_most(scorer)
    base = [f"{report.base.perplexity[n].token.value:.4g}" for n in names]
    rows = [["base", f"{report.base.toxicity[scorer].share.value:.1%}", *base, ""]]
    if level is None:
        return table(
            ["model", "toxic", *names, "seconds"],
            rows,
            title=f"by {scorer}: no curve reaches a share below the base's",
        )
    paid = {m.text: m.paid for m in report.matched if (m.axis, m.level) == (scorer, level)}
    for curve in report.curves:
        perplexities = [_perplexity(report, n, paid[n][curve]) for n in names]
        rows.append([curve, f"{level:.1%}", *perplexities, _seconds(report, curve, scorer, level)])
    title = f"perplexity at an equal toxic share by {scorer}, with 95 % intervals of what was paid"
    return table(["model", "toxic", *names, "seconds"], rows, title=title)


def _seconds(report: "DetoxReport", curve: str, scorer: str, level: float) -> str:
    """What making the first candidate at or below a level took."""
    reaching = (p for p in report.curves[curve] if p.toxicity[scorer].share.value <= level)
    first = next(reaching, None)
    return "" if first is None or first.seconds is None else f"{first.seconds:.0f}"


def _perplexity(report: "DetoxReport", text: str, paid: "Interval | None") -> str:
    if paid is None:
        return "not reached"
    start = report.base.perplexity[text].token.value
    value = f"{start * math.exp(paid.value):.4g}"
    if paid.low is None or paid.high is None:
        return value
    return f"{value} [{start * math.exp(paid.low):.4g}, {start * math.exp(paid.high):.4g}]"
