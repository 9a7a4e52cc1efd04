"""Several processes each merge a part of one output, which the first of them joins."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint import locks
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import (
    MergeConfig,
    Part,
    parse_part,
    part_of_launcher,
    parts,
    plan_merge,
    run_merge,
)
from mergekit_bayes.merge import run as engine
from mergekit_bayes.methods import METHODS
from mergekit_bayes.methods.measuring import WINDOW
from mergekit_bayes.stream import units as units_module
from mergekit_bayes.stream.chunks import Reader
from mergekit_bayes.stream.first_pass import FirstPass
from tests import interrupted, tiny
from tests.interrupted import config, line

inputs = interrupted.inputs
MERGE = "import sys; from bmerge_cli.main import main; main()"


def bmerge(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_four_processes_write_one_output(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 500)
    run_merge(config(inputs, out="whole.safetensors"))
    parts = [bmerge(*line(inputs, "out.safetensors"), "--shard", f"{i}/4") for i in (3, 1, 4, 2)]
    assert [p.wait() for p in parts] == [0] * 4, [p.stderr.read() for p in parts]
    assert not Path("out.safetensors").exists()
    last = bmerge(*line(inputs, "out.safetensors"))
    assert last.wait() == 0, last.stderr.read()
    for suffix in (".safetensors", ".posterior"):
        assert Path("out" + suffix).read_bytes() == Path("whole" + suffix).read_bytes()
    assert not Path("out.safetensors.partial").exists()


def test_each_rank_of_a_launcher_takes_a_part_and_one_prints(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="whole.safetensors"))
    ranks = [
        bmerge(*line(inputs, "out.safetensors"), RANK=str(r), WORLD_SIZE="4") for r in range(4)
    ]
    said = [p.communicate() for p in ranks]
    assert [p.returncode for p in ranks] == [0] * 4, said
    assert [out.strip() for out, _ in said] == ["out.safetensors", "", "", ""]
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_the_first_rank_does_what_a_dead_one_left(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "PATIENCE", 0.3)
    run_merge(config(inputs, out="whole.safetensors"))
    settings = config(inputs, out="out.safetensors")
    run_merge(settings, part=Part(2, 3))
    with closing(plan_merge(settings)) as plan:
        started = time.monotonic()
        report = engine.join(plan, Part(1, 3))
    assert report is not None
    assert 0.3 < time.monotonic() - started < 20
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_a_rank_that_comes_after_the_first_stopped_waiting_leaves_its_part_to_it(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "MOMENT", 0.05)
    with closing(plan_merge(config(inputs, out="out"))) as plan:
        partial = engine.Partial(engine.partial_path(plan.target), engine.plan_hash(plan))
        with partial.locked(alone=True, force=False):
            assert engine.join(plan, Part(3, 3)) is None
            with pytest.raises(CheckpointError, match="another process is at this merge"):
                engine.join(plan, Part(1, 3))


def test_parts_cover_every_unit_once_and_evenly(inputs):
    with closing(plan_merge(config(inputs, out="x"))) as plan:
        units = engine.units_of(plan)
        for of in (1, 2, 3, 7):
            taken = [
                [u.id for u in units if Part(i, of).takes(u.position)] for i in range(1, of + 1)
            ]
            assert sorted(k for part in taken for k in part) == list(range(len(units)))


def test_a_giant_tensor_is_shared_among_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 1000)
    for i, name in enumerate("ab"):
        tiny.write(f"{name}.safetensors", {"wte.weight": np.full((100, 100), i, np.float32)})
    settings = MergeConfig(models=("a.safetensors", "b.safetensors"), out="c.safetensors")
    with closing(plan_merge(settings)) as plan:
        units = engine.units_of(plan)
    counts = [sum(Part(i, 4).takes(u.position) for u in units) for i in range(1, 5)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching"])
@pytest.mark.parametrize("models", [2, 3, 24])
def test_a_chunk_takes_as_much_memory_whatever_the_number_of_models(
    tmp_path, monkeypatch, models, method
):
    monkeypatch.chdir(tmp_path)
    for i in range(models):
        ones = {"wte.weight": np.ones((10, 10), np.float32)}
        tiny.posterior(f"{i}.safetensors", ones, ones)
    names = tuple(f"{i}.safetensors" for i in range(models))
    settings = MergeConfig(models=names[1:], base=names[0], method=method, out="c.safetensors")
    with closing(plan_merge(settings)) as plan:
        entries = units_module.entries_at_a_time(plan, plan.steps[0])
    arrays = (models + 1) * (1 + (method == "gradient_matching"))
    assert entries & (entries - 1) == 0
    assert 1 << 22 < 4 * arrays * entries <= max(1 << 23, 4 * arrays << 16)


@pytest.mark.parametrize("of_tasks", ["F8_E4M3", "F16", "BF16", "F32", "F64"])
@pytest.mark.parametrize("of_base", ["F8_E4M3", "F16", "BF16", "F32", "F64"])
def test_a_chunk_takes_the_memory_of_the_arrays_that_a_pass_holds(
    tmp_path, monkeypatch, of_base, of_tasks
):
    """A dtype that is widened to be computed takes the wider one's memory, not that of its file."""
    monkeypatch.chdir(tmp_path)
    for i, dtype in enumerate((of_base, of_tasks, of_tasks)):
        tiny.write(f"{i}.safetensors", {"wte.weight": np.ones((10, 10), np.float32)}, dtype)
    models = ("1.safetensors", "2.safetensors")
    settings = MergeConfig(models=models, base="0.safetensors", out="c.safetensors")
    with closing(plan_merge(settings)) as plan:
        step = plan.steps[0]
        entries = units_module.entries_at_a_time(plan, step)
        measured = FirstPass(plan, lambda: Reader(plan), map, fused=True).measure(step)
        chunk = Reader(plan).chunk(step, measured, 0, step.merged)
    held = (chunk.means.nbytes + chunk.mean.nbytes) // step.merged
    assert 1 << 22 < held * entries <= 1 << 23


@pytest.mark.parametrize("method", ["ties", "della", "breadcrumbs"])
def test_what_runs_in_numpy_takes_windows_whose_temporaries_are_small(
    tmp_path, monkeypatch, method
):
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        tiny.write(f"{i}.safetensors", {"wte.weight": np.ones(3 * WINDOW, np.float32)}, "BF16")
    sizes = []

    def watching(act, items):
        items = list(items)
        sizes.extend(stop - start for *_, start, stop in items)
        return map(act, items)

    models = ("1.safetensors", "2.safetensors")
    settings = MergeConfig(models=models, base="0.safetensors", method=method, out="c.safetensors")
    with closing(plan_merge(settings)) as plan:
        reader = Reader(plan)
        FirstPass(plan, lambda: reader, watching, fused=False).measure(plan.steps[0])
        if METHODS[method].tensor is not None:
            sizes.append(units_module.entries_at_a_time(plan, plan.steps[0]))
    assert sizes
    assert max(sizes) == WINDOW


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(Exception, match="expected I/N"):
        parse_part(text)


def test_launchers_are_recognised(monkeypatch):
    for rank, size in parts._LAUNCHERS:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)
    assert part_of_launcher() is None
    for rank, size in parts._LAUNCHERS:
        with monkeypatch.context() as patch:
            patch.setenv(rank, "2")
            patch.setenv(size, "8")
            assert part_of_launcher() == Part(3, 8)
            patch.setenv(size, "1")
            assert part_of_launcher() is None
