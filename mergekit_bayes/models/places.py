"""Where each checkpoint tensor lives in a loaded model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MERGEABLE, TensorSpec
from mergekit_bayes.errors import MismatchError, PrecisionError
from mergekit_bayes.posterior import Posterior
from mergekit_bayes.posterior.directions import refuse_matrices
from mergekit_bayes.posterior.forms import row_shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Place(NamedTuple):
    """Where a tensor of the precision file lies in memory: a parameter, or a strided part of one.

    Attributes:
        name: Its name in the precision file.
        parameter: The parameter that holds it.
        shape: Its shape.
        stride: Strides inside the parameter, in entries; None if it is the parameter itself.
        offset: Index of its first entry inside the parameter.
    """

    name: str
    parameter: "Tensor"
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int

    def view(self, parameter: "Tensor") -> "Tensor":
        """The same place in the parameter, or in a tensor laid out like it."""
        if self.stride is None:
            return parameter
        return parameter.as_strided(self.shape, self.stride, self.offset)


def checkpoint_names(
    model: "torch.nn.Module", tensors: "Mapping[str, Tensor]"
) -> "dict[str, Tensor]":
    """Rename tensors from their names in memory to those that `save_pretrained` writes.

    PEFT drops the adapter's name. Mixture-of-experts models stack on loading what their files hold
    apart. Undoing that only splits and permutes, so it is right for diagonal precisions too.
    """
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        return dict(get_peft_model_state_dict(model, state_dict=dict(tensors)))
    from transformers.core_model_loading import revert_weight_conversion

    return dict(revert_weight_conversion(model, dict(tensors)))


def kept_tensors(model: "torch.nn.Module") -> "dict[str, Tensor]":
    """The tensors that `save_pretrained` keeps, by their names in memory: no tied one twice."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name not in left_out and not (name in tied and tensor is tensors.get(tied[name]))
    }


def stored_places(
    model: "torch.nn.Module", tensors: "Mapping[str, Tensor]"
) -> "dict[str, dict[str, Tensor]]":
    """What each tensor is stored as: tensors of no memory, by stored name, by name in memory.

    Raises:
        MismatchError: A stored tensor is made of several, which cannot be stored one by one.
    """
    empty = {name: _empty(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    together = {n: tuple(t.shape) for n, t in checkpoint_names(model, empty).items()}
    places = {name: checkpoint_names(model, {name: t}) for name, t in empty.items()}
    alone = {n: tuple(t.shape) for stored in places.values() for n, t in stored.items()}
    if together != alone:
        name = min(set(together.items()) ^ set(alone.items()))[0]
        raise MismatchError(
            f"'{name}' is one tensor of the model's file and several in memory, which cannot be "
            "written one by one. Train replicas in place of shards."
        )
    return places


def row_axes(model: "torch.nn.Module") -> dict[str, int]:
    """How many axes of each parameter stay where a precision has one number a row of its file.

    The first one, of a parameter that is stored as it is. Of one that is stored in parts, such as
    stacked experts (expert, row, column), each part has rows of its own: all but the last stay.

    Returns:
        By name, for every parameter that requires a gradient.

    Raises:
        MismatchError: The rows of a part do not lie along the last axis of its parameter.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    empty = {n: _empty(p.shape, p.dtype) for n, p in parameters.items()}
    stored = _stored_names(model, empty)
    as_it_is = {id(tensor) for tensor in stored.values()}
    axes = {n: min(1, t.ndim) if id(t) in as_it_is else t.ndim - 1 for n, t in empty.items()}
    rows = {
        n: _empty((*t.shape[: axes[n]], *(1 for _ in t.shape[axes[n] :])), t.dtype)
        for n, t in empty.items()
    }
    for name, tensor in _stored_names(model, rows).items():
        if tuple(tensor.shape) != row_shape(tuple(stored[name].shape)):
            raise MismatchError(
                f"'{name}' is stored in another order than it has in memory, so that its rows "
                "cannot be pooled. Leave out --pool."
            )
    return axes


class InputAxis(NamedTuple):
    """Which axis of a stored tensor is that of a linear layer's inputs, and whose layer it is.

    Attributes:
        parameter: Name of the parameter in memory.
        expert: Index of the stacked expert whose weight it is; None for the whole parameter.
        axis: -1 or -2.
    """

    parameter: str
    expert: int | None
    axis: int


def input_axes(model: "torch.nn.Module", axes: Mapping[str, int]) -> dict[str, InputAxis]:
    """Where the weights of linear layers are stored, by the names that `save_pretrained` writes.

    Args:
        model: A model of transformers.
        axes: The axis of the inputs of each weight in memory, -1 or -2, by parameter name.

    Raises:
        MismatchError: A weight is stored with others, or in parts of which one has not all inputs.
    """
    import torch

    parameters = {n: p for n, p in model.named_parameters() if n in axes}
    empty = {n: _empty(p.shape, p.dtype) for n, p in parameters.items()}
    origin = {id(tensor): name for name, tensor in empty.items()}
    found, renamed = {}, set()
    for stored, tensor in _stored_names(model, empty).items():
        if id(tensor) in origin:
            name = origin[id(tensor)]
            found[stored] = InputAxis(name, None, axes[name])
            renamed.add(name)
    for name, parameter in parameters.items():
        if name in renamed:
            continue
        # What is in an entry: its expert, and its place among the inputs. Views take no memory.
        shape, axis = parameter.shape, axes[name]
        experts = torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:])).expand(shape)
        inputs = torch.arange(shape[axis]).view(-1, *(1 for _ in range(-1 - axis))).expand(shape)
        places = _stored_names(model, {name: inputs})
        for stored, part in _stored_names(model, {name: experts}).items():
            found[stored] = _input_axis(name, stored, shape, part, places[stored])
    return found


def _input_axis(
    name: str, stored: str, shape: Sequence[int], experts: "Tensor", inputs: "Tensor"
) -> InputAxis:
    """Which axis of a part of a parameter is that of the inputs.

    Args:
        name: The parameter.
        stored: The part.
        shape: Shape of the parameter.
        experts: The expert of each entry of the part.
        inputs: The place among the inputs of each.
    """
    expert = int(experts.reshape(-1)[0])
    is_whole = len(inputs.shape) == len(shape)
    for axis in (-1, -2):
        along = inputs.movedim(axis, -1)
        row = along.reshape(-1, along.shape[-1])[0]
        own = experts if is_whole else experts.new_tensor(expert)
        if (
            row.equal(row.new_tensor(range(len(row))))
            and along.eq(row).all()
            and len(row) == int(inputs.max()) + 1
            and own.eq(experts).all()
        ):
            return InputAxis(name, None if is_whole else expert, axis)
    raise MismatchError(
        f"'{stored}' is stored in another order than it has in memory, so that the matrices of "
        f"'{name}' do not fit it. Choose --estimator ggn."
    )


def find_places(model: "torch.nn.Module", posterior: Posterior) -> list[Place]:
    """The place of every precision in a model. Tied parameters come once.

    Args:
        model: A transformers or PEFT model, or any torch module whose parameters have the names
            of the precision file.
        posterior: With its precision open.

    Raises:
        MismatchError: The names or shapes of the precision are not the model's.
        PrecisionError: The precision is not in a file.
    """
    if posterior.precision is None:
        raise PrecisionError(
            f"'{posterior.ref}' has no precision in a file, so nothing can be drawn from it."
        )
    refuse_matrices(
        posterior.precision,
        "what draws weights, or holds them by their precision,",
        f"Make another with `bmerge precision {posterior.ref} --estimator ggn`.",
    )
    specs = posterior.precision.specs
    candidates = _by_checkpoint_name(model)
    rename = find_renaming(specs, candidates, fits=_may_be_precision)
    places = list(_stored_places(candidates, rename, specs))
    for place in places:
        spec = specs[place.name]
        if not _may_be_precision(place.shape, spec.shape) or spec.dtype not in MERGEABLE:
            raise MismatchError(
                f"{posterior.precision.where(place.name)}: the precision of '{place.name}' is "
                f"{spec.dtype} {list(spec.shape)}, the model's tensor {list(place.shape)}. Use the "
                "precision that belongs to it."
            )
    model_names = {rename(name) for name in candidates}
    unknown = [name for name in specs if name not in model_names and not is_buffer(name)]
    if unknown or not places:
        name = unknown[0] if unknown else next(iter(specs), "")
        raise MismatchError(
            f"{posterior.precision.files[0]}: the model has no parameter '{name}'. Use the "
            "precision that belongs to it."
        )
    return places


def find_parameters(model: "torch.nn.Module", specs: Mapping[str, TensorSpec]) -> dict[str, Place]:
    """The place of every tensor of a checkpoint in the model that was loaded from it.

    Args:
        model: A transformers model.
        specs: The tensors by the checkpoint's names.

    Returns:
        By the checkpoint's name. Tied parameters come once; tensors that the model has no use for,
        and those that are no parameters, are left out.

    Raises:
        MismatchError: A parameter has another shape than its tensor.
    """
    candidates = _by_checkpoint_name(model)
    rename = find_renaming(specs, candidates)
    places = {place.name: place for place in _stored_places(candidates, rename, specs)}
    for name, place in places.items():
        if place.shape != specs[name].shape:
            raise MismatchError(
                f"'{name}' is {list(specs[name].shape)} in the checkpoint and {list(place.shape)} "
                "in the model. Take the config of the model that the tensors are of."
            )
    return places


def _stored_places(
    candidates: Mapping[str, Place], rename: Renaming, specs: Mapping[str, TensorSpec]
) -> Iterator[Place]:
    """The places of those tensors that a file holds, by its names. Tied ones come once."""
    taken: set[tuple[int, int]] = set()
    for name, place in candidates.items():
        stored_name = rename(name)
        key = (id(place.parameter), place.offset)
        if stored_name in specs and key not in taken:
            taken.add(key)
            yield place._replace(name=stored_name)


def _may_be_precision(shape: Sequence[int], precision: Sequence[int]) -> bool:
    """Whether a tensor's precision may have this shape: no axes, or as long or 1 on every one."""
    return not precision or (
        len(precision) == len(shape)
        and all(a in (1, b) for a, b in zip(precision, shape, strict=True))
    )


def _by_checkpoint_name(model: "torch.nn.Module") -> dict[str, Place]:
    """Every parameter, or part of one, by the name that a checkpoint gives it.

    Most parameters are only renamed, which empty tensors show. Of a parameter that is stored in
    parts (stacked experts), each part is found by the indices of its entries.
    """
    import torch

    parameters = dict(model.named_parameters(remove_duplicate=False))
    empty = {n: _empty(p.shape, p.dtype) for n, p in parameters.items()}
    origin = {id(tensor): name for name, tensor in empty.items()}
    places, renamed = {}, set()
    for name, tensor in _stored_names(model, empty).items():
        if id(tensor) in origin:
            parameter = parameters[origin[id(tensor)]]
            places[name] = Place(name, parameter, tuple(parameter.shape), None, 0)
            renamed.add(origin[id(tensor)])
    if hasattr(model, "peft_config"):
        return places  # what PEFT leaves out is the frozen base
    for name, parameter in parameters.items():
        if name not in renamed:
            indices = torch.arange(parameter.numel()).reshape(parameter.shape)
            for part_name, part in _stored_names(model, {name: indices}).items():
                places[part_name] = _strided(part_name, parameter, part)
    return places


def _stored_names(model: "torch.nn.Module", tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    if not hasattr(model, "config") and not hasattr(model, "peft_config"):
        return dict(tensors)  # not a model of transformers: stored under the names in memory
    return checkpoint_names(model, tensors)


def _empty(shape: Sequence[int], dtype: "torch.dtype") -> "Tensor":
    """A tensor that has a shape and takes no memory."""
    import torch

    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _strided(name: str, parameter: "Tensor", indices: "Tensor") -> Place:
    """The part of a contiguous parameter that has these flat indices."""
    import torch

    shape = tuple(indices.shape)
    offset = int(indices.reshape(-1)[0]) if indices.numel() else 0
    stride = tuple(
        int(indices.select(axis, 1).reshape(-1)[0]) - offset if size > 1 else 1
        for axis, size in enumerate(shape)
    )
    flat = torch.arange(parameter.numel())
    if not parameter.is_contiguous() or not torch.equal(
        flat.as_strided(shape, stride, offset), indices
    ):
        raise MismatchError(
            f"'{name}' is stored in another order than it has in memory; it cannot be drawn."
        )
    return Place(name, parameter, shape, stride, offset)
