"""Content hashes: of a tensor, of a set of tensors, of a checkpoint, and of any file or folder."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.specs import TensorSource
from mergekit_bayes.documents import DocumentError, open_regular
from mergekit_bayes.errors import CheckpointError

_BLOCK, _BLOCKS = 4096, 16  # bytes of a block, blocks of a tensor
_STEP = 1 << 20  # bytes read at a time where all of a tensor is hashed


def identity(source: TensorSource, *, full: bool = False, but: Collection[str] = ()) -> str:
    """Content hash of a set of tensors: SHA-256 over name, dtype, shape and content, by name.

    It does not depend on how the tensors are sharded.

    Args:
        source: The tensors.
        full: Hash all bytes instead of sixteen 4-KiB blocks of each tensor.
        but: Names of tensors to leave out.
    """
    content = full_hash if full else block_hash
    digest = hashlib.sha256()
    for name in sorted(source.specs.keys() - set(but)):
        spec = source.specs[name]
        digest.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0".encode())
        digest.update(content(source, name))
    return digest.hexdigest()


def files_identity(files: Sequence[Path]) -> str:
    """`identity` of the tensors in safetensors files, by sampled blocks."""
    with SafetensorsSource(files) as source:
        return identity(source)


def checkpoint_identity(path: Path) -> str:
    """`identity` of the tensors of a model file or folder, by sampled blocks."""
    return files_identity(checkpoint_files(path))


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes; of a folder, of the names and hashes of all files below it.

    Raises:
        CheckpointError: A file cannot be read, or is none.
    """
    if path.is_dir():
        files = (f for f in sorted(path.rglob("*")) if f.is_file())
        hashes = [(str(f.relative_to(path)), content_hash(f)) for f in files]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, DocumentError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read ({reason}).") from None


def block_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of sixteen 4-KiB blocks spread over a tensor's bytes; of all bytes if it is small."""
    nbytes = source.specs[name].nbytes
    starts: Sequence[int]
    if nbytes <= _BLOCK * _BLOCKS:
        starts = range(0, nbytes, _BLOCK)
    else:
        starts = [(nbytes - _BLOCK) * i // (_BLOCKS - 1) for i in range(_BLOCKS)]
    return _hash_pieces(source, name, starts, _BLOCK)


def full_hash(source: TensorSource, name: str) -> bytes:
    """SHA-256 of all of a tensor's bytes."""
    return _hash_pieces(source, name, range(0, source.specs[name].nbytes, _STEP), _STEP)


def _hash_pieces(source: TensorSource, name: str, starts: Sequence[int], size: int) -> bytes:
    """SHA-256 of the pieces of `size` bytes that start at these bytes; the last may be shorter."""
    nbytes = source.specs[name].nbytes
    digest, buffer = hashlib.sha256(), bytearray(size)
    for start in starts:
        piece = memoryview(buffer)[: min(size, nbytes - start)]
        source.read_bytes(name, start, piece)
        digest.update(piece)
    return digest.digest()
