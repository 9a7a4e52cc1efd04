"""Memory and open files do not grow with the model, and progress shows before the first pass."""

import subprocess
import sys

import numpy as np
import pytest

from mergekit_bayes.checkpoint.layout import write_index
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.stream import first_pass as first
from tests import tiny


@pytest.mark.parametrize("fused", [False, True])
def test_memory_does_not_grow_with_the_model(tmp_path, fused):
    """Peak resident memory of a merge of 64 MiB files stays within 24 MiB of one of 1 MiB files."""
    code = (
        "import re, sys\n"
        "from mergekit_bayes.merge import MergeConfig, run_merge\n"
        "run_merge(MergeConfig(models=('a.safetensors','b.safetensors'), base='base.safetensors',"
        f" weights='precision', out='o.safetensors'), fused={fused})\n"
        f"assert ('llvmlite' in sys.modules) == {fused}\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1))"
    )
    peaks = []
    for rows in (64, 64, 4096):  # the first may compile, which takes memory of its own
        folder = tmp_path / f"{rows}-{len(peaks)}"
        shapes = {"w": (rows, 4096)}
        for i, name in enumerate(("base", "a", "b")):
            tiny.posterior(
                folder / f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes)
            )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout) / 1024)
    assert peaks[2] - peaks[1] < 24, peaks


def test_more_shards_than_the_usual_limit_of_open_files_are_merged(tmp_path):
    shapes = {f"h.{i}.weight": (2, 2) for i in range(40)}
    for k, name in enumerate(("base", "a", "b")):
        parts = {f"model-{i + 1:05d}-of-00040.safetensors": [n] for i, n in enumerate(shapes)}
        for (file, (tensor,)), values in zip(
            parts.items(), tiny.arrays(k, shapes).values(), strict=True
        ):
            tiny.write(tmp_path / name / file, {tensor: values})
        write_index(tmp_path / name, "model", parts, 0)
    code = (
        "import resource, sys\n"
        "from mergekit_bayes.errors import CheckpointError\n"
        "from mergekit_bayes.merge import MergeConfig, run_merge\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (60, int(sys.argv[1])))\n"
        "try:\n"
        "    run_merge(MergeConfig(models=('a', 'b'), base='base', out='out'))\n"
        "except CheckpointError as error:\n"
        "    print(error)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, hard],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hard in ("60", "1000")
    ]
    assert "ulimit -n" in said[0]
    assert said[1] == ""
    assert set(tiny.read(tmp_path / "out")) == set(shapes)


def test_an_error_is_heard_of_and_progress_is_shown_before_the_first_pass_of_all_tensors(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shapes = {f"h.{i:02d}.weight": (8, 8) for i in range(60)}
    for i, name in enumerate(("base", "a")):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(i, shapes), tiny.precisions(i, shapes))
    config = MergeConfig(
        models=("a.safetensors",),
        base="base.safetensors",
        weights="precision",
        shrink="0.3",
        out="x.safetensors",
    )
    passed, real = [], first.FirstPass.measure
    monkeypatch.setattr(
        first.FirstPass, "measure", lambda self, step: passed.append(step.name) or real(self, step)
    )
    seen = []
    run_merge(config, threads=1, progress=lambda done, total: seen.append(len(passed)))
    assert len(seen) == 60
    assert seen[0] < 20
    mean = tiny.arrays(1, shapes)
    mean["h.00.weight"][0, 0] = np.nan
    tiny.posterior("bad.safetensors", mean, tiny.precisions(1, shapes))
    passed.clear()
    with pytest.raises(CheckpointError, match=r"h\.00\.weight"):
        run_merge(
            config.model_copy(update={"models": ("bad.safetensors",), "out": "y.safetensors"}),
            threads=1,
        )
    assert len(passed) < 20
