"""Run the `child` of a test module in two gloo processes."""

import json
import os
import sys
from pathlib import Path

import pytest

from mergekit_bayes import launcher

ROOT = Path(__file__).parents[1]


def found_by_two(module, folder):
    """What each of two processes found: `child(folder)` writes a list of dicts to found.json."""
    code = f"from pathlib import Path; from {module} import child; child(Path({str(folder)!r}))"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the folder may be another
        assert launcher.launch([sys.executable, "-c", code], 2) == 0
    results = json.loads((folder / "found.json").read_text())
    assert [f["world"] for f in results] == [2, 2]  # some launcher commands silently start one
    return results
