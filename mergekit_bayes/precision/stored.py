"""What the files of a checkpoint say: its names of the parameters, and its number format."""

from collections import Counter
from collections.abc import Mapping

import torch

from mergekit_bayes.checkpoint.rename_rules import Scope
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import MismatchError


def stored_names(source: SafetensorsSource, tensors: Mapping[str, torch.Tensor]) -> Renaming:
    """From names in memory to the file's, which may differ (`h.0...` of GPT-2 on the Hub).

    Raises:
        MismatchError: The file does not hold a parameter of the model.
    """
    rename = find_renaming(source.specs, tensors, scope=Scope.REPLACED)
    for name in tensors:
        if rename(name) not in source.specs:
            raise MismatchError(
                f"'{name}' is a parameter of the model, but {source.files[0]} does not hold it, so "
                "its values were made up on loading. Fine-tune the model first, or choose another "
                "--task."
            )
    return rename


def stored_dtype(source: SafetensorsSource) -> str:
    """The number format of most of the file's values, by torch's name where it has one."""
    sizes: Counter[str] = Counter()
    for spec in source.specs.values():
        sizes[spec.dtype] += spec.size
    (stored, _), *_ = sizes.most_common(1)
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(stored, stored)
