"""How the weights that an adapter changes are laid out in its base's files."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.layers import Layer
from mergekit_bayes.lora.pieces import Piece, pieces_of
from mergekit_bayes.lora.variants import initial_move
from mergekit_bayes.lora.views import Segment, View
from mergekit_bayes.lora.writers import FOLD

_IN_BLOCK = re.compile(r"\.\d+\..*\.weight$")  # a weight of a numbered block


class PlacedLayer(NamedTuple):
    """A layer of an adapter and the layout of the base's weight that it changes.

    Attributes:
        layer: The layer, or the first of several.
        transposed: Whether the weight is stored as (d_in, d_out).
        pieces: The products that the weight changes by where it is not one whole product.
    """

    layer: Layer
    transposed: bool
    pieces: tuple[Piece, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers that change the weight."""
        return tuple(dict.fromkeys(piece.layer for piece in self.pieces)) or (self.layer,)


def possible_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes in which a change of this shape may be stored: its matrices may be transposed."""
    return [shape, (*shape[:-2], *shape[:-3:-1])]


def place_layers(
    view: View, adapter: Adapter, layers: Mapping[str, Layer], transposed: Collection[str]
) -> dict[str, PlacedLayer]:
    """The layers by the stored tensor that they change.

    Args:
        view: The base as the adapter sees it.
        adapter: The adapter.
        layers: Its layers by the view's tensor.
        transposed: The tensors whose matrices are stored as (d_in, d_out).

    Raises:
        ConfigError: What the adapter does to a weight needs it in one piece.
    """
    placed: dict[str, PlacedLayer] = {}
    pieces: dict[str, list[Piece]] = {}
    for name, layer in layers.items():
        stored, is_transposed = view.stored(name), name in transposed
        if name not in view.segments and layer.experts == 1:
            placed[stored] = PlacedLayer(layer, is_transposed)
            continue
        _refuse_variants(view, adapter, name, layer)
        height = (layer.columns if is_transposed else layer.rows) * layer.experts
        segments = view.segments.get(name, (Segment(stored, 0, 0, height),))
        for tensor, found in pieces_of(layer, segments, transposed=is_transposed).items():
            pieces.setdefault(tensor, []).extend(found)
    for tensor, found in pieces.items():
        found.sort(key=lambda piece: piece.at)
        placed[tensor] = PlacedLayer(found[0].layer, found[0].transposed, tuple(found))
    return placed


def _refuse_variants(view: View, adapter: Adapter, name: str, layer: Layer) -> None:
    move = initial_move(adapter.config)
    if move is not None or layer.magnitude is not None:
        what = f"init_lora_weights={move!r}" if move is not None else "use_dora"
        raise ConfigError(
            f"'{adapter.ref}' has {what}, which needs '{name}' in one piece, and "
            f"{view.where(name)} stores it in another form ('{view.stored(name)}'). {FOLD}"
        )


def find_transposed(
    specs: Mapping[str, TensorSpec], adapter: Adapter, layers: Mapping[str, Layer]
) -> set[str]:
    """The weights whose matrices are stored as (d_in, d_out), judged by their shapes.

    Square ones are taken to be laid out as the others are, or else as the base's own matrices are
    whose bias tells their outputs, or else as the config says. A head tells nothing of the others:
    that of a GPT-2 is an ordinary layer, and where PEFT adapts it, it may write so in the config.

    Args:
        specs: What the adapter changes, or replaces, by the view's name.
        adapter: The adapter.
        layers: Its layers by the view's tensor.

    Raises:
        ConfigError: The layout of a square weight is ambiguous.
    """
    tables = {name for name, layer in layers.items() if layer.is_embedding}
    stacks = {name: layer for name, layer in layers.items() if layer.experts > 1}
    matrices = {
        name: layer
        for name, layer in layers.items()
        if not layer.kernel and not layer.is_parameter and name not in tables
    }
    return (
        tables
        | _transposed_matrices(specs, adapter, matrices)
        | _transposed_stacks(specs, adapter, stacks)
    )


def _transposed_matrices(
    specs: Mapping[str, TensorSpec], adapter: Adapter, layers: Mapping[str, Layer]
) -> set[str]:
    is_transposed: dict[str, bool] = {}
    square: list[str] = []
    for name, layer in layers.items():
        if layer.rows != layer.columns:
            is_transposed[name] = specs[name].shape == (layer.columns, layer.rows)
        elif not is_vocabulary(name):
            square.append(name)
    layouts = {yes for name, yes in is_transposed.items() if not is_vocabulary(name)}
    if square and not layouts:
        layouts = _layout_by_biases(specs)
    if square and len(layouts) > 1:
        raise ConfigError(
            f"'{adapter.ref}' adapts transposed and ordinary layers, and the square '{square[0]}' "
            "may be either. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    flag = bool(adapter.config.get("fan_in_fan_out"))
    square_transposed = layouts.pop() if len(layouts) == 1 else flag
    transposed = {name for name, yes in is_transposed.items() if yes}
    return transposed | (set(square) if square_transposed else set())


def _layout_by_biases(specs: Mapping[str, TensorSpec]) -> set[bool]:
    """Whether a base stores the matrices of its blocks as (d_in, d_out); empty if unknown.

    A bias is as long as the outputs of its matrix are many.
    """
    layouts = set()
    for name, spec in specs.items():
        bias = specs.get(f"{name.removesuffix('.weight')}.bias")
        is_matrix = len(spec.shape) == 2 and spec.shape[0] != spec.shape[1]
        if bias is not None and is_matrix and _IN_BLOCK.search(name):
            layouts.add(bias.shape == spec.shape[1:])
    return layouts if len(layouts) == 1 else set()


def _transposed_stacks(
    specs: Mapping[str, TensorSpec], adapter: Adapter, stacks: Mapping[str, Layer]
) -> set[str]:
    """The stacks of experts that are stored as (experts, d_in, d_out).

    Which factor PEFT takes for the rows of a square matrix depends on the model's code, and on the
    version of PEFT (before 0.19.1, A is that of the rows of an ordinary matrix).
    """
    square = [name for name, layer in stacks.items() if layer.rows == layer.columns]
    others = [name for name in stacks if name not in square]
    transposed = {name for name in others if specs[name].shape != stacks[name].shape}
    if square and (not others or 0 < len(transposed) < len(others)):
        raise ConfigError(
            f"'{adapter.ref}' adapts '{square[0]}', whose experts are square, and no other experts "
            f"of it tell which factor is that of the rows. {FOLD}"
        )
    return transposed | {name for name in square if transposed}
