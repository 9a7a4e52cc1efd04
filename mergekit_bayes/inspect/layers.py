"""Which tensors of a checkpoint are parameters, and which of a precision fit none."""

from collections import Counter
from collections.abc import Iterable, Mapping

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.posterior.forms import is_form_of


def is_parameter(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is a parameter: a floating-point one that is no known buffer."""
    return not is_buffer(name) and spec.dtype in MERGEABLE


def count_dtypes(specs: Mapping[str, TensorSpec], names: Iterable[str]) -> dict[str, int]:
    """Entries of these tensors by the dtype that holds them."""
    counts = Counter[str]()
    for name in names:
        counts[specs[name].dtype] += specs[name].size
    return dict(counts)


def misfits(precision: Mapping[str, TensorSpec], mean: Mapping[str, TensorSpec]) -> dict[str, str]:
    """Tensors of a precision that the model lacks, or that have no form of its tensor, and why."""
    found = {name: _misfit(spec, mean.get(name)) for name, spec in precision.items()}
    return {name: reason for name, reason in found.items() if reason is not None}


def _misfit(precision: TensorSpec, mean: TensorSpec | None) -> str | None:
    if mean is None:
        return "the model has no tensor of this name"
    if is_form_of(precision, mean):
        return None
    if is_form_of(TensorSpec("F32", precision.shape), mean):
        return f"its dtype is {precision.dtype}, and F32, BF16 or F64 is read"
    shape, expected = list(precision.shape), list(mean.shape)
    turned = "; it is transposed" if shape == expected[::-1] else ""
    return f"its shape is {shape}, and that of the model's tensor {expected}{turned}"
