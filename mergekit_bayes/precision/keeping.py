"""How an estimate keeps its sums, and what of them is stored."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import Module

from mergekit_bayes.checkpoint.layout import precision_path
from mergekit_bayes.curvature import Keeping
from mergekit_bayes.models.devices import SPREAD
from mergekit_bayes.models.places import checkpoint_names, row_axes
from mergekit_bayes.posterior.forms import one_shape
from mergekit_bayes.precision.settings import PrecisionConfig
from mergekit_bayes.ranks import launched


def target_of(config: PrecisionConfig) -> Path:
    """The file or folder in which the precision will be."""
    if config.output:
        return Path(config.output)
    return precision_path(Path(os.path.expanduser(config.model)))


def parts_folder(config: PrecisionConfig) -> Path:
    """The folder beside it in which the state of the estimate is saved meanwhile."""
    target = target_of(config)
    return target.with_name(target.name + ".partial")


def is_sharded(config: PrecisionConfig) -> bool:
    """Whether the model is sharded over the processes of a launcher."""
    return config.device == SPREAD and launched() > 0


def keeping(config: PrecisionConfig, model: Module) -> Keeping:
    """How the sums are kept: by row for `--pool`, in a file beside the output for `--sums disk`.

    Raises:
        MismatchError: The model's rows cannot be pooled.
    """
    axes = row_axes(model) if config.pool in ("row", "tensor") else {}
    place = target_of(config).parent if config.sums == "disk" else config.sums
    return Keeping(
        axes,
        place,
        is_shared=True,
        is_sharded=is_sharded(config),
        blocks=config.blocks,
        rank=config.rank,
    )


def stored_precision(
    config: PrecisionConfig, model: Module, total: Mapping[str, Tensor], scale: float
) -> dict[str, Tensor]:
    """The precision under the names that `save_pretrained` writes, `scale * total + prior`.

    Args:
        config: The settings; `pool` and `prior` are used.
        model: The model.
        total: The sums by parameter name, which are overwritten.
        scale: Observations that the precision stands for, over those in the sums.
    """
    precision = {name: summed.mul_(scale).add_(config.prior) for name, summed in total.items()}
    return by_tensor(config, checkpoint_names(model, precision))


def by_tensor(config: PrecisionConfig, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A precision by stored name, in one number a tensor where `pool` asks for that.

    Args:
        config: The settings.
        stored: Of one number a row, where `pool` asks for fewer than one an entry.
    """
    if config.pool == "tensor":  # rows of a tensor are equally long, so that their mean is its own
        return {n: t.double().mean().float().reshape(one_shape(t.shape)) for n, t in stored.items()}
    return stored
