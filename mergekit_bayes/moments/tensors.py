"""The second moments in `exp_avg_sq.safetensors`: tensors under the names of their parameters.

The header may say in its metadata, as text: `step` and `beta2`, and in `mean` the content hash of
the weights (`mean.blocks` of a `PosteriorInfo`). What it does not say is asked for.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.moments.base import (
    SQUARES,
    Key,
    Moment,
    Moments,
    as_beta2,
    as_step,
    refuse_other_numbers,
)

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_tensors(source: SafetensorsSource, path: Path) -> Moments:
    """The second moments in safetensors files.

    Args:
        source: The files, open for as long as moments are read.
        path: The file or folder, for messages.

    Raises:
        CheckpointError: There is no tensor, one is not in floating point, two are of one parameter,
            or step or beta2 is no number.
    """
    step = as_step(path, "the file", _number(path, source, "step"))
    beta2 = _number(path, source, "beta2")
    decay = as_beta2(path, {} if beta2 is None else {"betas": [0.0, beta2]})
    moments: dict[Key, Moment] = {}
    for stored, spec in source.specs.items():
        name = stored.removesuffix(f".{SQUARES}")
        dtype = _NAMES.get(spec.dtype, spec.dtype)
        refuse_other_numbers(path, name, dtype)
        if name in moments:
            raise CheckpointError(
                f"{path}: holds {shown(name)} and {shown(f'{name}.{SQUARES}')}, two moments of one "
                "parameter. Leave one out."
            )
        moments[name] = Moment(spec.shape, dtype, step, decay, partial(_read, source, stored))
    if not moments:
        raise CheckpointError(f"{path}: holds no moment. Write them by the parameters' names.")
    return Moments(path, moments, (tuple(moments),), mean=source.metadata.get("mean"))


def _read(source: SafetensorsSource, name: str) -> Tensor:
    return torch.from_numpy(read_tensor(source, name))


def _number(path: Path, source: SafetensorsSource, key: str) -> float | None:
    text = source.metadata.get(key)
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(
            f"{path}: its metadata gives {shown(text)} as {key}, expected a number."
        ) from None
