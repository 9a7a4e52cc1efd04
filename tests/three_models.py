"""A base and two tasks as files, merges of them, and the same merge in float64."""

import numpy as np
import pytest

from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Base and two tasks with precisions in `base`, `a`, `b` .safetensors, and their arrays."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for i, name in enumerate(("base", "a", "b")):
        mean, precision = tiny.arrays(i), tiny.precisions(i)
        tiny.posterior(f"{name}.safetensors", mean, precision)
        found[name] = (mean, precision)
    return found


def merge(*models, **settings):
    refs = tuple(f"{m}.safetensors" for m in models)
    if settings.get("base"):
        settings["base"] += ".safetensors"
    return run_merge(MergeConfig(models=refs, **settings))


def expected_matching(world, names, scales):
    """Twin in float64; `base` counts with delta_0, all counts equal."""
    result = {}
    for key in tiny.SHAPES:
        m0, s0 = (np.float64(x[key]) for x in world["base"])
        s0 = s0 + DELTA_0
        total, pull = s0, 0.0
        for name, scale in zip(names, scales, strict=True):
            m, h = (np.float64(x[key]) for x in world[name])
            total = total + scale * h
            pull = pull + scale * (s0 + h) * (m - m0)
        result[key] = (m0 + pull / total, total)
    return result
