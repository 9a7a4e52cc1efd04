"""Write a precision beside its mean."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mergekit_bayes.checkpoint.codec import encode, is_bad_precision
from mergekit_bayes.checkpoint.layout import (
    checkpoint_files,
    is_precision_file,
    old_precision_path,
    precision_name,
    precision_path,
    write_precision_index,
)
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.errors import CheckpointError, MismatchError, PrecisionError
from mergekit_bayes.posterior.factors import Directions, Kronecker, LowRank, Matrices, RankOne
from mergekit_bayes.posterior.forms import DirectionsSpec, is_form_of
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.posterior.stored import PRECISION, named, parts_of


class Later(NamedTuple):
    """A precision of one number an entry that is made when it is written, and held no longer.

    Attributes:
        shape: Its shape.
        read: Makes it: a float32 array of that shape.
    """

    shape: tuple[int, ...]
    read: Callable[[], Array]


Precision = Array | RankOne | Directions | Later


def save_posterior(
    model: Path,
    precision: Mapping[str, Precision],
    info: PosteriorInfo,
    *,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Store a precision beside its model, under the model's names and in its shards.

    Args:
        model: The checkpoint, a file or folder; it is not touched.
        precision: float32 arrays under the checkpoint's own tensor names; 1/weight^2, finite and
            >= 0; each in any form of `forms`, of rank one, or symmetric, of directions, or made
            only `Later`. Tensors that were not trained may be absent.
        info: The record, which is stored in every file's header.
        out: Another place: a file that ends in `.posterior` or `.safetensors`, or a folder.
        force: Replace what is there.

    Returns:
        The file or folder written.

    Raises:
        CheckpointError: The model cannot be read, or the target exists or cannot be written.
        MismatchError: A tensor has another name or shape than the model's.
        PrecisionError: An entry is negative or not finite.
    """
    with SafetensorsSource(checkpoint_files(model)) as mean:
        _check_precision(precision, mean, model)
        target = out or precision_path(model)
        old = old_precision_path(model) if out is None else target
        if os.path.lexists(old) and not force:
            raise CheckpointError(f"'{old}' exists. Pass --force to replace it.")
        with replacing(target, force=force) as partial:
            if is_precision_file(target):
                _write_set(partial, precision, info)
            else:
                _write_folder(partial, precision, info, mean)
        if old != target:  # of an earlier version: there would be two
            old.unlink(missing_ok=True)
    return target


def write_info(folder: Path, info: PosteriorInfo) -> None:
    """Write `posterior.json`, the copy of the record that is there to be read by eye."""
    text = info.in_current_format().model_dump_json(indent=2)
    write_own(folder / "posterior.json", text + "\n")


def _check_precision(
    precision: Mapping[str, Precision], mean: SafetensorsSource, model: Path
) -> None:
    for name, values in precision.items():
        spec = mean.specs.get(name)
        if spec is None:
            raise MismatchError(f"precision of '{name}': {model} has no tensor of that name.")
        of_form = DirectionsSpec if isinstance(values, Directions) else TensorSpec
        if not is_form_of(of_form("F32", values.shape), spec):
            raise MismatchError(
                f"precision of '{name}' is {list(values.shape)}, but the tensor in {model} is "
                f"{list(spec.shape)}."
            )
        if isinstance(values, Later):  # looked at when it is there
            continue
        parts = list(parts_of(name, values).values())
        if isinstance(values, (Matrices, Kronecker)):
            parts = [x for p in parts for x in (np.einsum("...ii->...i", p), abs(p))]
        if isinstance(values, LowRank):
            parts = [values.diagonal, abs(values.factor)]
        _refuse_bad(name, parts)


def _refuse_bad(name: str, parts: Sequence[Array]) -> None:
    bad = sum(int(np.count_nonzero(is_bad_precision(part))) for part in parts)
    if bad:
        size = sum(part.size for part in parts)
        raise PrecisionError(
            f"precision of '{name}': {bad} of {size} entries are negative or not finite, and "
            "nothing was stored. Look for NaN in what it was made of, or for counts that are "
            "far too large."
        )


def _write_folder(
    folder: Path,
    precision: Mapping[str, Precision],
    info: PosteriorInfo,
    mean: SafetensorsSource,
) -> None:
    """Write the precision as shards that follow the mean's, with index and record."""
    folder.mkdir()
    groups: dict[int, list[str]] = {}
    for name in precision:
        groups.setdefault(mean.file_of(name), []).append(name)
    count, total_size = len(mean.files), 0
    in_files: dict[str, list[str]] = {}
    for i, names in sorted(groups.items()):
        file = precision_name(i, count)
        parts = _write_set(folder / file, {n: precision[n] for n in names}, info)
        in_files[file] = list(parts)
        total_size += sum(spec.nbytes for spec in parts.values())
    if in_files:
        write_precision_index(folder, in_files, total_size)
    write_info(folder, info)


def _write_set(
    path: Path, precision: Mapping[str, Precision], info: PosteriorInfo
) -> Mapping[str, TensorSpec]:
    """Write one file, and return what is in it."""
    parts: dict[str, Array | Later] = {}
    for name, values in precision.items():
        if isinstance(values, Later):
            parts[named(PRECISION, name)] = values
        else:
            parts |= parts_of(name, values)
    specs = {name: TensorSpec("F32", part.shape) for name, part in parts.items()}
    with SafetensorsSink(path, specs, info.to_metadata()) as sink:
        for name, part in parts.items():
            sink.write_bytes(name, 0, _encoded(name, part))
    return specs


def _encoded(name: str, part: Array | Later) -> memoryview:
    """The bytes of a tensor of the file; one that is made now has not been looked at yet."""
    if isinstance(part, Later):
        part = part.read()
        _refuse_bad(name, [part])
    return encode(part.reshape(-1), "F32")
