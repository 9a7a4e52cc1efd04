"""A base with an adapter as one dense model, whose entries are computed as they are read."""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import read_chunk
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, CheckpointSource, Closing, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.dense import VARIANCE_FLOOR, Product, change, variance
from mergekit_bayes.lora.layers import Factors
from mergekit_bayes.lora.placing import place_adapter

_KEPT = 8  # layers whose factors stay in memory; a merge reads one layer after another


class AdaptedSource(Closing):
    """A base with an adapter folded in: names, shapes and shards of the base.

    An adapted tensor is F32 (F64 on an F64 base), because `W + s B A` is computed in that format.
    Tensors that the adapter holds whole are its bytes, all others the base's; where it holds a
    weight whole and factors of it, W is the adapter's. Reading is safe in several
    threads at once.

    Attributes:
        base: The base's tensors.
        adapter: The adapter.
        adapted: The layers by the tensor that they change.
        replaced: The tensors that the adapter replaces, from the base's name to its name on disk.
    """

    is_computed = True

    def __init__(self, base: CheckpointSource, adapter: Adapter) -> None:
        """Match the adapter with the base; the source then owns both.

        Raises:
            ConfigError: The layout of a square weight is ambiguous.
            MismatchError: A layer or tensor of the adapter does not fit the base.
        """
        self.base, self.adapter = base, adapter
        self.adapted, self.replaced, self._notes = place_adapter(base, adapter)
        self._specs: dict[str, TensorSpec] = {
            name: self._spec(name) for name in dict.fromkeys([*base.specs, *self.replaced])
        }
        self._product = lru_cache(_KEPT)(self._make)

    def _origin(self, name: str) -> tuple[CheckpointSource, str]:
        """Where W is stored, and its name there."""
        if name in self.replaced:
            return self.adapter.posterior.mean, self.replaced[name]
        return self.base, name

    def _spec(self, name: str) -> TensorSpec:
        source, stored = self._origin(name)
        spec = source.specs[stored]
        if name not in self.adapted:
            return spec
        return TensorSpec("F64" if spec.dtype == "F64" else "F32", spec.shape)

    def _make(self, name: str) -> Product:
        layer, transposed = self.adapted[name]
        dtype = np.float64 if self._specs[name].dtype == "F64" else np.float32
        factors = Factors(*(f.astype(dtype, copy=False) for f in self.adapter.factors(layer)))
        return change(factors, layer.scaling, transposed=transposed)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        """The base's files."""
        return self.base.files

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """The files of the base and of the adapter."""
        return {**self.base.inputs, **self.adapter.posterior.mean.inputs}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the base's files."""
        return self.base.metadata

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan reports of it: what of the adapter is left out, and another base."""
        return self._notes if self.other_base is None else (*self._notes, self.other_base)

    @cached_property
    def other_base(self) -> str | None:
        """That the adapter records a base of other weights than this one; None if it does not."""
        if self.adapter.base is None or identity(self.base) == self.adapter.base:
            return None
        named = self.adapter.config.get("base_model_name_or_path")
        return (
            f"'{self.adapter.ref}' was trained on other weights ('{named}') than those it is "
            "applied to"
        )

    def where(self, name: str) -> str:
        """The file or files of which a tensor is made, for messages."""
        source, stored = self._origin(name)
        where = source.where(stored)
        if name not in self.adapted:
            return where
        factors = self.adapter.posterior.mean.where(self.adapted[name].layer.a)
        return f"{where} + {factors}"

    def file_of(self, name: str) -> int:
        """Index of the base's shard to which a tensor belongs; 0 if only the adapter has it."""
        return self.base.file_of(name) if name in self.base.specs else 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        source, stored = self._origin(name)
        if name not in self.adapted:
            source.read_bytes(stored, offset, out)
        else:
            start, stop, skipped = _entries_of(offset, len(out), ITEM_SIZE[self._specs[name].dtype])
            values = self._product(name).entries(start, stop)
            values += read_chunk(source, stored, start, stop)
            out[:] = values.view(np.uint8).data[skipped : skipped + len(out)]

    def close(self) -> None:
        """Close the files of the base and the adapter."""
        self.base.close()
        self.adapter.posterior.mean.close()


class ProductPrecision(Closing):
    """The precision of an adapted base: `1 / (V_W + floor)` in F32, for the adapter's tensors.

    `dense.variance` computes V_W and says what this precision is not. A factor without a stored
    precision was frozen and has variance 0. Tensors that the adapter replaces have their stored
    precision.
    """

    notes: tuple[str, ...] = ()
    is_computed = True

    def __init__(self, mean: AdaptedSource, count: float | None = None) -> None:
        """Derive the precision from the factors' precisions.

        Args:
            mean: The adapted base; its adapter has a precision.
            count: Number of observations for which the factors' precisions are counted; the
                recorded number if None.
        """
        self._mean, self._adapter, self._count = mean, mean.adapter, count
        assert mean.adapter.posterior.precision is not None
        self._source = mean.adapter.posterior.precision
        stored = self._source.specs
        self._replaced = {n: d for n, d in mean.replaced.items() if n not in mean.adapted}
        self._specs = {
            name: TensorSpec("F32", mean.specs[name].shape)
            for name, (layer, _) in mean.adapted.items()
            if layer.a in stored or layer.b in stored
        }
        self._specs |= {
            n: TensorSpec("F32", mean.specs[n].shape)
            for n, disk in self._replaced.items()
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
        values = self._adapter.counted(self._replaced[name], self._count)
        assert values is not None
        return values.reshape(-1)

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor that has a precision, by the base's name."""
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the adapter's precision."""
        return self._source.files

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """The files of the adapter's precision."""
        return self._source.inputs

    def counted(self, count: float) -> "ProductPrecision":
        """The product's precision with the factors' taken as if `count` observations were seen."""
        return ProductPrecision(self._mean, count)

    @property
    def metadata(self) -> Mapping[str, str]:
        """Empty: the adapter's record is not that of the product."""
        return {}

    def where(self, name: str) -> str:
        """The file that holds the precision of a factor of the tensor, for messages."""
        adapted = self._mean.adapted
        disk = self._replaced[name] if name in self._replaced else adapted[name].layer.a
        return self._source.where(disk if disk in self._source.specs else adapted[name].layer.b)

    def file_of(self, name: str) -> int:
        """Always 0: the precision is not sharded."""
        return 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        start, stop, skipped = _entries_of(offset, len(out), 4)
        if name in self._replaced:
            values = self._stored(name)[start:stop]
        else:
            values = np.float32(1) / (
                self._variance(name).entries(start, stop) + np.float32(VARIANCE_FLOOR)
            )
        out[:] = values.view(np.uint8).data[skipped : skipped + len(out)]

    def close(self) -> None:
        """Close the files of the adapter's precision."""
        self._source.close()


def _entries_of(offset: int, size: int, item: int) -> tuple[int, int, int]:
    """The entries that hold a range of bytes, and how many of their first bytes to skip.

    The range may begin and end inside an entry.
    """
    start, stop = offset // item, -(-(offset + size) // item)
    return start, stop, offset - start * item
