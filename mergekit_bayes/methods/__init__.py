"""Merging rules, one file each, listed in one table.

Each is elementwise, so a slice of a merge is the merge of slices: this permits streaming.
"""

from mergekit_bayes.methods.base import Method, Parameter
from mergekit_bayes.methods.table import (
    METHODS,
    TABLE,
    check_fit,
    choose,
    method_named,
    settings_of,
)

__all__ = [
    "METHODS",
    "TABLE",
    "Method",
    "Parameter",
    "check_fit",
    "choose",
    "method_named",
    "settings_of",
]
