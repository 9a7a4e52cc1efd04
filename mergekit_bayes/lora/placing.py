"""Which tensors of a base an adapter changes or replaces, and how they are laid out."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mergekit_bayes.checkpoint.renaming import Renaming, find_renaming
from mergekit_bayes.checkpoint.specs import MERGEABLE, CheckpointSource, TensorSpec
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.config import CONFIG
from mergekit_bayes.lora.layers import Layer


class PlacedLayer(NamedTuple):
    """A layer of an adapter and the layout of the base's weight that it changes."""

    layer: Layer
    transposed: bool  # the weight is stored as (d_in, d_out)


def place_adapter(
    base: CheckpointSource, adapter: Adapter
) -> tuple[dict[str, PlacedLayer], dict[str, str]]:
    """Match an adapter with the tensors of a base.

    Returns:
        The layers by the base's tensor that they change; and the tensors that are replaced, from
        the base's name to the adapter's name on disk.

    Raises:
        ConfigError: The layout of a square weight is ambiguous.
        MismatchError: A layer or tensor of the adapter does not fit the base.
    """
    weights = {f"{module}.weight": layer for module, layer in adapter.layers.items()}
    renaming = _find_renaming(base, adapter, weights)
    layers = {renaming(name): layer for name, layer in weights.items()}
    for name, layer in layers.items():
        _check_layer(base, adapter, name, layer)
    transposed = _find_transposed(base, adapter, layers)
    replaced = {renaming(name): disk for name, disk in adapter.replacements.items()}
    for name, disk in replaced.items():
        shape = adapter.posterior.mean.specs[disk].shape
        if name in base.specs and base.specs[name].shape != shape:
            raise MismatchError(
                f"'{disk}' of '{adapter.ref}' is {list(shape)}, but '{name}' in "
                f"{base.where(name)} is {list(base.specs[name].shape)}. Was it trained on another "
                f"model ({_named_base(adapter)})?"
            )
    placed = {name: PlacedLayer(layer, name in transposed) for name, layer in layers.items()}
    return placed, replaced


def _find_renaming(
    base: CheckpointSource, adapter: Adapter, weights: Mapping[str, Layer]
) -> Renaming:
    """How the adapter's names of weights become the base's.

    Raises:
        MismatchError: A weight may be two or more of the base's.
    """
    stored = adapter.posterior.mean.specs
    shapes = {name: TensorSpec("F32", (x.rows, x.columns)) for name, x in weights.items()}
    shapes |= {name: stored[disk] for name, disk in adapter.replacements.items()}
    renaming = find_renaming(base.specs, shapes, fits=_may_be_transposed)
    for name in sorted(weights.keys() & renaming.ambiguous.keys()):
        rivals = renaming.ambiguous[name]
        shown = " or ".join(f"'{rival}'" for rival in rivals[:2])
        raise MismatchError(
            f"'{weights[name].a}' of '{adapter.ref}' may adapt {shown} of {base.files[0]}: the "
            "names do not tell which. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    return renaming


def _may_be_transposed(shape: Sequence[int], stored: Sequence[int]) -> bool:
    return tuple(stored) in (tuple(shape), tuple(shape[::-1]))


def _check_layer(base: CheckpointSource, adapter: Adapter, name: str, layer: Layer) -> None:
    spec = base.specs.get(name)
    if spec is None:
        raise MismatchError(
            f"'{layer.a}' of '{adapter.ref}' adapts '{name}', which {base.files[0]} does not "
            f"hold. Was it trained on another model than this ({_named_base(adapter)}), or on a "
            "head that is tied to the embedding?"
        )
    if spec.shape not in ((layer.rows, layer.columns), (layer.columns, layer.rows)):
        raise MismatchError(
            f"'{layer.a}' of '{adapter.ref}' changes a weight of [{layer.rows}, "
            f"{layer.columns}], but '{name}' in {base.where(name)} is {list(spec.shape)}. Was it "
            f"trained on another model ({_named_base(adapter)})?"
        )
    if spec.dtype not in MERGEABLE:
        raise MismatchError(
            f"'{name}' in {base.where(name)} is {spec.dtype}; adapters are applied to "
            f"{', '.join(MERGEABLE)}. Cast that model to BF16 first."
        )


def _find_transposed(
    base: CheckpointSource, adapter: Adapter, layers: Mapping[str, Layer]
) -> set[str]:
    """The tensors stored as (d_in, d_out), judged by their shapes.

    Square weights are taken to be laid out as the others are, or else as the config says.
    """
    is_transposed: dict[str, bool] = {}
    square: list[str] = []
    for name, layer in layers.items():
        if layer.rows == layer.columns:
            square.append(name)
        else:
            is_transposed[name] = base.specs[name].shape == (layer.columns, layer.rows)
    layouts = set(is_transposed.values())
    if square and len(layouts) > 1:
        raise ConfigError(
            f"'{adapter.ref}' adapts transposed and ordinary layers, and the square '{square[0]}' "
            "may be either. Fold it into its base with `PeftModel.merge_and_unload()`."
        )
    flag = bool(adapter.config.get("fan_in_fan_out"))
    square_transposed = layouts.pop() if len(layouts) == 1 else flag
    return {n for n, yes in is_transposed.items() if yes} | (
        set(square) if square_transposed else set()
    )


def _named_base(adapter: Adapter) -> str:
    return f"{CONFIG} names '{adapter.config.get('base_model_name_or_path')}'"
