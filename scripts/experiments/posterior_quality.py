"""Does training find the posterior? Stored precisions against exact ones, at equal cost.

    OMP_NUM_THREADS=1 python scripts/experiments/posterior_quality.py [--only SECTION ...]
        [--seeds 0 1 2] [--json FILE]

Every run gets the same number of passes (forward and backward of one batch) and ends at a mean of
its own. There the diagonal of the generalised Gauss-Newton matrix (GGN) is computed exactly, or by
many draws for the language model, and compared with what the run would store, per observation and
without the prior. Sections:

    linear, logistic   regressions on 20 correlated features, N = 2,000, started at zero
    classifier         a transformer of 45 k parameters, from sst2 to 2,000 sentences of yelp
    overfitted         the same on 128 sentences, until it knows them by heart
    lm                 a GPT-2 of 0.24 M parameters that has learnt a small world, to one subject
    finetune           held-out loss of `bmerge finetune` at its defaults, beside AdamW's defaults
    wrong              `bmerge finetune` with one setting off at a time: held-out loss, noise, h
                       beside a flush

classifier, overfitted and half of finetune read ../shared/data (jsonl.gz of `text` and `label`) and
are left out without it. The problems are in posterior_problems.py, the runs in posterior_runs.py,
finetune and wrong in posterior_tuning.py.
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
from posterior_runs import FEW, METHODS, Method, train
from posterior_tuning import Records, finetune, wrong


def runs(
    section: str,
    problem: Problem,
    methods: dict[str, Method],
    lengths: list[int],
    ess: float | str,
    seed: int,
) -> Records:
    """A record for each method and length."""
    records = []
    for name, method in methods.items():
        for passes in lengths:
            begun = time.process_time()
            record = train(problem, method, passes, ess, seed)
            seconds = time.process_time() - begun
            given = "" if record["ess"] is None else str(ess)
            records.append(
                {
                    "section": section,
                    "method": name,
                    "rate": problem.rate,
                    "given": given,
                    **record,
                    "seconds": seconds,
                }
            )
    return records


def linear(seed: int, folder: Path) -> Records:
    """A linear regression."""
    return regressions("linear", regression("regression", seed), seed)


def logistic(seed: int, folder: Path) -> Records:
    """A logistic regression."""
    return regressions("logistic", regression("multi_label_classification", seed), seed)


def regressions(section: str, problem: Problem, seed: int) -> Records:
    """All methods at one length, and a few at others."""
    return runs(section, problem, METHODS, [480], "N", seed) + runs(
        section, problem, FEW, [120, 1920], "N", seed
    )


def classifier(seed: int, folder: Path) -> Records:
    """A classifier, also at other effective sample sizes."""
    problem = sentiment(seed, rows=2000)
    records = runs("classifier", problem, METHODS, [480], "default", seed)
    records += runs("classifier", problem, FEW, [120, 1920], "default", seed)
    noisy = {n: METHODS[n] for n in ("IVON price", "IVON price, antithetic", "IVON ggn, k = 8")}
    return records + [
        r for ess in ("N", 1e7) for r in runs("classifier", problem, noisy, [480], ess, seed)
    ]


def overfitted(seed: int, folder: Path) -> Records:
    """The classifier on few sentences, for long."""
    methods = {**FEW, "VOGN": METHODS["VOGN"], "Adam, then flush": METHODS["Adam, then flush"]}
    return runs("overfitted", sentiment(seed, rows=128), methods, [960], "default", seed)


def lm(seed: int, folder: Path) -> Records:
    """The language model, at the rate of `bmerge finetune`, and some methods at ten times that."""
    methods = {
        **FEW,
        **{n: METHODS[n] for n in ("IVON ggn, k = 1", "VOGN", "bSAM", "Adam, then flush")},
    }
    some = {n: METHODS[n] for n in ("IVON price", "IVON ggn, k = 8", "IVON ggn, k = 8, then flush")}
    start = folder / f"world{seed}"
    return [
        record
        for rate, chosen in ((1e-4, methods), (1e-3, some))
        for record in runs("lm", language_model(seed, start, rate), chosen, [480], "default", seed)
    ]


SECTIONS: dict[str, Callable[[int, Path], Records]] = {
    f.__name__: f for f in (linear, logistic, classifier, overfitted, lm, finetune, wrong)
}
NEEDS_DATA = ("classifier", "overfitted")


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
    chosen = parser.parse_args()
    print(
        f"{date.today()}, {processor()}, one thread, Python {platform.python_version()}, torch "
        f"{torch.__version__}, "
        f"transformers {transformers.__version__}, seeds {' '.join(map(str, chosen.seeds))}\n"
    )
    everything: Records = []
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only:
            if name in NEEDS_DATA and not DATA.exists():
                print(f"{name}: left out, since there is no {DATA}\n")
                continue
            records = [r for seed in chosen.seeds for r in SECTIONS[name](seed, Path(folder))]
            everything += records
            print(
                f"{name}, {sum(r['seconds'] for r in records):.0f} CPU "
                f"seconds\n\n{table(records)}\n",
                flush=True,
            )
    if chosen.json:
        chosen.json.write_text(json.dumps(everything, indent=1))


def table(records: Records) -> str:
    """Markdown: a row for each group of runs that differ in the seed, median [lowest, highest]."""
    labels = [
        n
        for n in ("task", "method", "changed", "rate", "passes", "steps", "given")
        if n in records[0]
    ]
    numbers = [
        n
        for n in ("noise", "rank", "error", "ratio", "loss", "accuracy", "learnt", "seconds")
        if any(n in r for r in records)
    ]
    groups: dict[tuple[Any, ...], Records] = {}
    for record in records:
        groups.setdefault(tuple(record[n] for n in labels), []).append(record)
    titles = {
        "given": "ess",
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
        cells = [spread([r[n] for r in rows if n in r]) for n in numbers]
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
