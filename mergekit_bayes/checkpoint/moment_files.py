"""Which files hold Adam's second moments, as a training leaves them. None of them is opened here.

A precision can be made of such moments (`moments/`), but they are none: their scale is that of the
gradient of one batch. A merge that is given such a file says so, without torch.
"""

import os
import shlex
from pathlib import Path
from typing import Literal, NamedTuple

from mergekit_bayes.checkpoint.layout import set_files
from mergekit_bayes.errors import CheckpointError

METADATA = ".metadata"  # the file in which torch.distributed.checkpoint lists what it wrote
_STEM = "exp_avg_sq"
_STATES = ("optimizer.pt", "optimizer.bin")  # of the Trainer, and of accelerate
_PICKLES = (".pt", ".bin", ".pth")
_SHARDS = ("optimizer_0", "optimizer")  # folders in which FSDP's state is stored
_EXPECTED = (
    "optimizer.pt of the Trainer, optimizer.bin of accelerate, a folder of "
    "torch.distributed.checkpoint (with a file .metadata), or exp_avg_sq.safetensors"
)


class MomentFiles(NamedTuple):
    """Where second moments lie.

    Attributes:
        form: `state`, a pickle of an optimizer's state; `shards`, a folder of
            torch.distributed.checkpoint; or `tensors`, safetensors files of the moments alone.
        path: The pickle, the folder, or the one file or folder of the safetensors files.
        files: The files that are read.
    """

    form: Literal["state", "shards", "tensors"]
    path: Path
    files: tuple[Path, ...]


def find_moments(path: Path) -> MomentFiles:
    """The second moments in a file, or in a checkpoint's folder.

    Raises:
        CheckpointError: There are none, or several.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return MomentFiles("tensors", path, (path,))
        if path.suffix in _PICKLES:
            return MomentFiles("state", path, (path,))
        if path.name == METADATA:
            return _shards(path.parent)
        raise CheckpointError(f"'{path}' holds no state of an optimizer: expected {_EXPECTED}.")
    if not path.is_dir():
        raise CheckpointError(f"'{path}' is not there. Name a file or folder: {_EXPECTED}.")
    if (path / METADATA).is_file():
        return _shards(path)
    found = [MomentFiles("state", p, (p,)) for p in map(path.joinpath, _STATES) if p.is_file()]
    found += [_shards(p) for p in map(path.joinpath, _SHARDS) if (p / METADATA).is_file()]
    if files := set_files(path, _STEM):
        found.append(MomentFiles("tensors", files[0] if len(files) == 1 else path, tuple(files)))
    if len(found) > 1:
        names = " and ".join(one.path.name for one in found)
        raise CheckpointError(f"'{path}' holds {names}. Name one of them.")
    if not found:
        raise CheckpointError(
            f"'{path}' holds no state of an optimizer: expected {_EXPECTED}.{_of_other_kind(path)}"
        )
    return found[0]


def explain_moments(path: Path, ref: str, model: str) -> str | None:
    """Why a file or folder that was given as a precision is none, where it holds moments.

    Args:
        path: The file or folder.
        ref: What the user called it.
        model: The model whose precision it was to be.

    Returns:
        A message with the line that makes a precision of it; None where it is no such file.
    """
    if path.is_dir():
        candidates = [*_STATES, METADATA, *(f"{folder}/{METADATA}" for folder in _SHARDS)]
        candidates += [f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json"]
        is_moments = any((path / name).is_file() for name in candidates)
    else:
        is_pickle = path.suffix in _PICKLES and "optim" in path.name
        is_tensors = path.suffix == ".safetensors" and path.name.startswith(_STEM)
        is_moments = is_pickle or is_tensors or path.name in (METADATA, f"{_STEM}.safetensors")
    if not is_moments:
        return None
    return (
        f"'{ref}' holds an optimizer's second moments, which are no precision until they are "
        "scaled. Make one of them: `bmerge precision "
        f"{shlex.quote(model)} --from {shlex.quote(ref)} --observations N --batch-observations B`, "
        "where N counts the observations of all the data, and B those of one optimizer step."
    )


def _shards(folder: Path) -> MomentFiles:
    files = sorted(p for p in folder.iterdir() if p.suffix == ".distcp" or p.name == METADATA)
    return MomentFiles("shards", folder, tuple(files))


def _of_other_kind(folder: Path) -> str:
    """What else a training has left in a folder, and what can be done with it."""
    names = [p.relative_to(folder).as_posix() for p in folder.glob("*.*")]
    names += [p.relative_to(folder).as_posix() for p in folder.glob("global_step*/*optim_states*")]
    if any("zero_pp_rank" in os.path.basename(name) for name in names):
        return (
            " DeepSpeed ZeRO keeps its moments flat, over all parameters, which is not read: "
            "write them by name with `safetensors` to exp_avg_sq.safetensors."
        )
    if any(name.startswith(("optimizer_", "rank")) and "rank" in name for name in names):
        return (
            " The files of single ranks are not read: save with FSDP's state dict type "
            "SHARDED_STATE_DICT or FULL_STATE_DICT."
        )
    return ""
