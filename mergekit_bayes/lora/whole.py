"""Whole tensors that adapters carry beside their factors (`modules_to_save`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import full_hash
from mergekit_bayes.checkpoint.specs import MERGEABLE, Array
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.lora.factors import AdapterMerge

SAME, _AVERAGED = "the same in all adapters", "averaged by precision"


def check_whole(
    merge: AdapterMerge, whole: Mapping[str, Sequence[tuple[int, str]]]
) -> dict[str, str]:
    fates = {}
    for name, holders in whole.items():
        if len(holders) < len(merge.adapters):
            lacking = min(set(range(len(merge.adapters))) - {i for i, _ in holders})
            raise MismatchError(
                f"'{name}' is whole in '{merge.adapters[holders[0][0]].ref}' (modules_to_save) but "
                "not in "
                f"'{merge.adapters[lacking].ref}'. {_FOLD}"
            )
        means = [merge.adapters[i].posterior.mean for i, _ in holders]
        specs = {mean.specs[disk] for mean, (_, disk) in zip(means, holders, strict=True)}
        if len({spec.shape for spec in specs}) > 1:
            raise MismatchError(
                f"'{name}' has different shapes in these adapters: "
                f"{sorted(s.shape for s in specs)}."
            )
        if (
            len(specs) == 1
            and len({full_hash(m, d) for m, (_, d) in zip(means, holders, strict=True)}) == 1
        ):
            fates[name] = SAME
        elif merge.weights == "uniform":
            raise MismatchError(
                f"'{name}' differs between the adapters, which hold it whole (modules_to_save): "
                "what each one changed "
                f"is known only with the base. {_FOLD}"
            )
        else:
            fates[name] = _AVERAGED
        if any(spec.dtype not in MERGEABLE for spec in specs):
            raise MismatchError(f"'{name}' is not stored as one of {', '.join(MERGEABLE)}. {_FOLD}")
    return fates


_FOLD = "Fold instead: `bmerge merge BASE+A BASE+B`."


def average_whole(merge: AdapterMerge, holders: Sequence[tuple[int, str]]) -> Array:
    pull: Any = 0.0
    total: Any = 0.0
    for index, disk in holders:
        adapter = merge.adapters[index]
        stored = adapter.counted(disk, merge.counts[index])
        if stored is None:
            raise PrecisionError(
                f"no precision for '{disk}' of '{adapter.ref}'. Make a full one with `bmerge "
                "precision`."
            )
        amount = merge.scales[index] * (stored.astype(np.float64) + 1e-12)
        pull, total = pull + amount * read_tensor(adapter.posterior.mean, disk), total + amount
    return np.asarray(pull / total)
