"""Which names of two checkpoints mean one tensor.

Different versions and classes of a library store one model under different names: with or without
a prefix (`h.0` and `transformer.h.0`), with parts moved (`language_model.model` and
`model.language_model`), or with other words (`LayerNorm.gamma` and `LayerNorm.weight`).
`find_renaming` pairs the tensors that only one side names so, by rules that hold for many tensors
at once. It pairs nothing that could be paired in two ways.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from mergekit_bayes.checkpoint.names import is_vocabulary
from mergekit_bayes.checkpoint.rename_patterns import Pattern, number_order, reordered
from mergekit_bayes.checkpoint.rename_rules import Path, Scope
from mergekit_bayes.checkpoint.rename_search import Side, search_rules

_EXAMPLES = 4  # changes that a sentence names


class Shaped(Protocol):
    """Anything with a shape."""

    @property
    def shape(self) -> Sequence[int]:
        """Length of every axis."""
        ...


Fits = Callable[[Sequence[int], Sequence[int]], bool]
Names = Mapping[str, Shaped]


class NameChange(NamedTuple):
    """What is different in some names.

    Attributes:
        before: The part of the other checkpoint's names.
        after: What the donor has in its place.
        tensors: Number of tensors.
    """

    before: str
    after: str
    tensors: int


@dataclass(frozen=True)
class Renaming:
    """How another checkpoint's names become the donor's.

    Attributes:
        names: The donor's name of each tensor that is renamed.
        changes: What is different, the most frequent change first.
        ambiguous: For each tensor that would fit two or more of the donor's, their names. Such
            tensors are not renamed.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[NameChange, ...] = ()
    ambiguous: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        """The donor's name of a tensor; `name` itself if it is not renamed."""
        return self.names.get(name, name)

    def describe(self) -> str:
        """The changes as part of a sentence: `LayerNorm.gamma -> LayerNorm.weight (12), ...`."""
        shown = [f"{c.before} -> {c.after} ({c.tensors:,})" for c in self.changes[:_EXAMPLES]]
        return ", ".join(shown + ["..."] * (len(self.changes) > _EXAMPLES))


def renamed_note(ref: str, renaming: Renaming) -> str:
    """The sentence of a report that says which names of a model differ, and how."""
    return (
        f"{len(renaming.names):,} tensors of '{ref}' are matched under other names: "
        f"{renaming.describe()}"
    )


def same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are equal."""
    return tuple(one) == tuple(other)


def find_renaming(
    donor: Names, other: Names, *, scope: Scope = Scope.NESTED, fits: Fits = same_shape
) -> Renaming:
    """Pair the tensors that only one of two checkpoints names so.

    Names that both have are left alone. The rest is grouped into patterns, in which layers have no
    number, and a pattern is paired with one of the same numbers and shapes by a rule. A rule is
    believed if no other rule that explains its pairs is as simple and explains as many patterns.

    Args:
        donor: The tensors by the names that are kept.
        other: The tensors that are renamed.
        scope: What a rule may change; see `Scope`.
        fits: Whether a tensor of the first shape may be the donor's tensor of the second one.
            Vocabularies may have different lengths in any case.
    """
    left = [name for name in other if name not in donor]
    donor_left = [name for name in donor if name not in other]
    if not left or not donor_left:
        return Renaming()

    def fit(name: str, partner: str) -> bool:
        return _may_be(other[name].shape, donor[partner].shape, name, partner, fits)

    one_prefix = _common_prefix(left, donor_left, donor, fit)
    if one_prefix is not None:
        return one_prefix
    found = search_rules(_side(left, other), _side(donor_left, donor), fit, scope)
    names: dict[str, str] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for match in found.matches:
        pairs = match.pattern.pairs(match.partner)
        names.update(pairs)
        for rule in match.rules:
            counts[rule.shown_in(match.pattern.path, match.partner.path)] += len(pairs)
    # A second name of a tensor that both have is told by those who map the names.
    doubles = (
        (name, _name(form, reordered(index, order)))
        for pattern, forms in found.left
        for form in forms
        if (order := number_order(pattern.path, form)) is not None
        for index, name in pattern.names.items()
    )
    names |= {name: double for name, double in doubles if double in donor and double in other}
    frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    changes = tuple(NameChange(*shown, count) for shown, count in frequent)
    rivals: dict[str, list[str]] = {}
    for pattern, partners in found.ambiguous:
        orders = [(partner, order) for partner in partners for order in pattern.orders(partner)]
        for partner, order in orders:
            for name, rival in pattern.pairs(partner, order):
                rivals.setdefault(name, []).append(rival)
    ambiguous = {
        name: tuple(dict.fromkeys(possible))
        for name, possible in rivals.items()
        if len(set(possible)) > 1
    }
    return Renaming(names, changes, ambiguous)


def _may_be(
    shape: Sequence[int], donors: Sequence[int], name: str, partner: str, fits: Fits
) -> bool:
    if fits(shape, donors):
        return True
    is_longer = len(shape) == len(donors) > 0 and tuple(shape[1:]) == tuple(donors[1:])
    return is_longer and is_vocabulary(name) and is_vocabulary(partner)


def _common_prefix(
    left: Sequence[str], donor_left: Sequence[str], donor: Names, fit: Callable[[str, str], bool]
) -> Renaming | None:
    """The renaming by one prefix of all names that are left on one side, if there is just one.

    The shapes of most tensors agree; of the others an error is told by those who compare them.
    """
    found: list[Renaming] = []
    for longer, shorter, is_added in ((left, donor_left, False), (donor_left, left, True)):
        known = set(shorter)
        matches = Counter(p for n in longer for p in _prefixes(n) if n[len(p) :] in known)
        for prefix, count in matches.items():
            if count < min(len(longer), len(shorter)):
                continue
            pairs = [(n, n.removeprefix(prefix)) for n in longer if n.startswith(prefix)]
            pairs = [(n, bare) for n, bare in pairs if bare in (known if is_added else donor)]
            names = {bare: n for n, bare in pairs} if is_added else dict(pairs)
            if 2 * sum(fit(*pair) for pair in names.items()) > len(names):
                shown = ("*", f"{prefix}*") if is_added else (f"{prefix}*", "*")
                found.append(Renaming(names, (NameChange(*shown, len(names)),)))
    return found[0] if len(found) == 1 else None


def _prefixes(name: str) -> list[str]:
    """The beginnings of a name that end in a dot."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]


def _side(left: Iterable[str], specs: Names) -> Side:
    """Group names that differ in their numbers only.

    Args:
        left: The names to group.
        specs: All tensors of the checkpoint.
    """
    patterns: dict[Path, dict[Path, str]] = {}
    for name in left:
        path = _path(name)
        index = tuple(part for part in name.split(".") if part.isdecimal())
        patterns.setdefault(path, {})[index] = name
    numbers: dict[frozenset[Path], frozenset[Path]] = {}
    return Side(
        [
            Pattern(
                path,
                members,
                numbers.setdefault(frozenset(members), frozenset(members)),
                len({tuple(specs[name].shape) for name in members.values()}) == 1,
            )
            for path, members in patterns.items()
        ],
        {path[:i] for path in {_path(name) for name in specs} for i in range(1, len(path))},
    )


def _name(path: Path, numbers: Path) -> str:
    """A path with its numbers."""
    rest = iter(numbers)
    return ".".join(next(rest) if word == "*" else word for word in path)


def _path(name: str) -> Path:
    return tuple("*" if part.isdecimal() else part for part in name.split("."))
