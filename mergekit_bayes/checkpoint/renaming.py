"""Which names of two checkpoints mean one tensor.

A saved fine-tune may carry one common prefix that its Hub base lacks (`transformer.h.0` against
`h.0`).
"""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple


class Renaming(NamedTuple):
    """How another checkpoint's names become the donor's.

    Attributes:
        strip: The prefix that is removed.
        add: The prefix that is put in its place.
    """

    strip: str = ""
    add: str = ""

    def __call__(self, name: str, donor: Collection[str]) -> str:
        """The donor's name of a tensor; `name` itself if the donor has none."""
        if name in donor:
            return name
        renamed = self.add + name.removeprefix(self.strip)
        return renamed if renamed in donor else name


def find_renaming(donor: Collection[str], other: Collection[str]) -> Renaming:
    """The renaming by one common prefix that gives most of `other`'s tensors the donor's names.

    Names that agree already win a tie, so that they are left alone.
    """
    matches: Counter[Renaming] = Counter({Renaming(): len(set(donor) & set(other))})
    for name in other:
        matches.update(Renaming(strip=p) for p in _prefixes(name) if name[len(p) :] in donor)
    for name in donor:
        matches.update(Renaming(add=p) for p in _prefixes(name) if name[len(p) :] in other)
    return matches.most_common(1)[0][0]


def _prefixes(name: str) -> list[str]:
    """The beginnings of a name that end in a dot."""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]
