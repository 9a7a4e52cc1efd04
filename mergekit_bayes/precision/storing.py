"""Stores a precision with its record, wherever its numbers come from."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sources import is_hub_id, pinned
from mergekit_bayes.checkpoint.specs import Array
from mergekit_bayes.checkpoint.stamps import Stamp, refuse_changed
from mergekit_bayes.checkpoint.tokenizers import tokenizer_identity
from mergekit_bayes.curvature.health import precision_health
from mergekit_bayes.curvature.outputs import TrainedLoss
from mergekit_bayes.errors import MismatchError
from mergekit_bayes.posterior import Anchor, PosteriorInfo, Prior, identify, save_posterior
from mergekit_bayes.posterior.factors import Directions, Kronecker, LowRank
from mergekit_bayes.posterior.info import LOSS
from mergekit_bayes.posterior.pooling import rank_ones
from mergekit_bayes.posterior.save import Precision
from mergekit_bayes.precision.settings import PrecisionConfig


class Found(NamedTuple):
    """A precision, and what its record says of where it comes from.

    Attributes:
        precision: Under the names that `save_pretrained` writes, as finely as `pool` says; entries
            for `row-column`. At least one tensor here or in `matrices`.
        estimator: Name of the estimator.
        unit: What an observation is.
        observations: Number of observations that it stands for.
        loss: The loss whose curvature it is.
        training: How it was made.
        sampled: Number of examples that were looked at; None without examples.
        health: Statistics beside those of the numbers.
        matrices: Precisions of whole directions, under names likewise.
        renaming: From those names to the file's; None to find it by the shapes of `precision`.
    """

    precision: Mapping[str, Tensor]
    estimator: str
    unit: Literal["token", "example"]
    observations: int
    loss: TrainedLoss
    training: Mapping[str, Any]
    sampled: int | None = None
    health: Mapping[str, float] = {}
    matrices: Mapping[str, Directions] = {}
    renaming: Renaming | None = None


class Stored(NamedTuple):
    """Where a precision was stored, and the statistics in its record."""

    path: Path
    health: dict[str, float]


def store(
    config: PrecisionConfig,
    folder: Path,
    model: Module,
    source: SafetensorsSource,
    found: Found,
    inputs: Mapping[Path, Stamp],
) -> Stored:
    """Store a precision as the posterior of a checkpoint.

    Args:
        config: The settings.
        folder: The checkpoint.
        model: Its model.
        source: Its weights.
        found: The precision.
        inputs: All files that it was made from, as they were: of others the record would be wrong.

    Raises:
        CheckpointError: An input has changed, or the precision cannot be written.
        MismatchError: The weights do not hold a parameter of the model.
    """
    rename = found.renaming or stored_names(source, found.precision)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    variances = {n: diagonal(m) for n, m in found.matrices.items()}
    health = {**precision_health({**found.precision, **variances}), **found.health}
    info = PosteriorInfo(
        estimator=found.estimator,
        unit=found.unit,
        observations=found.observations,
        ess=found.observations,
        sampled=found.sampled,
        prior=Prior(kind="isotropic", precision=config.prior) if config.prior else Prior(),
        anchor=Anchor(),
        mean=identify(source),
        tokenizer=tokenizer_identity(folder),
        dtype=_dtype(source),
        aliases={alias: rename(name) for alias, name in tied.items()},
        training={**found.training, **_hub_model(config, folder), LOSS: found.loss.name},
        health=health,
        pool=config.pool,
    )
    arrays: dict[str, Array] = {rename(n): t.cpu().numpy() for n, t in found.precision.items()}
    stored: Mapping[str, Precision] = arrays | {rename(n): m for n, m in found.matrices.items()}
    if config.pool == "row-column":
        stored = rank_ones(arrays)
    refuse_changed(inputs)
    out = Path(config.output) if config.output else None
    return Stored(save_posterior(folder, stored, info, out=out, force=config.force), health)


def diagonal(matrices: Directions) -> Tensor:
    """The diagonal of matrices: one number for each of a layer's inputs, or for each entry."""
    if isinstance(matrices, Kronecker):
        left, right = (torch.from_numpy(f).diagonal(dim1=-2, dim2=-1) for f in matrices)
        return left[..., None] * right[..., None, :]
    if isinstance(matrices, LowRank):
        return torch.from_numpy(matrices.entries())
    return torch.from_numpy(matrices.blocks).diagonal(dim1=-2, dim2=-1)


def stored_names(source: SafetensorsSource, tensors: Mapping[str, Tensor]) -> Renaming:
    """From names in memory to the file's, which may differ (`h.0...` of GPT-2 on the Hub).

    Raises:
        MismatchError: The file does not hold a parameter of the model.
    """
    rename = find_renaming(source.specs, tensors, scope=Scope.REPLACED)
    for name in tensors:
        if rename(name) not in source.specs:
            raise MismatchError(
                f"'{name}' is a parameter of the model, but {source.files[0]} does not hold it, so "
                "its values were made up on loading. Fine-tune the model for this task first."
            )
    return rename


def _hub_model(config: PrecisionConfig, folder: Path) -> dict[str, str]:
    """The Hub model that it is of; the path of a folder is left out."""
    ref = pinned(config.model, folder)
    return {"model": ref} if ref != config.model or is_hub_id(ref) else {}


def _dtype(source: SafetensorsSource) -> str:
    """The number format of most of the file's values, by torch's name where it has one."""
    sizes: Counter[str] = Counter()
    for spec in source.specs.values():
        sizes[spec.dtype] += spec.size
    (stored, _), *_ = sizes.most_common(1)
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(stored, stored)
