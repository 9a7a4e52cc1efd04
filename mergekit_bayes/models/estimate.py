"""Curvature of a loaded model over examples of data."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from mergekit_bayes.curvature import ENTRIES, ESTIMATORS, Curvature, Keeping
from mergekit_bayes.models.encode import Collate, batches
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.models.quiet import with_bar

E = TypeVar("E", bound=Mapping[str, object])


def estimate_curvature(
    estimator: str,
    loaded: Loaded,
    examples: Sequence[Mapping[str, object]],
    *,
    batch_size: int,
    seed: int,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Diagonal curvature of the summed loss over examples, at the model's present weights.

    A progress bar shows the batches. The model stays on its device.

    Args:
        estimator: A name in `curvature.ESTIMATORS`.
        loaded: The model. Parameters that require no gradient are left out.
        examples: Encoded rows. Labels of a sequence classifier only say by their dtype which loss
            it trains with, where its `problem_type` does not.
        batch_size: Examples in a backward pass. Smaller batches give more draws of the same data.
        seed: Seed of the estimator.
        keep: How finely the sums are kept, and where.
    """
    collate = Collate(loaded.pad)
    device = loaded.device
    steps = batches(examples, batch_size, collate, device=device)
    shown = with_bar(steps, "curvature", math.ceil(len(examples) / batch_size))
    return ESTIMATORS[estimator](loaded.model, shown, seed=seed, keep=keep)


def random_examples(examples: Sequence[E], count: int, seed: int) -> list[E]:
    """`count` examples in random order; one comes again only after all others have come.

    Args:
        examples: At least one.
        count: Number to draw.
        seed: Seed of the order.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(len(examples), generator=generator).tolist()
    return [examples[i] for i in order[:count]]
