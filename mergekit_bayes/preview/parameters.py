"""The parameters of a loaded model as the output of a merge."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from mergekit_bayes.checkpoint.specs import ITEM_SIZE, TensorSpec
from mergekit_bayes.models.places import Place

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


class ParameterSink:
    """A model's parameters as a sink of tensors: what is written is there at once.

    A parameter has the value of the written tensor in the parameter's own dtype, as if a file of
    these tensors had been loaded. Different tensors may be written by different threads.

    Args:
        places: Where each tensor lies in the model, by name.
        specs: Dtype and shape of each tensor as it is written.
    """

    def __init__(self, places: Mapping[str, Place], specs: Mapping[str, TensorSpec]) -> None:
        self._places, self._specs = places, specs
        self._flat: dict[str, torch.Tensor | None] = {}
        self._gathered: dict[str, tuple[torch.Tensor, int]] = {}  # and how many bytes are missing
        self._lock = threading.Lock()

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor, from its byte `offset` on, into its parameter."""
        import torch

        dtype = getattr(torch, _TORCH[self._specs[name].dtype])
        flat = self._flat_parameter(name)
        if flat is None:
            self._gather(name, offset, data, dtype)
            return
        start = offset // ITEM_SIZE[self._specs[name].dtype]
        if flat.dtype == dtype and flat.device.type == "cpu":
            stored = flat.view(torch.uint8).numpy()
            stored[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        else:
            values = _tensor(data, dtype)
            flat[start : start + len(values)].copy_(values)

    def _flat_parameter(self, name: str) -> "torch.Tensor | None":
        """The parameter as a vector; None where its entries do not lie after each other."""
        if name not in self._flat:
            view = self._view(name)
            self._flat[name] = view.view(-1) if view.is_contiguous() else None
        return self._flat[name]

    def _view(self, name: str) -> "torch.Tensor":
        place = self._places[name]
        return place.view(place.parameter.detach())

    def _gather(self, name: str, offset: int, data: memoryview, dtype: "torch.dtype") -> None:
        """Write to a tensor of its own, which goes into the model when it is complete."""
        import torch

        spec = self._specs[name]
        with self._lock:
            if name not in self._gathered:
                self._gathered[name] = torch.empty(spec.nbytes, dtype=torch.uint8), spec.nbytes
            whole, missing = self._gathered.pop(name)
            whole.numpy()[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            missing -= len(data)
            if missing > 0:
                self._gathered[name] = whole, missing
            else:
                self._view(name).copy_(whole.view(dtype).reshape(spec.shape))


def _tensor(data: memoryview, dtype: "torch.dtype") -> "torch.Tensor":
    import torch

    values = torch.empty(len(data), dtype=torch.uint8)
    values.numpy()[:] = np.frombuffer(data, np.uint8)
    return values.view(dtype)
