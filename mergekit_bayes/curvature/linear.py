"""The linear layers of a model: their weights, and how the rows that reach them are seen.

A weight counts where it is multiplied with rows in one of three kinds of module, and used nowhere
else (a head that is tied to the embedding is not):

    torch.nn.Linear             (outputs, inputs), fused ones too
    transformers' Conv1D        (inputs, outputs)
    transformers' experts       (experts, outputs, inputs) or (experts, inputs, outputs), of the
                                modules that `use_experts_implementation` made
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from mergekit_bayes.curvature.sketches import sketch_shape
from mergekit_bayes.libraries import outputs_of

Batch: TypeAlias = Mapping[str, Tensor]
# Called with a module and the arguments of its forward, before it.
See = Callable[[nn.Module, tuple[Tensor, ...]], None]

_UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Layer(NamedTuple):
    """A weight that is multiplied with rows.

    Attributes:
        name: Its name among the model's parameters.
        weight: The parameter, of two axes, or of three for stacked experts.
        axis: The axis of its inputs, -1 or -2.
        modules: Where it is used, each with the attribute that holds it.
    """

    name: str
    weight: nn.Parameter
    axis: int
    modules: tuple[tuple[nn.Module, str], ...]

    def sums(self, blocks: int) -> tuple[int, ...]:
        """The shape of the sum of its inputs' products, (..., k, n, n).

        Args:
            blocks: k, where it divides the number of inputs; else there is one block.
        """
        inputs = self.weight.shape[self.axis]
        k = blocks if inputs % blocks == 0 else 1
        return (*self.weight.shape[:-2], k, inputs // k, inputs // k)

    def sketch(self, rank: int | None) -> tuple[int, ...] | None:
        """The shape of a sketch of that sum; None for a layer whose sum itself is kept.

        Args:
            rank: That of sketches, which are for layers of more than twice as many inputs.
        """
        inputs = self.weight.shape[self.axis]
        if rank is None or inputs <= 2 * rank:
            return None
        return sketch_shape(tuple(self.weight.shape[:-2]), rank, inputs)


def linear_layers(model: nn.Module) -> list[Layer]:
    """The linear layers of a model whose weights require a gradient, in the model's order."""
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    elsewhere: set[int] = set()
    axes: dict[int, int] = {}
    for module in model.modules():
        of_inputs = _axes(module)
        for attribute, parameter in module.named_parameters(recurse=False):
            if attribute in of_inputs:
                uses.setdefault(id(parameter), []).append((module, attribute))
                axes[id(parameter)] = of_inputs[attribute]
            else:
                elsewhere.add(id(parameter))
    return [
        Layer(name, parameter, axes[id(parameter)], tuple(uses[id(parameter)]))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in uses and id(parameter) not in elsewhere
    ]


def is_experts(module: object) -> bool:
    """Whether a module is one of transformers' stacked experts."""
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def up_of(experts: Any) -> str:
    """The attribute of the first weight of stacked experts."""
    return _UP[0] if experts.has_gate else _UP[1]


def inner_rows(experts: Any, expert: int, rows: Tensor) -> Tensor:
    """The rows that reach the second weight of an expert, from those that reach the first."""
    up = up_of(experts)
    weight = getattr(experts, up)[expert]
    rows = rows.to(weight.device)  # a model on several devices moves them later
    outputs = rows @ (weight if experts.is_transposed else weight.T)
    if experts.has_bias:
        outputs = outputs + getattr(experts, f"{up}_bias")[expert]
    inner: Tensor = (experts._apply_gate if experts.has_gate else experts.act_fn)(outputs)
    return inner


class Seen(NamedTuple):
    """How a model runs its linear layers.

    Attributes:
        layers: Those that run as modules.
        selects: Whether some see rows that are chosen from the batch's tokens.
        head: The module whose outputs for every token the model returns for one of them; None if
            there is none.
    """

    layers: list[Layer]
    selects: bool
    head: nn.Module | None


def look(model: nn.Module, layers: Iterable[Layer], batch: Batch) -> Seen:
    """Run a batch to see which linear layers run as modules: others read the weights by themselves.

    A layer counts as run if one with the same name but for its numbers runs, since a batch need not
    reach all experts.
    """
    layers = list(layers)
    shapes: dict[nn.Module, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        shapes.pop(module, None)  # the last one that ran is last
        shapes[module] = tuple(inputs[0].shape), tuple(getattr(output, "shape", ()))

    modules = {module: None for layer in layers for module, _ in layer.modules}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        logits = outputs_of(model, **without_labels(batch)).logits
    rows, length = batch["input_ids"].shape
    ran = {
        _NUMBER.sub("#", layer.name)
        for layer in layers
        if any(module in shapes for module, _ in layer.modules)
    }
    selects = any(
        len(shape) == 2 and shape[0] not in (rows, rows * length)
        for module, (shape, _) in shapes.items()
        if not is_experts(module)
    )
    head = None
    if logits.ndim == 2 and shapes:
        last, (_, outputs) = next(reversed(shapes.items()))
        head = last if outputs == (rows, length, logits.shape[-1]) else None
    return Seen([n for n in layers if _NUMBER.sub("#", n.name) in ran], selects, head)


def without_labels(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model sees."""
    return {name: values for name, values in batch.items() if name != "labels"}


def unpadded(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The rows of batches, those with one pattern of padding together, and without it."""
    for batch in batches:
        mask = batch.get("attention_mask")
        if mask is None:
            yield batch
            continue
        for pattern in torch.unique(mask, dim=0):
            rows, columns = (mask == pattern).all(1), pattern.bool()
            yield {
                name: values[rows][:, columns] if values.shape == mask.shape else values[rows]
                for name, values in batch.items()
            }


@contextmanager
def frozen(layers: Iterable[Layer]) -> Iterator[None]:
    """Inside, the weights of some layers require no gradient."""
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.weight.requires_grad_, True)
            layer.weight.requires_grad_(False)
        yield


@contextmanager
def watched(layers: Iterable[Layer], see: See) -> Iterator[None]:
    """Inside, `see` is called before each of the layers' modules runs."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        see(module, (*args, *kwargs.values()))

    with ExitStack() as stack:
        for module in {module: None for layer in layers for module, _ in layer.modules}:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _axes(module: Any) -> dict[str, int]:
    """The axis of the inputs of each of a module's own weights that is multiplied with rows."""
    if isinstance(module, nn.Linear):
        return {"weight": -1}
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return {"weight": -2}
    if is_experts(module):
        return dict.fromkeys((up_of(module), DOWN), -2 if module.is_transposed else -1)
    return {}
