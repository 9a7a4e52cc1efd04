"""What a file that is not safetensors really is, judged by its first bytes.

A file may have the name `model.safetensors` and hold something else: the pointer that Git LFS
leaves in its place, a web page, a pickle. The reader then meets a header that makes no sense, and
this module says why and what to do.
"""

import os
import shlex
from pathlib import Path

from mergekit_bayes.errors import CheckpointError, shown

HEAD = 512  # bytes from which a file's kind is judged; a tar archive names itself at byte 257

_LFS, _ANNEX = b"version https://git-lfs.github.com/spec/", b"/annex/objects/"
_FETCH = "Fetch the file itself"

# First bytes, what such a file is, and what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file of llama.cpp", "Use the safetensors of the model it was made from."),
    (b"\x1f\x8b", "compressed by gzip", "Unpack it with `gunzip`."),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "Unpack it with `unzstd`."),
    (b"\xfd7zXZ\x00", "compressed by xz", "Unpack it with `unxz`."),
    (b"BZh", "compressed by bzip2", "Unpack it with `bunzip2`."),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it."),
    (
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras and TensorFlow write it",
        "Load the model with the library that wrote it, and save it as safetensors.",
    ),
    (
        b"\x93NUMPY",
        "an array of numpy",
        "Save the model with `save_pretrained` or `safetensors.numpy.save_file`.",
    ),
)

_DOWNLOADS = ".cache/huggingface/download"  # where the Hub's client keeps what is not complete
# Endings that downloaders give to files that are not complete.
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")


def explain_foreign(head: bytes, size: int, path: Path) -> str | None:
    """What a file is that cannot be read as safetensors, and what to do.

    Args:
        head: Its first bytes, up to `HEAD`.
        size: Its size in bytes.
        path: The file, for the command that converts it.

    Returns:
        Sentences to follow the path and a colon; None if the first bytes are of no known kind.
    """
    if size == 0:
        return f"is empty: a download or a copy that did not finish. {_FETCH} again."
    if reason := explain_stand_in(head):
        return reason
    if head.startswith(b"PK\x03\x04"):
        return _explain_zip(head, path)
    # Protocol 2 and later begin with 0x80; older ones are text.
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "is a pickle. Load it with `torch.load(FILE, weights_only=True)` and save it with "
            "`safetensors.torch.save_file`."
        )
    for magic, kind, way_out in _MAGIC:
        if head.startswith(magic):
            return f"is {kind}, not safetensors. {way_out}"
    if head[257:262] == b"ustar":
        return "is a tar archive, not safetensors. Unpack it with `tar -xf`."
    if size >= 8 and _is_text(head):
        text = head.lstrip()
        kind = "JSON" if text[:1] in (b"{", b"[") else "a text"
        line = text.splitlines()[0][:80].decode(errors="replace") if text else ""
        # A link may lead to a key or a token, which is not for the log of a job.
        quoted = "" if path.is_symlink() else f"; it begins with {shown(line)}"
        return f"is {kind}, not safetensors{quoted}. {_FETCH}."
    if size >= 8 and not any(head):
        return (
            f"begins with {len(head)} bytes of zeros: a downloader reserved the space and did not "
            f"finish. {_FETCH} again."
        )
    return None


def explain_stand_in(head: bytes) -> str | None:
    """What a server or a version control system left in a file's place; None for anything else.

    Args:
        head: The first bytes of a file of any kind.
    """
    if reason := explain_pointer(head):
        return reason
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:15].lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return (
            "is a web page, not the file itself: the server answered with an error or a login "
            f"page, and that was saved. {_FETCH}, for example with `hf download`, after `hf auth "
            "login` if it is gated."
        )
    return None


def explain_pointer(head: bytes) -> str | None:
    """What a version control system left in a file's place; None for anything else.

    Args:
        head: The first bytes of a file of any kind.
    """
    if _ANNEX in head and len(head) < HEAD:
        return "is a pointer of git-annex, not the file itself. Get it with `git annex get`."
    if not head.startswith(_LFS):
        return None
    sizes = [line[5:] for line in head.splitlines() if line.startswith(b"size ")]
    size = f" (of {int(sizes[0]):,} bytes)" if sizes and sizes[0].isdigit() else ""
    return (
        f"is a Git LFS pointer, not the file itself{size}: the repository was cloned without Git "
        "LFS. Get the file with `git lfs install` and `git lfs pull` in that clone, or with "
        "`hf download REPOSITORY`."
    )


def explain_missing(folder: Path) -> str | None:
    """Why a folder holds no checkpoint of the usual names, if its content shows it.

    Args:
        folder: A folder without `model.safetensors`, its index, or an adapter's.

    Returns:
        Sentences to follow the folder's name; None if its content shows nothing.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    names = _names(folder)
    for name in names:
        file = folder / name
        is_broken = os.path.islink(file) and not os.path.exists(file)
        if is_broken and name.endswith((".safetensors", ".index.json")):
            target = os.readlink(file)
            return f"holds {name}, a link to {target}, which is not there. {_FETCH} again."
    if unfinished := explain_unfinished(folder):
        return f"holds {unfinished}"
    if others := [name for name in names if name.endswith(".safetensors")]:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        return (
            f"holds {others[0]}{more}, but no model.safetensors. If this one file is the model, "
            "name the file itself."
        )
    if any(name.endswith(".distcp") or name == "pytorch_model_fsdp_0" for name in names):
        return (
            "holds a sharded training checkpoint of PyTorch (.distcp). Merge its shards with "
            "`accelerate merge-weights`."
        )
    if "zero_to_fp32.py" in names:
        return (
            "holds a training checkpoint of DeepSpeed. Build the model from it: `python "
            "zero_to_fp32.py . OUT --safe_serialization` in that folder."
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return f"holds {gguf[0]}, of llama.cpp. Use the safetensors of the model it was made from."
    for name in ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index"):
        if name in names:
            return (
                f"holds {name}, of TensorFlow or JAX. Load it with the library that wrote it, and "
                "save it as safetensors."
            )
    return None


def explain_unfinished(folder: Path) -> str | None:
    """What a downloader has not finished, in a folder or in the cache within it, and what to do.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    waiting = [name for name in _names(folder) if name.endswith(_UNFINISHED)]
    cache = folder / _DOWNLOADS
    # Not through a link, which could lead to any number of files.
    if not waiting and os.path.realpath(cache) == f"{os.path.realpath(folder)}/{_DOWNLOADS}":
        waiting = sorted(str(p.relative_to(folder)) for p in cache.rglob("*.incomplete"))
    if not waiting:
        return None
    return (
        f"a download that did not finish ({waiting[0]}). Run the same download again; it goes on "
        "where it stopped."
    )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}).") from None


def is_unfinished(path: Path) -> bool:
    """Whether a file's ending says that its download is not complete."""
    return path.name.endswith(_UNFINISHED)


def _explain_zip(head: bytes, path: Path) -> str:
    # torch.save writes `NAME/data.pkl` first.
    if b"data.pkl" in head:
        return f"is a pickle of PyTorch (a zip archive). {_convert(path)}"
    return "is a zip archive, not safetensors. Unpack it with `unzip`."


def _convert(path: Path) -> str:
    renamed = path.with_suffix(".bin")
    return (
        f"Rename it and convert it: `mv {shlex.quote(str(path))} {shlex.quote(str(renamed))}`, "
        f"then `bmerge convert {shlex.quote(str(renamed))} -o {shlex.quote(str(path))}`."
    )


def _is_text(head: bytes) -> bool:
    """Whether the bytes are printable, in UTF-8 that may be cut at the end."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:
            return False
        text = head[: error.start].decode()
    return bool(text) and all(c.isprintable() or c.isspace() for c in text)
