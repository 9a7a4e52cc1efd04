"""Merge the tensors that adapters hold in place of the base's (`modules_to_save`, `bias`)."""

from collections.abc import Sequence

import numpy as np

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import full_hash
from mergekit_bayes.checkpoint.specs import MERGEABLE, Array
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora.inputs import AdapterMerge, Replacements, TensorCopy
from mergekit_bayes.lora.writers import FOLD_ALL

_SAME, _AVERAGED = "the same in all adapters", "averaged by precision"
_FOLD = f"Fold instead: {FOLD_ALL}."


def decide_replacements(merge: AdapterMerge, replacements: Replacements) -> dict[str, str]:
    """Decide what becomes of each tensor: kept if all adapters agree, else averaged by precision.

    Raises:
        MismatchError: A tensor is missing in an adapter, has different shapes, differs under
            uniform weights, or is not stored as numbers.
    """
    outcomes = {}
    for name, copies in replacements.items():
        if len(copies) < len(merge.adapters):
            lacking = min(set(range(len(merge.adapters))) - {copy.owner for copy in copies})
            raise MismatchError(
                f"'{name}' is whole in '{merge.adapters[copies[0].owner].ref}' (modules_to_save, "
                "bias, or stored below its factors) "
                f"but not in '{merge.adapters[lacking].ref}'. {_FOLD}"
            )
        means = [merge.adapters[copy.owner].posterior.mean for copy in copies]
        specs = {mean.specs[copy.disk] for mean, copy in zip(means, copies, strict=True)}
        if len({spec.shape for spec in specs}) > 1:
            raise MismatchError(
                f"'{name}' has different shapes in these adapters: "
                f"{sorted(s.shape for s in specs)}. {_FOLD}"
            )
        if len(specs) == 1 and _are_equal(merge, copies):
            outcomes[name] = _SAME
        elif merge.weights == "uniform":
            raise MismatchError(
                f"'{name}' differs between the adapters, which hold it whole (modules_to_save, or "
                f"bias): what each one changed is known only with the base. {_FOLD}"
            )
        else:
            outcomes[name] = _AVERAGED
        if any(spec.dtype not in MERGEABLE for spec in specs):
            raise MismatchError(f"'{name}' is not stored as one of {', '.join(MERGEABLE)}. {_FOLD}")
    return outcomes


def merge_replacement(merge: AdapterMerge, copies: Sequence[TensorCopy], outcome: str) -> Array:
    """The merged tensor, by the outcome that `decide_replacements` gave it.

    Raises:
        PrecisionError: It is averaged, and a precision is missing.
    """
    if outcome == _SAME:
        return read_tensor(merge.adapters[copies[0].owner].posterior.mean, copies[0].disk)
    return _average(merge, copies)


def _are_equal(merge: AdapterMerge, copies: Sequence[TensorCopy]) -> bool:
    hashes = {full_hash(merge.adapters[c.owner].posterior.mean, c.disk) for c in copies}
    return len(hashes) == 1


def _average(merge: AdapterMerge, copies: Sequence[TensorCopy]) -> Array:
    """`sum_t c_t S_t m_t / sum_t c_t S_t`, in float64."""
    shape = merge.adapters[copies[0].owner].posterior.mean.specs[copies[0].disk].shape
    weighted, total = np.zeros(shape), np.zeros(shape)
    for copy in copies:
        adapter = merge.adapters[copy.owner]
        stored = adapter.counted(copy.disk, merge.counts[copy.owner])
        if stored is None:
            raise PrecisionError(
                f"no precision for '{copy.disk}' of '{adapter.ref}'. Make a full one with `bmerge "
                "precision`."
            )
        amount = merge.scales[copy.owner] * (stored.astype(np.float64) + DELTA_0)
        weighted += amount * read_tensor(adapter.posterior.mean, copy.disk)
        total += amount
    return weighted / total
