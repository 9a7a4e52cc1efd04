"""A precision in its files: the names of its tensors there, and those that are computed from two.

A file of a precision is a safetensors file in which every name begins with a role and a colon, so
that no loader takes a tensor for one of the model's, whatever the file is called:

    precision:NAME    the precision of the model's tensor NAME: one number an entry, a row
                      or the tensor (see `forms`), 1/weight^2
    rows:NAME         r and c of a precision of rank one, S[i, j] = r[i] * c[j]: r has one
    columns:NAME      number a row, (rows, 1, ...), and c one an entry of a row, (1, ...)
    right:NAME        matrices in place of numbers (see `forms`), for the last axis of a tensor
    left:NAME         or for the one before it; both have the shape (..., blocks, n, n). Where a
                      tensor has both, each block is a term of a sum of Kronecker products
    diagonal:NAME     the diagonal d, (..., n), of a precision of low rank, diag(d) + U' U; `right`
                      or `left` then is the factor U, (..., k, n), and no matrix

Files of other programs, and of format 1, have the model's own names. Readers of `StoredPrecisions`
see the model's names in either case, and a precision of rank one with the shape of its mean.
Matrices for the axis before the last have one more axis of length 1 there, which tells them apart,
and the numbers of both one after the other the shape (..., blocks, numbers of a block, 1, 1). A
diagonal and its factor have the shape of both in one, and three axes of length 1 (four for `left`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from mergekit_bayes.checkpoint.codec import encode, is_bad_precision, read_tensor
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, Closing, PrecisionSource, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.errors import PrecisionError, shown
from mergekit_bayes.posterior.factors import Directions, Kronecker, LowRank, Matrices, RankOne
from mergekit_bayes.posterior.forms import DirectionsSpec, low_rank_shape
from mergekit_bayes.posterior.info import PosteriorInfo, read_info

PRECISION, ROWS, COLUMNS = "precision", "rows", "columns"  # the roles
RIGHT, LEFT, DIAGONAL = "right", "left", "diagonal"
_ROLES = (PRECISION, ROWS, COLUMNS, RIGHT, LEFT, DIAGONAL)
_PREFIXED_SINCE = 2  # the first format whose names begin with a role


class StoredTensor(NamedTuple):
    """The precision of one tensor, as its files hold it.

    Attributes:
        spec: Dtype and shape in which it is read.
        parts: Its names in the files: one, or the two that it consists of.
        numbers: How many numbers are stored.
    """

    spec: TensorSpec
    parts: tuple[str, ...]
    numbers: int

    @property
    def has_matrices(self) -> bool:
        """Whether they are matrices, which nobody reads by entry."""
        return isinstance(self.spec, DirectionsSpec)


def stored_numbers(source: PrecisionSource, name: str) -> int:
    """How many numbers are stored for a precision; of a computed one, how many it has."""
    if isinstance(source, StoredPrecisions):
        return source.numbers(name)
    return source.specs[name].size


def named(role: str, name: str) -> str:
    """The name in a file of a model's tensor in a role."""
    return f"{role}:{name}"


def parts_of(name: str, precision: Array | RankOne | Directions) -> dict[str, Array]:
    """The tensors that a precision is in a file, by their names there.

    Args:
        name: The model's name of its tensor.
        precision: One number an entry, a row or the tensor; of rank one; or of directions.
    """
    if isinstance(precision, LowRank):
        factor = named(LEFT if precision.is_left else RIGHT, name)
        return {named(DIAGONAL, name): precision.diagonal, factor: precision.factor}
    if isinstance(precision, Kronecker):
        return {named(LEFT, name): precision.left, named(RIGHT, name): precision.right}
    if isinstance(precision, Matrices):
        return {named(LEFT if precision.is_left else RIGHT, name): precision.blocks}
    if isinstance(precision, RankOne):
        return {named(ROWS, name): precision.rows, named(COLUMNS, name): precision.columns}
    return {named(PRECISION, name): precision}


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
    may_be_prefixed = info is None or is_prefixed
    tensors: dict[str, StoredTensor] = {}
    for name, spec in specs.items():
        role, colon, rest = name.partition(":")
        if role not in _ROLES or not colon or not may_be_prefixed:
            if is_prefixed:
                raise PrecisionError(
                    f"{file}: {shown(name)} begins with none of the roles "
                    f"{', '.join(f'{r}:' for r in _ROLES)}. Update mergekit-bayes if a newer one "
                    "wrote it."
                )
            role, rest = PRECISION, name
        if role == PRECISION:
            stored = StoredTensor(spec, (name,), spec.size)
        elif named(DIAGONAL, rest) in specs:
            stored = _low_rank(specs, rest, file)
        elif role in (RIGHT, LEFT):
            stored = _matrices(specs, rest, role, file)
        else:
            pair = named(ROWS, rest), named(COLUMNS, rest)
            stored = _rank_one(specs, pair, file)
        if tensors.setdefault(rest, stored).parts != stored.parts:
            raise PrecisionError(f"{file}: holds two precisions of {shown(rest)}. Make it again.")
    return tensors


def _rank_one(specs: Mapping[str, TensorSpec], pair: tuple[str, str], file: Path) -> StoredTensor:
    for name in pair:
        if name not in specs:
            raise PrecisionError(
                f"{file}: {shown(name)} is missing, the other factor is there. Make it again."
            )
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
            f"{columns.dtype} {list(columns.shape)}, expected F32 [rows, 1, ...] and [1, ...]. "
            "Make it again."
        )
    return StoredTensor(TensorSpec("F32", shape), pair, rows.size + columns.size)


def _matrices(specs: Mapping[str, TensorSpec], name: str, role: str, file: Path) -> StoredTensor:
    """The precision of a tensor that has matrices for one of its axes or for both."""
    parts = tuple(part for part in (named(LEFT, name), named(RIGHT, name)) if part in specs)
    for part in parts:
        spec = specs[part]
        if len(spec.shape) < 3 or spec.shape[-1] != spec.shape[-2] or spec.dtype != "F32":
            raise PrecisionError(
                f"{file}: {shown(part)} is {spec.dtype} {list(spec.shape)}, expected F32 "
                "[..., blocks, n, n]."
            )
    first, last = specs[parts[0]].shape, specs[parts[-1]].shape
    if len(parts) == 1:
        shape = (*first, 1) if role == LEFT else first
        return StoredTensor(DirectionsSpec("F32", shape), parts, prod(first))
    if first[:-2] != last[:-2]:
        raise PrecisionError(
            f"{file}: {shown(parts[0])} is {list(first)} and {shown(parts[1])} {list(last)}, which "
            "are not the same number of terms."
        )
    shape = (*first[:-2], first[-1] ** 2 + last[-1] ** 2, 1, 1)
    return StoredTensor(DirectionsSpec("F32", shape), parts, prod(shape))


def _low_rank(specs: Mapping[str, TensorSpec], name: str, file: Path) -> StoredTensor:
    """The precision of a tensor that has a diagonal and a factor for one of its axes."""
    diagonal = named(DIAGONAL, name)
    factors = [part for part in (named(RIGHT, name), named(LEFT, name)) if part in specs]
    if len(factors) != 1:
        raise PrecisionError(
            f"{file}: {shown(diagonal)} needs one factor, {RIGHT}: or {LEFT}:, and has "
            f"{len(factors)}. Make it again."
        )
    (factor,) = factors
    of_diagonal, of_factor = specs[diagonal], specs[factor]
    shape = of_factor.shape
    fits = len(shape) > 1 and of_diagonal.shape == (*shape[:-2], shape[-1])
    if not fits or not of_diagonal.dtype == of_factor.dtype == "F32":
        raise PrecisionError(
            f"{file}: {shown(diagonal)} is {of_diagonal.dtype} {list(of_diagonal.shape)} and "
            f"{shown(factor)} {of_factor.dtype} {list(of_factor.shape)}, expected F32 [..., n] and "
            "[..., k, n]. Make it again."
        )
    axis = -1 if factor == named(RIGHT, name) else -2
    spec = DirectionsSpec("F32", low_rank_shape(shape[:-2], shape[-2], shape[-1], axis))
    return StoredTensor(spec, (diagonal, factor), spec.size)


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
        """The names in the files of a tensor's precision: one, or the two that it consists of."""
        return self._tensors[name].parts

    def current_parts(self, name: str) -> dict[str, str]:
        """The same names, each with the one that it has in a file of today's format."""
        stored = self._tensors[name]
        if stored.has_matrices or len(stored.parts) > 1:
            return {part: part for part in stored.parts}
        return {stored.parts[0]: named(PRECISION, name)}

    @property
    def matrices(self) -> tuple[str, ...]:
        """The tensors whose precisions are matrices."""
        return tuple(name for name, stored in self._tensors.items() if stored.has_matrices)

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

        Of several tensors of matrices come all of the first, in the order of `parts`, and so on.

        Raises:
            CheckpointError: As `SafetensorsSource.read_bytes`.
            PrecisionError: A factor of rank one is negative or not finite.
        """
        parts = self._tensors[name].parts
        if len(parts) == 1:
            self._stored.read_bytes(parts[0], offset, out)
            return
        if self._tensors[name].has_matrices:
            sizes = [self._stored.specs[part].nbytes for part in parts]
            for part, start, stop, at in _overlaps(sizes, offset, len(out)):
                self._stored.read_bytes(parts[part], at, out[start:stop])
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
        with np.errstate(over="ignore"):  # infinite, and bad entries for whoever reads them
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


def _overlaps(
    sizes: Sequence[int], offset: int, length: int
) -> Iterator[tuple[int, int, int, int]]:
    """Where a range of bytes lies in parts that follow each other.

    Yields:
        Index of a part, start and stop within the range, and the offset within the part.
    """
    begin = 0
    for part, size in enumerate(sizes):
        start, stop = max(offset, begin), min(offset + length, begin + size)
        if start < stop:
            yield part, start - offset, stop - offset, start - begin
        begin += size


class PrecisionSink(SafetensorsSink):
    """A file of precisions, which are written by the model's names."""

    def __init__(
        self,
        path: Path,
        parts: Mapping[str, Mapping[str, TensorSpec]],
        info: PosteriorInfo,
        *,
        shared: bool = False,
        begun: bool = False,
    ) -> None:
        """Create the file at its final size, as `SafetensorsSink` does.

        Args:
            path: The file.
            parts: By the model's name of each tensor, the tensors that its precision is in the
                file: dtype and shape by their names there.
            info: The record for the header.
            shared: As of `SafetensorsSink`.
            begun: As of `SafetensorsSink`.
        """
        in_file = {name: spec for tensor in parts.values() for name, spec in tensor.items()}
        super().__init__(path, in_file, info.to_metadata(), shared=shared, begun=begun)
        self._parts = parts

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of the precision of the model's tensor `name`.

        Those of several tensors follow each other, as `StoredPrecisions.read_bytes` gives them.
        """
        parts = list(self._parts[name].items())
        sizes = [spec.nbytes for _, spec in parts]
        for part, start, stop, at in _overlaps(sizes, offset, len(data)):
            super().write_bytes(parts[part][0], at, data[start:stop])
