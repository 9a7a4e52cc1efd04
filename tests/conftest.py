"""Tests that share an expensive fixture run in one process, so that it is made once, and first."""

import pytest

# The fixture that starts other processes or trains, by the file whose tests share it.
EXPENSIVE = {
    "test_bench": "result",
    "test_detox": "world",
    "test_rank_noise": "two",
    "test_ranks": "two",
    "test_shards": "two",
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    """Group those tests for `--dist loadgroup`; the small tests then fill up both processes."""
    for item in items:
        if EXPENSIVE.get(item.path.stem) in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)
