"""What a merge costs beside reading its inputs and writing its outputs: CPU seconds, wall time,
anonymous memory.

    python scripts/bench/merge.py --sizes 0.5,1.5 --with-mergekit --json merge.json

Makes random checkpoints of Qwen2's shapes in bfloat16, a base and two tasks, each with a precision,
and runs every row in a process of its own, row after row and round after round, so that a busy
machine disturbs all rows alike. CPU seconds are user and system time of the process and its
children, start-up included. Anonymous memory is the highest
RssAnon of the process, looked at every 10 ms: what a program holds beside the page cache. "From
disk" is what the process had to read because the page cache did not hold it; where it is not zero,
rows are not comparable. The first round warms caches and is not counted; rows of minutes run in one
round only. Linux only. Exits with 1 if a target is missed.
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
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, encode
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, TensorSpec
from mergekit_bayes.posterior import PosteriorInfo, identify

MODELS = ("base", "a", "b")
MERGEKIT = "0.1.4"


class Shape(NamedTuple):
    """Of a Qwen2 model with a tied head."""

    hidden: int
    layers: int
    inner: int
    keys: int  # width of keys and values
    vocabulary: int


SHAPES = {
    0.002: Shape(64, 2, 176, 16, 30_000),
    0.5: Shape(896, 24, 4864, 128, 151_936),
    1.5: Shape(1536, 28, 8960, 256, 151_936),
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers stores them."""
    h, keys, inner = shape.hidden, shape.keys, shape.inner
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", keys), ("v", keys)):
            result[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            result[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        result[f"{layer}self_attn.o_proj.weight"] = (h, h)
        result[f"{layer}mlp.gate_proj.weight"] = result[f"{layer}mlp.up_proj.weight"] = (inner, h)
        result[f"{layer}mlp.down_proj.weight"] = (h, inner)
        result[f"{layer}input_layernorm.weight"] = result[
            f"{layer}post_attention_layernorm.weight"
        ] = (h,)
    return result | {"model.norm.weight": (h,)}


def make(target: Path, shape: Shape, precision: str) -> None:
    """A base and two tasks with random weights and precisions, written as a stream; `target`
    appears when whole.
    """
    folder = target.with_name(f"{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    shapes = tensors(shape)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": max(1, shape.keys // 64),
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for seed, name in enumerate(MODELS):
        rng = np.random.default_rng(seed)
        weights = np.float32(0.02) * rng.standard_normal(1 << 20, np.float32)
        precisions = np.exp(rng.standard_normal(1 << 20, np.float32))
        (folder / name / "posterior").mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        mean = folder / name / "model.safetensors"
        _write(
            mean,
            {n: TensorSpec("BF16", s) for n, s in shapes.items()},
            {"format": "pt"},
            weights,
            rng,
        )
        source = SafetensorsSource([mean])
        info = PosteriorInfo(
            estimator="ggn",
            unit="token",
            observations=1000,
            ess=1000,
            mean=identify(source, full=False),
        )
        source.close()
        specs = {n: TensorSpec(precision, s) for n, s in shapes.items()}
        _write(
            folder / name / "posterior" / "precision.safetensors",
            specs,
            info.to_metadata(),
            precisions,
            rng,
        )
    folder.rename(target)


def _write(
    path: Path, specs: dict[str, TensorSpec], metadata: dict[str, str], values: Any, rng: Any
) -> None:
    sink = SafetensorsSink(path, specs, metadata)
    for name, spec in specs.items():
        for start, stop in chunks(spec, len(values)):
            moved = np.roll(values, int(rng.integers(len(values))))
            sink.write_bytes(
                name, start * ITEM_SIZE[spec.dtype], encode(moved[: stop - start], spec.dtype)
            )
    sink.close()


class Row(NamedTuple):
    """One command; `io` names the row that reads and writes the same bytes, `once` runs it in one
    round only.
    """

    size: float
    name: str
    command: list[str]
    out: Path
    io: str | None = None
    once: bool = False


# Reads files and writes as many bytes as asked for, 8 MiB at a time, by the means that a merge has.
IO = """
import os, sys
out, sizes, *files = sys.argv[1:]
buffer = memoryview(bytearray(8 << 20))
for file in files:
    fd, at = os.open(file, os.O_RDONLY), 0
    while (n := os.preadv(fd, [buffer], at)):
        at += n
os.makedirs(out)
for i, size in enumerate(map(int, sizes.split(","))):
    fd, at = os.open(f"{out}/{i}", os.O_CREAT | os.O_RDWR), 0
    os.posix_fallocate(fd, 0, size)
    while at < size:
        at += os.pwrite(fd, buffer[: size - at], at)
"""
# Task arithmetic as one would write it in a notebook.
TORCH = """
import sys
from safetensors.torch import load_file, save_file
out, *folders = sys.argv[1:]
base, *tasks = [{n: t.float() for n, t in load_file(f"{f}/model.safetensors").items()} for f in folders]
merged = {n: (t + sum(task[n] - t for task in tasks)).bfloat16() for n, t in base.items()}
save_file(merged, out, metadata={"format": "pt"})
"""

# Of memory an entry, with some room, for rows that hold whole models in float32: 16 were seen.
WHOLE_BYTES = 20


def rows(size: float, work: Path, out: Path, mergekit: Path | None) -> Iterator[Row]:
    """All rows of one size."""
    folder = work / f"{size:g}"
    means = [str(folder / m / "model.safetensors") for m in MODELS]
    precisions = [str(folder / m / "posterior" / "precision.safetensors") for m in MODELS]
    entries = sum(int(np.prod(s)) for s in tensors(SHAPES[size]).values())
    base, a, b = (str(folder / m) for m in MODELS)

    def row(name: str, command: list[str], io: str | None = None, suffix: str = "") -> Row:
        target = out / f"{size:g}-{name.replace(' ', '-').replace('/', '-')}{suffix}"
        return Row(size, name, [*command], target, io)

    def reads(name: str, files: list[str], sizes: list[int]) -> Row:
        target = row(name, [])
        return target._replace(
            command=[
                sys.executable,
                "-S",
                "-c",
                IO,
                str(target.out),
                ",".join(map(str, sizes)),
                *files,
            ]
        )

    yield reads("read 3 files, write 1", means, [2 * entries])
    yield reads("read 6 files, write 1", means + precisions, [2 * entries])
    yield reads("read 6 files, write 2", means + precisions, [2 * entries, 4 * entries])

    def merge(
        name: str, io: str, *flags: str, models: tuple[str, ...] = (a, b), base: str | None = base
    ) -> Row:
        target = row(name, [], io)
        given = ["--base", base] if base else []
        binary = str(Path(sys.executable).with_name("bmerge"))
        return target._replace(
            command=[binary, "merge", *models, *given, *flags, "-q", "-o", str(target.out)]
        )

    three, six, posterior = (
        "read 3 files, write 1",
        "read 6 files, write 1",
        "read 6 files, write 2",
    )
    weighed = ("--weights", "precision")
    yield merge("average", three, models=(base, a, b), base=None)
    yield merge("task arithmetic", three)
    yield merge("gradient matching", posterior, *weighed)
    yield merge("gradient matching, no posterior", six, *weighed, "--no-posterior")
    yield merge("gradient matching, one thread", posterior, *weighed, "--threads", "1")
    yield merge("removal", posterior, *weighed, "--scale", "-0.5")
    yield merge("--shrink 0.3", posterior, *weighed, "--shrink", "0.3")
    yield merge("--shrink row:0.3", posterior, *weighed, "--shrink", "row:0.3")
    yield merge("--observations 3x", posterior, *weighed, "--observations", f"{base}=3x")
    yield merge("--pool row", six, *weighed, "--pool", "row")
    yield merge("ties", three, "--method", "ties")
    yield merge("dare_ties", three, "--method", "dare_ties")
    torch = row("torch, float32 state dicts", [], three, ".safetensors")
    whole = entries * WHOLE_BYTES < memory()
    if whole:
        yield torch._replace(command=[sys.executable, "-c", TORCH, str(torch.out), base, a, b])
    else:
        print(
            f"{size:g} B: no rows that hold whole models in float32, for want of memory.",
            file=sys.stderr,
        )
    if mergekit is not None:
        models = (base, a, b)
        yield _mergekit_row(row("mergekit task_arithmetic", [], three), {}, mergekit, work, models)
        # As precise inside as ours; the row above is the faster and the usual one.
        if whole:
            exact = row("mergekit task_arithmetic, float32", [], three)
            yield _mergekit_row(exact, {}, mergekit, work, models, "float32")
        for method in ("ties", "dare_ties") if size <= 0.5 else ():
            slow = row(f"mergekit {method}", [], three)._replace(once=True)
            yield _mergekit_row(slow, {"density": 0.5}, mergekit, work, models)


def _mergekit_row(
    row: Row,
    settings: dict[str, float],
    venv: Path,
    work: Path,
    models: tuple[str, ...],
    inside: str = "bfloat16",
) -> Row:
    base, *tasks = models
    method = row.name.removeprefix("mergekit ").partition(",")[0]
    recipe = {
        "merge_method": method,
        "base_model": base,
        "dtype": inside,
        "out_dtype": "bfloat16",
        "models": [{"model": t, "parameters": {"weight": 1.0, **settings}} for t in tasks],
    }
    file = work / f"mergekit-{row.size:g}-{method}-{inside}.yaml"
    file.write_text(json.dumps(recipe))  # JSON is YAML
    binary = str(venv / "bin" / "mergekit-yaml")
    return row._replace(command=[binary, str(file), str(row.out), "--no-copy-tokenizer", "--quiet"])


class Cost(NamedTuple):
    cpu: float  # seconds
    wall: float  # seconds
    anonymous: float  # MiB
    disk: float  # GiB read from it


def run(row: Row) -> Cost:
    """Run one row once; its output is removed afterwards."""
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen(row.command, stdout=log, stderr=log, env=environment)
        peak = [0]
        watcher = threading.Thread(target=_watch, args=(process.pid, peak))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watcher.join()
        if process.returncode:
            log.seek(0)
            raise SystemExit(
                f"{row.name}: {' '.join(row.command)[:300]}\n{log.read().decode()[-3000:]}"
            )
    for path in row.out.parent.glob(row.out.name + "*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # The kernel counts blocks of 512 bytes, whatever the disk's.
    return Cost(
        usage.ru_utime + usage.ru_stime, wall, peak[0] / 1024, usage.ru_inblock * 512 / 2**30
    )


def _watch(pid: int, peak: list[int]) -> None:
    while True:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return
        found = [line for line in status.splitlines() if line.startswith("RssAnon")]
        if not found:  # it has ended
            return
        peak[0] = max(peak[0], int(found[0].split()[1]))
        time.sleep(0.01)


def install_mergekit(work: Path) -> Path:
    """mergekit in a virtual environment of its own, with the torch that the project is tested with."""
    venv = work / "mergekit"
    if not (venv / "bin" / "mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        torch = version("torch").partition("+")[0]
        # This mergekit does not run with transformers 5.
        packages = [f"mergekit=={MERGEKIT}", f"torch=={torch}", "transformers<5"]
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", *packages], check=True)
    return venv


def memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine(mergekit: Path | None) -> dict[str, Any]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(
        (x.partition(":")[2].strip() for x in lines if "model name" in x), platform.machine()
    )
    packages = {
        name: version(name) for name in ("mergekit-bayes", "numpy", "numba", "torch", "safetensors")
    }
    if mergekit is not None:
        code = "from importlib.metadata import version as v; print(*map(v, ('mergekit', 'torch', 'transformers')))"
        found = subprocess.run(
            [mergekit / "bin" / "python", "-c", code], check=True, capture_output=True, text=True
        )
        own, torch, transformers = found.stdout.split()
        packages["mergekit"] = f"{own} (torch {torch}, transformers {transformers})"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory() / 2**30, 1),
        "python": platform.python_version(),
        **packages,
    }


def commit() -> str:
    """The commit of the source tree, with a plus where files of the package differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], check=False, capture_output=True, text=True
    )
    if head.returncode:
        return "unknown"
    top = [":/mergekit_bayes", ":/cli"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *top], check=False, capture_output=True, text=True
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def measure(plan: list[Row], repeats: int, warm_up: int) -> dict[tuple[float, str], list[Cost]]:
    """All rows, round after round; the first `warm_up` rounds do not count."""
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
    """Medians and ranges; the ratio is the median over rounds of CPU seconds to those of the I/O in
    the same round.
    """
    result = []
    for row in plan:
        own = costs[row.size, row.name]
        cpu = [c.cpu for c in own]
        found: dict[str, Any] = {
            "size": row.size,
            "row": row.name,
            "io": row.io,
            "rounds": len(own),
            "cpu_s": statistics.median(cpu),
            "cpu_range": [min(cpu), max(cpu)],
            "wall_s": statistics.median(c.wall for c in own),
            "anonymous_mib": max(c.anonymous for c in own),
            "disk_gib": statistics.median(c.disk for c in own),
        }
        if row.io is not None:
            ratios = [
                c.cpu / i.cpu for c, i in zip(own, costs[row.size, row.io], strict=not row.once)
            ]
            found["ratio"] = statistics.median(ratios)
            found["ratio_range"] = [min(ratios), max(ratios)]
        result.append(found)
    return result


def targets(found: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """(what, measured, bound, met); the bounds hold at 0.5 and 1.5 B."""
    by = {(f["size"], f["row"]): f for f in found}
    result = []
    for size, bound in ((0.5, 2.0), (1.5, 1.5)):
        if (size, "gradient matching") not in by:
            continue
        for row in ("gradient matching", "--shrink 0.3", "--shrink row:0.3", "--observations 3x"):
            if (size, row) not in by:
                continue
            ratio = by[size, row]["ratio"]
            result.append(
                (
                    f"{size:g} B, {row}: CPU over that of its I/O, at most",
                    ratio,
                    bound,
                    ratio <= bound,
                )
            )
        memory = by[size, "gradient matching"]["anonymous_mib"]
        result.append(
            (f"{size:g} B, gradient matching: anonymous MiB, below", memory, 128, memory < 128)
        )
        if (size, "mergekit task_arithmetic") in by:
            gain = (
                by[size, "mergekit task_arithmetic"]["cpu_s"]
                / by[size, "gradient matching"]["cpu_s"]
            )
            what = f"{size:g} B: CPU of mergekit's task arithmetic over that of gradient matching, at least"
            result.append((what, gain, 8, gain >= 8))
    return result


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "| B | | CPU s | range | over its I/O | wall s | anonymous MiB | GiB from disk |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for f in found:
        ratio = f"{f['ratio']:.2f}" if "ratio" in f else ""
        low, high = f["cpu_range"]
        lines.append(
            f"| {f['size']:g} | {f['row']} | {f['cpu_s']:.2f} | {low:.2f} to {high:.2f} | {ratio} "
            "| "
            f"{f['wall_s']:.2f} | {f['anonymous_mib']:.0f} | {f['disk_gib']:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
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
        "--work", type=Path, help="where checkpoints are made, or found again; default: temporary"
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
    made: list[Path] = []  # and to be removed
    try:
        work = _folder(options.work, made)
        out = Path(
            tempfile.mkdtemp(
                prefix="bmerge-bench-", dir=_place(options.out, work, max(options.sizes))
            )
        )
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
    found: list[dict[str, Any]] = []
    for size in options.sizes:
        folder = work / f"{size:g}"
        fresh = not folder.exists()
        if fresh:
            made += [folder, folder.with_name(f"{folder.name}.partial")]
            # Float32 precisions of the largest would not stay in the page cache beside the means.
            make(folder, SHAPES[size], "F32" if size < 1 else "BF16")
        wanted = [w for w in options.rows.split(",") if w]
        plan = [
            r
            for r in rows(size, work, out, mergekit)
            if not wanted or r.io is None or any(w in r.name for w in wanted)
        ]
        load = os.getloadavg()[0]
        found += summary(plan, measure(plan, options.repeats, options.warm_up))
        about["load"][f"{size:g}"] = [round(load, 1), round(os.getloadavg()[0], 1)]
        if options.json is not None:
            document = {
                "machine": about,
                "rows": found,
                "targets": [list(t) for t in targets(found)],
            }
            options.json.write_text(json.dumps(document, indent=2) + "\n")
        if fresh and not options.keep:
            shutil.rmtree(folder)
    if mergekit is None:
        print("mergekit was not measured (--with-mergekit).", file=sys.stderr)
    print(table(found))
    print("\n" + ", ".join(f"{k} {v}" for k, v in about.items()))
    measured = targets(found)
    for what, value, bound, met in measured:
        print(f"{'met   ' if met else 'MISSED'} {what} {bound:g}: {value:.2f}")
    return 0 if all(met for *_, met in measured) else 1


def _sizes(text: str) -> list[float]:
    sizes = [float(s) for s in text.split(",")]
    if not set(sizes) <= SHAPES.keys():
        raise argparse.ArgumentTypeError(
            f"{text}: expected some of {', '.join(f'{s:g}' for s in SHAPES)}"
        )
    return sizes


def _folder(given: Path | None, made: list[Path]) -> Path:
    if given is None:
        made.append(Path(tempfile.mkdtemp(prefix="bmerge-bench-")))
        return made[0]
    folder, fresh = given.resolve(), not given.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        made.append(folder)
    return folder


def _place(given: Path | None, work: Path, size: float) -> Path:
    """Where outputs go: a folder of the run's own is made there, so that nothing of anyone else is
    removed.
    """
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        return given
    shared = Path("/dev/shm")
    needed = int(7e9 * size)  # a mean in bfloat16 and a precision in float32, and some room
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > needed else work


if __name__ == "__main__":
    sys.exit(main())
