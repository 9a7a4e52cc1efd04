"""Break files of every kind under every command, and count how the command ends.

    python scripts/fuzz.py [--cases N] [--seed S] [--commands merge,convert] [--only N] [--markdown]

A case is one line of `fuzz_world.LINES`, one of its files, and one way to break it; all three
follow from the seed and the number of the case. All run in this process, through the entry point of
`bmerge`. Each must end with the result or with one message, in 10 seconds, and leave neither half
an output nor a changed input; `docs/reliability.md` says what else is promised. The exit code is 1
if a case did not.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

for _name, _value in (
    ("HF_HUB_OFFLINE", "1"),
    ("HF_DATASETS_OFFLINE", "1"),
    ("TOKENIZERS_PARALLELISM", "false"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "cli")]

from scripts.fuzz_mutations import Bytes, entry, spliced, ways
from scripts.fuzz_run import BAD, GOOD, Good, Stage, Verdict, fresh, judge, snapshot, tensors
from scripts.fuzz_world import Line, files_of, lines_named, make_world

LIMIT = 10.0  # seconds


@dataclass(frozen=True)
class Case:
    """One case and its end."""

    number: int
    line: str
    file: str
    how: str
    kind: str
    why: str
    group: str
    seconds: float


class Fuzzer:
    """A world, the lines over it, and what they do when nothing is broken.

    Args:
        folder: Where the world is made and the cases run.
        lines: The lines.
        limit: Seconds that a case may take.
    """

    def __init__(self, folder: Path, lines: Iterable[Line], limit: float = LIMIT) -> None:
        self.world, self.work = folder / "world", folder / "case"
        self.lines, self.limit, self.stage = list(lines), limit, Stage()
        with self.stage.caught():
            make_world(self.world)
        self.good = {line.name: self._good(line) for line in self.lines}

    def _good(self, line: Line) -> Good:
        fresh(self.world, line, self.work)
        before = snapshot(self.work)
        ran = self.stage.run(line.words, self.work, 10 * self.limit)
        verdict = judge(line, ran, self.work, before, None, "")
        if verdict.kind != "done":
            raise RuntimeError(f"{line.name}: {verdict}\n{ran.err}") from ran.error
        made = tensors(self.work / line.out) if line.out and line.weights else {}
        return Good(ran.grown, made)

    def case(self, seed: int, number: int) -> Case:
        """Run one case."""
        rng = random.Random(f"{seed}/{number}")
        lines = [line for line in self.lines if files_of(line, self.world)]
        line = rng.choices(lines, [line.weight for line in lines])[0]
        broken = rng.choice(files_of(line, self.world))
        fresh(self.world, line, self.work)
        how = break_file(self.work / broken, rng, self.world.with_name("canary"))
        before = snapshot(self.work)
        ran = self.stage.run(line.words, self.work, self.limit)
        verdict = judge(line, ran, self.work, before, self.good[line.name], broken)
        return Case(number, line.name, broken, how, *_parts(verdict), round(ran.seconds, 2))


def _parts(verdict: Verdict) -> tuple[str, str, str]:
    return verdict.kind, verdict.why, verdict.group


def break_file(path: Path, rng: random.Random, canary: Path) -> str:
    """Break a file or folder in one way; returns which."""
    if path.is_dir() or rng.random() < 0.15:
        return f"entry: {entry(path, rng, canary)}"
    found = ways(path)
    share = {"document": 6, "bytes": 2, "text": 2}
    kind = rng.choices(list(found), [share[k] for k in found])[0]
    change: Bytes = rng.choice(found[kind])
    data = path.read_bytes()
    try:
        path.write_bytes(change(data, rng))
    except (ValueError, struct.error, zipfile.BadZipFile):  # the scratch of a merge has no header
        path.write_bytes(spliced(data, rng))
        return f"{kind}: spliced"
    return f"{kind}: {change.__name__}"


def table(cases: list[Case], lines: Iterable[Line]) -> str:
    """Counts by command and kind, as Markdown."""
    kinds = [*GOOD, *BAD]
    commands = list(dict.fromkeys(line.name.split()[0] for line in lines))
    rows = [
        "| command | cases | " + " | ".join(kinds) + " |",
        "| --- |" + " ---: |" * (len(kinds) + 1),
    ]
    for name in [*commands, "all"]:
        counts = Counter(c.kind for c in cases if name in ("all", c.line.split()[0]))
        cells = [f"{counts.total():,}", *(f"{counts[kind]:,}" for kind in kinds)]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def failures(cases: list[Case]) -> Iterator[str]:
    """The failed cases, one line a group, with the first case of each."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.kind in BAD:
            groups.setdefault((case.kind, case.group or case.line.split()[0]), []).append(case)
    for (kind, group), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = members[0]
        yield f"{len(members):4}  {kind}: {group}"
        yield f"      --only {first.number}: {first.line}; {first.file}; {first.how}; {first.why}"


def versions() -> str:
    """The versions that matter for a run."""
    from importlib.metadata import version

    names = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "peft", "pyyaml")
    return f"Python {platform.python_version()}, " + ", ".join(f"{n} {version(n)}" for n in names)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print what came of them; returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--commands", help="names of lines, or how they begin: merge,push json")
    parser.add_argument("--only", type=int, help="one case, with its streams")
    parser.add_argument("--json", type=Path, help="write all cases to this file")
    parser.add_argument("--markdown", action="store_true", help="print the table and nothing else")
    parser.add_argument("--keep", type=Path, help="make the world here and keep it")
    chosen = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        lines = list(lines_named(chosen.commands))
        # All lines are drawn from even if few are run, so that a number means the same case.
        fuzzer = Fuzzer(folder.resolve(), lines)
        if chosen.only is not None:
            return show(fuzzer, chosen.seed, chosen.only)
        cases, began = [], time.monotonic()
        for number in range(chosen.first, chosen.first + chosen.cases):
            if chosen.seconds is not None and time.monotonic() - began > chosen.seconds:
                break
            cases.append(fuzzer.case(chosen.seed, number))
            if cases[-1].kind in BAD and not chosen.markdown:
                print(cases[-1], file=sys.stderr, flush=True)
    print(table(cases, lines))
    slowest = max((case.seconds for case in cases), default=0.0)
    print(
        f"\nSeed {chosen.seed}, {len(cases):,} cases in {time.monotonic() - began:,.0f} s, the "
        f"slowest {slowest:.1f} s; {versions()}."
    )
    if not chosen.markdown:
        print("\n".join(failures(cases)))
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(case) for case in cases], indent=1))
    return int(any(case.kind in BAD for case in cases))


def show(fuzzer: Fuzzer, seed: int, number: int) -> int:
    """Run one case and print all that is known of it."""
    case = fuzzer.case(seed, number)
    for name, value in asdict(case).items():
        print(f"{name:8} {value}")
    return int(case.kind in BAD)


if __name__ == "__main__":
    sys.exit(main())
