"""A precision in its files: the names of its tensors there, and those that are computed from two.

A file of a precision is a safetensors file in which every name begins with a role and a colon, so
that no loader takes a tensor for one of the model's, whatever the file is called:

    precision:NAME    the precision of the model's tensor NAME: one number an entry, a row
                      or the tensor (see `forms`), 1/weight^2
    rows:NAME         r and c of a precision of rank one, S[i, j] = r[i] * c[j]: r has one
    columns:NAME      number a row, (rows, 1, ...), and c one an entry of a row, (1, ...)
    right:NAME        matrices in place of numbers (see `forms`), for the last axis of a tensor
    left:NAME         or for the one before it; both have the shape (..., blocks, n, n)

Files of other programs, and of format 1, have the model's own names. Readers of `StoredPrecisions`
see the model's names in either case, a precision of rank one with the shape of its mean, and
matrices for the axis before the last with one more axis of length 1, which tells them apart.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from mergekit_bayes.checkpoint.codec import encode, is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, Closing, PrecisionSource, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.errors import PrecisionError, shown
from mergekit_bayes.posterior.info import PosteriorInfo, read_info

PRECISION, ROWS, COLUMNS = "precision", "rows", "columns"  # the roles
RIGHT, LEFT = "right", "left"
_ROLES = (PRECISION, ROWS, COLUMNS, RIGHT, LEFT)
_PREFIXED_SINCE = 2  # the first format whose names begin with a role


class StoredTensor(NamedTuple):
    """The precision of one tensor, as its files hold it.

    Attributes:
        spec: Dtype and shape in which it is read.
        parts: Its names in the files: one, or those of `rows` and `columns`.
        numbers: How many numbers are stored.
    """

    spec: TensorSpec
    parts: tuple[str, ...]
    numbers: int


class RankOne(NamedTuple):
    """A precision of rank one, `S[i, j] = rows[i] * columns[j]`, of a tensor of shape (r, c, d).

    Attributes:
        rows: Shape (r, 1, 1), 1/weight^2.
        columns: Shape (1, c, d), without a unit.
    """

    rows: Array
    columns: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it belongs to."""
        return (*self.rows.shape[:1], *self.columns.shape[1:])

    @property
    def size(self) -> int:
        """Number of entries of that tensor."""
        return self.rows.size * self.columns.size


class Matrices(NamedTuple):
    """Precisions of whole directions: a matrix for one axis of a tensor, the same for all others.

    The precision of a row w of a weight of shape (..., r, c) is `w' S w` with S for its c entries;
    `left` is the same for columns, and S for their r entries.

    Attributes:
        blocks: The blocks on the diagonal of S, (..., k, n, n), symmetric, 1/weight^2. What stands
            before k are the leading axes of the tensor, each with its own S.
        is_left: Whether S is for the axis before the last.
    """

    blocks: Array
    is_left: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape by which `forms` knows them."""
        return (*self.blocks.shape, 1) if self.is_left else self.blocks.shape

    @property
    def size(self) -> int:
        """How many numbers are stored."""
        return self.blocks.size


def stored_numbers(source: PrecisionSource, name: str) -> int:
    """How many numbers are stored for a precision; of a computed one, how many it has."""
    if isinstance(source, StoredPrecisions):
        return source.numbers(name)
    return source.specs[name].size


def named(role: str, name: str) -> str:
    """The name in a file of a model's tensor in a role."""
    return f"{role}:{name}"


def parts_of(name: str, precision: Array | RankOne | Matrices) -> dict[str, Array]:
    """The tensors that a precision is in a file, by their names there.

    Args:
        name: The model's name of its tensor.
        precision: One number an entry, a row or the tensor; of rank one; or matrices.
    """
    if isinstance(precision, Matrices):
        return {named(LEFT if precision.is_left else RIGHT, name): precision.blocks}
    if isinstance(precision, RankOne):
        return {named(ROWS, name): precision.rows, named(COLUMNS, name): precision.columns}
    return {named(PRECISION, name): precision}


def renamed(part: str) -> str:
    """The name in a file of today's format of what has a name in a file of any format."""
    return part if part.partition(":")[0] in _ROLES else named(PRECISION, part)


def stored_tensors(
    specs: Mapping[str, TensorSpec], info: PosteriorInfo | None, file: Path
) -> dict[str, StoredTensor]:
    """The precisions in some files by the names of the model's tensors.

    Args:
        specs: Dtype and shape of every tensor, by its name in the files.
        info: Their record; None for files of other programs.
        file: One of them, for messages.

    Raises:
        PrecisionError: A tensor has a role that is not known, two precisions have one name, or a
            factor of rank one is alone or does not fit the other.
    """
    is_prefixed = info is not None and info.format >= _PREFIXED_SINCE
    tensors: dict[str, StoredTensor] = {}
    for name, spec in specs.items():
        role, colon, rest = name.partition(":")
        if role not in _ROLES or not colon:
            if is_prefixed:
                raise PrecisionError(
                    f"{file}: {shown(name)} begins with none of the roles "
                    f"{', '.join(f'{r}:' for r in _ROLES)}. Update mergekit-bayes if a newer one "
                    "wrote it."
                )
            role, rest = PRECISION, name
        if role == PRECISION:
            stored = StoredTensor(spec, (name,), spec.size)
        elif role in (RIGHT, LEFT):
            stored = StoredTensor(_matrices(name, spec, role == LEFT, file), (name,), spec.size)
        else:
            pair = named(ROWS, rest), named(COLUMNS, rest)
            stored = _rank_one(specs, pair, file)
        if tensors.setdefault(rest, stored).parts != stored.parts:
            raise PrecisionError(f"{file}: holds two precisions of {shown(rest)}. Make it again.")
    return tensors


def _rank_one(specs: Mapping[str, TensorSpec], pair: tuple[str, str], file: Path) -> StoredTensor:
    for name in pair:
        if name not in specs:
            raise PrecisionError(f"{file}: {shown(name)} is missing, the other factor is there.")
    rows, columns = (specs[name] for name in pair)
    shape = (*rows.shape[:1], *columns.shape[1:])
    fits = (
        len(rows.shape) == len(columns.shape) > 1
        and rows.shape == (shape[0], *(1 for _ in shape[1:]))
        and columns.shape[0] == 1
        and rows.dtype == columns.dtype == "F32"
    )
    if not fits:
        raise PrecisionError(
            f"{file}: {shown(pair[0])} is {rows.dtype} {list(rows.shape)} and the columns "
            f"{columns.dtype} {list(columns.shape)}, expected F32 [rows, 1, ...] and [1, ...]."
        )
    return StoredTensor(TensorSpec("F32", shape), pair, rows.size + columns.size)


def _matrices(name: str, spec: TensorSpec, is_left: bool, file: Path) -> TensorSpec:
    if len(spec.shape) < 3 or spec.shape[-1] != spec.shape[-2] or spec.dtype != "F32":
        raise PrecisionError(
            f"{file}: {shown(name)} is {spec.dtype} {list(spec.shape)}, expected F32 "
            "[..., blocks, n, n]."
        )
    return TensorSpec(spec.dtype, (*spec.shape, 1)) if is_left else spec


class StoredPrecisions(Closing):
    """The precisions in some files, by the names of the model's tensors.

    Attributes:
        info: What the files say about them; None if another program wrote them.
        notes: None.
        is_computed: False.
    """

    notes: tuple[str, ...] = ()
    is_computed = False

    def __init__(self, files: Sequence[Path]) -> None:
        """Open the files and check their headers.

        Raises:
            CheckpointError: As `SafetensorsSource`.
            PrecisionError: The record cannot be read, or the names are not those of precisions.
        """
        with ExitStack() as stack:
            self._stored = stack.enter_context(SafetensorsSource(files))
            self.info = read_info(self._stored)
            self._tensors = stored_tensors(self._stored.specs, self.info, self.files[0])
            stack.pop_all()  # opened in full: the caller closes it from here on
        self._specs = {name: tensor.spec for name, tensor in self._tensors.items()}
        self._factors: dict[str, RankOne] = {}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files."""
        return self._stored.files

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """The same files, each with its stamp of when it was opened."""
        return self._stored.inputs

    @property
    def metadata(self) -> Mapping[str, str]:
        """The `__metadata__` of their headers."""
        return self._stored.metadata

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every precision, by the name of the model's tensor."""
        return self._specs

    @property
    def in_files(self) -> SafetensorsSource:
        """The tensors as they are in the files."""
        return self._stored

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in the files of a tensor's precision: one, or those of `rows` and `columns`."""
        return self._tensors[name].parts

    def numbers(self, name: str) -> int:
        """How many numbers are stored for a tensor."""
        return self._tensors[name].numbers

    def counted(self, count: float) -> Self:
        """The same source: the count of a stored precision is a factor."""
        return self

    def where(self, name: str) -> str:
        """The file that holds a precision, for messages."""
        return self._stored.where(self._tensors[name].parts[0])

    def file_of(self, name: str) -> int:
        """Index of the file that holds a precision."""
        return self._stored.file_of(self._tensors[name].parts[0])

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with a precision's bytes, from byte `offset` on; of rank one the products.

        Raises:
            CheckpointError: As `SafetensorsSource.read_bytes`.
            PrecisionError: A factor of rank one is negative or not finite.
        """
        parts = self._tensors[name].parts
        if len(parts) == 1:
            self._stored.read_bytes(parts[0], offset, out)
            return
        start, stop = offset // 4, -(-(offset + len(out)) // 4)
        content = encode(self._products(name, start, stop), "F32")
        out[:] = content[offset - 4 * start :][: len(out)]

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        self._stored.close()

    def _products(self, name: str, start: int, stop: int) -> Array:
        """Entries `start:stop` of a precision of rank one, in float32."""
        factors = self._factors.get(name)
        if factors is None:
            factors = self._factors[name] = self._read_factors(name)
        row = max(factors.columns.size, 1)
        first, last = start // row, -(-stop // row)
        products = factors.rows.reshape(-1, 1)[first:last] * factors.columns.reshape(1, -1)
        result: Array = products.reshape(-1)[start - first * row : stop - first * row]
        return result

    def _read_factors(self, name: str) -> RankOne:
        rows, columns = (read_tensor(self._stored, part) for part in self._tensors[name].parts)
        bad = sum(int(np.count_nonzero(is_bad_precision(factor))) for factor in (rows, columns))
        if bad:
            raise PrecisionError(
                f"{self.where(name)}: the factors of the precision of '{name}' have {bad} entries "
                "that are negative or not finite. Estimate it again."
            )
        return RankOne(rows, columns)


class PrecisionSink(SafetensorsSink):
    """A file of precisions with one tensor each, which are written by the model's names."""

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, tuple[str, TensorSpec]],
        info: PosteriorInfo,
        *,
        shared: bool = False,
        begun: bool = False,
    ) -> None:
        """Create the file at its final size, as `SafetensorsSink` does.

        Args:
            path: The file.
            parts: By the model's name of each tensor, that of its precision in the file (`named`),
                with its dtype and shape there.
            info: The record for the header.
            shared: As of `SafetensorsSink`.
            begun: As of `SafetensorsSink`.
        """
        super().__init__(path, dict(parts.values()), info.to_metadata(), shared=shared, begun=begun)
        self._in_file = {name: part for name, (part, _) in parts.items()}

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of the precision of the model's tensor `name`."""
        super().write_bytes(self._in_file[name], offset, data)
