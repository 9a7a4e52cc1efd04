"""What precisions add to adding kinds of text: language models of three sizes.

    python scripts/experiments/language_merge.py -o runs/language
    python scripts/experiments/language_merge.py -o runs/tiny --size tiny

Bases of about 0.3, 2.1 and 8 million parameters, trained as those of `detox_world.py` on talk-page
comments, sentences of restaurant reviews and toxic comments, learn novels, sentences of an
encyclopedia, and product reviews, each on its own. Every way of merging these is compared as in
`sentiment_merge.py`: untuned, at the scale that validation texts choose of five, and at the
distance from the base that tuned task arithmetic has, by nats a token. First all sizes are looked
at untuned, then tuned, then at the distance. It writes `report.md` and `report.json`, whose first
table is the trend with size. Everything is kept by the hash of its settings, so that the command
goes on where it was stopped, and `--report` only writes the report of what is there. It needs the
texts in ../shared/data.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import sentiment_merge  # first, since it sets what libraries read when they are imported
import torch
import transformers
from language_report import make_report
from language_world import SIZES, LanguageWorld
from sentiment_columns import LANGUAGE
from sentiment_resampled import POINTS
from sentiment_world import DATA

from mergekit_bayes.checkpoint.replacing import replacing

SLOW = ("gm_kronecker",)  # only where they are asked for


def main(arguments: list[str] | None = None) -> int:
    """Make what is missing, and write the report.

    Returns:
        1 if a column failed, or there is no data.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [column.name for column in LANGUAGE]
    parser.add_argument("--size", choices=SIZES, default="default")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the work folder")
    parser.add_argument("--parameters", nargs="+", help="of what is made: 0.3M 2.1M 8M")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default those of each size")
    parser.add_argument("--bases", type=Path, help="a work folder of without_data.py")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=[name for name in names if name not in SLOW],
        metavar="COLUMN",
    )
    parser.add_argument("--points", nargs="+", choices=POINTS, default=POINTS)
    parser.add_argument("--report", action="store_true", help="write the report of what is there")
    given = parser.parse_args(arguments)
    if not DATA.exists():
        print(f"There is no {DATA.parent}: the experiment needs its texts.", file=sys.stderr)
        return 1
    out = given.out.resolve()
    bases = given.bases.resolve() if given.bases else out / "bases"
    worlds = []
    for size in SIZES[given.size]:
        seeds = tuple(sorted({*size.seeds, *(given.seeds or ())}))
        size = dataclasses.replace(size, seeds=seeds)
        worlds.append(LanguageWorld(out / size.parameters, size, bases))
        worlds[-1].work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed: dict[str, dict[str, str]] = {world.size.parameters: {} for world in worlds}

    def report() -> str:
        text, content = make_report(worlds, failed)
        for file, whole in (("report.md", text), ("report.json", json.dumps(content, indent=1))):
            with replacing(out / file, force=True) as unfinished:
                unfinished.write_text(whole)
        return text

    if not given.report:
        wanted = given.parameters or [world.size.parameters for world in worlds]
        turns = [
            (world, seed)
            for world in worlds
            for seed in given.seeds or world.size.seeds
            if world.size.parameters in wanted
        ]
        run(turns, given.only, given.points, failed, report)
    print(report())
    return int(any(failed.values()))


def run(
    turns: list[tuple[LanguageWorld, int]],
    only: list[str],
    points: list[str],
    failed: dict[str, dict[str, str]],
    after: Callable[[], object],
) -> None:
    """Make all looks of one kind before those of the next, and one seed of all sizes before others.

    Args:
        turns: The sizes with their seeds.
        only: The ways of merging.
        points: The kinds of looks.
        failed: Gets the errors.
        after: Called after each kind, size and seed.
    """
    for point in points:
        for world, seed in sorted(turns, key=lambda turn: turn[1]):
            errors = failed[world.size.parameters]
            print(f"{world.size.parameters}, seed {seed}, {point}", flush=True)
            columns = [c for c in LANGUAGE if c.name in only and f"{c.name}-{seed}" not in errors]
            errors |= sentiment_merge.run_seed(world, seed, columns, (point,), corrections=())
            after()


if __name__ == "__main__":
    sys.exit(main())
