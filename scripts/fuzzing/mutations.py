"""Ways to break a file: its bytes, its text, its document, its container, or its place on disk.

Every way takes a file and a source of random numbers, and nothing else decides what it does, so a
case of `scripts/fuzz.py` can be repeated alone. `ways(path)` lists those that fit a file.
"""

import io
import os
import random
import shutil
import socket
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.fuzzing.documents import (
    json_line,
    json_spelling,
    json_values,
    yaml_spelling,
    yaml_values,
)

Bytes = Callable[[bytes, random.Random], bytes]

_ROWS = (".jsonl", ".csv", ".txt", ".parquet")  # rows may be many gigabytes, and are then read
_NAMES = (b"\xff\xfe.json", b"\x1b[31mred.json", b"a\nb.txt", b"a" * 250 + b".json", b"[red]x[.md")


# Bytes


def cut(data: bytes, rng: random.Random) -> bytes:
    """The front of a file."""
    return data[: rng.randrange(len(data) or 1)]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes replaced, often near the front, and often by signs of JSON."""
    changed, edge = bytearray(data), min(len(data), rng.choice((8, 64, len(data))))
    for _ in range(rng.choice((1, 1, 2, 5)) if edge else 0):
        changed[rng.randrange(edge)] = rng.choice((rng.randrange(256), *b'"{}[]:,0-e\\'))
    return bytes(changed)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """A piece cut out, and another put in its place."""
    a, b, c = (rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b : b + rng.randrange(40)] + data[max(a, c - rng.randrange(3)) :]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    """A block of zeros, as a file system leaves after a power cut."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + bytes(len(data[start : start + 512])) + data[start + 512 :]


def extended(data: bytes, rng: random.Random) -> bytes:
    """More bytes at the end."""
    return data + rng.choice((bytes(4096), rng.randbytes(100), data, b"\n", b"\0"))


def swapped(data: bytes, rng: random.Random) -> bytes:
    """The second half first."""
    return data[len(data) // 2 :] + data[: len(data) // 2]


def replaced(data: bytes, rng: random.Random) -> bytes:
    """Nothing, noise, or a file of another format."""
    others = (b"", b"\n", rng.randbytes(300), b"PK\x03\x04" + bytes(60), b"\x80\x02}q\x00.")
    return rng.choice((*others, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"))


BYTES: tuple[Bytes, ...] = (cut, flipped, spliced, zeroed, extended, swapped, replaced)


# Text


def recoded(data: bytes, rng: random.Random) -> bytes:
    """The text in another encoding."""
    text = data.decode(errors="replace") + "é"
    encodings = ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "latin-1", "cp500")
    return text.encode(rng.choice(encodings), errors="replace")


def interrupted(data: bytes, rng: random.Random) -> bytes:
    """Control characters, markup, or a very long line somewhere in the text."""
    pieces = (b"\0", b"\x1b[2J\x1b]8;;http://x\x07", b"\r", b"[bold red]x[/]", b"[/nothing]")
    pieces = (*pieces, b"\xe2\x80\xae", b"\xed\xa0\x80", b"\xff", b"x" * 2_000_000, b"\n" * 10_000)
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(pieces) + data[at:]


TEXT: tuple[Bytes, ...] = (recoded, interrupted)


# Containers


def wrong_length(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file that claims another length of its header."""
    (length,) = struct.unpack("<Q", data[:8])
    near = (0, 1, length - 1, length + 1, length * 2, len(data), len(data) - 8)
    claims = (*near, 1 << 31, 1 << 62, (1 << 64) - 1)
    return struct.pack("<Q", max(rng.choice(claims), 0)) + data[8:]


def rewritten(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is another document."""
    (length,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + length]
    kind = rng.randrange(12)
    text = json_values(header, rng) if kind else json_spelling(header, rng)
    if kind == 1:
        text = recoded(text, rng)
    elif kind == 2:  # a name twice
        text = text[:-1] + b"," + text[1:] if len(text) > 2 else text
    elif kind == 3:
        text = text.replace(b"0", b"9" * rng.choice((20, 400, 5000)), 1)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def rezipped(data: bytes, rng: random.Random) -> bytes:
    """A zip archive, as torch.save writes it, with a member changed or stored in another way."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    names = sorted(members)
    chosen, other = rng.choice(names), rng.choice(names)
    action = rng.randrange(9)
    compression = zipfile.ZIP_STORED
    if action == 0:
        compression = zipfile.ZIP_DEFLATED
    elif action == 1:
        del members[chosen]
    elif action == 2:
        members[chosen + "x"] = members.pop(chosen)
    elif action == 3:
        members[chosen], members[other] = members[other], members[chosen]
    elif action == 4:
        pickles = [n for n in names if n.endswith("data.pkl")]
        members[pickles[0]] = rng.choice(BYTES)(members[pickles[0]], rng)
    elif action == 5:
        members[chosen] = rng.choice(BYTES)(members[chosen], rng)
    elif action == 6:
        members[chosen] = bytes(1 << 28)
        compression = zipfile.ZIP_DEFLATED
    elif action == 7:
        members[next(n for n in names if n.endswith("data.pkl"))] = _RUNS_CODE
    else:
        members = {f"{'x' * 300}/{name.partition('/')[2]}": d for name, d in members.items()}
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return result.getvalue()


_RUNS_CODE = b"cposix\nsystem\n(S'touch ran'\ntR."


def repickled(data: bytes, rng: random.Random) -> bytes:
    """A pickle of other things than a model's tensors."""
    import torch

    warnings.simplefilter("ignore")  # of kinds of tensors that torch gives up
    one = torch.zeros(1)
    contents: tuple[Any, ...] = (
        {"w": one.expand(10**9)},
        {"w": one.as_strided((10**6, 10**6), (0, 0))},
        {"w": torch.arange(6.0).reshape(2, 3).t(), "v": torch.arange(8.0)[::2]},
        {"w": torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.int64), [], (10**12,))},
        {"w": torch.zeros(2, device="meta")},
        {"w": torch.zeros(3, dtype=torch.complex128)},
        {"w": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        {1: one},
        {"": one},
        {"a\n\x1b[2J": one},
        {"x" * 100_000: one},
        {"w": [one]},
        {"model": {"w": one}, "optimizer": {}},
        [one],
        one,
        {},
        {f"w{i}": one for i in range(20_000)},
    )
    if rng.random() < 0.1:
        return _RUNS_CODE
    result = io.BytesIO()
    torch.save(rng.choice(contents), result, _use_new_zipfile_serialization=rng.random() < 0.7)
    return result.getvalue()


# Places on disk


def _without(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def entry(path: Path, rng: random.Random, canary: Path) -> str:
    """Another kind of entry of the file system in place of a file or folder.

    Args:
        path: The file or folder.
        rng: Chooses the kind.
        canary: A file outside whose content no output may hold, with a sibling folder `secrets`.

    Returns:
        The kind.
    """
    kinds = ("missing", "folder", "pipe", "socket", "dangling", "outside", "outside folder", "loop")
    kinds = (*kinds, "mode", "sparse", "zeros", "link within", "odd name", "device")
    kind = rng.choice(kinds)
    if kind == "mode":
        path.chmod(rng.choice((0, 0o444, 0o222)))
        return kind
    if kind == "odd name":
        folder = path if path.is_dir() else path.parent
        with open(bytes(folder) + b"/" + rng.choice(_NAMES), "wb") as file:
            file.write(path.read_bytes() if path.is_file() else b"x")
        return kind
    if kind == "link within":
        inner = path.with_name(f"{path.name}.real")
        path.rename(inner)
        path.symlink_to(inner.name)
        return kind
    _without(path)
    if kind == "folder":
        path.mkdir()
        (path / "x").write_text("x")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            short = Path(f"/tmp/fuzz-{os.getpid()}")  # a socket's path has at most 107 bytes
            listening.bind(str(short))
            short.rename(path) if short.stat().st_dev == path.parent.stat().st_dev else None
            short.unlink(missing_ok=True)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 26 if path.suffix in _ROWS else 10 << 30)
    elif kind != "missing":
        targets = {"dangling": "nowhere", "outside": canary, "loop": path.name}
        targets |= {"outside folder": canary.with_name("secrets"), "zeros": "/dev/zero"}
        path.symlink_to(targets.get(kind, "/dev/stdin"))
    return kind


def ways(path: Path) -> dict[str, tuple[Bytes, ...]]:
    """The ways to change the content of a file, by kind; what fits its format comes first."""
    documents = _DOCUMENTS.get(path.suffix, ())
    if path.suffix == ".md" and not path.read_bytes().startswith(b"---\n"):
        documents = ()
    text = () if path.suffix in (".safetensors", ".posterior", ".bin", ".parquet", ".pt") else TEXT
    found = {"document": documents, "bytes": BYTES, "text": text}
    return {kind: group for kind, group in found.items() if group}


def break_path(path: Path, rng: random.Random, canary: Path) -> str:
    """Break a file or folder in one way; returns which. `canary` is as for `entry`."""
    if path.is_dir() or rng.random() < 0.15:
        return f"entry: {entry(path, rng, canary)}"
    found, share = ways(path), {"document": 6, "bytes": 2, "text": 2}
    kind = rng.choices(list(found), [share[k] for k in found])[0]
    change: Bytes = rng.choice(found[kind])
    data = path.read_bytes()
    try:
        path.write_bytes(change(data, rng))
    except (ValueError, struct.error, zipfile.BadZipFile):  # a merge's scratch has no header yet
        path.write_bytes(spliced(data, rng))
        return f"{kind}: spliced"
    return f"{kind}: {change.__name__}"


_DOCUMENTS: dict[str, tuple[Bytes, ...]] = {
    ".json": (json_values, json_values, json_values, json_spelling),
    ".jsonl": (json_line,),
    ".yaml": (yaml_values, yaml_values, yaml_spelling),
    ".md": (yaml_values, yaml_values, yaml_spelling),
    ".safetensors": (rewritten, rewritten, rewritten, wrong_length),
    ".posterior": (rewritten, rewritten, rewritten, wrong_length),
    ".bin": (rezipped, rezipped, repickled),
    ".pt": (rezipped,),
}
