"""A stored precision written again: in a coarser form, or in today's layout.

    row          one number for each slice of the first axis, the mean of its entries
    row-column   S[i, j] = rows[i] * columns[j], rows as above, columns with the mean 1: of all
                 such products the one with the same sums over each row and each column
                 (the least I-divergence from the entries; Adafactor, Shazeer and Stern, 2018)

A tensor whose form is as coarse already stays as it is, and so do vectors, and precisions that are
matrices. Tensors are read in pieces, so that memory does not grow with the model.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from mergekit_bayes.checkpoint.codec import chunks, encode, is_bad_precision, read_chunk
from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_ENDING,
    PRECISION_INDEX,
    precision_name,
    write_precision_index,
)
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import (
    ITEM_SIZE,
    Array,
    MemorySource,
    TensorSource,
    TensorSpec,
)
from mergekit_bayes.errors import PrecisionError
from mergekit_bayes.kernels import row_sums
from mergekit_bayes.posterior.factors import RankOne
from mergekit_bayes.posterior.forms import row_shape
from mergekit_bayes.posterior.info import PosteriorInfo
from mergekit_bayes.posterior.save import write_info
from mergekit_bayes.posterior.stored import (
    COLUMNS,
    PRECISION,
    ROWS,
    StoredPrecisions,
    named,
    parts_of,
)

PosteriorForm = Literal["row", "row-column", "entries"]  # the last keeps that of every tensor
_WINDOW = 1 << 18  # entries of a piece; a merge sums by the same windows, to the same bits


def is_written(precision: StoredPrecisions, form: PosteriorForm) -> bool:
    """Whether a precision lies in today's layout already, in a form that is coarse enough."""
    is_current = (precision.files[0].parent / PRECISION_INDEX).exists() and all(
        file.suffix == POSTERIOR_ENDING for file in precision.files
    )
    return is_current and not is_finer(precision, form)


def is_finer(precision: StoredPrecisions, form: PosteriorForm) -> bool:
    """Whether some tensor has a finer form than this, so that it would be pooled."""
    return not all(_stays(precision, name, form) for name in precision.specs)


def write_pooled(
    precision: StoredPrecisions, info: PosteriorInfo, folder: Path, form: PosteriorForm
) -> None:
    """Write a precision with index and record into a folder of this account.

    Args:
        precision: The precision.
        info: Its record.
        folder: An empty folder.
        form: The form; `entries` keeps the files, too, as they are divided.

    Raises:
        CheckpointError: A file cannot be read or written.
        PrecisionError: An entry that is pooled is negative or not finite.
    """
    names = list(precision.specs)
    if is_finer(precision, form):
        info = info.model_copy(update={"pool": form})
    # What is pooled is small, and one file.
    count = len(precision.files) if form == "entries" else 1
    files: dict[str, list[str]] = {}
    for name in names:
        file = precision_name(precision.file_of(name) if form == "entries" else 0, count)
        files.setdefault(file, []).append(name)
    in_files, size = {}, 0
    for file, members in sorted(files.items()):
        specs = {k: v for n in members for k, v in _specs(precision, n, form).items()}
        with SafetensorsSink(folder / file, specs, info.to_metadata()) as sink:
            for name in members:
                _write(sink, precision, name, form)
        in_files[file] = list(specs)
        size += sum(spec.nbytes for spec in specs.values())
    write_precision_index(folder, in_files, size)
    write_info(folder, info)


def pooled(source: TensorSource, name: str, pool: Literal["row", "row-column"]) -> Array | RankOne:
    """A precision by entry in a coarser form, in float32; sums are in float64.

    Args:
        source: Where it is read.
        name: Its name there; two axes or more.
        pool: The form.

    Raises:
        PrecisionError: An entry is negative or not finite.
    """
    shape = source.specs[name].shape
    rows, row = shape[0], int(np.prod(shape[1:]))
    row_totals, column_totals, bad = np.zeros(rows), np.zeros(row), 0
    for first, start, values in _pieces(source, name, rows, row):
        bad += int(np.count_nonzero(is_bad_precision(values)))
        sums = np.zeros(len(values))
        row_sums(values.reshape(-1), values.shape[1], sums, fused=False)
        row_totals[first : first + len(values)] += sums
        if pool == "row-column":
            stop = start + values.shape[1]
            column_totals[start:stop] += values.sum(axis=0, dtype=np.float64)
    if bad:
        raise PrecisionError(
            f"{source.where(name)}: the precision of '{name}' has {bad} entries that are negative "
            "or not finite. Make it again."
        )
    means = (row_totals / max(row, 1)).astype(np.float32).reshape(row_shape(shape))
    if pool == "row":
        return means
    total = column_totals.mean() if row else 0.0
    columns = column_totals / total if total > 0 else np.ones(row)
    return RankOne(means, columns.astype(np.float32).reshape(1, *shape[1:]))


def rank_ones(precision: Mapping[str, Array]) -> dict[str, Array | RankOne]:
    """Precisions by entry as two vectors each; a vector stays.

    Args:
        precision: float32 arrays, by name.

    Raises:
        PrecisionError: An entry is negative or not finite.
    """
    source = MemorySource(precision, "the estimate")
    return {
        name: pooled(source, name, "row-column") if values.ndim > 1 else values
        for name, values in precision.items()
    }


def _pieces(
    source: TensorSource, name: str, rows: int, row: int
) -> Iterator[tuple[int, int, Array]]:
    """Some whole rows at a time, or a part of one: its first row, first column and values."""
    height = max(_WINDOW // max(row, 1), 1)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        for start in range(0, row, _WINDOW):
            stop = min(start + _WINDOW, row)
            values = read_chunk(source, name, first * row + start, (last - 1) * row + stop)
            with np.errstate(over="ignore"):  # an F64 beyond F32 is infinite here, and refused
                values = values.astype(np.float32, copy=False)
            yield first, start, values.reshape(last - first, stop - start)


def _stays(precision: StoredPrecisions, name: str, form: PosteriorForm) -> bool:
    """Whether a tensor is in a form that is coarse enough."""
    shape = precision.specs[name].shape
    is_rank_one = len(precision.parts(name)) > 1
    if name in precision.matrices:
        return True
    if form == "entries" or (form == "row-column" and is_rank_one):
        return True
    return not is_rank_one and shape == row_shape(shape)


def _specs(precision: StoredPrecisions, name: str, form: PosteriorForm) -> dict[str, TensorSpec]:
    """Dtype and shape of what is written for a tensor, by the names in the file."""
    if _stays(precision, name, form):
        parts = precision.current_parts(name)
        return {current: precision.in_files.specs[part] for part, current in parts.items()}
    shape = precision.specs[name].shape
    rows = TensorSpec("F32", row_shape(shape))
    if form == "row":
        return {named(PRECISION, name): rows}
    return {named(ROWS, name): rows, named(COLUMNS, name): TensorSpec("F32", (1, *shape[1:]))}


def _write(
    sink: SafetensorsSink, precision: StoredPrecisions, name: str, form: PosteriorForm
) -> None:
    if _stays(precision, name, form):
        for part, current in precision.current_parts(name).items():
            _copy(sink, precision.in_files, part, current)
        return
    assert form != "entries"
    for part, values in parts_of(name, pooled(precision, name, form)).items():
        sink.write_bytes(part, 0, encode(values.reshape(-1), "F32"))


def _copy(sink: SafetensorsSink, source: TensorSource, part: str, name: str) -> None:
    spec = source.specs[part]
    item = ITEM_SIZE[spec.dtype]
    for start, stop in chunks(spec, _WINDOW):
        buffer = memoryview(bytearray((stop - start) * item))
        source.read_bytes(part, start * item, buffer)
        sink.write_bytes(name, start * item, buffer)
