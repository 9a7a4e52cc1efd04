"""How the optimizers go over tensors: slice by slice, in compiled passes where they fit."""

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

from torch import Tensor

Items: TypeAlias = tuple[Any, ...]  # tensors, numbers and None, in the order they were given

SLICE = 1 << 18  # elements; on a CPU the scratch tensors of one slice stay in cache
GPU_SLICE = 1 << 24  # on a GPU scratch memory does not grow with the largest embedding


def slices(*items: Tensor | float | None) -> Iterator[Items]:
    """Yield aligned flat views of at most `SLICE` (or `GPU_SLICE`) elements.

    Numbers, None and tensors without dimensions are repeated in every slice. If one of the
    tensors is not contiguous, or the first one fits into a slice, the items come as they are.

    Args:
        items: Tensors of one shape, numbers, tensors without dimensions, or None.
    """
    tensors = [t for t in items if isinstance(t, Tensor) and t.ndim > 0]
    size = SLICE if all(t.device.type == "cpu" for t in tensors) else GPU_SLICE
    if not tensors or tensors[0].numel() <= size or not all(t.is_contiguous() for t in tensors):
        yield items
        return
    flat = [t.view(-1) if isinstance(t, Tensor) and t.ndim > 0 else t for t in items]
    for start in range(0, tensors[0].numel(), size):
        stop = start + size
        yield tuple(t[start:stop] if isinstance(t, Tensor) and t.ndim > 0 else t for t in flat)


@cache
def passes_module() -> ModuleType | None:
    """Return the module of compiled passes, or None if numba cannot be used."""
    try:
        return import_module("mergekit_bayes.optim.passes")
    except ImportError:  # numba is missing, or incompatible with another installed library
        return None


def compiled_passes(*items: Tensor | float | None) -> ModuleType | None:
    """Return the module of compiled passes if it is available and fits all tensors, else None.

    Args:
        items: A tensor, then tensors of its shape and numbers; a number may be a tensor
            without dimensions.
    """
    passes = passes_module()
    tensors = [t for i, t in enumerate(items) if isinstance(t, Tensor) and (i == 0 or t.ndim > 0)]
    return passes if passes and passes.fits(*tensors) else None
