"""A base with an adapter as one dense model: open it, read it, weigh it."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.names import find_renaming
from mergekit_bayes.checkpoint.sources import is_hub_id
from mergekit_bayes.checkpoint.specs import (
    ITEM_SIZE,
    MERGEABLE,
    Array,
    CheckpointSource,
    Closing,
    TensorSpec,
)
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora.adapter import CONFIG, Adapter, Factors, Layer, open_adapter
from mergekit_bayes.lora.dense import VARIANCE_FLOOR, Product, change, variance
from mergekit_bayes.posterior import Posterior, open_posterior

_KEPT = 8  # layers whose factors stay in memory; a merge goes through them one after another


class AdaptedSource(Closing):
    """A base with an adapter folded in: names, shapes and shards of the base.

    An adapted tensor is F32 (F64 on an F64 base), because `W + s B A` is made there;
    `modules_to_save` are the adapter's bytes; all others are the base's. Reading is safe in several
    threads at once.

    Raises `MismatchError` where a layer of the adapter has no weight of its shape in the base.
    """

    is_computed = True

    def __init__(self, base: CheckpointSource, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.adapted, self.whole = _place(base, adapter)
        self._specs = {n: self._spec(n, s) for n, s in base.specs.items()}
        self._specs |= {n: adapter.posterior.mean.specs[disk] for n, disk in self.whole.items()}
        self._product = lru_cache(_KEPT)(self._make)

    def _spec(self, name: str, spec: TensorSpec) -> TensorSpec:
        if name not in self.adapted:
            return spec
        return TensorSpec("F64" if spec.dtype == "F64" else "F32", spec.shape)

    def _make(self, name: str) -> Product:
        layer, transposed = self.adapted[name]
        kind = np.float64 if self._specs[name].dtype == "F64" else np.float32
        factors = Factors(*(f.astype(kind, copy=False) for f in self.adapter.factors(layer)))
        return change(factors, layer.scaling, transposed=transposed)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        return self.base.files

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the base and of the adapter."""
        return (*self.base.inputs, *self.adapter.posterior.mean.inputs)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.base.metadata

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan should tell: that this is not the base which the adapter's posterior records."""
        info, named = (
            self.adapter.posterior.info,
            self.adapter.config.get("base_model_name_or_path"),
        )
        if info is not None and info.base is not None and identity(self.base) != info.base.blocks:
            return (
                f"'{self.adapter.ref}' was trained on other weights ('{named}') than those it is "
                "applied to",
            )
        return ()

    def where(self, name: str) -> str:
        if name in self.whole:
            return self.adapter.posterior.mean.where(self.whole[name])
        if name in self.adapted:
            return f"{self.base.where(name)} + {self.adapter.posterior.mean.where(self.adapted[name][0].a)}"
        return self.base.where(name)

    def file_of(self, name: str) -> int:
        return self.base.file_of(name) if name in self.base.specs else 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        if name in self.whole:
            self.adapter.posterior.mean.read_bytes(self.whole[name], offset, out)
        elif name not in self.adapted:
            self.base.read_bytes(name, offset, out)
        else:
            start, stop, skipped = _entries_of(offset, len(out), ITEM_SIZE[self._specs[name].dtype])
            values = self._product(name).entries(start, stop)
            values += read_chunk(self.base, name, start, stop)
            out[:] = values.view(np.uint8).data[skipped : skipped + len(out)]

    def close(self) -> None:
        self.base.close()
        self.adapter.posterior.mean.close()


class ProductPrecision(Closing):
    """The precision of an adapted base: `1 / (V_W + floor)` in F32, for the tensors that the
    adapter holds.

    `variance` gives V_W and says what this precision is not. A factor without a stored precision
    was frozen and has variance 0. Tensors that the adapter replaces whole have their stored
    precision.

    Args:
        mean: The adapted base.
        count: Take the factors' precisions as if this many observations had been seen; None for the
            recorded number.
    """

    notes: tuple[str, ...] = ()
    is_computed = True

    def __init__(self, mean: AdaptedSource, count: float | None = None) -> None:
        self._mean, self._adapter, self._count = mean, mean.adapter, count
        assert mean.adapter.posterior.precision is not None
        self._source = mean.adapter.posterior.precision
        stored = self._source.specs
        self._specs = {
            name: TensorSpec("F32", mean.specs[name].shape)
            for name, (layer, _) in mean.adapted.items()
            if layer.a in stored or layer.b in stored
        }
        self._specs |= {
            n: TensorSpec("F32", mean.specs[n].shape)
            for n, disk in mean.whole.items()
            if disk in stored
        }
        self._variance = lru_cache(_KEPT)(self._make)
        self._stored = lru_cache(_KEPT)(self._read)

    def _make(self, name: str) -> Product:
        layer, transposed = self._mean.adapted[name]
        variances = self._adapter.variances(layer, self._count)
        assert variances is not None
        return variance(
            self._adapter.factors(layer), variances, layer.scaling, transposed=transposed
        )

    def _read(self, name: str) -> Array:
        values = self._adapter.counted(self._mean.whole[name], self._count)
        assert values is not None
        return values.reshape(-1)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        return self._source.files

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files of the adapter's precision."""
        return self._source.inputs

    def counted(self, count: float) -> "ProductPrecision":
        """The product's precision with the factors' taken as if `count` observations were seen."""
        return ProductPrecision(self._mean, count)

    @property
    def metadata(self) -> Mapping[str, str]:
        return {}

    def where(self, name: str) -> str:
        adapted = self._mean.adapted
        disk = self._mean.whole[name] if name in self._mean.whole else adapted[name][0].a
        return self._source.where(disk if disk in self._source.specs else adapted[name][0].b)

    def file_of(self, name: str) -> int:
        return 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        start, stop, skipped = _entries_of(offset, len(out), 4)
        if name in self._mean.whole:
            values = self._stored(name)[start:stop]
        else:
            values = np.float32(1) / (
                self._variance(name).entries(start, stop) + np.float32(VARIANCE_FLOOR)
            )
        out[:] = values.view(np.uint8).data[skipped : skipped + len(out)]

    def close(self) -> None:
        self._source.close()


def open_model(
    ref: str,
    *,
    precision: str | None = None,
    isotropic: float | None = None,
    with_precision: bool = True,
    count: float | None = None,
) -> Posterior:
    """`open_posterior`, or for `BASE+ADAPTER` `open_adapted`."""
    if split_ref(ref) is None:
        return open_posterior(
            ref, precision=precision, isotropic=isotropic, with_precision=with_precision
        )
    return open_adapted(
        ref, precision=precision, isotropic=isotropic, with_precision=with_precision, count=count
    )


def open_adapted(
    ref: str,
    *,
    precision: str | None = None,
    isotropic: float | None = None,
    with_precision: bool = True,
    count: float | None = None,
) -> Posterior:
    """Open `BASE+ADAPTER` as one dense posterior. Reads headers and the adapter's config only.

    Its precision, if the adapter has one, is a `ProductPrecision`, on the scale of the summed loss
    and without
    `info`: it is taken as it is, with prior 0.

    Args:
        ref: Two paths or Hub ids with a `+` between them.
        precision: Another place for the adapter's precision.
        isotropic: One precision for every entry, 1/weight^2, instead of a file.
        with_precision: False leaves precisions alone.
        count: Observations that the adapter's precision shall stand for; the recorded number if
            None.

    Raises:
        CheckpointError: No such base or adapter.
        ConfigError: A kind of adapter that is not read.
        MismatchError: An adapter that does not fit this base.
        PrecisionError: A precision taken at other weights than this adapter's.
    """
    parts = split_ref(ref)
    if parts is None:
        raise CheckpointError(f"'{ref}': not of the form BASE+ADAPTER.")
    stored = with_precision and isotropic is None
    base = open_posterior(parts[0], with_precision=False)
    try:
        adapter = open_adapter(parts[1], precision=precision, with_precision=stored)
    except BaseException:
        base.close()
        raise
    try:
        mean = AdaptedSource(base.mean, adapter)
        product = None if adapter.posterior.precision is None else ProductPrecision(mean, count)
        return Posterior(
            ref, base.path, mean, product, isotropic=isotropic, parts=(base, adapter.posterior)
        )
    except BaseException:
        base.close()
        adapter.close()
        raise


def split_ref(ref: str) -> tuple[str, str] | None:
    """The two parts of `BASE+ADAPTER`; None for anything else, a path with a `+` in it included.

    Raises `CheckpointError` if neither the whole nor two parts of it are paths or Hub ids.
    """
    if "+" not in ref or _exists(ref):
        return None
    pairs = [(ref[:i], ref[i + 1 :]) for i, c in enumerate(ref) if c == "+"]
    pairs.sort(key=lambda pair: -sum(map(_exists, pair)))
    for pair in pairs:
        if all(_exists(part) or is_hub_id(part) for part in pair):
            return pair
    missing = next(part for part in pairs[0] if not (_exists(part) or is_hub_id(part)))
    raise CheckpointError(
        f"'{ref}': no such path, and not BASE+ADAPTER either: '{missing}' is no path and no Hub "
        "id. Name two folders, "
        "the model's and the adapter's."
    )


def _exists(ref: str) -> bool:
    return bool(ref) and Path(ref).expanduser().exists()


def _entries_of(offset: int, size: int, item: int) -> tuple[int, int, int]:
    """The entries that hold some bytes, which may begin inside one, and how many of their first
    bytes to skip.
    """
    start, stop = offset // item, -(-(offset + size) // item)
    return start, stop, offset - start * item


def _place(
    base: CheckpointSource, adapter: Adapter
) -> tuple[dict[str, tuple[Layer, bool]], dict[str, str]]:
    """Which tensors of the base are adapted (and whether they are stored transposed), and which are
    replaced.
    """
    weights = {f"{module}.weight": layer for module, layer in adapter.layers.items()}
    renaming = find_renaming(base.specs, [*weights, *adapter.whole])
    placed = {renaming(name, base.specs): layer for name, layer in weights.items()}
    for name, layer in placed.items():
        spec = base.specs.get(name)
        if spec is None:
            raise MismatchError(
                f"'{layer.a}' of '{adapter.ref}' adapts '{name}', which {base.files[0]} does not "
                "hold. Was it trained "
                f"on another model than this ({_named(adapter)}), or on a head that is tied to the "
                "embedding?"
            )
        if spec.shape not in ((layer.rows, layer.columns), (layer.columns, layer.rows)):
            raise MismatchError(
                f"'{layer.a}' of '{adapter.ref}' changes a weight of [{layer.rows}, "
                f"{layer.columns}], but '{name}' in "
                f"{base.where(name)} is {list(spec.shape)}. Was it trained on another model "
                f"({_named(adapter)})?"
            )
        if spec.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{name}' in {base.where(name)} is {spec.dtype}; adapters are applied to "
                f"{', '.join(MERGEABLE)}. "
                "Cast that model to BF16 first."
            )
    transposed = _transposed(base, adapter, placed)
    whole = {renaming(name, base.specs): disk for name, disk in adapter.whole.items()}
    for name, disk in whole.items():
        found = adapter.posterior.mean.specs[disk]
        if name in base.specs and base.specs[name].shape != found.shape:
            raise MismatchError(
                f"'{disk}' of '{adapter.ref}' is {list(found.shape)}, but '{name}' in "
                f"{base.where(name)} is "
                f"{list(base.specs[name].shape)}. Was it trained on another model "
                f"({_named(adapter)})?"
            )
    return {name: (layer, name in transposed) for name, layer in placed.items()}, whole


def _transposed(base: CheckpointSource, adapter: Adapter, placed: Mapping[str, Layer]) -> set[str]:
    """The tensors stored as (d_in, d_out): by shape; square ones as the others are, or as the
    config says.
    """
    votes, square = {}, []
    for name, layer in placed.items():
        if layer.rows == layer.columns:
            square.append(name)
        else:
            votes[name] = base.specs[name].shape == (layer.columns, layer.rows)
    seen = set(votes.values())
    if square and len(seen) > 1:
        raise ConfigError(
            f"'{adapter.ref}' adapts transposed and ordinary layers, and the square '{square[0]}' "
            "may be either. Fold "
            "it into its base with `PeftModel.merge_and_unload()`."
        )
    usual = seen.pop() if len(seen) == 1 else bool(adapter.config.get("fan_in_fan_out"))
    return {n for n, vote in votes.items() if vote} | (set(square) if usual else set())


def _named(adapter: Adapter) -> str:
    return f"{CONFIG} names '{adapter.config.get('base_model_name_or_path')}'"
