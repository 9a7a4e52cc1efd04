"""What a case of `scripts/fuzz.py` comes to: the kinds of good and bad ends."""

import hashlib
import json
import os
import stat
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors

from scripts.fuzzing.lines import Line, side_file
from scripts.fuzzing.stage import CEILING, LARGEST, Hang, Ran
from scripts.fuzzing.world import CANARY

if TYPE_CHECKING:
    import torch

GOOD = ("done", "refused")
BAD = (
    "traceback",
    "hang",
    "half output",
    "wrong",
    "input changed",
    "canary",
    "memory",
    "disk",
    "leak",
    "terminal",
    "message",
)
MEMORY = 500 << 20  # bytes above what the same line takes on good files
_ENDINGS = (".safetensors", ".posterior")  # of files of tensors
_LONGEST = 4000  # characters of a message
_READ = 32 << 20  # bytes of a file that are compared; of larger ones size and time are

Snapshot = dict[str, tuple[object, ...]]


@dataclass(frozen=True)
class Verdict:
    """The kind of a case's end, why, and for a traceback where it came from."""

    kind: str
    why: str = ""
    group: str = ""


def snapshot(folder: Path) -> Snapshot:
    """Every entry below a folder: its kind and mode, and its content."""
    found: Snapshot = {}
    for path in sorted(Path(os.fsdecode(bytes(folder))).rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            small = status.st_size <= _READ
            content = hashlib.sha256(path.read_bytes()).digest() if small else status.st_mtime_ns
        found[str(path.relative_to(folder))] = (status.st_mode, content)
    return found


def tensors(out: Path) -> dict[str, str]:
    """A digest of each tensor of an output, by file and name; all of it must be readable.

    Raises:
        ValueError: A file of the output is missing or cannot be read.
    """
    files = [out] if out.is_file() else sorted(f for e in _ENDINGS for f in out.rglob(f"*{e}"))
    for index in sorted(out.rglob("*.index.json")) if out.is_dir() else []:
        if "bin" not in index.name:
            content = json.loads(index.read_text())
            for name in content.get("weight_map", content.get("tensors")).values():
                if not (index.parent / name).is_file():
                    raise ValueError(f"{index.name} names '{name}', which is not there")
    found = {}
    for file in files:
        try:
            stored = safetensors.deserialize(file.read_bytes())
        except Exception as error:
            raise ValueError(f"{file.name}: {error}") from None
        for name, tensor in stored:
            about = f"{tensor['dtype']} {tensor['shape']} ".encode()
            place = f"{file.relative_to(out)}/{name}"
            found[place] = hashlib.sha256(about + bytes(tensor["data"])).hexdigest()
    return found


def judge(
    line: Line,
    ran: Ran,
    folder: Path,
    before: Snapshot,
    good: "Good | None" = None,
    broken: str = "",
) -> Verdict:
    """The verdict of a case.

    Args:
        line: The line.
        ran: What it did.
        folder: Where it ran.
        before: The folder before it ran.
        good: What the line does on good files; None if this is that run.
        broken: The file that was broken.
    """
    if isinstance(ran.error, Hang):
        return Verdict("hang", f"over {ran.seconds:.0f} s at {_place(ran.error)}")
    if isinstance(ran.error, MemoryError):
        return Verdict("memory", f"over {CEILING >> 20:,} MiB at {_place(ran.error)}")
    if ran.error is not None:
        return Verdict("traceback", _last_line(ran.error), _group(ran.error))
    if "Traceback (most recent" in ran.err or "Exception ignored" in ran.err:
        text = " | ".join(ran.err.strip().splitlines()[-3:])
        return Verdict("traceback", text[-300:], "printed by a thread or a library")
    if ran.code not in (0, 2):
        return Verdict("traceback", f"exit code {ran.code}: {ran.err[-300:]}")
    after = snapshot(folder)
    refused = ran.code == 2
    checks = (
        _message(ran) if refused else None,
        _terminal(ran),
        _left(line, folder, before, after, refused, broken),
        _changed(line, folder, before, after),
        _canary(ran, folder, before, after),
        None if refused else _output(line, folder, good, broken),
        _spent(line, ran, good),
    )
    return next((v for v in checks if v is not None), Verdict("refused" if refused else "done"))


@dataclass(frozen=True)
class Good:
    """What a line does on good files: its peak of memory, digests of its tensors, what it reads."""

    grown: int
    tensors: dict[str, str]
    files: list[str]


def _is_message(line: str) -> bool:
    name = line.partition(": ")[0]
    return name.isidentifier() and name.endswith("Error")


def _message(ran: Ran) -> Verdict | None:
    lines = ran.err.strip().splitlines()
    starts = [number for number, line in enumerate(lines) if _is_message(line)]
    text = "\n".join(lines[starts[0] :]) if starts else ran.err
    # Settings that are wrong are named all at once, a line each.
    if len(starts) != 1 or (len(lines) > starts[0] + 1 and not text.startswith("ConfigError")):
        return Verdict("message", f"{len(starts)} messages: {text[-300:]!r}")
    if len(text) > _LONGEST:
        return Verdict("message", f"{len(text):,} characters: {text[:200]!r}")
    return None


def _terminal(ran: Ran) -> Verdict | None:
    for line in ran.err.split("\n"):  # stdout is no terminal here, and a card goes there as it is
        signs = {s for s in line if s != "\t" and not s.isprintable()}
        # Bars of libraries go back to the start of their line.
        if signs - {"\r"} or (signs and _is_message(line)):
            return Verdict("terminal", f"{sorted(signs)!r} in {line[:200]!r}")
    return None


def _under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(f"{root}/") for root in roots)


def _left(
    line: Line, folder: Path, before: Snapshot, after: Snapshot, refused: bool, broken: str
) -> Verdict | None:
    new = [name for name in after if name not in before]
    out = (line.out,) if line.out else ()
    if refused:
        odd = [n for n in new if not _under(n, line.kept)]
        if any(_under(n, out) and after.get(n) != entry for n, entry in before.items()):
            odd.append(f"{line.out} (changed)")
        return Verdict("half output", f"left {odd[:4]} after {refused=}") if odd else None
    # What a merge of files writes has names that begin with the output's.
    stem = line.out.partition(".")[0] if line.out else "\0"
    linked = _real_names(folder, line.kept)
    odd = [
        n
        for n in new
        if not (n.startswith(stem) or _under(n, linked))
        or _under(n, tuple(f"{o}.partial" for o in out))
    ]
    if line.out and not (folder / line.out).exists():
        if broken.endswith(".yaml"):  # the settings name another output now
            odd = [n for n in odd if n.startswith(".") or ".partial" in n]
        else:
            odd.append(f"no {line.out}")
    return Verdict("half output", f"{odd[:4]} after exit 0") if odd else None


def _real_names(folder: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Where outputs really lie: a folder may be a link of the user's to another one here."""
    return tuple(os.path.relpath(os.path.realpath(folder / name), folder) for name in names)


def _changed(line: Line, folder: Path, before: Snapshot, after: Snapshot) -> Verdict | None:
    own = (*line.kept, *((line.out,) if line.out else ()))
    own += _real_names(folder, own)
    changed = [n for n, e in before.items() if after.get(n) != e and not _under(n, own)]
    return Verdict("input changed", f"{changed[:4]}") if changed else None


def _canary(ran: Ran, folder: Path, before: Snapshot, after: Snapshot) -> Verdict | None:
    if CANARY in ran.out or CANARY in ran.err:
        return Verdict("canary", "printed")
    for name in after:
        path = folder / name
        if name not in before and not path.is_symlink() and path.is_file():
            with path.open("rb") as file:
                if CANARY.encode() in file.read(_READ):
                    return Verdict("canary", f"in {name}")
        elif name not in before and path.is_symlink():
            return Verdict("canary", f"{name} is a link to {os.readlink(path)}")
    return None


def _output(line: Line, folder: Path, good: Good | None, broken: str) -> Verdict | None:
    if line.out is None or line.out in line.kept:
        return None
    try:
        found = tensors(folder / line.out)
    except (ValueError, OSError) as error:
        return Verdict("half output", str(error)[:300])
    if good is None or not line.weights:
        return None
    if side_file(broken) and found != good.tensors:
        return Verdict("wrong", "other tensors than those of the good line")
    if line.name.startswith("convert") and broken.endswith(".bin"):
        same = found == good.tensors
        return None if same else _as_torch_reads(line, folder)
    return None


def _as_torch_reads(line: Line, folder: Path) -> Verdict | None:
    """Compare what was converted with what torch itself reads; a tied name is stored once."""
    import torch
    from safetensors.torch import load_file

    theirs: dict[str, torch.Tensor] = {}
    for file in sorted((folder / line.needs[0]).glob("*.bin")):
        try:
            theirs |= torch.load(file, weights_only=True)
        except Exception as error:
            return Verdict("wrong", f"torch does not read {file.name}: {str(error)[:200]}")
    out = folder / str(line.out)
    ours: dict[str, torch.Tensor] = {}
    for file in [out] if out.is_file() else out.glob("*.safetensors"):
        ours |= load_file(file)
    for name, tensor in ours.items():
        same = name in theirs and tensor.dtype == theirs[name].dtype
        if not same or not torch.equal(_bits(tensor), _bits(theirs[name])):
            return Verdict("wrong", f"{name} is not what torch reads")
    return None


def _bits(tensor: "torch.Tensor") -> "torch.Tensor":
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _spent(line: Line, ran: Ran, good: Good | None) -> Verdict | None:
    if "File too large" in ran.err:
        return Verdict("disk", f"over {LARGEST >> 20} MiB")
    if good is not None and ran.grown > good.grown + MEMORY:
        return Verdict("memory", f"{(ran.grown - good.grown) >> 20:,} MiB above the good line")
    if good is not None and ran.opened and not line.hub:  # the client keeps its connections
        return Verdict("leak", f"{ran.opened} files left open")
    return None


def _last_line(error: BaseException) -> str:
    return " ".join(traceback.format_exception_only(error)[-1].split())[:300]


def _frames(error: BaseException) -> list[traceback.FrameSummary]:
    frames = traceback.extract_tb(error.__traceback__)
    return [frame for frame in frames if Path(frame.filename).parent.name != "fuzzing"]


def _ours(frame: traceback.FrameSummary) -> bool:
    return "mergekit_bayes" in frame.filename or "bmerge_cli" in frame.filename


def _place(error: BaseException) -> str:
    frames = [f for f in _frames(error) if _ours(f)] or _frames(error)
    if not frames:
        return "?"
    inner, last = frames[-1], _frames(error)[-1]
    beyond = "" if inner is last else f" > {Path(last.filename).name}:{last.name}"
    return f"{'/'.join(Path(inner.filename).parts[-2:])}:{inner.lineno} {inner.name}{beyond}"


def _group(error: BaseException) -> str:
    return f"{type(error).__name__} at {_place(error)}"
