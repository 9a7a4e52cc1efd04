"""Does training find the posterior? Stored precisions against exact ones, at equal cost.

    OMP_NUM_THREADS=1 python scripts/experiments/posterior_quality.py [--only SECTION ...]
        [--seeds 0 1 2] [--json FILE] [--settings]

Every run gets the same number of passes (forward and backward of one batch) and ends at a mean of
its own. There the diagonal of the generalised Gauss-Newton matrix (GGN) is computed exactly, or by
many draws for the language model, and compared with what the run would store, per observation and
without the prior. Beside every ratio of IVON's own h stands its kappa = (1 - beta2) ess / (2 B).
Rows called "our settings" are those of `bmerge finetune`, or were chosen here; they are not those
of an optimizer's authors. `--settings` prints ess and kappa of the runs without training. Sections:

    linear, logistic   regressions on 20 correlated features, N = 2,000, started at zero
    classifier         a transformer of 45 k parameters, from sst2 to 2,000 sentences of yelp
    overfitted         the same on 128 sentences, until it knows them by heart
    lm                 a GPT-2 of 0.24 M parameters that has learnt a small world, to one subject
    published_linear, published_logistic, published_classifier, published_lm
                       the same problems with settings that the authors of IVON, VOGN and bSAM
                       published, and with several effective sample sizes
    finetune           held-out loss of `bmerge finetune` at its defaults, beside AdamW's
    wrong              `bmerge finetune` with one setting off at a time: held-out loss, noise, h
                       beside a flush

classifier, overfitted, published_classifier and half of finetune read ../shared/data (jsonl.gz of
`text` and `label`) and are left out without it. The problems are in posterior_problems.py, the runs
in posterior_runs.py, the published settings in posterior_published.py, finetune and wrong in
posterior_tuning.py.
"""

import argparse
import contextlib
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from posterior_problems import DATA, Problem, language_model, regression, sentiment
from posterior_published import (
    Run,
    classifier_runs,
    linear_runs,
    logistic_runs,
    network_runs,
)
from posterior_runs import FEW, METHODS, Method, planned, train
from posterior_tuning import Records, finetune, wrong

Runner = Callable[[Problem, Method, int, float | str, int], dict[str, Any]]
Section = Callable[[int, Path, Runner], Records]


def runs(
    section: str,
    problem: Problem,
    methods: dict[str, Method],
    lengths: list[int],
    ess: float | str,
    seed: int,
    runner: Runner,
) -> Records:
    """A record for each method and length; the runner is `train` or `planned`."""
    records = []
    for name, method in methods.items():
        for passes in lengths:
            begun = time.process_time()
            record = runner(problem, method, passes, ess, seed)
            if runner is train:
                record["seconds"] = time.process_time() - begun
            given = ess if isinstance(ess, str) else f"{ess:,.0f}"
            records.append(
                {
                    "section": section,
                    "method": name,
                    "rate": problem.rate,
                    "given": "" if record["ess"] is None else given,
                    **record,
                }
            )
    return records


def published(
    section: str, problem: Problem, chosen: list[Run], seed: int, runner: Runner
) -> Records:
    """A record for each run of `posterior_published`, which has its own length and batch."""
    records = []
    for name, method, passes in chosen:
        given = "N" if method.ess is None else method.ess
        (record,) = runs(section, problem, {name: method}, [passes], given, seed, runner)
        del record["rate"]  # each method has its own
        records.append({**record, "batch": method.batch or problem.batch})
    return records


def linear(seed: int, folder: Path, runner: Runner) -> Records:
    """A linear regression."""
    return regressions("linear", regression("regression", seed), seed, runner)


def logistic(seed: int, folder: Path, runner: Runner) -> Records:
    """A logistic regression."""
    return regressions("logistic", regression("multi_label_classification", seed), seed, runner)


def regressions(section: str, problem: Problem, seed: int, runner: Runner) -> Records:
    """All methods at one length, and a few at others."""
    return runs(section, problem, METHODS, [480], "N", seed, runner) + runs(
        section, problem, FEW, [120, 1920], "N", seed, runner
    )


def classifier(seed: int, folder: Path, runner: Runner) -> Records:
    """A classifier, also at other effective sample sizes."""
    problem = sentiment(seed, rows=2000)
    records = runs("classifier", problem, METHODS, [480], "default", seed, runner)
    records += runs("classifier", problem, FEW, [120, 1920], "default", seed, runner)
    noisy = chosen("IVON price, our settings", "IVON price, antithetic", "IVON ggn, k = 8")
    for ess in ("N", 1e7):
        records += runs("classifier", problem, noisy, [480], ess, seed, runner)
    return records


def overfitted(seed: int, folder: Path, runner: Runner) -> Records:
    """The classifier on few sentences, for long."""
    methods = {**FEW, **chosen("VOGN, our settings", "Adam, then flush")}
    return runs("overfitted", sentiment(seed, rows=128), methods, [960], "default", seed, runner)


def lm(seed: int, folder: Path, runner: Runner) -> Records:
    """The language model, at the rate of `bmerge finetune`, and some methods at ten times that."""
    ours = chosen("IVON ggn, k = 1", "VOGN, our settings", "bSAM, our settings", "Adam, then flush")
    some = chosen("IVON price, our settings", "IVON ggn, k = 8", "IVON ggn, k = 8, then flush")
    records: Records = []
    for rate, methods in ((1e-4, {**FEW, **ours}), (1e-3, some)):
        problem = language_model(seed, folder / f"world{seed}", rate)
        records += runs("lm", problem, methods, [480], "default", seed, runner)
    return records


def chosen(*names: str) -> dict[str, Method]:
    """The methods of these names."""
    return {name: METHODS[name] for name in names}


def published_linear(seed: int, folder: Path, runner: Runner) -> Records:
    """The linear regression with published settings."""
    problem = regression("regression", seed)
    return published("published_linear", problem, linear_runs(problem), seed, runner)


def published_logistic(seed: int, folder: Path, runner: Runner) -> Records:
    """The logistic regression with published settings."""
    problem = regression("multi_label_classification", seed)
    return published("published_logistic", problem, logistic_runs(problem), seed, runner)


def published_classifier(seed: int, folder: Path, runner: Runner) -> Records:
    """The classifier with published settings."""
    problem = sentiment(seed, rows=2000)
    return published("published_classifier", problem, classifier_runs(problem), seed, runner)


def published_lm(seed: int, folder: Path, runner: Runner) -> Records:
    """The language model with published settings."""
    problem = language_model(seed, folder / f"world{seed}", 1e-4)
    return published("published_lm", problem, network_runs(problem), seed, runner)


def as_section(section: Callable[[int, Path], Records]) -> Section:
    """A section of whole fine-tunes, which cannot be planned without training."""

    def records(seed: int, folder: Path, runner: Runner) -> Records:
        return section(seed, folder) if runner is train else []

    return records


SECTIONS: dict[str, Section] = {
    f.__name__: f
    for f in (
        linear,
        logistic,
        classifier,
        overfitted,
        lm,
        published_linear,
        published_logistic,
        published_classifier,
        published_lm,
    )
} | {f.__name__: as_section(f) for f in (finetune, wrong)}
NEEDS_DATA = ("classifier", "overfitted", "published_classifier")


def main() -> None:
    """Run the sections, print a table of each, and write all records if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="write every run there, too")
    parser.add_argument(
        "--settings", action="store_true", help="print ess and kappa of the runs; train nothing"
    )
    given = parser.parse_args()
    print(
        f"{date.today()}, {processor()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, "
        f"transformers {transformers.__version__}, seeds {' '.join(map(str, given.seeds))}\n"
    )
    everything: Records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.only:
            if name in NEEDS_DATA and not DATA.exists():
                print(f"{name}: left out, since there is no {DATA}\n")
                continue
            runner: Runner = planned if given.settings else train
            records = [
                r for seed in given.seeds for r in SECTIONS[name](seed, Path(folder), runner)
            ]
            if not records:
                print(f"{name}: left out, since its fine-tunes choose their settings themselves\n")
                continue
            everything += records
            print(
                f"{name}, {sum(r.get('seconds', 0.0) for r in records):.0f} CPU "
                f"seconds\n\n{table(records)}\n",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(everything, indent=1))


def table(records: Records) -> str:
    """Markdown: a row for each group of runs that differ in the seed, median [lowest, highest]."""
    labels = [
        n
        for n in ("task", "method", "changed", "rate", "batch", "passes", "steps", "given")
        if n in records[0]
    ]
    numbers = [
        n
        for n in (
            *(
                "ess",
                "kappa",
                "start",
                "hess_noise",
                "noise",
                "rank",
                "error",
                "ratio",
                "loss",
                "accuracy",
            ),
            *("learnt", "seconds"),
        )
        if any(r.get(n) is not None for r in records)
    ]
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[n] for n in labels), []).append(record)
    titles = {
        "given": "ess",
        "ess": "ess as a number",
        "start": "start kept",
        "loss": "held-out loss",
        "learnt": "training accuracy",
        "rank": "rank correlation",
    }
    lines = [
        "| " + " | ".join(titles.get(n, n) for n in (*labels, *numbers)) + " |",
        "| "
        + " | ".join("---" if n in ("task", "method") else "---:" for n in (*labels, *numbers))
        + " |",
    ]
    for group, rows in groups.items():
        cells = [spread([r[n] for r in rows if r.get(n) is not None]) for n in numbers]
        lines.append("| " + " | ".join([str(g) for g in group] + cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Median [lowest, highest], or the median alone where they are the same."""
    if not values:
        return ""
    middle, low, high = (digits(v) for v in (statistics.median(values), min(values), max(values)))
    return middle if low == high else f"{middle} [{low}, {high}]"


def digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def processor() -> str:
    """The name of the CPU."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    return platform.processor()


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
