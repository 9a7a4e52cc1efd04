"""What a merge costs beside reading its inputs and writing its outputs.

    python scripts/bench/merge.py --sizes 0.5,1.5 --with-mergekit --json merge.json

Makes random checkpoints of Qwen2's shapes in bfloat16 (merge_models.py) and runs every row
(merge_rows.py) in its own process, row after row and round after round, so that a busy machine
disturbs all rows alike. CPU seconds are user and system time of the process and its children,
start-up included. Anonymous memory is the highest RssAnon of the process, read every 10 ms: what a
program holds beside the page cache. "From disk" is what the process had to read because the page
cache did not hold it; where it is not zero, rows are not comparable. The first round warms caches
and is not counted; rows of minutes run in one round only. Linux only. Exits with 1 if a target is
missed.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from machine import commit, cpu
from merge_models import SHAPES, make
from merge_rows import MERGEKIT, START_UP, Row, install_mergekit, memory, rows


class Cost(NamedTuple):
    """What one run cost.

    Attributes:
        cpu: CPU seconds.
        wall: Seconds.
        anonymous: MiB of anonymous memory.
        disk: GiB read from disk.
    """

    cpu: float
    wall: float
    anonymous: float
    disk: float


def run(row: Row) -> Cost:
    """Run one row once; its output is removed afterwards."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users run what the first run compiled
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(row.command, stdout=log, stderr=log, env=environment)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # an interrupt: it would go on to write
            process.kill()
            process.wait()
            raise
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        log.seek(0)
        said = log.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{row.name}: {' '.join(row.command)[:300]}\n{said[-3000:]}")
    # Bare I/O may end between two readings, and tells its own at its end.
    peak += [int(line.split()[1]) for line in said.splitlines() if line.startswith("RssAnon:")]
    for path in row.out.parent.glob(row.out.name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The kernel counts blocks of 512 bytes, whatever the disk's.
    return Cost(
        usage.ru_utime + usage.ru_stime, wall, max(peak) / 1024, usage.ru_inblock * 512 / 2**30
    )


def _watch(pid: int, peak: list[int]) -> None:
    """Keep the highest RssAnon of a process, in KiB."""
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        if not lines:  # the process has ended
            return
        peak[0] = max(peak[0], int(lines[0].split()[1]))
        time.sleep(0.01)


def machine(mergekit: Path | None) -> dict[str, Any]:
    """What the numbers depend on."""
    packages = {
        name: version(name) for name in ("mergekit-bayes", "numpy", "numba", "torch", "safetensors")
    }
    if mergekit is not None:
        code = (
            "from importlib.metadata import version\n"
            "print(*map(version, ('mergekit', 'torch', 'transformers')))"
        )
        done = subprocess.run(
            [mergekit / "bin" / "python", "-c", code], check=True, capture_output=True, text=True
        )
        itself, torch, transformers = done.stdout.split()
        packages["mergekit"] = f"{itself} (torch {torch}, transformers {transformers})"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory() / 2**30, 1),
        "python": platform.python_version(),
        **packages,
    }


def measure(plan: list[Row], repeats: int, warm_up: int) -> dict[tuple[float, str], list[Cost]]:
    """Run all rows, round after round; the first `warm_up` rounds do not count."""
    costs: dict[tuple[float, str], list[Cost]] = {(r.size, r.name): [] for r in plan}
    for turn in range(1 - warm_up, repeats + 1):
        for row in plan:
            if row.once and turn != 1:
                continue
            cost = run(row)
            print(
                f"{turn}/{repeats} {row.size:g} B {row.name}: {cost.cpu:.2f} CPU s",
                file=sys.stderr,
                flush=True,
            )
            if turn >= 1:
                costs[row.size, row.name].append(cost)
    return costs


def summary(plan: list[Row], costs: dict[tuple[float, str], list[Cost]]) -> list[dict[str, Any]]:
    """Medians and ranges over the rounds.

    The ratio is the median over rounds of CPU seconds to those of the I/O in the same round.
    """
    result = []
    for row in plan:
        rounds = costs[row.size, row.name]
        cpu = [c.cpu for c in rounds]
        record: dict[str, Any] = {
            "size": row.size,
            "row": row.name,
            "io": row.io,
            "rounds": len(rounds),
            "cpu_s": statistics.median(cpu),
            "cpu_range": [min(cpu), max(cpu)],
            "wall_s": statistics.median(c.wall for c in rounds),
            "anonymous_mib": max(c.anonymous for c in rounds),
            "disk_gib": statistics.median(c.disk for c in rounds),
        }
        if row.io is not None:
            ratios = [
                c.cpu / i.cpu for c, i in zip(rounds, costs[row.size, row.io], strict=not row.once)
            ]
            record["ratio"] = statistics.median(ratios)
            record["ratio_range"] = [min(ratios), max(ratios)]
        result.append(record)
    return result


# Most CPU seconds over those of the I/O, by size and row.
_BOUNDS = {
    size: {
        "average": bound,
        "task arithmetic": bound,
        "gradient matching": bound,
        "--observations 3x": bound,
        "--shrink 0.3": 2.0,
        "--shrink row:0.3": 2.0,
        "ties": 4.0,
    }
    for size, bound in ((0.5, 2.0), (1.5, 1.5))
}
_START_UP = 0.4  # CPU seconds
_ANONYMOUS = 128  # MiB
_GAIN = 8  # of gradient matching over mergekit's task arithmetic


def targets(records: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """(what, measured, bound, met) of each target; the bounds hold at 0.5 and 1.5 B."""
    by_row = {(r["size"], r["row"]): r for r in records}
    result = []
    for size, bounds in _BOUNDS.items():
        for row, bound in bounds.items():
            if (size, row) in by_row:
                ratio = by_row[size, row]["ratio"]
                what = f"{size:g} B, {row}: CPU over that of its I/O, at most"
                result.append((what, ratio, bound, ratio <= bound))
        if (start := by_row.get((size, START_UP))) is not None:
            seconds = start["cpu_s"]
            result.append(
                (
                    f"{size:g} B, {START_UP}: CPU s, at most",
                    seconds,
                    _START_UP,
                    seconds <= _START_UP,
                )
            )
        matching = by_row.get((size, "gradient matching"))
        if matching is None:
            continue
        anonymous = matching["anonymous_mib"]
        what = f"{size:g} B, gradient matching: anonymous MiB, below"
        result.append((what, anonymous, _ANONYMOUS, anonymous < _ANONYMOUS))
        mergekit = by_row.get((size, "mergekit task_arithmetic"))
        if mergekit is not None:
            gain = mergekit["cpu_s"] / matching["cpu_s"]
            what = (
                f"{size:g} B: CPU of mergekit's task arithmetic over that of gradient matching, "
                "at least"
            )
            result.append((what, gain, _GAIN, gain >= _GAIN))
    return result


def table(records: list[dict[str, Any]]) -> str:
    """The records as a table in Markdown."""
    lines = [
        "| B | | CPU s | range | over its I/O | wall s | anonymous MiB | GiB from disk |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        low, high = r["cpu_range"]
        cells = [
            f"{r['size']:g}",
            r["row"],
            f"{r['cpu_s']:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{r['ratio']:.2f}" if "ratio" in r else "",
            f"{r['wall_s']:.2f}",
            f"{r['anonymous_mib']:.0f}",
            f"{r['disk_gib']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Make checkpoints, run the rows, print the table; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--sizes",
        type=_sizes,
        default="0.5,1.5",
        help="billions of parameters: " + ", ".join(f"{s:g}" for s in SHAPES),
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count, at least 1")
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before them that do not")
    parser.add_argument(
        "--rows",
        default="",
        help="only rows whose name contains one of these, comma-separated (and I/O)",
    )
    parser.add_argument(
        "--without",
        default="",
        help="no rows whose name contains one of these, comma-separated",
    )
    parser.add_argument(
        "--work", type=Path, help="where checkpoints are made and reused; default: temporary"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where outputs go; default: memory (/dev/shm) if they fit, else --work",
    )
    parser.add_argument(
        "--keep", action="store_true", help="leave in --work what this run made there"
    )
    parser.add_argument("--json", type=Path, help="also written here, after each size")
    parser.add_argument(
        "--with-mergekit",
        action="store_true",
        help=f"install mergekit {MERGEKIT} into an environment below --work",
    )
    options = parser.parse_args()
    if options.repeats < 1 or options.warm_up < 0:
        parser.error("--repeats must be 1 or more, --warm-up 0 or more.")
    if options.keep and options.work is None:
        parser.error("--keep needs --work.")
    made: list[Path] = []  # is removed at the end
    try:
        work = _folder(options.work, made)
        parent = _out_parent(options.out, work, max(options.sizes))
        out = Path(tempfile.mkdtemp(prefix="bmerge-bench-", dir=parent))
        made.append(out)
        return _bench(options, work, out, made)
    finally:
        for path in made:
            if not (options.keep and path.is_relative_to(work) and path != out):
                shutil.rmtree(path, ignore_errors=True)


def _bench(options: argparse.Namespace, work: Path, out: Path, made: list[Path]) -> int:
    mergekit = None
    if options.with_mergekit:
        if not (work / "mergekit").exists():
            made.append(work / "mergekit")
        mergekit = install_mergekit(work)
    about = machine(mergekit) | {"load": {}}
    records: list[dict[str, Any]] = []
    for size in options.sizes:
        folder = work / f"{size:g}"
        fresh = not folder.exists()
        if fresh:
            made += [folder, folder.with_name(f"{folder.name}.partial")]
            # Float32 precisions of the largest would not stay in the page cache beside the means.
            make(folder, SHAPES[size], "F32" if size < 1 else "BF16")
        parts = [part for part in options.rows.split(",") if part]
        left_out = [part for part in options.without.split(",") if part]
        plan = [
            r
            for r in rows(size, work, out, mergekit)
            if (not parts or r.io is None or any(part in r.name for part in parts))
            and not any(part in r.name for part in left_out)
        ]
        load = os.getloadavg()[0]
        records += summary(plan, measure(plan, options.repeats, options.warm_up))
        about["load"][f"{size:g}"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        if options.json is not None:
            document = {
                "machine": about,
                "rows": records,
                "targets": [list(t) for t in targets(records)],
            }
            options.json.write_text(json.dumps(document, indent=2) + "\n")
        if fresh and not options.keep:
            shutil.rmtree(folder)
    if mergekit is None:
        print("mergekit was not measured (--with-mergekit).", file=sys.stderr)
    print(table(records))
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    measured = targets(records)
    for what, value, bound, met in measured:
        print(f"{'met   ' if met else 'MISSED'} {what} {bound:g}: {value:.2f}")
    return 0 if all(met for *_, met in measured) else 1


def _sizes(text: str) -> list[float]:
    """The sizes of `--sizes`."""
    sizes = [float(s) for s in text.split(",")]
    if not set(sizes) <= SHAPES.keys():
        raise argparse.ArgumentTypeError(
            f"{text}: expected some of {', '.join(f'{s:g}' for s in SHAPES)}"
        )
    return sizes


def _folder(choice: Path | None, made: list[Path]) -> Path:
    """The folder to work in; what this run makes is added to `made`."""
    if choice is None:
        made.append(Path(tempfile.mkdtemp(prefix="bmerge-bench-")))
        return made[0]
    folder, fresh = choice.resolve(), not choice.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        made.append(folder)
    return folder


def _out_parent(choice: Path | None, work: Path, size: float) -> Path:
    """The folder in which the run makes its own folder for outputs, and removes only that."""
    if choice is not None:
        choice.mkdir(parents=True, exist_ok=True)
        return choice
    shared = Path("/dev/shm")
    needed = int(7e9 * size)  # a mean in bfloat16 and a precision in float32, and some room
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > needed else work


if __name__ == "__main__":
    sys.exit(main())
