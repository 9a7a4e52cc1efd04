"""Rules by which names of tensors change: one run of words in the place of another."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

Path = tuple[str, ...]  # a name, split at its dots, with "*" for every number


class Scope(IntEnum):
    """What a rule may change, and so how sure it is: 0 is the surest.

    Attributes:
        MOVED: The beginning of names, by adding, removing or moving words:
            `language_model.model` to `model.language_model`.
        NESTED: Other places likewise: `layers.0.fc1` to `layers.0.mlp.fc1`.
        REPLACED: Words become other words, for all that lies below them: `encoder.layer` to
            `layers`. Only for two whole models of one architecture: of two parts of models,
            `encoder` and `decoder` would be taken for one.
    """

    MOVED = 0
    NESTED = 1
    REPLACED = 2


class Rule(NamedTuple):
    """A run of words and what stands in its place.

    Attributes:
        before: The words of the other checkpoint's names.
        after: The words of the donor's names.
        at_start: Whether the rule holds at the beginning of names only.
    """

    before: Path
    after: Path
    at_start: bool = False

    @property
    def scope(self) -> Scope:
        """How much it changes."""
        return _scope_of(self)

    def apply(self, path: Path) -> list[Path]:
        """The names that it makes of a name, one for each place where it can be applied."""
        length = len(self.before)
        starts = range(1) if self.at_start else range(len(path) - length + 1)
        if not length and not self.at_start:
            return []
        return [
            path[:i] + self.after + path[i + length :]
            for i in starts
            if path[i : i + length] == self.before
        ]

    def reversed(self) -> "Rule":
        """The rule from the donor's names to the other checkpoint's."""
        return Rule(self.after, self.before, self.at_start)

    def shown_in(self, path: Path, partner: Path) -> tuple[str, str]:
        """Both sides as text, with the word before them where they alone would say too little.

        Args:
            path: A name to which the rule was applied, among others perhaps.
            partner: What the rules have made of it.
        """
        start: Path = ()
        run, where = (self.after, partner) if self.after else (self.before, path)
        at = _find(run, where)
        is_end = at is not None and at + len(run) == len(where)
        if at and not self.at_start and (is_end or not self.before or not self.after):
            start = where[at - 1 : at]
        end = ("*",) if self.at_start else ()
        before, after = (".".join((*start, *side, *end)) for side in (self.before, self.after))
        return before or "(nothing)", after or "(nothing)"


def _find(run: Path, path: Path) -> int | None:
    """Where a run of words stands in a name the last time."""
    starts = range(len(path) - len(run), -1, -1)
    return next((i for i in starts if path[i : i + len(run)] == run), None)


@lru_cache(maxsize=4096)
def _scope_of(rule: Rule) -> Scope:
    before, after = _words(rule.before), _words(rule.after)
    if before <= after or after <= before:
        return Scope.MOVED if rule.at_start else Scope.NESTED
    return Scope.REPLACED


class Edit(NamedTuple):
    """The one difference between two names: `head + rule.before + tail` has become another name.

    Attributes:
        rule: The difference.
        head: The common words before it.
        tail: The common words behind it.
    """

    rule: Rule
    head: Path
    tail: Path

    @property
    def cost(self) -> tuple[int, int]:
        """How much it changes, to find the least change."""
        return self.rule.scope, len(self.rule.before) + len(self.rule.after)

    def has_common_word(self) -> bool:
        """Whether the two names share a word besides the names of parameters and numbers."""
        common = (_words(self.rule.before) & _words(self.rule.after)) + _words(self.tail)
        return any(word not in ("weight", "bias") for word in common)


def edit_between(one: Path, other: Path) -> Edit:
    """The one difference between two names, as near to their beginning as can be."""
    shortest = min(len(one), len(other))
    tail = 0
    while tail < shortest and one[-1 - tail] == other[-1 - tail]:
        tail += 1
    head = 0
    while head < shortest - tail and one[head] == other[head]:
        head += 1
    before, after = one[head : len(one) - tail], other[head : len(other) - tail]
    return Edit(Rule(before, after, not head), one[:head], one[len(one) - tail :])


def is_believable(edits: Sequence[Edit]) -> bool:
    """Whether the pairs that one rule explains show that it is a rule.

    A prefix may belong to one tensor. Words inside of a name must come or go in two places, or
    before two words at least. Words that become others must have two modules below them: that
    `pre_norm` and `post_norm` have the same shape does not make them one tensor.
    """
    scope = edits[0].rule.scope
    if scope is Scope.MOVED:
        return any(edit.has_common_word() for edit in edits)
    if scope is Scope.NESTED:
        places = {(edit.head[-1:], edit.tail[:-1]) for edit in edits}
        return len(places) > 1 or any(_words(edit.tail[:-1]).total() > 1 for edit in edits)
    return len({edit.tail[:-1] for edit in edits if _words(edit.tail[:-1])}) > 1


def _words(path: Path) -> Counter[str]:
    return Counter(word for word in path if word != "*")


def _both_ways(pairs: Iterable[tuple[str, str]]) -> tuple[Rule, ...]:
    rules = [Rule(tuple(a.split(".")), tuple(b.split("."))) for a, b in pairs]
    return tuple(rules + [rule.reversed() for rule in rules])


# Changes of words that no structure shows, as transformers makes them on loading
# (`conversion_mapping.py`, 5.x): the scale and shift of a norm, torch's weight norm, the head of
# GPT-NeoX, and the vision transformers.
KNOWN_RULES = _both_ways(
    (
        ("gamma", "weight"),
        ("beta", "bias"),
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
        ("embed_out", "lm_head"),
        ("attention.query", "q_proj"),
        ("attention.key", "k_proj"),
        ("attention.value", "v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("out_proj", "o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
)
