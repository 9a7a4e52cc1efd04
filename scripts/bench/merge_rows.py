"""The rows of the merge benchmark: the commands that are measured, ours and those of others."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from merge_models import FACTORS, MATRICES, MODELS, RANK, SHAPES, tensors

MERGEKIT = "0.1.5"
START_UP = "start-up: a dry run"

# Reads files and writes the given numbers of bytes, 8 MiB at a time, by a merge's own calls.
IO = """
import os, sys
out, sizes, *files = sys.argv[1:]
buffer = memoryview(bytearray(8 << 20))
for file in files:
    fd, at = os.open(file, os.O_RDONLY), 0
    while (n := os.preadv(fd, [buffer], at)):
        at += n
os.makedirs(out)
for i, size in enumerate(map(int, filter(None, sizes.split(",")))):
    fd, at = os.open(f"{out}/{i}", os.O_CREAT | os.O_RDWR), 0
    os.posix_fallocate(fd, 0, size)
    while at < size:
        at += os.pwrite(fd, buffer[: size - at], at)
print(next(line for line in open("/proc/self/status") if line.startswith("RssAnon:")))
"""

# Task arithmetic as one would write it in a notebook.
TORCH = """
import sys
from safetensors.torch import load_file, save_file
out, *folders = sys.argv[1:]
base, *tasks = [
    {n: t.float() for n, t in load_file(f"{f}/model.safetensors").items()} for f in folders
]
merged = {n: (t + sum(task[n] - t for task in tasks)).bfloat16() for n, t in base.items()}
save_file(merged, out, metadata={"format": "pt"})
"""

# The same by mergekit's in-memory API, as its README shows it.
IN_MEMORY = """
import sys
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
out, dtype, *folders = sys.argv[1:]
models = {f: load_file(f"{f}/model.safetensors") for f in folders}
with torch.no_grad():
    merged = merge_state_dicts(
        models,
        "task_arithmetic",
        parameters={"weight": 1.0},
        base=folders[0],
        dtype=getattr(torch, dtype),
        out_dtype=torch.bfloat16,
    )
save_file(merged, out, metadata={"format": "pt"})
"""

# Bytes of memory an entry for rows that hold complete models in float32; 16 were measured.
WHOLE_BYTES = 20


class Row(NamedTuple):
    """One command of the table.

    Attributes:
        size: Billions of parameters.
        name: Of the row.
        command: The command line.
        out: What it writes.
        io: The row that reads and writes the same bytes.
        once: Whether it runs in one round only.
    """

    size: float
    name: str
    command: list[str]
    out: Path
    io: str | None = None
    once: bool = False


def rows(size: float, work: Path, out: Path, mergekit: Path | None) -> Iterator[Row]:
    """All rows of one size."""
    folder = work / f"{size:g}"
    means = [str(folder / m / "model.safetensors") for m in MODELS]
    precisions = [str(folder / m / "posterior" / "precision.posterior") for m in MODELS]
    entries = sum(int(np.prod(s)) for s in tensors(SHAPES[size]).values())
    base, a, b = (str(folder / m) for m in MODELS)

    def row(name: str, command: list[str], io: str | None = None, suffix: str = "") -> Row:
        target = out / f"{size:g}-{name.replace(' ', '-').replace('/', '-')}{suffix}"
        return Row(size, name, [*command], target, io)

    def reads(name: str, files: list[str], sizes: list[int]) -> Row:
        target = row(name, [])
        written = ",".join(map(str, sizes))
        command = [sys.executable, "-S", "-c", IO, str(target.out), written, *files]
        return target._replace(command=command)

    yield reads("read 3 files, write 1", means, [2 * entries])
    yield reads("read 6 files", means + precisions, [])
    yield reads("read 6 files, write 1", means + precisions, [2 * entries])
    yield reads("read 6 files, write 2", means + precisions, [2 * entries, 4 * entries])

    def merge(
        name: str, io: str, *flags: str, models: tuple[str, ...] = (a, b), base: str | None = base
    ) -> Row:
        target = row(name, [], io)
        on_base = ["--base", base] if base else []
        binary = str(Path(sys.executable).with_name("bmerge"))
        is_written = not any(flag.startswith("--predict") for flag in flags)
        to = ["-o", str(target.out)] if is_written else []
        return target._replace(command=[binary, "merge", *models, *on_base, *flags, "-q", *to])

    three, six = "read 3 files, write 1", "read 6 files, write 1"
    posterior = "read 6 files, write 2"
    weighed = ("--weights", "precision")
    dry = merge("", three, "--dry-run")
    yield dry._replace(name=START_UP, io=None)
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
    for count in (1, 16):
        sets = [f"--predict={(i + 1) / count:g}" for i in range(count)]
        yield merge(f"--predict, sets: {count}", "read 6 files", *weighed, *sets)
    for what, stored_in, times in (("matrices", MATRICES, 1), (f"rank {RANK}", FACTORS, 3)):
        files = [str(folder / m / stored_in) for m in MODELS]
        io = f"read 3 files and {what}, write 2"
        # A merge has the ranks of all models.
        written = times * os.path.getsize(files[0]) if os.path.exists(files[0]) else 0
        yield reads(io, means + files, [2 * entries, written])
        chosen = [f"--precision={folder / m}={file}" for m, file in zip(MODELS, files, strict=True)]
        yield merge(f"gradient matching, {what}", io, *weighed, *chosen)
    for method in ("ace", "tsv_m", "iso_c") if size == 0.1 else ():
        yield merge(method, three, "--method", method)._replace(once=True)
    yield merge("ties", three, "--method", "ties")
    yield merge("dare_ties", three, "--method", "dare_ties")
    torch = row("torch, float32 state dicts", [], three, ".safetensors")
    fits = entries * WHOLE_BYTES < memory()
    if fits:
        yield torch._replace(command=[sys.executable, "-c", TORCH, str(torch.out), base, a, b])
    else:
        print(
            f"{size:g} B: too little memory for rows that hold complete models in float32.",
            file=sys.stderr,
        )
    if mergekit is not None:
        models = (base, a, b)
        yield _mergekit_row(row("mergekit task_arithmetic", [], three), {}, mergekit, work, models)
        # As precise inside as ours; the row above is faster, and mergekit's default.
        if fits:
            exact = row("mergekit task_arithmetic, float32", [], three)
            yield _mergekit_row(exact, {}, mergekit, work, models, "float32")
            # Without its command, its graph of tasks and its files: state dicts in memory.
            for inside in ("bfloat16", "float32"):
                name = f"mergekit merge_state_dicts, {inside}"
                api = row(name, [], three, ".safetensors")
                binary = str(mergekit / "bin" / "python")
                command = [binary, "-c", IN_MEMORY, str(api.out), inside, *models]
                yield api._replace(command=command)
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
    """The row with mergekit's command; `inside` is the dtype of its arithmetic."""
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


def install_mergekit(work: Path) -> Path:
    """Install mergekit into its own environment, with the torch that the project is tested with."""
    venv = work / "mergekit"
    if not (venv / "bin" / "mergekit-yaml").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        torch = version("torch").partition("+")[0]
        packages = [f"mergekit=={MERGEKIT}", f"torch=={torch}"]
        subprocess.run([str(venv / "bin" / "pip"), "install", "--quiet", *packages], check=True)
    return venv


def memory() -> int:
    """Bytes of memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
