"""Names that differ in their numbers only, and which number of one is which of another."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

from mergekit_bayes.checkpoint.names import is_buffer
from mergekit_bayes.checkpoint.rename_rules import Path

Order = tuple[int, ...]  # for each number of one name, its place among those of another
Fit = Callable[[str, str], bool]

_MOST_NUMBERS = 4  # of a name whose numbers may have changed places


class Pattern(NamedTuple):
    """Names that differ in their numbers only.

    Attributes:
        path: The words, with "*" for every number.
        names: The full names by their numbers.
        numbers: The keys of `names`; patterns with the same ones share one object.
        one_shape: Whether all of them have one shape.
    """

    path: Path
    names: Mapping[Path, str]
    numbers: frozenset[Path]
    one_shape: bool

    def orders(self, partner: "Pattern") -> list[Order]:
        """The orders in which a partner may have the same numbers: one, if it is known."""
        order = number_order(self.path, partner.path)
        if order is not None:
            return [order] if _is_part(self.numbers, partner.numbers, order) else []
        count = self.path.count("*")
        if count != partner.path.count("*") or count > _MOST_NUMBERS:
            return []
        return [o for o in permutations(range(count)) if _is_part(self.numbers, partner.numbers, o)]

    def known_order(self, partner: "Pattern") -> Order | None:
        """The order of the numbers in a partner, by the words or as no other one fits.

        None if it is not known: such patterns contest the partners of others, and are not paired.
        """
        order = number_order(self.path, partner.path)
        if order is None and self.orders(partner) == [_as_they_are(self.path)]:
            order = _as_they_are(self.path)
        return order

    def pairs(self, partner: "Pattern", order: Order | None = None) -> list[tuple[str, str]]:
        """The names of the same numbers in both.

        Args:
            partner: The other pattern.
            order: For each number of the partner, its place in this pattern; by default the known
                one, and no pairs if none is known.
        """
        order = self.known_order(partner) if order is None else order
        if order is None:
            return []
        renamed = ((name, reordered(index, order)) for index, name in self.names.items())
        return [(name, partner.names[i]) for name, i in renamed if i in partner.names]

    def can_be(self, partner: "Pattern", fit: Fit) -> bool:
        """Whether one has the other's numbers, and all tensors of the same numbers fit."""
        orders = self.orders(partner)
        if orders and self.one_shape and partner.one_shape:
            return fit(next(iter(self.names.values())), next(iter(partner.names.values())))
        return any(all(fit(*pair) for pair in self.pairs(partner, order)) for order in orders)

    def is_covered_by(self, partner: "Pattern") -> bool:
        """Whether a partner has all of these numbers."""
        return len(self.numbers) <= len(partner.numbers) and bool(self.orders(partner))

    def is_buffer(self) -> bool:
        """Whether these are constants rather than parameters."""
        return is_buffer(next(iter(self.names.values())))


@lru_cache(maxsize=4096)
def _is_part(numbers: frozenset[Path], partners: frozenset[Path], order: Order) -> bool:
    """Whether one of two sets of numbers has all of the other, in this order."""
    if numbers is partners and order == tuple(range(len(order))):
        return True
    moved = frozenset(reordered(index, order) for index in numbers)
    return moved <= partners or partners <= moved


def _as_they_are(path: Path) -> Order:
    """The order in which numbers keep their places."""
    return tuple(range(path.count("*")))


def reordered(numbers: Path, order: Order) -> Path:
    """The numbers of a name in another order."""
    return tuple(numbers[place] for place in order)


def number_order(one: Path, other: Path) -> Order | None:
    """Which number of one name is which number of another, by the words before the numbers.

    `experts.*.layers.*` and `layers.*.experts.*` have their numbers in another order. The words
    between two numbers belong to the second one, and a number is the likelier to be another, the
    more of the words before it agree.

    Args:
        one: A name.
        other: What it is called elsewhere.

    Returns:
        For each number of `other`, its place in `one`. None if the words do not tell: none of them
        agrees, two orders agree equally well, or numbers change places without a word of their own.
    """
    before, after = _words_before_numbers(one), _words_before_numbers(other)
    return _number_order(before, after) if len(before) == len(after) else None


@lru_cache(maxsize=4096)
def _words_before_numbers(path: Path) -> tuple[Path, ...]:
    stars = [i for i, word in enumerate(path) if word == "*"]
    return tuple(
        path[start:stop] for start, stop in zip([0, *(i + 1 for i in stars)], stars, strict=False)
    )


@lru_cache(maxsize=4096)
def _number_order(before: tuple[Path, ...], after: tuple[Path, ...]) -> Order | None:
    as_they_are = tuple(range(len(before)))
    if len(before) < 2:
        return as_they_are
    ends, other_ends = ([words[-1:] for words in side] for side in (before, after))
    if len(before) > _MOST_NUMBERS:
        return as_they_are if ends == other_ends else None
    scores = {
        order: [_common_end(before[i], words) for i, words in zip(order, after, strict=True)]
        for order in permutations(as_they_are)
    }
    most = max(map(sum, scores.values()))
    order, *rivals = (order for order, score in scores.items() if sum(score) == most)
    words, other_words = ({word for run in side for word in run} for side in (before, after))
    for place, run, score in zip(order, after, scores[order], strict=True):
        # A word that stands before another number now may have taken its own number along.
        if not score and (other_words & {*before[place][-1:]} or words & {*run[-1:]}):
            return None
    has_own_words = all(scores[order]) and len(set(ends)) == len(ends)
    return order if not rivals and (order == as_they_are or has_own_words) else None


def _common_end(one: Path, other: Path) -> int:
    """How many words at the end of two runs agree."""
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return length
