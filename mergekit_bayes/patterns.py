"""Regular expressions from outside, compiled only if no name can make them take long.

Python's `re` tries the ways to match one after another. A pattern such as `(a+)+$` has so many for
one name that a match takes years. The ways are counted here from above, on the parsed pattern:

- a repeat whose end its next character does not tell may end anywhere in the name, `.*` in `.*x`;
- repeats that follow each other share the name's length: n^k / k! ways for k of them;
- a part that may be left out, and branches that can match the same text, multiply the ways;
- within a repeat no such choice is allowed, for it would be made again in each round.
"""

import importlib
import itertools
import math
import re
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

LONGEST_NAME = 256  # characters; longer names are not matched with patterns
_LONGEST_PATTERN = 1000
MOST_WAYS = 5_000_000  # tried in 25 to 50 ms
_LOOKAHEAD = 16  # characters that are compared to tell what comes next

_parser: Any = importlib.import_module("re._parser")  # no public module parses a pattern
_Items: TypeAlias = Sequence[tuple[Any, Any]]  # a parsed pattern: operations and their arguments
_Masks: TypeAlias = tuple[int, ...]  # which characters may come next, one after another

_OTHER = 128  # the bit that stands for all characters beyond ASCII
_ANY = (1 << (_OTHER + 1)) - 1
_END = 1 << (_OTHER + 1)  # the bit for the end of the name
_ENDS = ("AT_END", "AT_END_STRING")
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


class PatternError(ValueError):
    """A pattern is no regular expression or may take long; the text is the reason."""


def compile_pattern(
    pattern: str, *, anywhere: bool = False, longest: int = LONGEST_NAME
) -> re.Pattern[str]:
    """Compile a pattern that was not written here.

    Args:
        pattern: A regular expression, to be matched with names.
        anywhere: Whether it is searched for within names, instead of matched with their start.
        longest: The most characters of a name.

    Raises:
        PatternError: It is no regular expression, or it may take long.
    """
    if count_ways(pattern, anywhere=anywhere, longest=longest) > MOST_WAYS:
        raise PatternError("it can match a name in too many ways, and may take hours")
    with warnings.catch_warnings(action="ignore"):
        return re.compile(pattern)


def count_ways(pattern: str, *, anywhere: bool = False, longest: int = LONGEST_NAME) -> float:
    """In how many ways a match of a pattern may be tried on the worst name; an upper bound.

    Args:
        pattern: As in `compile_pattern`.
        anywhere: As in `compile_pattern`.
        longest: As in `compile_pattern`.

    Raises:
        PatternError: It is no regular expression, or one whose ways grow exponentially.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise PatternError(
            f"it has {len(pattern):,} characters, where at most {_LONGEST_PATTERN:,} are read"
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            items = _parser.parse(pattern)
            re.compile(pattern)
        ways, repeats = _ways(items, (_END,), longest)
    except PatternError:
        raise
    except RecursionError:
        raise PatternError("it is nested too deeply") from None
    except (re.error, OverflowError, ValueError) as error:
        raise PatternError(str(error)) from None
    if anywhere and not _is_anchored(items):
        ways, repeats = ways * longest, repeats + 1
    return ways / math.factorial(repeats)


def _is_anchored(items: _Items) -> bool:
    return bool(items) and str(items[0][1]) in ("AT_BEGINNING", "AT_BEGINNING_STRING")


def _ways(items: _Items, after: _Masks, longest: int) -> tuple[float, int]:
    """How many ways a sequence may be tried in, and how many of its repeats end anywhere.

    Args:
        items: The sequence.
        after: The characters that must follow it, as far as they are known.
        longest: The most characters of a name.
    """
    ways, repeats = 1.0, 0
    for i, (operation, argument) in enumerate(items):
        following, is_fixed = _start(items[i + 1 :])
        follow = following + after if is_fixed else following
        more, more_repeats = _ways_of_one(str(operation), argument, follow, longest)
        ways, repeats = ways * more, repeats + more_repeats
    return ways, repeats


def _ways_of_one(operation: str, argument: Any, follow: _Masks, longest: int) -> tuple[float, int]:
    if operation in ("GROUPREF", "GROUPREF_EXISTS"):
        raise PatternError("it refers back to one of its groups")
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _ways(argument[1], (), longest)
    if (inner := _group(operation, argument)) is not None:
        return _ways(inner, follow, longest)
    if operation == "BRANCH":
        return _ways_of_branches(argument[1], follow, longest)
    if operation in _REPEATS:
        least, most, body = argument
        return _ways_of_repeat(least, most, body, follow, longest)
    return 1.0, 0


def _ways_of_branches(
    branches: Sequence[_Items], follow: _Masks, longest: int
) -> tuple[float, int]:
    counted = [_ways(branch, follow, longest) for branch in branches]
    most = max(repeats for _, repeats in counted)
    # As if each had as many repeats as the one with the most, by whose k! the ways are divided.
    each = [ways * math.perm(most, most - repeats) for ways, repeats in counted]
    starts = [masks + follow if fixed else masks for masks, fixed in map(_start, branches)]
    overlapping = [
        any(i != j and not _differ(one, other) for j, other in enumerate(starts))
        for i, one in enumerate(starts)
    ]
    together = sum(itertools.compress(each, overlapping))
    return max(together, *each), most


def _ways_of_repeat(
    least: int, most: int, body: Any, follow: _Masks, longest: int
) -> tuple[float, int]:
    ways, repeats = _ways(body, follow, longest)
    masks, is_fixed = _start(body)
    if least == most and is_fixed:
        return ways ** min(least, longest), repeats
    if most <= 1:
        return ways * (1 if least == most or _differ(masks, follow) else 2), repeats
    if len(body) != 1 or _mask(*body[0]) is None:
        if body.getwidth()[0] == 0:
            raise PatternError("it repeats what may be empty")
        if _ways(body, masks + masks if is_fixed else masks, LONGEST_NAME)[0] > 1:
            raise PatternError("it repeats what can match the same text in several ways")
    if _differ(masks, follow):
        return ways, repeats
    ends = min(longest, int(most) - least + 1)
    return ways * max(1, ends / _period(follow)), repeats + 1


def _differ(one: _Masks, other: _Masks) -> bool:
    """Whether no text begins with both."""
    return any(a & b == 0 for a, b in zip(one, other, strict=False))


def _period(masks: _Masks) -> int:
    """The least distance between two places of a text at which these characters are."""
    text = tuple(mask for mask in masks if mask != _END)
    for shift in range(1, len(text)):
        if not _differ(text[shift:], text):
            return shift
    return max(1, len(text))


def _group(operation: str, argument: Any) -> Any:
    """What is in a group; None if it is none."""
    if operation == "SUBPATTERN":
        return argument[3]
    return argument if operation == "ATOMIC_GROUP" else None


def _start(items: _Items) -> tuple[_Masks, bool]:
    """The characters that a sequence must begin with, and whether they are all of it."""
    masks: _Masks = ()
    for item in items:
        more, is_fixed = _start_of_one(str(item[0]), item[1])
        masks += more
        if not is_fixed or len(masks) > _LOOKAHEAD:
            return masks[:_LOOKAHEAD], False
    return masks, True


def _start_of_one(operation: str, argument: Any) -> tuple[_Masks, bool]:
    if operation == "AT":
        is_end = str(argument) in _ENDS
        return ((_END,), False) if is_end else ((), True)
    if operation in ("ASSERT", "ASSERT_NOT"):
        return (), True
    if (inner := _group(operation, argument)) is not None:
        return _start(inner)
    if operation == "BRANCH":
        starts = [_start(branch) for branch in argument[1]]
        lengths = {len(masks) for masks, _ in starts}
        union = [0] * min(lengths)
        for masks, _ in starts:
            union = [a | b for a, b in zip(union, masks, strict=False)]
        return tuple(union), len(lengths) == 1 and all(fixed for _, fixed in starts)
    if operation in _REPEATS:
        least, most, body = argument
        masks, is_fixed = _start(body)
        if not is_fixed:
            return (masks if least else ()), False
        return masks * min(least, _LOOKAHEAD), least == most
    mask = _mask(operation, argument)
    return ((mask,), True) if mask is not None else ((), False)


def _mask(operation: Any, argument: Any) -> int | None:
    """The characters of an operation that matches one, both cases of a letter as one; else None."""
    operation = str(operation)
    if operation == "ANY":
        return _ANY
    if operation == "LITERAL":
        return _bit(argument)
    if operation == "NOT_LITERAL":
        return _all_but(_bit(argument))
    if operation != "IN":
        return None
    mask, is_negated = 0, False
    for kind, value in argument:
        if str(kind) == "NEGATE":
            is_negated = True
        elif str(kind) == "RANGE":
            first, last = value
            mask |= sum({_bit(c) for c in range(first, min(last, _OTHER) + 1)})
            mask |= _bit(last)
        elif str(kind) == "CATEGORY":
            mask |= _CATEGORIES[str(value)]
        else:
            mask |= _bit(value)
    return _all_but(mask) if is_negated else mask


def _all_but(mask: int) -> int:
    # Of letters and of what is beyond ASCII, a bit stands for more than one character.
    return _ANY & ~mask | _SHARED


def _bit(code: int) -> int:
    return 1 << (ord(chr(code).lower()) if code < _OTHER else _OTHER)


def _category(pattern: str) -> int:
    members = {_bit(code) for code in range(_OTHER) if re.fullmatch(pattern, chr(code))}
    return sum(members) | _bit(_OTHER)


_CATEGORIES = {
    f"CATEGORY_{name}": _category(pattern)
    for name, pattern in {
        "DIGIT": r"\d",
        "NOT_DIGIT": r"\D",
        "SPACE": r"\s",
        "NOT_SPACE": r"\S",
        "WORD": r"\w",
        "NOT_WORD": r"\W",
    }.items()
}
_SHARED = _bit(_OTHER) | sum(_bit(code) for code in range(ord("a"), ord("z") + 1))
