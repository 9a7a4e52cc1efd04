"""Content hashes of tensors, checkpoints and files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import TensorSource


def files_identity(files: Sequence[Path]) -> str:
    source = SafetensorsSource(files)
    try:
        return identity(source)
    finally:
        source.close()


def checkpoint_identity(path: Path) -> str:
    source = SafetensorsSource(checkpoint_files(path))
    try:
        return identity(source)
    finally:
        source.close()


_BLOCK, _BLOCKS = 4096, 16  # identity: sixteen blocks a tensor


def block_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of sixteen 4-KiB blocks spread over a tensor's bytes (all of a small one's)."""
    nbytes = source.specs[name].nbytes
    digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
    if nbytes <= _BLOCK * _BLOCKS:
        starts = range(0, nbytes, _BLOCK)
    else:
        starts = [(nbytes - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]  # type: ignore[assignment]
    for start in starts:
        out = memoryview(buffer)[: min(_BLOCK, nbytes - start)]
        source.read_bytes(name, start, out)
        digest.update(out)
    return digest.digest()


def full_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of all of a tensor's bytes."""
    nbytes, step = source.specs[name].nbytes, 1 << 20
    digest, buffer = hashlib.sha256(), bytearray(step)
    for start in range(0, nbytes, step):
        out = memoryview(buffer)[: min(step, nbytes - start)]
        source.read_bytes(name, start, out)
        digest.update(out)
    return digest.digest()


def identity(source: TensorSource, *, full: bool = False) -> str:
    """Who these tensors are: SHA-256 over each one's name, dtype, shape and content, in order of
    name.

    Content is sixteen 4-KiB blocks a tensor, or all of it if `full`. Independent of sharding.
    """
    content = full_hash if full else block_hash
    digest = hashlib.sha256()
    for name in sorted(source.specs):
        spec = source.specs[name]
        digest.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0".encode())
        digest.update(content(source, name))
    return digest.hexdigest()
