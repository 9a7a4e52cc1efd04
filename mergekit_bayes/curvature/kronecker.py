"""Kronecker factors of the curvature of linear layers: their inputs and their output gradients.

K-FAC of Martens and Grosse (ICML 2015), with the vectors of root-GGN for the gradients.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.curvature.base import Curvature
from mergekit_bayes.curvature.ggn import signed_roots
from mergekit_bayes.curvature.inputs import Inputs, begin
from mergekit_bayes.curvature.linear import Seen, frozen, is_experts
from mergekit_bayes.curvature.squares import squared_gradients
from mergekit_bayes.curvature.stability import Part
from mergekit_bayes.curvature.sums import ENTRIES, Keeping, Sums
from mergekit_bayes.errors import ConfigError

_OUTPUTS, _ROWS = " outputs", " rows"  # after a parameter's name: its other factor, and a count


def kronecker_factors(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    seed: int = 0,
    keep: Keeping = ENTRIES,
) -> Curvature:
    """Add up the two factors of every linear layer's curvature, and root-GGN for all else.

        H ~ G (x) A / T,    A = sum over T rows of x x',    G = sum over T rows of g g'

    with x the rows that reach a layer y = W x + b (the tokens, without padding), and g the
    gradients of `<v, z>` in y, v being the vectors of root-GGN. H is in units of the summed loss,
    1/weight^2, for a weight with outputs first. It is exact for a layer whose rows are independent
    of its gradients and of each other, as for a regression with one layer; else it lacks what rows
    of one observation have in common, and its bias does not shrink with more data. The variance is
    that of root-GGN, over r^2 + c^2 numbers in place of r c.

    What is not a module of two axes (stacked experts, embeddings, norms, biases, weights that are
    read elsewhere) has the diagonal of `ggn_diagonal`.

    Memory: 4 (r^2 + c^2) bytes a layer of shape (r, c), and twice that for the widest.

    Args:
        model: As of `ggn_diagonal`.
        batches: As of `ggn_diagonal`.
        seed: Seed of the signs of root-GGN.
        keep: Where sums are kept; `axes` is for what is no linear layer.

    Returns:
        `matrices` names the linear layers, whose totals are A, (1, c, c); `outputs` has G / T.

    Raises:
        CheckpointError: The model's outputs are not numbers.
        ConfigError: There is no linear layer, some see other rows than the batch's tokens, or
            nothing but linear layers is trained.
    """
    seen, batches = begin(model, batches, "kronecker", takes=_is_matrix)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in seen.layers:
        inputs = layer.weight.shape[layer.axis]
        outputs = layer.weight.numel() // inputs
        shapes[layer.name] = (1, inputs, inputs)
        shapes[layer.name + _OUTPUTS] = (1, outputs, outputs)
        shapes[layer.name + _ROWS] = (1, 1, 1)
    with frozen(seen.layers):
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                "--estimator kronecker needs gradients that flow through the layers, and no "
                "embedding, norm or bias of this model is trained. Choose inputs."
            )
        found = squared_gradients(
            model,
            batches,
            signed_roots,
            seed=seed,
            keep=keep._replace(matrices=shapes),
            beside=_Both(model, seen),
        )
    names = [layer.name for layer in seen.layers]
    return found._replace(
        total={n: total for n, total in found.total.items() if not n.endswith((_OUTPUTS, _ROWS))},
        parts=tuple(_without_factors(part) for part in found.parts),
        matrices={layer.name: layer.axis for layer in seen.layers},
        outputs={n: found.total[n + _OUTPUTS] / found.total[n + _ROWS].clamp(min=1) for n in names},
    )


def _is_matrix(module: nn.Module) -> bool:
    return not is_experts(module)


def _without_factors(part: Part) -> Part:
    kept = {n: rows for n, rows in part.rows.items() if not n.endswith((_OUTPUTS, _ROWS))}
    return part._replace(rows=kept)


class _Both(Inputs):
    """Adds the products of inputs and of output gradients to the sums."""

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        super().__init__(model, seen)
        self.parameters = {
            name + part: weight
            for name, weight in self.parameters.items()
            for part in ("", _OUTPUTS, _ROWS)
        }

    @contextmanager
    def adding(self, sums: Sums) -> Iterator[None]:
        """Inside, what reaches the layers, and what comes back to them, is added to the sums."""
        with ExitStack() as stack:
            stack.enter_context(super().adding(sums))
            for module, names in self.names.items():
                hook = partial(self._see_output, names["weight"])
                stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _see_output(self, name: str, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if self.is_running and output.requires_grad:
            output.register_hook(partial(self._add_gradient, name))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _add_gradient(self, name: str, gradient: Tensor) -> None:
        # Of padding it is zero: nothing that is scored looks there.
        rows = gradient.reshape(-1, gradient.shape[-1])
        self._sums.add_products(name + _OUTPUTS, self._sums.products(name + _OUTPUTS, rows))

    def _add_products(self, name: str, products: Tensor, rows: int) -> None:
        super()._add_products(name, products, rows)
        self._sums.totals[name + _ROWS].add_(rows)
