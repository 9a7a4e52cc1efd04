"""Where each checkpoint tensor lives in a loaded model."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mergekit_bayes.checkpoint.names import find_renaming, is_buffer
from mergekit_bayes.checkpoint.specs import MERGEABLE
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior import Posterior


def checkpoint_names(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names in memory to the same by the names that `save_pretrained` gives them.

    PEFT drops the adapter's name; mixture-of-experts models stack on loading what the file holds
    apart, which is fine for diagonal precisions, since it only splits and permutes.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, state_dict=dict(tensors)))
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


class Place(NamedTuple):
    """Where a tensor of the precision file lies in the model's memory: a strided part of one
    parameter.
    """

    name: str
    parameter: "Tensor"
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None  # None: the whole parameter
    offset: int

    def view(self, parameter: "Tensor") -> "Tensor":
        """This part of the parameter, or of a tensor laid out like it."""
        return (
            parameter
            if self.stride is None
            else parameter.as_strided(self.shape, self.stride, self.offset)
        )


def find_places(model: Any, posterior: Posterior) -> list[Place]:
    if posterior.precision is None:
        raise PrecisionError(
            f"'{posterior.ref}' has no precision in a file, so nothing can be drawn from it."
        )
    specs = posterior.precision.specs
    by_memory = _by_checkpoint_name(model)
    rename = find_renaming(specs, by_memory)
    found: list[Place] = []
    filled: set[tuple[int, int]] = set()  # tied parameters are drawn once
    known = {rename(name, specs) for name in by_memory}
    for name, place in by_memory.items():
        on_disk = rename(name, specs)
        key = (id(place.parameter), place.offset)
        if on_disk not in specs or key in filled:
            continue
        filled.add(key)
        spec = specs[on_disk]
        pooled = len(spec.shape) == len(place.shape) and all(
            a in (1, b) for a, b in zip(spec.shape, place.shape, strict=True)
        )
        if not pooled or spec.dtype not in MERGEABLE:
            raise MismatchError(
                f"{posterior.precision.where(on_disk)}: the precision of '{on_disk}' is "
                f"{spec.dtype} "
                f"{list(spec.shape)}, the model's tensor {list(place.shape)}. Use the precision "
                "that belongs to it."
            )
        found.append(place._replace(name=on_disk))
    unknown = [n for n in specs if n not in known and not is_buffer(n)]
    if unknown or not found:
        name = unknown[0] if unknown else next(iter(specs), "")
        raise MismatchError(
            f"{posterior.precision.files[0]}: the model has no parameter '{name}'. Use the "
            "precision that belongs to "
            "it."
        )
    return found


def _by_checkpoint_name(model: Any) -> dict[str, Place]:
    """Every parameter, or part of one, by the name that a checkpoint gives it.

    Only names change for most; a parameter that is stored in parts (stacked experts) is followed by
    its indices.
    """
    import torch

    def named(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        if not hasattr(model, "config") and not hasattr(model, "peft_config"):
            return dict(tensors)  # no model of transformers: stored as it is called

        return checkpoint_names(model, tensors)

    parameters = dict(model.named_parameters(remove_duplicate=False))
    empty = {n: torch.empty(p.shape, dtype=p.dtype, device="meta") for n, p in parameters.items()}
    origin = {id(t): n for n, t in empty.items()}
    places, followed = {}, set()
    for name, t in named(empty).items():
        if id(t) in origin:
            parameter = parameters[origin[id(t)]]
            places[name] = Place(name, parameter, tuple(parameter.shape), None, 0)
            followed.add(origin[id(t)])
    if hasattr(model, "peft_config"):
        return places  # what PEFT leaves out is the frozen base
    for name, parameter in parameters.items():
        if name not in followed:
            indices = torch.arange(parameter.numel()).reshape(parameter.shape)
            for part, index in named({name: indices}).items():
                places[part] = _strided(part, parameter, index)
    return places


def _strided(name: str, parameter: "Tensor", index: "Tensor") -> Place:
    """The part of a contiguous parameter whose flat indices these are."""
    import torch

    shape = tuple(index.shape)
    offset = int(index.reshape(-1)[0]) if index.numel() else 0
    stride = tuple(
        int(index.select(axis, 1).reshape(-1)[0]) - offset if size > 1 else 1
        for axis, size in enumerate(shape)
    )
    flat = torch.arange(parameter.numel())
    if not parameter.is_contiguous() or not torch.equal(
        flat.as_strided(shape, stride, offset), index
    ):
        raise MismatchError(
            f"'{name}' is stored in another order than it has in memory; it cannot be drawn."
        )
    return Place(name, parameter, shape, stride, offset)
