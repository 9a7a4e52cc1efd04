"""Break files of every kind under every command, and count how the command ends.

    python scripts/fuzz.py [--cases N] [--seed S] [--commands merge,convert] [--only N] [--markdown]

A case is a command line, one of its files, and one way to break it. All three follow from the seed
and the case's number. The cases run in this process, through the entry point of `bmerge`. Each must
end in 10 seconds, with the result or with one message, and leave neither half an output nor a
changed input; `docs/reliability.md` says what else is promised. The exit code is 1 if a case did
not. A case that cannot be stopped ends the process with its stack; its number is in `running` in
the folder of the world (`fuzz-*` among the temporary folders). Ctrl-C stops after the running case.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "cli"))
from scripts.fuzzing.hub import break_answers, requested, served
from scripts.fuzzing.lines import LINES, Line, files_of
from scripts.fuzzing.mutations import break_path
from scripts.fuzzing.stage import Stage
from scripts.fuzzing.verdict import BAD, GOOD, Good, Verdict, judge, snapshot, tensors
from scripts.fuzzing.world import OUTSIDE, fresh, make_outside, make_world
from tests.hub_state import Hub

LIMIT = 10.0  # seconds


@dataclass(frozen=True)
class Case:
    """One case and its end.

    Attributes:
        number: Its number, from which with the seed all else follows.
        line: Name of the command line.
        file: The file or folder that was broken.
        how: The way in which.
        kind: One of `GOOD` or `BAD`.
        why: What was found, if it is bad.
        group: Where a traceback came from.
        seconds: How long it took.
    """

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
        seed: Of all that is drawn.
        limit: Seconds that a case may take.
    """

    def __init__(self, folder: Path, seed: int = 0, limit: float = LIMIT) -> None:
        self.world, self.work = folder.resolve() / "world", folder.resolve() / "case"
        self.seed, self.limit, self.stage = seed, limit, Stage()
        with self.stage.caught():
            make_world(self.world)
        self.outside = snapshot(self.world.parent / OUTSIDE)
        self._good: dict[str, Good] = {}

    def good(self, line: Line) -> Good:
        """What a line does on good files.

        Raises:
            RuntimeError: It does not succeed on them.
        """
        if line.name not in self._good:
            fresh(self.world, line, self.work)
            before = snapshot(self.work)
            with self._around(line) as hub:
                ran = self.stage.run(line.words, self.work, 10 * self.limit)
            verdict = judge(line, ran, self.work, before)
            if verdict.kind != "done":
                raise RuntimeError(f"{line.name}: {verdict}\n{ran.err}") from ran.error
            made = tensors(self.work / line.out) if line.out and line.weights else {}
            files = requested(hub) if hub is not None else files_of(line, self.world)
            self._good[line.name] = Good(ran.grown, made, files)
        return self._good[line.name]

    def drawn(self, number: int) -> tuple[Line, random.Random]:
        """The line of a case, and the source of all that is drawn after it."""
        rng = random.Random(f"{self.seed}/{number}")
        return rng.choices(LINES, [line.weight for line in LINES])[0], rng

    def case(self, number: int) -> Case:
        """Run one case."""
        line, rng = self.drawn(number)
        file, key = rng.choice(self.good(line).files), self.world.parent / OUTSIDE / "key"

        def spoil(hub: Hub | None) -> str:
            if hub is not None:
                return break_answers(hub, file, rng)
            return break_path(self.work / file, rng, key)

        return self.broken(line, file, spoil, number)

    def broken(
        self, line: Line, file: str, spoil: Callable[[Hub | None], str], number: int = 0
    ) -> Case:
        """Run a line after one of its files, or an answer of its Hub, was broken.

        Args:
            line: The line.
            file: The file or folder, relative to the world, or the path of the answer.
            spoil: Breaks it, and says how.
            number: Number of the case.
        """
        good = self.good(line)
        fresh(self.world, line, self.work)
        with self._around(line) as hub:
            how = spoil(hub)
            running = f"{number}: {line.name}; {file}; {how}\n"
            self.world.with_name("running").write_text(running, errors="backslashreplace")
            before = snapshot(self.work)
            ran = self.stage.run(line.words, self.work, self.limit)
        found = judge(line, ran, self.work, before, good, file)
        if snapshot(self.world.parent / OUTSIDE) != self.outside:
            found = Verdict("input changed", "files to which a link leads")
            make_outside(self.world.parent / OUTSIDE)
        seconds = round(ran.seconds, 2)
        return Case(number, line.name, file, how, found.kind, found.why, found.group, seconds)

    def _around(self, line: Line) -> contextlib.AbstractContextManager[Hub | None]:
        """The Hub of a line that needs one."""
        home = self.world.with_name("home")
        return served(self.world, home) if line.hub else contextlib.nullcontext()

    def cases(self, first: int, commands: str | None = None) -> Iterator[Case]:
        """Run case after case.

        Args:
            first: Number of the first.
            commands: How the names of lines begin, separated by commas; other cases are skipped.
        """
        for number in count(first):
            name = self.drawn(number)[0].name
            if commands is None or name.startswith(tuple(commands.split(","))):
                yield self.case(number)


def table(cases: list[Case]) -> str:
    """Counts by command and kind, as Markdown."""
    kinds = (*GOOD, *BAD)
    commands = dict.fromkeys(line.name.split()[0] for line in LINES if line.weight)
    rows = [f"| command | cases | {' | '.join(kinds)} |", f"| --- |{' ---: |' * (len(kinds) + 1)}"]
    for name in (*commands, "all"):
        counts = Counter(c.kind for c in cases if name in ("all", c.line.split()[0]))
        cells = [f"{counts.total():,}", *(f"{counts[kind]:,}" for kind in kinds)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def failures(cases: list[Case]) -> Iterator[str]:
    """The failed cases, grouped, each group with its first case."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.kind in BAD:
            groups.setdefault((case.kind, case.group or case.line.split()[0]), []).append(case)
    for (kind, group), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = members[0]
        yield f"{len(members):4}  {kind}: {group}"
        yield f"      --only {first.number}: {first.line}; {first.file}; {first.how}; {first.why}"


def conditions(seed: int, cases: list[Case], seconds: float) -> str:
    """One sentence on what was run, on what, and how long it took."""
    names = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "peft", "pyyaml")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    slowest = max((case.seconds for case in cases), default=0.0)
    return (
        f"Seed {seed}, {len(cases):,} cases in {seconds:,.0f} s, the slowest {slowest:.1f} s; "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {versions}."
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print what came of them.

    Args:
        arguments: Command line; that of the process by default.

    Returns:
        1 if a case failed, else 0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="number of cases")
    parser.add_argument("--seconds", type=float, help="start no case after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of the only case")
    parser.add_argument("--commands", help="how the names of lines begin: merge,push json")
    parser.add_argument("--markdown", action="store_true", help="print only the table")
    parser.add_argument("--json", type=Path, help="write all cases to this file")
    parser.add_argument("--folder", type=Path, help="a new folder for the world, which is kept")
    chosen = parser.parse_args(arguments)
    cases: list[Case] = []
    began, stopped = time.monotonic(), threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stopped.set())
    with contextlib.ExitStack() as stack:
        folder = chosen.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="fuzz-"))
        )
        fuzzer = Fuzzer(folder, chosen.seed)
        if chosen.only is not None:
            cases = [fuzzer.case(chosen.only)]
        for case in fuzzer.cases(chosen.first, chosen.commands) if not cases else ():
            cases.append(case)
            if case.kind in BAD and not chosen.markdown:
                print(case, file=sys.stderr, flush=True)
            late = time.monotonic() - began > (chosen.seconds or 1e9)
            if len(cases) == chosen.cases or late or stopped.is_set():
                break
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(case) for case in cases], indent=1))
    if chosen.only is not None:
        print("\n".join(f"{name:8} {value}" for name, value in asdict(cases[0]).items()))
    else:
        print(f"{table(cases)}\n\n{conditions(chosen.seed, cases, time.monotonic() - began)}")
        print("" if chosen.markdown else "\n".join(failures(cases)), end="")
    return int(any(case.kind in BAD for case in cases))


if __name__ == "__main__":
    sys.exit(main())
