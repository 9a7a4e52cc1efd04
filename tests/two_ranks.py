"""Run the `child` of a test module in two gloo processes."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from mergekit_bayes import launcher

ROOT = Path(__file__).parents[1]


def run(module, folder):
    """Call the `child` of a module, and end this process."""
    importlib.import_module(module).child(Path(folder))
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo may else end the interpreter's teardown with an abort ("terminate called
    # without an active exception"), after all of the work.
    os._exit(0)


def found_by_two(module, folder):
    """What each of two processes found: `child(folder)` writes a list of dicts to found.json."""
    code = f"from tests.two_ranks import run; run({module!r}, {str(folder)!r})"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)  # the folder may be another
        assert launcher.launch([sys.executable, "-c", code], 2) == 0
    results = json.loads((folder / "found.json").read_text())
    assert [f["world"] for f in results] == [2, 2]  # some launcher commands silently start one
    return results
