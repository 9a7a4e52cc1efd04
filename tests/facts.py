"""The facts of a method, for tests that call its `combine` or a pass themselves."""

import numpy as np

from mergekit_bayes.methods.base import FactInputs
from mergekit_bayes.methods.histogram import BINS


def facts_of(method, tasks, *, guard=0.2, totals=None, **given):
    """What the method makes of its default settings but for those given, and of totals of one."""
    settings = {p.name: p.default for p in method.parameters} | given
    reduction = method.reduction
    if reduction is not None and totals is None:
        count = reduction.count(tasks)
        shape = (count, BINS) if reduction.kind == "histogram" else (count,)
        totals = np.ones(shape, np.int64 if reduction.kind == "histogram" else np.float64)
    if method.facts is None:
        return None
    return method.facts(FactInputs(settings, guard, (1.0,) * tasks, totals))
