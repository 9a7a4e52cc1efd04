"""Where squared gradients are added up, and how finely, and products of rows.

A pass makes the gradient of one parameter after the other and hands each to `Sums.add`, which is
done with it before the next one is made. What is held besides the model is then the sums:

    every entry            4 bytes an entry, on the parameter's device, in CPU memory or in a file
    one number a row       4 bytes a row
    products of rows       4 n^2 bytes for each block of n columns, or 4 (k + 1) n for a sketch of
                           rank k
"""

import mmap
import os
import tempfile
from collections.abc import Mapping
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.curvature.parts import Parts
from mergekit_bayes.curvature.sketches import add_rows, add_sketch
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.ranks import add_over_ranks, gather

_AT_ONCE = 1 << 20  # entries that are squared at once, which bounds what a float32 copy takes
_WRITTEN = 1 << 20  # bytes of zeros in one write


class Keeping(NamedTuple):
    """How finely sums are kept, and where.

    Attributes:
        axes: By parameter name, how many of its first axes stay; over the others the mean is taken.
            1 keeps one number a row. A parameter that is not named keeps all its entries.
        place: `device` for the parameter's own, `cpu` for memory, or a folder in which a file
            without a name holds the sums. It is gone when the process ends, however it does.
        is_shared: The ranks of a launcher share the batches, and each gets the sums of all. All
            must make the pass, with the same batches.
        parts: Where the pass is saved, and gone on from.
        is_sharded: The parameters are sharded over the ranks, on their first axis. Only the first
            rank gets the sums then, in memory where they would lie on the device.
        is_gathered: Where they are sharded: otherwise each rank keeps the sums of its own rows.
        matrices: By parameter name, the shape of a sum of products, (..., k, n, n), for those that
            have one in place of squares.
        blocks: k, where an estimator of matrices chooses their shapes.
        sketches: By parameter name, the shape of a sketch of such a sum (`sketches`).
        rank: k of a sketch, where an estimator of matrices chooses; None for no sketches.
    """

    axes: Mapping[str, int] = {}
    place: Literal["device", "cpu"] | Path = "device"
    is_shared: bool = False
    parts: Parts | None = None
    is_sharded: bool = False
    is_gathered: bool = True
    matrices: Mapping[str, tuple[int, ...]] = {}
    blocks: int = 1
    sketches: Mapping[str, tuple[int, ...]] = {}
    rank: int | None = None

    def shape_of(self, name: str, parameter: Tensor) -> tuple[int, ...]:
        """The shape of a parameter's sum: 1 on each axis over which the mean is taken."""
        if name in self.matrices:
            return self.matrices[name]
        if name in self.sketches:
            return self.sketches[name]
        kept = self.axes.get(name, parameter.ndim)
        return (*parameter.shape[:kept], *(1 for _ in parameter.shape[kept:]))

    def mean_of(self, name: str, entries: Tensor) -> Tensor:
        """The mean of a parameter's entries, of `shape_of`."""
        left_out = tuple(range(self.axes.get(name, entries.ndim), entries.ndim))
        return entries.mean(left_out, keepdim=True) if left_out else entries


ENTRIES = Keeping()


class _Added(NamedTuple):
    """Rows that were added to a sketch: what that was, and what it became."""

    rows: Tensor
    before: Tensor
    after: Tensor


class Sums:
    """Sums of squared gradients, or of products of rows, in float32, by parameter name.

    Args:
        parameters: The parameters, by name; only shape and device are used.
        keep: How finely, and where.

    Attributes:
        totals: The sums, of `keep.shape_of`; where axes are left out, of the squares' mean.

    Raises:
        CheckpointError: There is no room for them on the disk.
    """

    def __init__(self, parameters: Mapping[str, Tensor], keep: Keeping) -> None:
        shapes = {name: keep.shape_of(name, p) for name, p in parameters.items()}
        self._matrices, self._sketches = keep.matrices.keys(), keep.sketches.keys()
        self._last: _Added | None = None
        self.totals: dict[str, Tensor]
        if isinstance(keep.place, Path):
            self.totals = _in_a_file(shapes, keep.place)
        else:
            self.totals = {
                name: torch.zeros(shape, device=parameters[name].device)
                if keep.place == "device"
                else torch.zeros(shape)
                for name, shape in shapes.items()
            }

    def add(self, name: str, gradient: Tensor) -> None:
        """Add the square of a parameter's gradient."""
        total = self.totals[name]
        if not total.numel():
            return
        rows, sums = gradient.reshape(total.numel(), -1), total.view(-1, 1)
        at_once = max(1, _AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), at_once):
            row, sum_ = rows[start : start + at_once], sums[start : start + at_once]
            if rows.shape[1] == 1:
                entries = row.to(sum_.device).float()
                sum_.addcmul_(entries, entries)
            else:
                sum_.add_(row.float().square().mean(1, keepdim=True).to(sum_.device))

    def products(self, name: str, rows: Tensor) -> Tensor:
        """What rows add to the matrices of a parameter: `sum_i x_i x_i'` in blocks, (k, n, n).

        To a sketch they add themselves.

        Args:
            name: The parameter.
            rows: (rows, k n).
        """
        if name in self._sketches:
            return rows.float()
        k, n, _ = self.totals[name].shape[-3:]
        blocks = rows.float().reshape(-1, k, n).transpose(0, 1)
        return blocks.mT @ blocks

    def add_products(self, name: str, products: Tensor, expert: int | None = None) -> None:
        """Add `products`, to the matrices of one of the stacked experts where there are any."""
        total = self.totals[name] if expert is None else self.totals[name][expert]
        if name in self._sketches:
            self._add_rows(total, products)
        else:
            total.add_(products.to(total.device))

    def _add_rows(self, sketch: Tensor, rows: Tensor) -> None:
        last = self._last
        # Layers that see the same rows, such as queries, keys and values, have the same sketch.
        if last is not None and last.rows is rows and torch.equal(last.before, sketch):
            sketch.copy_(last.after)
            return
        before = sketch.clone()
        add_rows(sketch, rows.to(sketch.device))
        self._last = _Added(rows, before, sketch)

    def add_over_ranks(self) -> None:
        """Add up the sums of all ranks, on each of them. Every rank must call this."""
        for name, total in self.totals.items():
            if name not in self._sketches:
                add_over_ranks(total)
                continue
            flat = total.view(-1, *total.shape[-2:])
            first, *others = gather(flat.cpu())
            flat.copy_(first)
            for other in others:
                for sketch, added in zip(flat, other, strict=True):
                    add_sketch(sketch, added.to(sketch.device))

    def by_row(self) -> dict[str, Tensor]:
        """The sums with one number for each row of squares; of matrices the diagonals."""
        return {name: self._by_row(name, total) for name, total in self.totals.items()}

    def _by_row(self, name: str, total: Tensor) -> Tensor:
        if name in self._sketches:
            return total[..., 0, :]
        return total.diagonal(dim1=-2, dim2=-1).flatten(-2) if name in self._matrices else total


def _in_a_file(shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
    """Zeros of these shapes in one file of a folder, mapped into memory."""
    sizes = [prod(shape) for shape in shapes.values()]
    size = 4 * max(1, sum(sizes))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            _fill(file.fileno(), size)
            memory = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: no room for the sums of {size / 1e9:.3g} GB ({error.strerror or error}). "
            "Free some space, choose another -o, or keep them elsewhere (--sums cpu, --pool row)."
        ) from None
    flat = torch.frombuffer(memory, dtype=torch.float32)
    ends = accumulate(sizes)
    return {
        name: flat[end - size : end].view(shape)
        for (name, shape), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


def _fill(file: int, size: int) -> None:
    """Allocate a file: a page of a mapped file for which the disk has no room ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
        return
    left = size  # macOS
    while left:
        left -= os.write(file, bytes(min(left, _WRITTEN)))
