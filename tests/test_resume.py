"""A merge that is killed at any moment is resumed by the same command and ends in the same bytes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mergekit_bayes import merge as engine
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import MergeConfig, Part, carry_out, parse_part, part_of_launcher, plan_merge, run_merge, work
from tests import tiny

SHAPES = {f"h.{i}.weight": (40, 13 + i) for i in range(8)} | {"wte.weight": (300, 7), "empty": (0, 3)}
SCENARIOS = {
    "file": {"out": "out.safetensors"},
    "folder": {"out": "out", "max_shard_size": "4KB"},
    "sync": {"out": "out", "max_shard_size": "12KB"},
    "force": {"out": "out", "force": True},
}
CALLS = ("pwrite", "write", "replace", "rename", "unlink", "mkdir", "fsync")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for i, name in enumerate(("base", "a", "b")):
        tiny.posterior(folder / f"{name}.safetensors", tiny.arrays(i, SHAPES), tiny.precisions(i, SHAPES))
    return folder


def config(inputs, **settings):
    models = tuple(str(inputs / f"{n}.safetensors") for n in "ab")
    return MergeConfig(models=models, base=str(inputs / "base.safetensors"), weights="precision", **settings)


def contents(folder="."):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def merge_until(call, settings, folder, sync):
    """In a child: merge, and be killed at the given call to the system, half of it done."""
    os.chdir(folder)
    work.UNIT = 500
    left = call

    def counted(name, real):
        def act(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                if name == "pwrite":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                elif call % 2:
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return act

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    run_merge(settings, threads=2, sync=sync)
    Path(f"calls-{call - left}").touch()


def child(context, *arguments):
    process = context.Process(target=merge_until, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_merge_killed_at_random_points_ends_in_the_same_bytes(inputs, tmp_path, monkeypatch, scenario):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_bayes.merge", "tests.test_resume"])
    monkeypatch.setattr(work, "UNIT", 500)
    settings, sync = config(inputs, **SCENARIOS[scenario]), scenario == "sync"
    target = settings.out

    def fresh(name):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.chdir(folder)
        if scenario == "force":
            Path("out").mkdir()
            Path("out/config.json").write_text("old")
            Path("out/old.txt").write_text("old")
        return folder

    folder = fresh("whole")
    assert child(context, 10**9, settings, folder, sync) == 0
    (mark,) = folder.glob("calls-*")
    total = int(mark.name.removeprefix("calls-"))
    mark.unlink()
    expected = contents()
    assert target in expected or f"{target}/merge_report.json" in expected
    assert not any("partial" in name or "old.txt" in name for name in expected)
    points = random.Random(0).sample(range(1, total - 12), 10) + list(range(total - 12, total + 1, 2))
    resumed = 0
    for point in points:
        folder = fresh(str(point))
        assert child(context, point, settings, folder, sync) == -signal.SIGKILL, point
        there = {n: b for n, b in contents().items() if n == target or n.startswith(f"{target}/")}
        whole = {n: b for n, b in expected.items() if n == target or n.startswith(f"{target}/")}
        assert there in ({}, whole, {"out/config.json": b"old", "out/old.txt": b"old"}), point
        resumed += bool(list(folder.glob("*.partial/journal*")))
        if Path(target).exists() and not list(folder.glob("*.partial/*")):
            assert contents() == expected  # it was killed after the last step
            continue
        run_merge(settings, threads=1, sync=sync)
        assert contents() == expected, point
    assert resumed > len(points) // 2


def units_done(monkeypatch, settings):
    """The units that a merge does."""
    done = []
    real = work.Worker.run
    with monkeypatch.context() as patch:
        patch.setattr(work.Worker, "run", lambda self, unit, *rest: done.append(unit.id) or real(self, unit, *rest))
        run_merge(settings)
    return done


def test_what_is_done_is_not_done_again(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "UNIT", 500)
    settings = config(inputs, out="out.safetensors")
    run_merge(settings, part=Part(2, 3))
    done = units_done(monkeypatch, settings)
    with closing(plan_merge(settings.model_copy(update={"force": True}))) as plan:
        units = engine.units_of(plan)
    second = {u.id for u in units if Part(2, 3).takes(u.position)}
    assert second
    assert sorted(done) == sorted({u.id for u in units} - second)


def test_another_merge_does_not_take_over_what_was_left(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="out"), part=Part(1, 2))
    before = contents()
    other = config(inputs, out="out", scale=(0.5,))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(other)
    assert contents() == before
    run_merge(other.model_copy(update={"force": True}))
    assert Path("out/merge_report.json").exists()
    assert not Path("out.partial").exists()


def test_a_changed_input_is_another_merge(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "a", "b"):
        tiny.posterior(tmp_path / f"{name}.safetensors", tiny.arrays(7, SHAPES), tiny.precisions(7, SHAPES))
    settings = config(tmp_path, out="out")
    run_merge(settings, part=Part(1, 2))
    for file in tmp_path.glob("a*.safetensors"):
        file.unlink()
    tiny.posterior(tmp_path / "a.safetensors", tiny.arrays(8, SHAPES), tiny.precisions(7, SHAPES))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(settings)


def test_lines_from_before_a_power_cut_are_not_believed_without_sync(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out")
    for sync, believed in ((False, False), (True, True)):
        run_merge(settings, part=Part(1, 1), sync=sync)
        journal = next(Path("out.partial").glob("journal*"))
        lines = journal.read_text().splitlines()
        first = json.loads(lines[0]) | {"boot": "another"}
        journal.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
        done = units_done(monkeypatch, settings)
        assert (not done) == believed
        shutil.rmtree("out")


def test_a_full_disk_is_found_before_the_first_byte(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="deep/out")
    monkeypatch.setattr(engine.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    opened = []
    monkeypatch.setattr(engine, "Output", lambda *a: opened.append(a))
    with pytest.raises(CheckpointError, match="free"):
        run_merge(settings)
    assert not opened
    assert not list(Path("deep").iterdir())


MERGE = "import sys; from bmerge_cli.main import main; main()"


def bmerge(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", MERGE, *arguments], env=os.environ | environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def line(inputs, out):
    a, b, base = (str(inputs / f"{n}.safetensors") for n in ("a", "b", "base"))
    return ["merge", a, b, "--base", base, "--weights", "precision", "-o", out]


def test_four_processes_write_one_output(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "UNIT", 500)
    run_merge(config(inputs, out="whole.safetensors"))
    parts = [bmerge(*line(inputs, "out.safetensors"), "--shard", f"{i}/4") for i in (3, 1, 4, 2)]
    assert [p.wait() for p in parts] == [0] * 4, [p.stderr.read() for p in parts]
    assert not Path("out.safetensors").exists()
    last = bmerge(*line(inputs, "out.safetensors"))
    assert last.wait() == 0, last.stderr.read()
    for suffix in (".safetensors", ".precision.safetensors"):
        assert Path("out" + suffix).read_bytes() == Path("whole" + suffix).read_bytes()
    assert not Path("out.safetensors.partial").exists()


def test_each_rank_of_a_launcher_takes_a_part_and_one_prints(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="whole.safetensors"))
    ranks = [bmerge(*line(inputs, "out.safetensors"), RANK=str(r), WORLD_SIZE="4") for r in range(4)]
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


def test_two_processes_cannot_be_at_the_same_part(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out")
    with closing(plan_merge(settings)) as plan:
        partial = engine.Partial(engine.partial_path(plan.target), engine.plan_hash(plan), force=False)
        with partial.journal(Part(1, 2), sync=False):
            with pytest.raises(CheckpointError, match="another process"):
                carry_out(plan, part=Part(1, 2))
            carry_out(plan, part=Part(2, 2))
            with pytest.raises(CheckpointError, match="still being written"):
                carry_out(plan)
        assert carry_out(plan) is not None


def test_parts_cover_every_unit_once_and_evenly(inputs):
    with closing(plan_merge(config(inputs, out="x"))) as plan:
        units = engine.units_of(plan)
        for of in (1, 2, 3, 7):
            taken = [[u.id for u in units if Part(i, of).takes(u.position)] for i in range(1, of + 1)]
            assert sorted(k for part in taken for k in part) == list(range(len(units)))


def test_a_giant_tensor_is_shared_among_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "UNIT", 1000)
    for i, name in enumerate("ab"):
        tiny.write(f"{name}.safetensors", {"wte.weight": np.full((100, 100), i, np.float32)})
    settings = MergeConfig(models=("a.safetensors", "b.safetensors"), out="c.safetensors")
    with closing(plan_merge(settings)) as plan:
        units = engine.units_of(plan)
    counts = [sum(Part(i, 4).takes(u.position) for u in units) for i in range(1, 5)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(Exception, match="expected I/N"):
        parse_part(text)


def test_launchers_are_recognised(monkeypatch):
    for rank, size in engine._LAUNCHERS:
        monkeypatch.delenv(rank, raising=False)
        monkeypatch.delenv(size, raising=False)
    assert part_of_launcher() is None
    for rank, size in engine._LAUNCHERS:
        with monkeypatch.context() as patch:
            patch.setenv(rank, "2")
            patch.setenv(size, "8")
            assert part_of_launcher() == Part(3, 8)
            patch.setenv(size, "1")
            assert part_of_launcher() is None
