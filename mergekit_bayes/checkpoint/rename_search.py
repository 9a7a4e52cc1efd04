"""Searches the rules by which the names of two checkpoints become one."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from mergekit_bayes.checkpoint.rename_patterns import Fit, Pattern
from mergekit_bayes.checkpoint.rename_rules import (
    KNOWN_RULES,
    Edit,
    Path,
    Rule,
    Scope,
    edit_between,
    is_believable,
)

_MOST_FORMS = 32  # of one pattern
_MOST_TRIALS = 300_000  # of pairs of patterns
_MOST_PAIRS = 40_000  # of patterns that fit; with more only known rules are tried

Rank = tuple[float, float]  # scope, and the negative number of patterns that the rule explains

_KNOWN: Rank = (-1, -math.inf)  # of a pair that needs no new rule


class Side(NamedTuple):
    """The names of one checkpoint.

    Attributes:
        left: Those that the other checkpoint lacks.
        starts: The beginnings of all names.
    """

    left: Sequence[Pattern]
    starts: Set[Path]


class Match(NamedTuple):
    """Two patterns that name the same tensors, and the rules that lead from one to the other."""

    pattern: Pattern
    partner: Pattern
    rules: tuple[Rule, ...]


class RulesFound(NamedTuple):
    """What a search has found.

    Attributes:
        matches: The pairs.
        ambiguous: Patterns with two or more partners, of which none is surer than another, or with
            one whose numbers may be in another order.
        left: Patterns without a partner, and what the rules that were found make of them.
    """

    matches: list[Match]
    ambiguous: list[tuple[Pattern, list[Pattern]]]
    left: list[tuple[Pattern, list[Path]]]


class _Candidate(NamedTuple):
    """A pair that a rule would explain."""

    pattern: Pattern
    partner: Pattern
    rules: tuple[Rule, ...]  # those that lead to the form, without the new one
    edit: Edit | None  # the new rule's; None if there is none


def search_rules(other: Side, donor: Side, fit: Fit, scope: Scope) -> RulesFound:
    """Pair patterns by rules.

    A rule that replaces words must explain all patterns to which it applies on one side at least;
    if not, the search is done again without it.

    Args:
        other: The names that are to be changed.
        donor: The names that they are to become.
        fit: Whether the first of two names may be the second by its shape.
        scope: What a rule may change.
    """
    patterns, partners = other.left, donor.left
    fitting: dict[Path, list[Pattern]] = {}
    may_learn = len(patterns) * len(partners) <= _MOST_TRIALS
    if may_learn:
        fitting = {
            p.path: _with_all_numbers(p, [q for q in partners if p.can_be(q, fit)])
            for p in patterns
        }
        may_learn = sum(map(len, fitting.values())) <= _MOST_PAIRS
    if not may_learn:
        fitting = _known_partners(patterns, partners, fit)
    banned: set[Rule] = set()
    while True:
        search = _Search(other, donor, fitting, scope if may_learn else None, banned)
        search.run()
        incomplete = search.incomplete_rules()
        if not incomplete:
            search.add_other_shapes()
            return RulesFound(search.matches, search.ambiguous(), search.left())
        banned |= incomplete


def _with_all_numbers(pattern: Pattern, partners: list[Pattern]) -> list[Pattern]:
    """The partners that have all numbers of a pattern; all of them where there is no such one.

    Four layers are not those of a tower of two where another tower has four.
    """
    return [partner for partner in partners if pattern.is_covered_by(partner)] or partners


class _Forms:
    """What rules make of a pattern's words.

    Attributes:
        paths: Every form, the pattern's own words first.
        rules: For each form the rules that were applied.
    """

    def __init__(self, path: Path) -> None:
        self.paths = [path]
        self.rules: dict[Path, tuple[Rule, ...]] = {path: ()}
        self._rules_tried = [0]  # how many rules were applied to each form
        self._simplest: dict[Path, tuple[int, tuple[Rule, ...], Edit]] = {}

    def extend(self, rules: Sequence[Rule]) -> None:
        """Apply rules that were added to the end of the list."""
        for i, path in enumerate(self.paths):  # which grows
            for rule in rules[self._rules_tried[i] :]:
                for changed in () if rule in self.rules[path] else rule.apply(path):
                    if changed not in self.rules and len(self.paths) < _MOST_FORMS:
                        self.paths.append(changed)
                        self.rules[changed] = (*self.rules[path], rule)
                        self._rules_tried.append(0)
            self._rules_tried[i] = len(rules)

    def simplest_edit(self, target: Path) -> tuple[tuple[Rule, ...], Edit]:
        """The rules to the form from which the least change leads to a name, and that change."""
        count, rules, edit = self._simplest.get(
            target, (0, (), edit_between(self.paths[0], target))
        )
        for path in self.paths[count:]:
            other = edit_between(path, target)
            if other.cost < edit.cost:
                rules, edit = self.rules[path], other
        self._simplest[target] = (len(self.paths), rules, edit)
        return rules, edit


def _known_partners(
    patterns: Sequence[Pattern], partners: Sequence[Pattern], fit: Fit
) -> dict[Path, list[Pattern]]:
    """The partners that the known rules name."""
    by_path = {partner.path: partner for partner in partners}
    fitting: dict[Path, list[Pattern]] = {}
    for pattern in patterns:
        forms = _Forms(pattern.path)
        forms.extend(KNOWN_RULES)
        near = [by_path[path] for path in forms.paths if path in by_path]
        fitting[pattern.path] = [partner for partner in near if pattern.can_be(partner, fit)]
    return fitting


class _Search:
    """One search with one set of rules that are not believed."""

    def __init__(
        self,
        other: Side,
        donor: Side,
        fitting: Mapping[Path, Sequence[Pattern]],
        scope: Scope | None,
        banned: set[Rule],
    ) -> None:
        self.matches: list[Match] = []
        self._left = {pattern.path: pattern for pattern in other.left}
        self._partners = {pattern.path: pattern for pattern in donor.left}
        self._starts, self._donor_starts = other.starts, donor.starts
        self._fitting, self._scope, self._banned = fitting, scope, banned
        self._rules = list(KNOWN_RULES)
        self._forms = {pattern.path: _Forms(pattern.path) for pattern in other.left}

    def run(self) -> None:
        """Accept the surest rules, round by round, until there is no new one."""
        while sure := self._sure_rules(self._candidates()):
            strong = [(rule, pairs) for rule, pairs in sure if not _is_weak(pairs)]
            for rule, candidates in strong or sure:
                for candidate in candidates:
                    self._accept(candidate)
                if rule is not None and (rule.before or rule.at_start):
                    self._rules.append(rule)

    def incomplete_rules(self) -> set[Rule]:
        """Accepted rules that replace words, and leave patterns on both sides."""
        used = {rule for match in self.matches for rule in match.rules} - set(KNOWN_RULES)
        left = [self._forms[p.path] for p in self._left.values() if not p.is_buffer()]
        donor_left = [path for path, p in self._partners.items() if not p.is_buffer()]
        return {
            rule
            for rule in used
            if rule.scope is Scope.REPLACED
            and any(
                rule.apply(path)
                for forms in left
                for path in forms.paths
                if rule not in forms.rules[path]
            )
            and any(rule.reversed().apply(path) for path in donor_left)
        }

    def add_other_shapes(self) -> None:
        """Pair by the accepted rules what differs in shape, so that the shapes are compared."""
        claims: defaultdict[Path, list[Match]] = defaultdict(list)
        for pattern in self._left.values():
            forms = self._forms[pattern.path]
            partners = [self._partners[path] for path in forms.paths if path in self._partners]
            partners = [partner for partner in partners if pattern.pairs(partner)]
            if len(partners) == 1:
                path = partners[0].path
                claims[path].append(Match(pattern, partners[0], forms.rules[path]))
        for match in (matches[0] for matches in claims.values() if len(matches) == 1):
            del self._left[match.pattern.path], self._partners[match.partner.path]
            self.matches.append(match)

    def left(self) -> list[tuple[Pattern, list[Path]]]:
        """Patterns without a partner, and what the rules that were found make of them."""
        known = set(KNOWN_RULES)
        return [
            (
                pattern,
                [path for path, rules in forms.rules.items() if rules and not known & {*rules}],
            )
            for pattern in self._left.values()
            for forms in (self._forms[pattern.path],)
        ]

    def ambiguous(self) -> list[tuple[Pattern, list[Pattern]]]:
        """Patterns that are left, with their possible partners.

        These are two or more, or one in which no word tells which number is which.
        """
        rivals: defaultdict[Path, dict[Path, Pattern]] = defaultdict(dict)
        for rule, candidates in self._candidates().items():
            if rule is not None and (self._scope is None or rule.scope > self._scope):
                continue
            for candidate in candidates:
                rivals[candidate.pattern.path][candidate.partner.path] = candidate.partner
        return [
            (self._left[path], list(partners.values()))
            for path, partners in rivals.items()
            if len(partners) > 1
            or any(self._left[path].known_order(partner) is None for partner in partners.values())
        ]

    def _accept(self, candidate: _Candidate) -> None:
        pattern, partner, rules, edit = candidate
        del self._left[pattern.path], self._partners[partner.path]
        own = () if edit is None else (edit.rule,)
        self.matches.append(Match(pattern, partner, rules + own))

    def _candidates(self) -> dict[Rule | None, list[_Candidate]]:
        """The pairs that each possible rule would explain; None for the rules known already."""
        found: defaultdict[Rule | None, list[_Candidate]] = defaultdict(list)
        for pattern in self._left.values():
            forms = self._forms[pattern.path]
            forms.extend(self._rules)
            for partner in self._fitting[pattern.path]:
                if partner.path not in self._partners:
                    continue
                if partner.path in forms.rules:
                    rules = forms.rules[partner.path]
                    found[None].append(_Candidate(pattern, partner, rules, None))
                elif self._scope is not None:
                    rules, edit = forms.simplest_edit(partner.path)
                    found[edit.rule].append(_Candidate(pattern, partner, rules, edit))
        return {rule: pairs for rule, pairs in found.items() if _is_possible(pairs)}

    def _sure_rules(
        self, by_rule: Mapping[Rule | None, list[_Candidate]]
    ) -> list[tuple[Rule | None, list[_Candidate]]]:
        """The believable rules, with those of their pairs that no other rule contests."""
        ranks = {rule: _rank(candidates) for rule, candidates in by_rule.items()}
        claims: defaultdict[tuple[bool, Path], list[tuple[Rank, Path]]] = defaultdict(list)
        for rule, candidates in sorted(by_rule.items(), key=lambda item: ranks[item[0]]):
            for pattern, partner, _, _ in candidates:
                claims[True, pattern.path].append((ranks[rule], partner.path))
                claims[False, partner.path].append((ranks[rule], pattern.path))

        def is_uncontested(rank: Rank, one: Path, other: Path) -> bool:
            # The best rivals come first, so that most contested pairs are found at once.
            return all(
                path == own or _dominates(rank, rival)
                for key, own in (((True, one), other), ((False, other), one))
                for rival, path in claims[key]
            )

        sure: list[tuple[Rule | None, list[_Candidate]]] = []
        for rule, candidates in by_rule.items():
            uncontested = [
                c
                for c in candidates
                if is_uncontested(ranks[rule], c.pattern.path, c.partner.path)
                and c.pattern.known_order(c.partner) is not None
            ]
            if _is_weak(uncontested):
                uncontested = [c for c in uncontested if not self._is_explained(c)]
            if uncontested and self._is_acceptable(rule, uncontested):
                sure.append((rule, uncontested))
        return sure

    def _is_explained(self, candidate: _Candidate) -> bool:
        """Whether accepted rules put one of the two names into a part that the other side has."""
        learned = self._rules[len(KNOWN_RULES) :]
        forms = [
            (form, self._donor_starts)
            for rule in learned
            if rule.before
            for form in rule.apply(candidate.pattern.path)
        ] + [
            (form, self._starts)
            for rule in learned
            if rule.after
            for form in rule.reversed().apply(candidate.partner.path)
        ]
        return any(form[:1] in starts for form, starts in forms)

    def _is_acceptable(self, rule: Rule | None, candidates: Sequence[_Candidate]) -> bool:
        if rule is None or self._scope is None:
            return rule is None
        # Rules that may not be used still contest the pairs of others.
        if rule.scope > self._scope or rule in self._banned:
            return False
        if not is_believable([c.edit for c in candidates if c.edit is not None]):
            return False
        # What both checkpoints have under one name is hardly something else in one of them.
        words = None if rule.scope is Scope.REPLACED else 1
        is_doubtful = rule.at_start and (words is None or _is_weak(candidates))
        return not is_doubtful or not (
            (rule.before and rule.before[:words] in self._donor_starts)
            or (rule.after and rule.after[:words] in self._starts)
        )


def _is_weak(candidates: Sequence[_Candidate]) -> bool:
    """Whether a new rule is seen in one module only."""
    return len({c.edit.tail[:-1] if c.edit else c.pattern.path for c in candidates}) < 2


def _is_possible(candidates: Sequence[_Candidate]) -> bool:
    """Whether a rule may be right.

    One that adds or removes words may be right even if too few pairs show it: then it makes others
    doubtful. One that replaces words is thought of only if it is believable.
    """
    edits = [c.edit for c in candidates if c.edit is not None]
    return not edits or edits[0].rule.scope is not Scope.REPLACED or is_believable(edits)


def _rank(candidates: Sequence[_Candidate]) -> Rank:
    edit = candidates[0].edit
    if edit is None:
        return _KNOWN
    return (edit.rule.scope, -len({candidate.pattern.path for candidate in candidates}))


def _dominates(one: Rank, other: Rank) -> bool:
    """Whether a rule is at least as simple as another, explains as much, and is not its equal."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]
