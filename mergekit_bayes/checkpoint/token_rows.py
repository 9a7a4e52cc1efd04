"""A model whose embedding and head have the rows of an output's tokens, made as they are read."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from mergekit_bayes.checkpoint.codec import decode, encode, read_chunk
from mergekit_bayes.checkpoint.names import (
    is_token_embedding,
    is_vocabulary,
    may_be_tied_head,
)
from mergekit_bayes.checkpoint.specs import (
    ITEM_SIZE,
    MERGEABLE,
    Array,
    CheckpointSource,
    Closing,
    TensorSpec,
)
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.checkpoint.token_maps import MEAN, PADDING, ZERO, Rows, TokenMaps
from mergekit_bayes.errors import MismatchError

_BLOCK = 1 << 18  # entries that are converted or summed up at a time


def token_tensors(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The tensors with one row a token, judged by their names."""
    return [
        name
        for name, spec in specs.items()
        if spec.shape and is_vocabulary(name) and not _is_per_layer(name)
    ]


def stored_dtype(source: CheckpointSource, name: str) -> str:
    """The dtype in which a model's file has a tensor, whatever rows it was given for a merge.

    A source whose tensors are made of those of other sources, maybe in another dtype, has a method
    of this name.
    """
    of_file: Callable[[str], str] | None = getattr(source, "stored_dtype", None)
    return source.specs[name].dtype if of_file is None else of_file(name)


def token_rows(specs: Mapping[str, TensorSpec]) -> int:
    """How many tokens have a row in all tensors with one row a token; 0 without such a tensor."""
    return min((specs[name].shape[0] for name in token_tensors(specs)), default=0)


class TokenSource(Closing):
    """A model whose token tensors have the rows that a map says; all others are as they are.

    Rows are read where they are asked for, and nothing is kept but the map and one row for padding.
    A tensor is of the model's dtype if its rows are copies of rows of that dtype. Where one of them
    is a mean, which is summed in float64, or comes from another dtype, the tensor is F32 (F64 if
    a row is). Reading is safe in several threads at once.

    Attributes:
        base: The model's tensors as stored.
        maps: Where the rows of all models come from.
        is_computed: Whether a tensor has another dtype than the stored one.
    """

    def __init__(
        self, sources: Sequence[CheckpointSource], model: int, maps: TokenMaps, refs: Sequence[str]
    ) -> None:
        """Match the rows. The source owns the model's tensors, and no other model's.

        Args:
            sources: The tensors of all models as stored.
            model: The number of the model that this source stands for.
            maps: Where its rows come from.
            refs: The models as the user gave them, for messages.

        Raises:
            MismatchError: A row comes from a model that lacks the tensor or has longer or shorter
                rows, or a tensor cannot be rearranged.
        """
        self.base, self._sources, self._refs = sources[model], sources, refs
        self._model, self.maps, self._rows = model, maps, maps.of(model)
        self._names: dict[str, dict[int, str]] = {}  # of a tensor in each model that gives rows
        self._padding: dict[str, Array] = {}
        self._lock = Lock()
        specs = dict(self.base.specs)
        for name in token_tensors(specs):
            specs[name] = self._match(name)
        for name, spec in specs.items():
            if spec.shape and is_vocabulary(name) and _is_per_layer(name):
                self._refuse_moved(name, spec)
        self._specs: Mapping[str, TensorSpec] = specs
        self.is_computed = self.base.is_computed or any(
            specs[name].dtype != self.base.specs[name].dtype for name in self._names
        )

    def _match(self, name: str) -> TensorSpec:
        """Find the tensor in all models that give rows of it; the spec of the result."""
        owner, maps, spec = self._rows.owner, self.maps, self.base.specs[name]
        givers = {int(m) for m in np.unique(owner) if m >= 0}
        has_mean = bool((owner == MEAN).any())
        if has_mean:
            givers |= set(maps.counted)
        names: dict[int, str] = {}
        for giver in sorted(givers | {self._model}):
            found = name if giver == self._model else _counterpart(name, self._sources[giver].specs)
            if found is None:
                if giver in owner:
                    raise MismatchError(
                        f"'{name}' of '{self._refs[self._model]}' needs rows of tokens of "
                        f"'{self._refs[giver]}', which has no such tensor. Take the tokens of a "
                        "model that has it."
                    )
                continue
            names[giver] = found
            self._check(name, spec, giver, found)
        self._names[name] = names
        dtypes = {self._sources[giver].specs[found].dtype for giver, found in names.items()}
        is_copy = dtypes == {spec.dtype} and not has_mean and not (owner == PADDING).any()
        dtype = spec.dtype if is_copy else "F64" if "F64" in dtypes else "F32"
        return TensorSpec(dtype, (maps.rows, *spec.shape[1:]))

    def _check(self, name: str, spec: TensorSpec, giver: int, found: str) -> None:
        other = self._sources[giver].specs[found]
        if other.dtype not in MERGEABLE:
            raise MismatchError(
                f"'{found}' is {other.dtype} in '{self._refs[giver]}' "
                f"({self._sources[giver].where(found)}); rows are taken from "
                f"{', '.join(MERGEABLE)}. Cast that model to BF16 first."
            )
        if other.shape[1:] != spec.shape[1:]:
            raise MismatchError(
                f"'{name}' is {list(spec.shape)} in '{self._refs[self._model]}' but "
                f"{list(other.shape)} in '{self._refs[giver]}', whose rows are needed for tokens "
                "that the other lacks: their rows differ in length. Merge models of one width."
            )

    def _refuse_moved(self, name: str, spec: TensorSpec) -> None:
        count = min(spec.shape[0], self.maps.tokens)
        owner, row = self._rows.owner[:count], self._rows.row[:count]
        if not (owner == self._model).all() or not (row == np.arange(count)).all():
            raise MismatchError(
                f"'{name}' of '{self._refs[self._model]}' has rows of tokens for each layer, which "
                "stay where they are, and the output's tokens have other numbers. Take the tokens "
                "of this model."
            )

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by name."""
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        """The model's own files."""
        return self.base.files

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """The model's own files, and those of the models that give it rows."""
        givers = {giver for names in self._names.values() for giver in names}
        others = [self._sources[giver].inputs for giver in sorted(givers - {self._model})]
        return {
            file: stamp for inputs in (*others, self.base.inputs) for file, stamp in inputs.items()
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of the model's own files."""
        return self.base.notes

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the model's own files."""
        return self.base.metadata

    def where(self, name: str) -> str:
        """The file of the model's own tensor, for messages."""
        return self.base.where(name)

    def file_of(self, name: str) -> int:
        """Index of the shard to which a tensor belongs."""
        return self.base.file_of(name)

    def stored_dtype(self, name: str) -> str:
        """The dtype in which the model's own file has a tensor."""
        return self.base.specs[name].dtype

    def close(self) -> None:
        """Close the model's own files."""
        self.base.close()

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        if name not in self._names:
            self.base.read_bytes(name, offset, out)
            return
        row_bytes = self._width(name) * ITEM_SIZE[self._specs[name].dtype]
        if not row_bytes or not len(out):
            return
        end = offset + len(out)
        first, last = offset // row_bytes, -(-end // row_bytes)
        for start, stop in _runs(self._rows, first, last):
            begin, finish = max(offset, start * row_bytes), min(end, stop * row_bytes)
            view = out[begin - offset : finish - offset]
            self._read_run(name, start, begin - start * row_bytes, view)

    def _width(self, name: str) -> int:
        return math.prod(self._specs[name].shape[1:])

    def _read_run(self, name: str, start: int, offset: int, out: memoryview) -> None:
        """Fill `out` from rows that follow each other in one model, or from one computed row.

        Args:
            name: The tensor.
            start: The first row of the run.
            offset: Bytes of it to skip.
            out: Where to write.
        """
        owner, row = int(self._rows.owner[start]), int(self._rows.row[start])
        dtype, width = self._specs[name].dtype, self._width(name)
        item = ITEM_SIZE[dtype]
        if owner == ZERO:
            np.frombuffer(out, np.uint8)[:] = 0
            return
        if owner >= 0:
            source, stored = self._sources[owner], self._names[name][owner]
            if source.specs[stored].dtype == dtype:
                source.read_bytes(stored, row * width * item + offset, out)
                return
        end = offset + len(out)
        for begin in range(offset // item, -(-end // item), _BLOCK):
            stop = min(begin + _BLOCK, -(-end // item))
            data = encode(self._entries(name, start, owner, row, begin, stop), dtype)
            low, high = max(offset, begin * item), min(end, stop * item)
            out[low - offset : high - offset] = data[low - begin * item : high - begin * item]

    def _entries(self, name: str, token: int, owner: int, row: int, begin: int, stop: int) -> Array:
        """Entries `begin:stop` of a run, as float32 (float64 for F64)."""
        width, names = self._width(name), self._names[name]
        if owner >= 0:
            skipped = row * width
            return read_chunk(self._sources[owner], names[owner], skipped + begin, skipped + stop)
        if owner == PADDING:
            return self._mean_row(name)[np.arange(begin, stop) % width]
        total = np.zeros(stop - begin)
        sharing = [(m, r) for m, r in self.maps.sharing(token) if m in names]
        for model, own in sharing:
            skipped = own * width
            total += read_chunk(self._sources[model], names[model], skipped + begin, skipped + stop)
        return total / max(len(sharing), 1)

    def _mean_row(self, name: str) -> Array:
        """The mean of all rows that are no padding, made when it is first asked for."""
        with self._lock:
            if name not in self._padding:
                dtype, width = self._specs[name].dtype, self._width(name)
                tokens = self.maps.tokens
                total = np.zeros(width)
                rows = max(1, _BLOCK // max(width, 1))
                for first in range(0, tokens, rows):
                    count = min(rows, tokens - first)
                    raw = np.empty(count * width * ITEM_SIZE[dtype], np.uint8)
                    self.read_bytes(name, first * width * ITEM_SIZE[dtype], raw.data)
                    total += decode(raw, dtype).reshape(count, width).sum(0, dtype=np.float64)
                self._padding[name] = total / max(tokens, 1)
            return self._padding[name]


def _is_per_layer(name: str) -> bool:
    """Whether a tensor has rows of tokens for each layer, counted by a config key of its own."""
    return "per_layer" in name


def _runs(rows: Rows, first: int, last: int) -> list[tuple[int, int]]:
    """Ranges of rows `first:last` that follow each other in one model, or are computed alike.

    Each mean is a range of its own.
    """
    owner, row = rows.owner[first:last], rows.row[first:last]
    follows = (owner[1:] == owner[:-1]) & ((row[1:] == row[:-1] + 1) | (owner[1:] < 0))
    follows &= owner[1:] != MEAN
    cuts = np.flatnonzero(~follows) + 1
    starts = [0, *cuts.tolist()]
    return [
        (first + a, first + b) for a, b in zip(starts, [*starts[1:], last - first], strict=True)
    ]


def _counterpart(name: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The tensor of another model that a tensor with one row a token corresponds to.

    Names may have other beginnings. The head of a model without one is its embedding.
    """
    if name in specs:
        return name
    tensors = token_tensors(specs)
    ending = ".".join(name.split(".")[-2:])
    alike = [other for other in tensors if other == ending or other.endswith(f".{ending}")]
    if not alike and may_be_tied_head(name):
        alike = [other for other in tensors if is_token_embedding(other)]
    return alike[0] if len(alike) == 1 else None
