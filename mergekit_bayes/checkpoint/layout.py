"""Which files of a folder hold its tensors, which hold their precision, and shard indexes."""

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from mergekit_bayes.checkpoint.foreign import (
    HEAD,
    explain_missing,
    explain_stand_in,
    explain_unfinished,
    is_unfinished,
)
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.documents import parse_json, read_bytes
from mergekit_bayes.errors import CheckpointError, shown

POSTERIOR_FOLDER = "posterior"  # in a model's folder
POSTERIOR_ENDING = ".posterior"  # of a safetensors file that no loader takes for weights
PRECISION_INDEX, PRECISION_KEY = "precision.index.json", "tensors"
_WEIGHT_MAP = "weight_map"
_STEMS = ("model", "adapter_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_KINDS = {
    ".gguf": "a GGUF file of llama.cpp, and not",
    POSTERIOR_ENDING: "the precision of a model, and not",
}


def checkpoint_files(path: Path, ref: str | None = None) -> list[Path]:
    """The safetensors files of a model: the file itself, or a folder's single file or shards.

    Args:
        path: A file or folder.
        ref: What messages call it; the path by default.

    Raises:
        CheckpointError: There is no safetensors file, or an index and its shards disagree.
    """
    ref = ref or str(path)
    convert = f"Convert it to safetensors first: `bmerge convert {shlex.quote(ref)} -o "
    if path.is_file():
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"'{ref}' is a pickle, which is not read here. {convert}OUT.safetensors`."
            )
        if is_unfinished(path):
            raise CheckpointError(
                f"'{ref}' is a download that did not finish. Run the same download again; it goes "
                "on where it stopped."
            )
        if path.suffix != ".safetensors":
            kind = _OTHER_KINDS.get(path.suffix, "not")
            raise CheckpointError(
                f"'{ref}' is {kind} a .safetensors file. Name one, or a folder that "
                "save_pretrained wrote."
            )
        return [path]
    for stem in _STEMS:
        if files := set_files(path, stem):
            return files
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"):
        if os.path.exists(path / name):
            raise CheckpointError(
                f"'{ref}' holds its tensors in pickles ({name}), which are not read here. "
                f"{convert}OUT`."
            )
    if path.is_dir() and (reason := explain_missing(path)):
        raise CheckpointError(f"'{ref}' {reason}")
    raise CheckpointError(
        f"'{ref}' holds neither model.safetensors nor model.safetensors.index.json. "
        "Name a .safetensors file or a folder that save_pretrained wrote."
        + (
            f" If its tensors are in pickles: `bmerge convert {ref} -o OUT`."
            if is_hub_id(ref)
            else ""
        )
    )


def precision_files(path: Path) -> list[Path]:
    """The files of a model's own precision; empty if it has none.

    Raises:
        CheckpointError: There are two precisions, or an index and its files disagree.
    """
    if path.is_file():
        siblings = [p for p in (precision_path(path), old_precision_path(path)) if p.exists()]
        if len(siblings) > 1:
            raise _stale(path.parent, *siblings)
        if siblings or path.stem not in _STEMS:
            return siblings
        path = path.parent  # the single file of a model folder
    return precision_set(path / POSTERIOR_FOLDER)


def precision_path(model: Path) -> Path:
    """Where a model's precision belongs.

    `X.posterior` beside the file `X.safetensors`, the folder `posterior` in a folder.
    """
    if model.suffix == ".safetensors":
        return model.with_suffix(POSTERIOR_ENDING)
    return model / POSTERIOR_FOLDER


def old_precision_path(model: Path) -> Path:
    """Where earlier versions put it, as far as that is another place: beside a file."""
    if model.suffix == ".safetensors":
        return model.with_name(f"{model.stem}.precision.safetensors")
    return precision_path(model)


def is_precision_file(path: Path) -> bool:
    """Whether an output of this name is one file of a precision, and not a folder of them."""
    return path.suffix in (POSTERIOR_ENDING, ".safetensors")


def precision_set(folder: Path) -> list[Path]:
    """The files of the precision that lies in this folder itself; empty if there is none.

    The index names them. A single file is read without one, and so is the layout of earlier
    versions, `precision.safetensors` or its shards with their index.

    Raises:
        CheckpointError: There are two precisions, shards without an index, or an index and its
            files disagree.
    """
    index, single = folder / PRECISION_INDEX, folder / precision_name(0, 1)
    old = set_files(folder, "precision")
    if not os.path.lexists(index):
        files = [_finished(single)] if os.path.exists(single) else []
        if not files and (shards := sorted(folder.glob(f"precision-*{POSTERIOR_ENDING}"))):
            raise CheckpointError(
                f"{folder}: holds {shards[0].name} and no {index.name}, which names all files of "
                "the precision. Fetch it, too."
            )
    else:
        files = _indexed(index, PRECISION_KEY)
    if files and old:
        raise _stale(folder, files[0], old[0])
    return files or old


def precision_name(index: int, count: int) -> str:
    """File name of file `index` (from 0) of a precision of `count` files, in its folder."""
    return _numbered("precision", index, count) + POSTERIOR_ENDING


def write_precision_index(folder: Path, files: Mapping[str, list[str]], total_size: int) -> None:
    """Write the index of a precision, which there is for one file, too.

    It has other keys than a model's, which no loader can take it for.

    Args:
        folder: Where the files are.
        files: The tensors' names, as they are in the files, by file name.
        total_size: Bytes of all tensors.
    """
    _write_index(folder / PRECISION_INDEX, PRECISION_KEY, files, total_size)


def set_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of the set `stem` in a folder: its single file or its shards.

    Returns:
        The files; empty if the folder holds no such set.

    Raises:
        CheckpointError: There are both a single file and an index, or the index and its shards
            disagree.
    """
    index = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not os.path.lexists(index):
        return [_finished(single)] if os.path.exists(single) else []
    if os.path.exists(single):
        raise _stale(folder, single, index)
    return _indexed(index, _WEIGHT_MAP)


def _indexed(index: Path, key: str) -> list[Path]:
    """The files that an index names, compared with it name by name."""
    file_of = read_index(index, key)
    files = [_finished(index.parent / name) for name in sorted(set(file_of.values()))]
    with SafetensorsSource(files) as source:
        stored = {name: files[source.file_of(name)].name for name in source.specs}
    check_index(index, file_of, stored)
    return files


def _stale(folder: Path, one: Path, other: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder}: holds both {one.name} and {other.name}. Remove the stale one, or name a file."
    )


def _finished(file: Path) -> Path:
    """The file; an error if aria2 keeps a record of what of it is still to come.

    aria2 gives an unfinished file its name and size, with zeros where nothing has arrived.
    """
    if os.path.exists(f"{file}.aria2"):
        raise CheckpointError(
            f"{file}: aria2 has not finished its download ({file.name}.aria2 is beside it). Run "
            "the same download again; it goes on where it stopped."
        )
    return file


def shard_name(stem: str, index: int, count: int) -> str:
    """File name of shard `index` (from 0) of a set of `count` shards called `stem`."""
    return _numbered(stem, index, count) + ".safetensors"


def _numbered(stem: str, index: int, count: int) -> str:
    return stem if count == 1 else f"{stem}-{index + 1:05d}-of-{count:05d}"


def write_index(folder: Path, stem: str, shards: Mapping[str, list[str]], total_size: int) -> None:
    """Write a shard index as save_pretrained does.

    Args:
        folder: Where the shards are.
        stem: What the set is called, such as `model`.
        shards: The tensors' names by file name.
        total_size: Bytes of all tensors.
    """
    _write_index(folder / f"{stem}.safetensors.index.json", _WEIGHT_MAP, shards, total_size)


def _write_index(index: Path, key: str, files: Mapping[str, list[str]], total_size: int) -> None:
    file_of = {name: file for file, names in files.items() for name in names}
    content = {"metadata": {"total_size": total_size}, key: dict(sorted(file_of.items()))}
    write_own(index, json.dumps(content, indent=2) + "\n")


def read_index(index: Path, key: str = _WEIGHT_MAP) -> dict[str, str]:
    """Read an index: which file of the same folder holds which tensor.

    Args:
        index: The index file.
        key: The key of the map in it.

    Raises:
        CheckpointError: It is not such a map, or names a file elsewhere or one that is missing.
    """
    try:
        if not index.is_file():
            raise ValueError("it is not a file")
        text = read_bytes(index)
        if stand_in := explain_stand_in(text[:HEAD]):
            raise CheckpointError(f"{index}: {stand_in}")
        content = parse_json(text, strict=True)
        weight_map = content.get(key) if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has none")
        for name, file in weight_map.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or file in ("", ".", "..")
                or "\0" in file
            ):
                raise ValueError(f"{shown(name)} is in {shown(file)}, which is no file name")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{index}: is not an index with a {key} of file names beside it ({reason}). Fetch "
            "it again."
        ) from None
    for name in sorted(set(weight_map.values())):
        if not os.path.exists(index.parent / name):
            unfinished = explain_unfinished(index.parent)
            way_out = f"There is {unfinished}" if unfinished else "Fetch the missing shards."
            raise CheckpointError(f"{index}: names {shown(name)}, which is not there. {way_out}")
    return weight_map


def check_index(index: Path, weight_map: Mapping[str, str], stored: Mapping[str, str]) -> None:
    """Compare an index with its shards, name by name.

    Args:
        index: The index file, for messages.
        weight_map: File name by tensor, as the index has it.
        stored: File name by tensor, as the shards' headers have it.

    Raises:
        CheckpointError: The two disagree; the message names a tensor and its shard.
    """
    lost = [name for name in weight_map if name not in stored]
    if lost and len(lost) < len(weight_map):
        raise CheckpointError(
            f"{index}: says that {shown(lost[0])} is in {shown(weight_map[lost[0]])}, but that "
            f"file does not hold it, and no other shard does ({len(lost)} such). Fetch the shards "
            "again. If they are the same then, the index is wrong as published: take these names "
            "out of its map."
        )
    for name, file in weight_map.items():
        if stored.get(name) != file:
            instead = f"; {shown(stored[name])} does" if name in stored else ""
            raise CheckpointError(
                f"{index}: says that {shown(name)} is in {shown(file)}, but that file does not "
                f"hold it{instead}. Index and shards are of two savings; fetch them again."
            )
    for name, file in stored.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{index}: does not list {shown(name)}, which {shown(file)} holds. Index and "
                "shards are of two savings; fetch them again."
            )
