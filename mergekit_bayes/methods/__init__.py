"""Merging rules, one file each, listed in one table.

Each is elementwise, so a slice of a merge is the merge of slices: this permits streaming.
"""

from mergekit_bayes.methods.average import AVERAGE
from mergekit_bayes.methods.base import Method
from mergekit_bayes.methods.gradient_matching import GRADIENT_MATCHING
from mergekit_bayes.methods.precision_average import PRECISION_AVERAGE
from mergekit_bayes.methods.task_arithmetic import TASK_ARITHMETIC

METHODS = {m.name: m for m in (AVERAGE, PRECISION_AVERAGE, TASK_ARITHMETIC, GRADIENT_MATCHING)}

__all__ = ["METHODS", "Method", "choose"]


def choose(*, with_base: bool, by_precision: bool) -> Method:
    """The method that two questions decide: is there a base, and do precisions weigh?"""
    for method in METHODS.values():
        if method.needs_base == with_base and method.needs_precision == by_precision:
            return method
    raise AssertionError("the table has a method for each of the four answers")
