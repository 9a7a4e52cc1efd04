"""What each way of removing toxic text costs at equal toxicity, with intervals over seeds and rows.

    python scripts/experiments/detox.py --size small -o runs/removal

Trains bases (and oracles, which never saw the text), makes five looks of every method, measures
each, and writes `report.md`, `report.json` and `removal.png`. Every base, fine-tune and look is
done once, so that the command can be run again after it was stopped; `--report` only writes the
report of what is there. What is there counts as done whatever made it, so take another folder after
a change of methods. It needs the texts in ../shared/data, and scikit-learn (part of the test
extra).

Scales and steps of the looks were set on validation texts.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
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

from detox_jobs import carry_out, jobs  # noqa: E402
from detox_methods import METHODS  # noqa: E402
from detox_report import draw, make_report  # noqa: E402
from detox_world import DATA, SIZES, World  # noqa: E402

from mergekit_bayes.checkpoint.replacing import replacing  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Do what is missing, and write the report.

    Returns:
        1 if a step failed, or there is no data.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the work folder")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="METHOD", help=", ".join(m.name for m in METHODS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="by default those of the size")
    parser.add_argument("--report", action="store_true", help="write the report of what is there")
    given = parser.parse_args(arguments)
    if not DATA.exists():
        print(f"There is no {DATA}: the experiment needs its texts.", file=sys.stderr)
        return 1
    begun = time.monotonic()
    size = SIZES[given.size]
    if given.seeds:
        size = dataclasses.replace(size, seeds=tuple(given.seeds))
    world = World(given.out.resolve(), size)
    world.work.mkdir(parents=True, exist_ok=True)
    failed = {} if given.report else carry_out(world, jobs(world, given.only), given.workers)
    text, content = make_report(world, failed, time.monotonic() - begun)
    for file, write in (
        ("report.md", lambda path: path.write_text(text)),
        ("report.json", lambda path: path.write_text(json.dumps(content, indent=1, default=str))),
        ("removal.png", lambda path: draw(world, path)),
    ):
        with replacing(world.work / file, force=True) as unfinished:
            write(unfinished)
    print(text)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
