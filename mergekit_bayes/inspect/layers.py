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


def unknown_tensors(
    precision: Mapping[str, TensorSpec], mean: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    """Tensors of a precision that the model lacks, or that have no form of the model's tensor."""
    return tuple(
        name
        for name, spec in precision.items()
        if name not in mean or not is_form_of(spec, mean[name])
    )
