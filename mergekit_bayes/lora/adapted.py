"""A base with an adapter as one dense model, whose entries are computed as they are read."""

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from mergekit_bayes.checkpoint.codec import read_chunk, read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, CheckpointSource, Closing, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.lora.adapter import Adapter
from mergekit_bayes.lora.changes import Added, Change, Once, Rescaled, Rows, Shifted
from mergekit_bayes.lora.dense import VARIANCE_FLOOR, Product, change, variance
from mergekit_bayes.lora.layers import Factors, Layer
from mergekit_bayes.lora.magnitudes import output_norms
from mergekit_bayes.lora.misplaced import note_on_name
from mergekit_bayes.lora.moved import move_of
from mergekit_bayes.lora.pieces import Stack, stack_pieces
from mergekit_bayes.lora.placing import place_adapter
from mergekit_bayes.lora.variants import initial_move

_KEPT = 8  # layers whose factors stay in memory; a merge reads one layer after another


class AdaptedSource(Closing):
    """A base with an adapter folded in: names, shapes and shards of the base.

    A changed tensor is F32 (F64 on an F64 base), because `W + s B A` is computed in that format.
    Tensors that the adapter holds whole are its bytes, all others the base's; where it holds a
    weight whole and factors of it, W is the adapter's. Reading is safe in several
    threads at once.

    Attributes:
        base: The base's tensors.
        adapter: The adapter.
        heads: Heads that the base does not store, with the embedding of the base that each one is
            without the adapter.
        adapted: The layers by the tensor that they change.
        biases: The layers by the bias that theirs is added to (`lora_bias`).
        rows: The trained rows by the table whose rows they replace.
        changed: The tensors whose entries are computed: those of the three above.
        replaced: The tensors that the adapter replaces, from the base's name to its name on disk.
    """

    is_computed = True

    def __init__(
        self,
        base: CheckpointSource,
        adapter: Adapter,
        heads: Mapping[str, str] | None = None,
        ref: str | None = None,
    ) -> None:
        """Match the adapter with the base; the source then owns both.

        Args:
            base: The base's tensors.
            adapter: The adapter.
            heads: Heads that the base does not store and that become tensors of their own, each
                with the embedding of the base that it is without the adapter.
            ref: The base as the user gave it, which is compared with the name in the config.

        Raises:
            ConfigError: The layout of a square weight is ambiguous.
            MismatchError: A layer or tensor of the adapter does not fit the base.
        """
        self.base, self.adapter, self.heads = base, adapter, dict(heads or {})
        placed = place_adapter(base, adapter, self.heads)
        self.adapted, self.replaced, notes = placed.layers, placed.replaced, placed.notes
        named = None if ref is None else note_on_name(adapter, ref)
        self._notes = notes if named is None else (*notes, named)
        self.biases, self.rows = placed.biases, placed.rows
        self.changed = {*self.adapted, *self.biases, *self.rows}
        names = [*base.specs, *self.heads, *self.replaced]
        self._specs = {name: self._spec(name) for name in dict.fromkeys(names)}
        self._change = lru_cache(_KEPT)(self._make)
        self._moves, self._ratios = Once(self._move), Once(self._ratio)

    def _origin(self, name: str) -> tuple[CheckpointSource, str]:
        """Where W is stored, and its name there."""
        if name in self.replaced:
            return self.adapter.posterior.mean, self.replaced[name]
        return self.base, self.heads.get(name, name)

    def _spec(self, name: str) -> TensorSpec:
        source, stored = self._origin(name)
        spec = source.specs[stored]
        if name not in self.changed:
            return spec
        stored_dtypes = (spec.dtype, self.base.specs[name].dtype if name in self.base.specs else "")
        return TensorSpec("F64" if "F64" in stored_dtypes else "F32", spec.shape)

    def _dtype(self, name: str) -> type[np.float32] | type[np.float64]:
        return np.float64 if self._specs[name].dtype == "F64" else np.float32

    def _make(self, name: str) -> Change:
        dtype = self._dtype(name)
        if name in self.rows:
            trained = self.rows[name]
            indices = np.asarray(trained.indices, np.int64)
            order = np.argsort(indices)
            return Rows(indices[order], self.adapter.values(trained.disk).astype(dtype)[order])
        if name in self.biases:
            layer = self.biases[name]
            assert layer.bias is not None
            addend: Array = self.adapter.values(layer.bias).astype(dtype)
            return Shifted(addend * layer.scaling)
        placed = self.adapted[name]
        if placed.pieces:
            stack = stack_pieces(
                placed.pieces,
                lambda piece: self._change_of(piece.layer, dtype, transposed=piece.transposed),
            )
            return Added(stack)
        product, layer = self._product(name), placed.layer
        if layer.magnitude is None:
            return Added(product)
        return Rescaled(product, self._ratios(name), placed.transposed)

    def _product(self, name: str) -> Product:
        placed, dtype = self.adapted[name], self._dtype(name)
        product = self._change_of(placed.layer, dtype, transposed=placed.transposed)
        # What the adapter stores of the base was stored after it had moved.
        is_to_move = initial_move(self.adapter.config) is not None and name not in self.replaced
        return product.with_more(self._moves(name)) if is_to_move else product

    def _change_of(
        self, layer: Layer, dtype: type[np.float32] | type[np.float64], *, transposed: bool
    ) -> Product:
        factors = Factors(*(f.astype(dtype, copy=False) for f in self.adapter.factors(layer)))
        return change(factors, layer.scaling, transposed=transposed)

    def _move(self, name: str) -> Product:
        method, layer = initial_move(self.adapter.config), self.adapted[name].layer
        assert method is not None
        move = move_of(method, read_tensor(*self._origin(name)), layer.rank, layer.scaling)
        return Product(*(side.astype(self._dtype(name)) for side in move))

    def _ratio(self, name: str) -> Array:
        """`m / ||W + s B A||` of each output, for DoRA."""
        placed, origin = self.adapted[name], self._origin(name)
        assert placed.layer.magnitude is not None
        product = self._product(name)
        shape = (self._specs[name].size // product.width, product.width)
        norms = output_norms(
            lambda start, stop: read_chunk(*origin, start, stop),
            shape,
            product,
            by_column=placed.transposed,
        )
        if not (np.isfinite(norms).all() and norms.all()):
            raise CheckpointError(
                f"{self.where(name)}: an output of '{name}' has no finite norm above zero, "
                "by which DoRA divides. Did training diverge?"
            )
        magnitudes = self.adapter.values(placed.layer.magnitude).reshape(-1)
        return (magnitudes / norms).astype(self._dtype(name))

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
            f"'{self.adapter.ref}' was made on other weights ('{named}') than those it is "
            "applied to"
        )

    def explain_no_precision(self, name: str) -> str | None:
        """Why an adapter with a precision gives none to a tensor; None if it might."""
        if name in self.rows:
            return "Its rows were trained one by one, and nothing is known of the others."
        if name in self.adapted and self.adapted[name].layer.magnitude is not None:
            return "It has magnitudes (DoRA), whose norm ties all entries of an output."
        return None

    def where(self, name: str) -> str:
        """The file or files of which a tensor is made, for messages."""
        source, stored = self._origin(name)
        where = source.where(stored)
        if name not in self.changed:
            return where
        if name in self.rows:
            part = self.rows[name].disk
        else:
            part = (self.adapted[name].layer if name in self.adapted else self.biases[name]).a
        return f"{where} + {self.adapter.posterior.mean.where(part)}"

    def file_of(self, name: str) -> int:
        """Index of the base's shard to which a tensor belongs; 0 if only the adapter has it."""
        stored = self.heads.get(name, name)
        return self.base.file_of(stored) if stored in self.base.specs else 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        source, stored = self._origin(name)
        if name not in self.changed:
            source.read_bytes(stored, offset, out)
        else:
            start, stop, skipped = _entries_of(offset, len(out), ITEM_SIZE[self._specs[name].dtype])
            values = read_chunk(source, stored, start, stop).astype(self._dtype(name), copy=False)
            self._change(name).apply(values, start)
            out[:] = values.view(np.uint8).data[skipped : skipped + len(out)]

    def close(self) -> None:
        """Close the files of the base and the adapter."""
        self.base.close()
        self.adapter.posterior.mean.close()


class ProductPrecision(Closing):
    """The precision of an adapted base: `1 / (V_W + floor)` in F32, for the adapter's tensors.

    `dense.variance` computes V_W and says what this precision is not. A factor without a stored
    precision was frozen and has variance 0. A bias that the adapter adds to has `1 / (s^2 V_b +
    floor)`. Tensors that the adapter replaces have their stored precision. Weights with magnitudes
    (DoRA), whose norm ties all entries of an output, and tables with trained rows have none.
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
        self._replaced = {n: d for n, d in mean.replaced.items() if n not in mean.changed}
        self._specs = {
            name: TensorSpec("F32", mean.specs[name].shape)
            for name, placed in mean.adapted.items()
            if placed.layer.magnitude is None
            and any(layer.a in stored or layer.b in stored for layer in placed.layers)
        }
        self._specs |= {
            n: TensorSpec("F32", mean.specs[n].shape)
            for n, disk in self._replaced.items()
            if disk in stored
        }
        self._specs |= {
            name: TensorSpec("F32", mean.specs[name].shape)
            for name, layer in mean.biases.items()
            if layer.bias in stored
        }
        self._variance = lru_cache(_KEPT)(self._make)
        self._stored = lru_cache(_KEPT)(self._read)

    def _make(self, name: str) -> Product | Stack:
        placed = self._mean.adapted[name]
        if not placed.pieces:
            return self._variance_of(placed.layer, transposed=placed.transposed)
        return stack_pieces(
            placed.pieces, lambda p: self._variance_of(p.layer, transposed=p.transposed)
        )

    def _variance_of(self, layer: Layer, *, transposed: bool) -> Product:
        factors = self._adapter.factors(layer)
        frozen = Factors(*(np.zeros_like(factor) for factor in factors))
        variances = self._adapter.variances(layer, self._count) or frozen
        return variance(factors, variances, layer.scaling, transposed=transposed)

    def _disk(self, name: str) -> str:
        """The name on disk of a tensor that has a precision of its own."""
        if name in self._replaced:
            return self._replaced[name]
        bias = self._mean.biases[name].bias
        assert bias is not None
        return bias

    def _read(self, name: str) -> Array:
        values = self._adapter.counted(self._disk(name), self._count)
        assert values is not None
        if name in self._replaced:
            return values.reshape(-1)
        gain = np.float32(self._mean.biases[name].scaling ** 2)
        variances: Array = gain / (values.reshape(-1) + np.float32(DELTA_0))
        return np.float32(1) / (variances + np.float32(VARIANCE_FLOOR))

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
        if name not in self._mean.adapted:
            return self._source.where(self._disk(name))
        disks = [d for layer in self._mean.adapted[name].layers for d in (layer.a, layer.b)]
        return self._source.where(next(disk for disk in disks if disk in self._source.specs))

    def file_of(self, name: str) -> int:
        """Always 0: the precision is not sharded."""
        return 0

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        start, stop, skipped = _entries_of(offset, len(out), 4)
        if name not in self._mean.adapted:
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
