"""The covariance of the inputs of linear layers, which is a precision of whole directions.

Adding tasks by it instead of by numbers is RegMean (Jin et al., ICLR 2023); with a base and its
anchor it is gradient matching with matrices (`methods/gradient_matching.py`). It is the input
factor of K-FAC (Martens and Grosse, ICML 2015), with the identity for the factor of the outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.ggn import signed_roots
from mergekit_bayes.curvature.linear import (
    DOWN,
    Batch,
    Layer,
    Seen,
    frozen,
    inner_rows,
    is_experts,
    linear_layers,
    look,
    unpadded,
    up_of,
    watched,
)
from mergekit_bayes.curvature.refusals import explained, refuse_offloaded
from mergekit_bayes.curvature.squares import squared_gradients
from mergekit_bayes.curvature.sums import ENTRIES, Keeping, Sums
from mergekit_bayes.errors import ConfigError


def input_covariance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Add up the products of the inputs of every linear layer, and root-GGN for all else.

        A = sum over observations, over their tokens, of x x'       for a layer y = W x + b

    A has the shape (d, d) for a layer of d inputs. It is the Hessian of `0.5 |W x - y|^2` in each
    row of W: the Gauss-Newton matrix of a layer whose outputs count alike, in squared inputs, where
    the numbers of root-GGN are in squared loss/weight. A merge compares a layer with the same layer
    of other models, so that it does not matter that units differ from tensor to tensor.

    It is exact for the rows that it sees: without a draw, unbiased for the sum over all data, and
    as uncertain as a mean of x x' over so many examples. Batches do not matter.

    The tokens are all that are not padding, of a classifier's example too; a classifier's head that
    runs on every token, and is read at one, counts that one. Of the experts of a layer, each has
    the sum over the tokens that were routed to it. What is left (embeddings, norms, biases, routers
    and weights that are read outside of a linear module) has the diagonal of `ggn_diagonal`, by a
    backward pass that leaves the linear layers out.

    With `keep.rank` k the sum of a layer of more than 2 k inputs is a sketch (`sketches`): its
    diagonal, exact and unbiased as above, and the directions that were largest as they came, which
    are not quite those of A and depend on the order of the rows. Off the diagonal it is never more
    than A in any direction that it holds.

    Memory: 4 d^2 / `keep.blocks` bytes a layer, and twice that for the widest while it is added to;
    of a sketch 4 (k + 1) d, and of the widest while it is added to once more, the batch's rows in
    float32, and up to 5 k rows (128 for a small k).
    The float32 sums of 96 book reviews in a MiniLM of 22.7 M parameters were at most 2.2e-7 of a
    matrix's norm from float64 ones (2026-11-29).

    Args:
        model: As of `ggn_diagonal`.
        batches: As of `ggn_diagonal`.
        seed: Seed of the signs of root-GGN.
        keep: Where sums are kept, and in how many blocks; `axes` is for what is no linear layer.

    Returns:
        `matrices` names the linear layers, whose totals have the shape (..., k, d/k, d/k) with the
        stacked experts in front, and `sketches` those that have (..., 1 + k, d).

    Raises:
        CheckpointError: The model's outputs are not numbers.
        ConfigError: There is no linear layer, or some see other rows than the batch's tokens.
    """
    seen, batches = begin(model, batches, "inputs")
    sketches = {n.name: shape for n in seen.layers if (shape := n.sketch(keep.rank)) is not None}
    shapes = {n.name: n.sums(keep.blocks) for n in seen.layers if n.name not in sketches}
    with frozen(seen.layers):
        found = squared_gradients(
            model,
            batches,
            signed_roots,
            seed=seed,
            keep=keep._replace(matrices=shapes, sketches=sketches),
            beside=Inputs(model, seen),
        )
    return found._replace(
        matrices={layer.name: layer.axis for layer in seen.layers}, sketches=frozenset(sketches)
    )


def begin(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: str,
    takes: Callable[[nn.Module], bool] = lambda module: True,
) -> tuple[Seen, Iterable[Batch]]:
    """See which linear layers a model runs, and how.

    Args:
        model: The model.
        batches: What it will run on.
        estimator: Its name, for messages.
        takes: Whether the estimator takes the layers of a module.

    Returns:
        The layers, and the same batches in the form in which they must be run.

    Raises:
        ConfigError: It runs none.
    """
    first, batches = _first(batches)
    layers = [n for n in linear_layers(model) if all(takes(module) for module, _ in n.modules)]
    refuse_offloaded({layer.name: layer.weight for layer in layers})
    seen = _look(model, layers, first)
    if not seen.layers:
        raise ConfigError(
            f"--estimator {estimator} adds up the inputs of linear layers, and this model runs "
            "none that it can (torch.nn.Linear, transformers' Conv1D or stacked experts). Choose "
            "ggn."
        )
    return seen, unpadded(batches) if seen.selects else batches


def _first(batches: Iterable[Batch]) -> tuple[Batch | None, Iterable[Batch]]:
    """The first batch, and all of them."""
    remaining = iter(batches)
    first = next(remaining, None)
    return first, remaining if first is None else chain([first], remaining)


@explained()
def _look(model: nn.Module, layers: list[Layer], batch: Batch | None) -> Seen:
    if batch is None:
        return Seen(layers, selects=False, head=None)
    was_training = model.training
    model.eval()
    try:
        return look(model, layers, batch)
    finally:
        model.train(was_training)


class _Tokens(NamedTuple):
    """The tokens of the batch that a model is running on.

    Attributes:
        rows: Number of rows.
        length: Tokens of a row, with padding.
        chosen: Indices of those that are not padding; None for all.
    """

    rows: int
    length: int
    chosen: Tensor | None


class _Last(NamedTuple):
    """What the last layer saw.

    Attributes:
        inputs: The tensor itself.
        version: How often it had been changed in place.
        products: What its rows add to sums.
        rows: How many these are.
    """

    inputs: Tensor
    version: int
    products: Tensor
    rows: int


class Inputs:
    """Adds the products of the inputs to the sums, while a model runs on batches.

    Args:
        model: The model, whose forward is called with the batches' tensors by name.
        seen: Its layers.

    Attributes:
        parameters: The weights, by name.
        names: The names of the weights of each module, by its attributes.
    """

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self._model, self._seen = model, seen
        self.parameters: Mapping[str, Tensor] = {n.name: n.weight for n in seen.layers}
        self.names: dict[nn.Module, dict[str, str]] = {}
        for layer in seen.layers:
            for module, attribute in layer.modules:
                self.names.setdefault(module, {})[attribute] = layer.name
        self._tokens: _Tokens | None = None  # outside of a forward pass
        self._of_head: Tensor | None = None
        self._last: _Last | None = None

    @property
    def is_running(self) -> bool:
        """Whether the model is in a forward pass, and not where one is made again for gradients."""
        return self._tokens is not None

    @contextmanager
    def adding(self, sums: Sums) -> Iterator[None]:
        """Inside, what reaches the layers is added to the sums."""
        self._sums = sums
        with ExitStack() as stack:
            first = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            stack.callback(first.remove)
            stack.callback(self._model.register_forward_hook(self._end).remove)
            stack.enter_context(watched(self._seen.layers, self._see))
            yield

    def _begin(self, _: nn.Module, __: object, inputs: dict[str, Tensor]) -> None:
        rows, length = inputs["input_ids"].shape
        mask = inputs.get("attention_mask")
        chosen = None if mask is None or mask.all() else mask.flatten().nonzero()[:, 0]
        self._tokens = _Tokens(rows, length, chosen)

    def _end(self, _: nn.Module, __: object, outputs: Any) -> None:
        if self._of_head is not None and self._seen.head is not None:
            self._see_head(self._seen.head, self._of_head, outputs.logits)
        self._tokens = self._of_head = self._last = None

    @torch.no_grad()
    def _see(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if self._tokens is None:  # activations that are computed again in a backward pass
            return
        inputs = arguments[0]
        if is_experts(module):
            self._see_experts(module, inputs, arguments[1])
        elif module is self._seen.head:
            self._of_head = inputs
        else:
            self._add_inputs(self.names[module]["weight"], inputs)

    def _add_inputs(self, name: str, inputs: Tensor) -> None:
        """Add the rows of a layer; the product of what the layer before had too is at hand."""
        last = self._last
        # A layer may add its outputs to its own inputs, in place.
        if last is None or last.inputs is not inputs or last.version != inputs._version:
            rows = inputs.reshape(-1, inputs.shape[-1])
            chosen = self._chosen(name, inputs)
            rows = rows if chosen is None else rows.index_select(0, chosen.to(rows.device))
            products = self._sums.products(name, rows)
            last = self._last = _Last(inputs, inputs._version, products, len(rows))
        self._add_products(name, last.products, last.rows)

    def _add_products(self, name: str, products: Tensor, rows: int) -> None:
        self._sums.add_products(name, products)

    def _chosen(self, name: str, inputs: Tensor) -> Tensor | None:
        """Which rows of a layer's inputs count; None for all."""
        tokens, shape = self._tokens, tuple(inputs.shape[:-1])
        assert tokens is not None
        if tokens.chosen is None or shape == (tokens.rows,):
            return None
        if shape in ((tokens.rows, tokens.length), (tokens.rows * tokens.length,)):
            return tokens.chosen
        raise ConfigError(
            f"'{name}' sees rows {list(shape)} that are not the {tokens.rows} x {tokens.length} "
            "tokens of the batch, so that padding cannot be told apart. Pass --batch-size 1."
        )

    def _see_experts(self, module: nn.Module, inputs: Tensor, routed: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1])
        routed = routed.reshape(len(rows), -1)
        up, down = (self.names[module][attribute] for attribute in (up_of(module), DOWN))
        chosen = self._chosen(up, rows)
        if chosen is not None:
            rows, routed = (t.index_select(0, chosen.to(t.device)) for t in (rows, routed))
        for expert in range(len(self.parameters[down])):
            own = rows[(routed == expert).any(1)]
            if len(own):
                for name, seen in ((up, own), (down, inner_rows(module, expert, own))):
                    self._sums.add_products(name, self._sums.products(name, seen), expert)

    @torch.no_grad()
    def _see_head(self, head: nn.Module, inputs: Tensor, logits: Tensor) -> None:
        """Add the inputs of a classifier's head at the token whose outputs the model returned."""
        is_read = (head.forward(inputs) == logits[:, None]).all(-1)
        first = is_read.int().argmax(1)
        if bool(is_read.any(1).all()):
            inputs = inputs[torch.arange(len(inputs), device=inputs.device), first]
        self._add_inputs(self.names[head]["weight"], inputs)
