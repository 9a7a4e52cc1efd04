"""Write a precision beside its mean."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import encode, is_bad_precision
from mergekit_bayes.checkpoint.layout import (
    checkpoint_files,
    precision_path,
    shard_name,
    write_index,
)
from mergekit_bayes.checkpoint.own_files import write_own
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior.forms import is_form_of
from mergekit_bayes.posterior.info import PosteriorInfo


def save_posterior(
    model: Path,
    precision: Mapping[str, Array],
    info: PosteriorInfo,
    *,
    out: Path | None = None,
    force: bool = False,
) -> Path:
    """Store a precision beside its model, with the model's names, shapes and shards.

    Args:
        model: The checkpoint, a file or folder; it is not touched.
        precision: float32 arrays under the checkpoint's own tensor names, in any form; 1/weight^2,
            finite and >= 0. Tensors that were not trained may be absent.
        info: The record, which is stored in every file's header.
        out: Another place: a `.safetensors` file, or a folder.
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
        with replacing(target, force=force) as partial:
            if target.suffix == ".safetensors":
                _write_set(partial, precision, info)
            else:
                _write_folder(partial, precision, info, mean)
    return target


def write_info(folder: Path, info: PosteriorInfo) -> None:
    """Write `posterior.json`, the copy of the record that is there to be read by eye."""
    write_own(folder / "posterior.json", info.model_dump_json(indent=2) + "\n")


def _check_precision(precision: Mapping[str, Array], mean: SafetensorsSource, model: Path) -> None:
    for name, values in precision.items():
        spec = mean.specs.get(name)
        if spec is None:
            raise MismatchError(f"precision of '{name}': {model} has no tensor of that name.")
        if not is_form_of(TensorSpec("F32", values.shape), spec):
            raise MismatchError(
                f"precision of '{name}' is {list(values.shape)}, but the tensor in {model} is "
                f"{list(spec.shape)}."
            )
        bad = int(np.count_nonzero(is_bad_precision(values)))
        if bad:
            raise PrecisionError(
                f"precision of '{name}': {bad} of {values.size} entries are negative or not finite."
            )


def _write_folder(
    folder: Path, precision: Mapping[str, Array], info: PosteriorInfo, mean: SafetensorsSource
) -> None:
    """Write the precision as shards that follow the mean's, with index and record."""
    folder.mkdir()
    groups: dict[int, list[str]] = {}
    for name in precision:
        groups.setdefault(mean.file_of(name), []).append(name)
    count = len(mean.files)
    shards = {shard_name("precision", i, count): names for i, names in sorted(groups.items())}
    for file, names in shards.items():
        _write_set(folder / file, {n: precision[n] for n in names}, info)
    if count > 1:
        write_index(folder, "precision", shards, sum(4 * p.size for p in precision.values()))
    write_info(folder, info)


def _write_set(path: Path, tensors: Mapping[str, Array], info: PosteriorInfo) -> None:
    specs = {name: TensorSpec("F32", t.shape) for name, t in tensors.items()}
    with SafetensorsSink(path, specs, info.to_metadata()) as sink:
        for name, t in tensors.items():
            sink.write_bytes(name, 0, encode(t.reshape(-1), "F32"))
