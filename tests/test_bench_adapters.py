"""The benchmark of adapters runs at a tiny size, and its table of PEFT's combinations holds."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "scripts" / "bench"


def rows_of(*words):
    command = [sys.executable, str(BENCH / "adapters.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in line] for line in lines[2:]]


def test_a_layer_is_merged_by_both_ways_and_to_the_same_where_they_mean_the_same():
    sizes = ("--d", "40", "--rank", "2", "--adapters", "3", "--repeats", "1")
    (row,) = rows_of(*sizes, "--methods", "tsv_m")
    assert row[0] == "tsv_m"
    assert all(float(row[i]) >= 0 for i in (1, 2, 4, 5))
    assert float(row[-1]) < 1e-6


@pytest.mark.slow
def test_every_row_is_measured():
    sizes = ("--d", "64", "--rank", "2", "--adapters", "3", "--repeats", "1")
    rows = {row[0]: row for row in rows_of(*sizes)}
    assert {"task_arithmetic", "ties", "dare_ties", "sce", "iso_c", "tsv_m"} < rows.keys()
    assert all(float(rows[n][-1]) < 1e-6 for n in ("task_arithmetic", "iso_c", "tsv_m"))
    assert {rows[n][-1] for n in ("ties", "dare_ties", "sce")} == {"another rule"}
    files = rows_of("--files", "--layers", "1", *sizes)
    assert len(files) == 5
    assert all(float(row[1]) > 0 for row in files)


@pytest.mark.slow
def test_peft_combines_plain_adapters_rightly_and_some_others_wrongly():
    """What the documentation says of `add_weighted_adapter`; when PEFT heals one, say so there."""
    pytest.importorskip("peft")
    sys.path.insert(0, str(BENCH))
    try:
        rows = importlib.import_module("adapters_peft").errors()
    finally:
        sys.path.remove(str(BENCH))
    found = {(kind, combination): cells for kind, combination, *cells in rows}
    right = ("plain", "different alpha", "different rank", "rank_pattern", "alpha_pattern")
    wrong = ("use_rslora", "lora_bias", "use_dora", "kasa_config", "modules_to_save in the first")
    for combination in ("cat", "svd"):
        for kind in (*right, "use_rslora in the second"):
            assert all(float(e) < 1e-6 for e in found[kind, combination][:4]), kind
        for kind in wrong:
            assert all(float(e) > 0.1 for e in found[kind, combination][:4]), kind
    assert float(found["plain", "linear"][2]) > 0.1  # a product of sums, not a sum of products
    assert found["different rank", "linear"][2] == "ValueError"
    assert found["rank_pattern", "linear"][4] == "RuntimeError"  # it does not load again
