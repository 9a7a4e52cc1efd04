"""Measure a tensor piece by piece, for rules that must know of the whole one before they merge.

Pieces are windows of a size that depends on the tensor alone. Sums are added in the order of the
windows, and counts may be added in any order, so that neither chunks nor threads change a bit.

The c largest values are found without sorting, by digits of 16 bits: the bits of a non-negative
float, taken as a whole number, are in the order of the values. One pass counts the first digit, and
the next ones the following digit of those values whose first digits are known to be those of the
c-th largest: two passes in float32, four in float64. Where not all values that equal the c-th
largest are among the c largest, one more pass counts them window by window, and finds the place
where they end.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np

from mergekit_bayes.methods.tensors import (
    Array,
    Cut,
    Cuts,
    Measured,
    Order,
    Settings,
    Sum,
    TensorRule,
    Tensors,
)

WINDOW = 1 << 18  # entries
DIGIT = 16  # bits that a pass counts
_BINS = 1 << DIGIT

T = TypeVar("T")
R = TypeVar("R")
Window: TypeAlias = tuple[int, int]  # its first entry, and its end


class OrderedMap(Protocol):
    """A map that may use several threads and gives the results in order."""

    def __call__(self, act: Callable[[T], R], items: Iterable[T], /) -> Iterator[R]:
        """The results of `act` on each item."""
        ...


class Whole(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
        size: Entries that are merged.
        row: Entries that are not torn apart: those of a row, or 1.
        dtype: That of the values, float32 or float64.
        tasks: How many there are.
        settings: The method's, as they hold in this tensor.
    """

    size: int
    row: int
    dtype: np.dtype[Any]
    tasks: int
    settings: Settings

    @property
    def windows(self) -> list[Window]:
        """The pieces that are measured at a time: whole rows."""
        step = whole_rows(WINDOW, self.row)
        return [(at, min(at + step, self.size)) for at in range(0, self.size, step)]


def whole_rows(entries: int, row: int) -> int:
    """The entries of as many rows as fit into some entries, and of one at least."""
    return max(1, entries // row) * row


def measure(
    rule: TensorRule,
    whole: Whole,
    pieces: Callable[[int, int, Measured], Tensors],
    ordered_map: OrderedMap = map,
) -> Measured:
    """Measure what a rule must know of a tensor.

    Args:
        rule: The rule.
        whole: The tensor.
        pieces: `(start, stop, measured) -> tensors`: entries `start:stop` of all models. `measured`
            has the results of the measures before.
        ordered_map: Runs the windows, perhaps on several threads.

    Returns:
        The results by name, as `Tensors.measured` has them.

    Raises:
        ArithmeticError: Pieces that are not the same each time.
    """
    results: dict[str, Array | Cuts] = {}
    for one in rule.measures:
        if one.is_needed is None or one.is_needed(whole.settings):
            scan = _Scan(one, whole, pieces, dict(results), ordered_map)
            results[one.name] = scan.sums() if isinstance(one, Sum) else _cuts(one, scan)
    return results


def combine_whole(rule: TensorRule, tensors: Tensors) -> Array:
    """Merge a tensor that is in memory as a whole, measured as it is where it is not.

    Args:
        rule: The rule.
        tensors: The whole tensor of all models.

    Returns:
        The merged tensor, in its shape.
    """
    first = tensors.tasks[0]
    shape = rule.piece_shape(tensors.settings, first.shape)
    whole = Whole(
        first.size,
        first.size if -1 not in shape else int(-np.prod(shape)),
        np.result_type(*tensors.tasks, *([] if tensors.base is None else [tensors.base])),
        len(tensors.tasks),
        tensors.settings,
    )
    measured = measure(
        rule, whole, lambda start, stop, found: piece_of(rule, tensors, start, stop, found)
    )
    merged = rule.combine(piece_of(rule, tensors, 0, first.size, measured))
    return np.asarray(merged).reshape(first.shape)


def piece_of(
    rule: TensorRule, tensors: Tensors, start: int, stop: int, measured: Measured
) -> Tensors:
    """Entries `start:stop` of a tensor that is in memory, as its rule reads them.

    Args:
        rule: The rule.
        tensors: The whole tensor of all models.
        start: The first entry, in flat order.
        stop: The end of the entries.
        measured: What was measured of the whole tensor.
    """
    shape = rule.piece_shape(tensors.settings, tensors.tasks[0].shape)
    draws = tensors.draws

    def cut(array: Array) -> Array:
        return array.reshape(-1)[start:stop].reshape(shape)

    return tensors._replace(
        base=None if tensors.base is None else cut(tensors.base),
        tasks=tuple(cut(task) for task in tensors.tasks),
        draws=None if draws is None else lambda task: cut(draws(task)),
        start=start,
        size=tensors.tasks[0].size,
        measured=measured,
    )


@dataclass(frozen=True)
class _Scan:
    """Passes over the values of one measure."""

    measure: Order | Sum
    whole: Whole
    pieces: Callable[[int, int, Measured], Tensors]
    measured: Measured
    ordered_map: OrderedMap

    @property
    def lists(self) -> int:
        return self.measure.lists(self.whole.tasks)

    @property
    def width(self) -> int:
        """Bits of a value but the sign's."""
        return 8 * self.whole.dtype.itemsize - 1

    def sums(self) -> Array:
        def add(window: Window) -> Array:
            piece = self._piece(window)
            lists = range(self.lists)
            return np.array([self.measure.values(piece, k).sum(dtype=np.float64) for k in lists])

        total = np.zeros(self.lists)
        for part in self.ordered_map(add, self.whole.windows):
            total += part
        return total

    def bits(self, piece: Tensors, k: int) -> Array:
        """The values of a list as whole numbers, flat."""
        unsigned = np.uint64 if self.whole.dtype.itemsize == 8 else np.uint32
        values = np.ascontiguousarray(self.measure.values(piece, k), self.whole.dtype)
        bits: Array = values.reshape(-1).view(unsigned)
        return bits & unsigned((1 << self.width) - 1)

    def digits(self, groups: Sequence[tuple[int, int]], shift: int, above: int) -> Array:
        """How often each digit occurs.

        Args:
            groups: Lists, each with the higher digits of the values that count.
            shift: Bits below the digit.
            above: Bits below the higher digits; `width` where there are none.

        Returns:
            (groups, bins + 1) in int64; the last column has the number of zeros.
        """
        shape = (len(groups), _BINS + 1)
        counted: dict[int, Array] = {}  # each thread has its own

        def count(window: Window) -> None:
            piece, found = self._piece(window), dict[int, Array]()
            into = counted.setdefault(threading.get_ident(), np.zeros(shape, np.int64))
            for row, (k, prefix) in zip(into, groups, strict=True):
                if k not in found:
                    found[k] = self.bits(piece, k)
                bits = found[k]
                if above < self.width:
                    bits = bits[bits >> bits.dtype.type(above) == prefix]
                digit = bits >> bits.dtype.type(shift)
                digit &= bits.dtype.type((1 << (above - shift)) - 1)
                row[:_BINS] += np.bincount(digit.astype(np.intp), minlength=_BINS)
                row[_BINS] += bits.size - np.count_nonzero(bits)

        for _ in self.ordered_map(count, self.whole.windows):
            pass
        return sum(counted.values(), np.zeros(shape, np.int64))

    def places(self, targets: Sequence["_Target"]) -> list[int]:
        """For each target the flat index after its last value that equals the threshold."""

        def equal(window: Window) -> Array:
            piece = self._piece(window)
            found = {k: self.bits(piece, k) for k in {target.list for target in targets}}
            return np.array([np.count_nonzero(found[t.list] == t.prefix) for t in targets])

        windows = self.whole.windows
        counts = np.array(list(self.ordered_map(equal, windows))).reshape(-1, len(targets))
        places = []
        for target, ends in zip(targets, counts.cumsum(axis=0).T, strict=True):
            wanted = target.count - target.above
            index = _index(ends, wanted)
            before = int(ends[index - 1]) if index else 0
            bits = self.bits(self._piece(windows[index]), target.list)
            place = np.flatnonzero(bits == target.prefix)[wanted - before - 1]
            places.append(windows[index][0] + int(place) + 1)
        return places

    def _piece(self, window: Window) -> Tensors:
        return self.pieces(*window, self.measured)


@dataclass
class _Target:
    """A cut that is looked for.

    Attributes:
        list: Which list of values.
        count: How many largest values.
        prefix: The digits of the threshold that are known.
        above: How many values have larger digits.
        equal: How many have the same ones.
    """

    list: int
    count: int
    prefix: int = 0
    above: int = 0
    equal: int = 0

    def narrow(self, counts: Array, bits: int) -> None:
        """Find the next digit, of some bits, from how often each occurs after those known."""
        from_top = counts[::-1].cumsum()
        place = _index(from_top, self.count - self.above)
        digit = _BINS - 1 - place
        self.equal = int(counts[digit])
        self.above += int(from_top[place]) - self.equal
        self.prefix = self.prefix << bits | digit


def _index(ends: Array, wanted: int) -> int:
    """Where a running count first reaches a number that it must reach."""
    index = int(np.searchsorted(ends, wanted))
    if index == ends.size:
        raise ArithmeticError("its values changed while they were measured. Merge it again")
    return index


def _cuts(order: Order, scan: _Scan) -> Cuts:
    whole, lists, above = scan.whole, range(scan.lists), scan.width
    counted: dict[tuple[int, int], Array] = {}
    positive = [0] * scan.lists
    if order.by_positive:
        groups = [(k, 0) for k in lists]
        counted = dict(zip(groups, scan.digits(groups, above - DIGIT, above), strict=True))
        positive = [whole.size - int(counts[-1]) for counts in counted.values()]
    ranks = [order.ranks(whole.settings, k, whole.size, positive[k]) for k in lists]
    last = whole.size if order.only_thresholds else whole.size - 1
    targets = {
        (k, count): _Target(k, count) for k in lists for count in ranks[k] if 0 < count <= last
    }
    while targets and above > 0:
        shift = max(0, above - DIGIT)
        groups = sorted({(target.list, target.prefix) for target in targets.values()})
        if not counted:
            counted = dict(zip(groups, scan.digits(groups, shift, above), strict=True))
        for target in targets.values():
            target.narrow(counted[target.list, target.prefix][:-1], above - shift)
        above, counted = shift, {}
    found = _thresholds(order, scan, targets)
    nothing, everything = Cut(np.inf, 0), Cut(0.0, whole.size)
    return tuple(
        tuple(
            found.get((k, count), everything if count >= whole.size else nothing)
            for count in ranks[k]
        )
        for k in lists
    )


def _thresholds(
    order: Order, scan: _Scan, targets: Mapping[tuple[int, int], _Target]
) -> dict[tuple[int, int], Cut]:
    """The cuts of targets whose digits are all known."""
    limits = {key: scan.whole.size if target.prefix else 0 for key, target in targets.items()}
    if not order.only_thresholds:
        torn = [
            key
            for key, target in targets.items()
            if target.prefix and target.above + target.equal > target.count
        ]
        if torn:
            limits.update(zip(torn, scan.places([targets[key] for key in torn]), strict=True))
    unsigned = np.uint64 if scan.whole.dtype.itemsize == 8 else np.uint32
    return {
        key: Cut(float(np.array(target.prefix, unsigned).view(scan.whole.dtype)), limits[key])
        for key, target in targets.items()
    }
