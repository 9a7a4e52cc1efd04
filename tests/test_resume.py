"""A merge that is killed at any moment is resumed by the same command and ends in the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mergekit_bayes import merge as engine
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import (
    MergeConfig,
    Part,
    carry_out,
    journal,
    parse_part,
    part_of_launcher,
    plan_merge,
    run_merge,
    work,
)
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
                    with suppress(OSError):
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
        if there == whole and not list(folder.glob("*.partial/*.json")):
            assert set(contents()) - {f"{target}.partial/lock"} == set(expected)  # it was killed after the last step
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


def interrupt(monkeypatch, settings, after, **options):
    """Merge, and be stopped after some units."""
    real, left = work.Worker.run, [after]

    def run(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(work.Worker, "run", run)
        with pytest.raises(KeyboardInterrupt):
            run_merge(settings, threads=1, **options)


@pytest.mark.parametrize("host", [None, "another machine, or a container's next name"])
def test_unfinished_lines_of_another_boot_are_believed_with_sync_only(inputs, tmp_path, monkeypatch, host):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "UNIT", 500)
    settings = config(inputs, out="out")
    run_merge(settings)
    expected = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    for sync, believed in ((False, 0), (True, 5)):
        interrupt(monkeypatch, settings, 5, sync=sync)
        file = next(Path("out.partial").glob("journal*"))
        first, *lines = file.read_text().splitlines()
        first = json.loads(first) | {"boot": "another"} | ({} if host is None else {"host": host})
        file.write_text("\n".join([json.dumps(first), *lines]) + "\n")
        if not sync:  # what a power cut leaves
            for data in Path("out.partial/out").glob("*.safetensors"):
                data.write_bytes(bytes(data.stat().st_size))
        with closing(plan_merge(settings)) as plan:
            units = len(engine.units_of(plan))
        assert len(units_done(monkeypatch, settings)) == units - believed
        assert Path("out/model.safetensors").read_bytes() == expected
        shutil.rmtree("out")


def test_a_finished_part_of_another_machine_is_believed(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out")
    synced, real = [], os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd))
        run_merge(settings, part=Part(1, 1))
    assert {"model.safetensors", "precision.safetensors", "journal-1-of-1.jsonl"} <= {Path(p).name for p in synced}
    file = next(Path("out.partial").glob("journal*"))
    first, *lines = file.read_text().splitlines()
    first = json.loads(first) | {"boot": "another", "host": "another"}
    file.write_text("\n".join([json.dumps(first), *lines]) + "\n")
    assert not units_done(monkeypatch, settings)


def test_a_part_that_began_before_a_power_cut_and_was_finished_after_it_is_believed_from_there(tmp_path):
    lines = [
        {"plan": "p", "sync": False, "boot": "one", "host": "h"}, {"unit": 0, "tally": {}},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"}, {"unit": 1, "tally": {}},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"}, {"unit": 2, "tally": {}}, {"synced": True},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"}, {"unit": 3, "tally": {}},
        {"plan": "q", "sync": True, "boot": "two", "host": "h"}, {"unit": 4, "tally": {}},
    ]  # fmt: skip
    (tmp_path / "journal-1-of-1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert set(engine.Partial(tmp_path, "p").done()) == {1, 2}


def test_data_that_vanished_from_a_stopped_merge_is_made_anew(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out")
    run_merge(settings)
    expected = contents("out")
    shutil.rmtree("out")
    for name in ("model.safetensors", "posterior/precision.safetensors"):
        for act in (Path.unlink, lambda file: os.truncate(file, file.stat().st_size - 1)):
            run_merge(settings, part=Part(1, 2))
            run_merge(settings, part=Part(2, 2))
            act(Path("out.partial/out", name))
            with pytest.raises(CheckpointError, match=r"is gone\. The same line without --shard starts anew"):
                run_merge(settings, part=Part(2, 2))
            said = []
            with closing(plan_merge(settings)) as plan:
                carry_out(plan, say=said.append)
            assert any("is gone. Everything is done anew" in line for line in said)
            assert contents("out") == expected
            shutil.rmtree("out")


def spoiled(inputs, folder):
    """The same merge with a model that cannot be merged."""
    tiny.write(folder / "bad.safetensors", {n: np.full(s, np.nan, np.float32) for n, s in SHAPES.items()})
    return MergeConfig(models=(str(folder / "bad.safetensors"),), base=str(inputs / "base.safetensors"), out="out")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_that_name_that_is_no_merge_is_left_alone(inputs, tmp_path, monkeypatch, force):
    monkeypatch.chdir(tmp_path)
    bad = spoiled(inputs, tmp_path)
    for name, text in (("precious.txt", "x"), ("plan.json", '{"my": "plan"}'), ("out/x", "x")):
        Path("out.partial", name).parent.mkdir(parents=True)
        Path("out.partial", name).write_text(text)
        before = contents()
        for settings in (config(inputs, out="out", force=force), bad):
            with pytest.raises(CheckpointError, match=r"is another folder: it has '(precious|plan|out)"):
                run_merge(settings)
            assert contents() == before
        shutil.rmtree("out.partial")
    Path("out.partial").mkdir()  # an empty one can be taken
    run_merge(config(inputs, out="out", force=force))
    assert not Path("out.partial").exists()


def test_files_that_somebody_put_beside_the_journal_are_not_removed(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="out"), part=Part(1, 2))
    Path("out.partial/precious.txt").write_text("x")
    run_merge(config(inputs, out="out"))
    assert contents("out.partial") == {"precious.txt": b"x"}
    assert tiny.read("out")


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


def test_sync_waits_for_the_data_before_it_is_called_whole_and_for_that_before_any_rename(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    events = []
    real_fsync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def fsync(fd):
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(f"-> {Path(b).name}") or real_replace(a, b))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append(f"-> {b}") or real_rename(a, b))
    run_merge(config(inputs, out="out"), sync=True)
    written = {f"out.partial/{p.relative_to('.')}" for p in (Path("out"), *Path("out").rglob("*"))}
    whole, moved = events.index("-> whole.json"), events.index("-> out")
    assert written <= set(events[:whole])
    assert events[whole - 1] == "out.partial/whole.json.new"
    assert events[whole + 1 : moved] == ["out.partial"]
    assert events[moved + 1 :] == ["."]


def test_force_onto_a_link_to_a_folder_writes_where_it_points(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("store").mkdir()
    run_merge(config(inputs, out="store/real", scale=(0.5,)))
    Path("link").symlink_to(tmp_path / "store/real")
    run_merge(config(inputs, out="whole"))
    for _ in range(2):
        run_merge(config(inputs, out="link", force=True))
        assert Path("store/real/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["link", "store", "whole"]
    assert os.listdir("store") == ["real"]


def refuse_once(monkeypatch, where, name, wanted):
    """The disk is full at one call."""
    real, left = getattr(where, name), [1]

    def act(*args, **kwargs):
        if left and wanted(*args):
            left.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]) if isinstance(args[0], Path) else None)
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, act)


def units_written():
    return len(Path("out.partial/journal-1-of-1.jsonl").read_text().splitlines()) - 1


REFUSALS = {
    "data": (os, "pwrite", lambda *a: len(a[1]) > 500 and units_written() > 5, r"model\.safetensors: writing failed"),
    "journal": (os, "write", lambda *a: b'"unit": 7' in a[1], r"journal-1-of-1\.jsonl: No space left on device\. Once"),
    "recipe": (Path, "write_text", lambda p, *_: p.name == "merge_recipe.yaml", r"merge_recipe\.yaml: No space"),
    "report": (Path, "write_text", lambda p, *_: p.name == "merge_report.json", r"merge_report\.json: No space"),
    "header": (os, "pwrite", lambda *a: a[2] == 0, r"model\.safetensors: writing failed"),
    "whole": (os, "replace", lambda a, b: Path(b).name == "whole.json", "out: writing failed"),
}  # fmt: skip


@pytest.mark.parametrize("where", REFUSALS)
def test_a_disk_that_fills_up_is_said_and_the_same_line_goes_on(inputs, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(work, "UNIT", 500)
    settings = config(inputs, out="out")
    run_merge(settings)
    expected = contents("out")
    shutil.rmtree("out")
    *target, said = REFUSALS[where]
    with monkeypatch.context() as patch:
        refuse_once(patch, *target)
        with pytest.raises(CheckpointError, match=said):
            run_merge(settings, threads=1)
    assert not Path("out").exists()
    with closing(plan_merge(settings)) as plan:
        units = len(engine.units_of(plan))
    assert len(units_done(monkeypatch, settings)) < units
    assert contents("out") == expected


def test_a_disk_that_is_full_from_the_start_leaves_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        refuse_once(patch, os, "posix_fallocate", lambda *a: True)
        with pytest.raises(CheckpointError, match="writing failed"):
            run_merge(config(inputs, out="out"))
    assert not os.listdir()


def test_parts_of_another_account_are_joined_and_a_refusal_is_said(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="whole.safetensors"))
    settings = config(inputs, out="out.safetensors")
    run_merge(settings, part=Part(1, 2))
    real, theirs = os.open, {"lock", "journal-1-of-2.jsonl"}

    def opened(path, flags, *rest, **options):
        if Path(path).name in theirs and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", opened)
    with pytest.raises(CheckpointError, match=r"journal-1-of-2\.jsonl: Permission denied"):
        run_merge(settings, part=Part(1, 2))
    run_merge(settings, part=Part(2, 2))
    run_merge(settings)
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


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


def test_a_rank_that_comes_after_the_first_stopped_waiting_leaves_its_part_to_it(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "_MOMENT", 0.05)
    with closing(plan_merge(config(inputs, out="out"))) as plan:
        partial = engine.Partial(engine.partial_path(plan.target), engine.plan_hash(plan))
        with partial.held(alone=True, force=False):
            assert engine.join(plan, Part(3, 3)) is None
            with pytest.raises(CheckpointError, match="another process is at this merge"):
                engine.join(plan, Part(1, 3))


def test_two_processes_cannot_be_at_the_same_part(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "_MOMENT", 0.05)
    settings = config(inputs, out="out")
    with closing(plan_merge(settings)) as plan:
        partial = engine.Partial(engine.partial_path(plan.target), engine.plan_hash(plan))
        with partial.held(alone=False, force=False), partial.journal(Part(1, 2), sync=False):
            with pytest.raises(CheckpointError, match="another process"):
                carry_out(plan, part=Part(1, 2))
            carry_out(plan, part=Part(2, 2))
            with pytest.raises(CheckpointError, match="still being written"):
                carry_out(plan)
        assert carry_out(plan) is not None


def during(monkeypatch, where, name, act):
    """Do something once, in the middle of a merge: before `where.name` is called."""
    real, left = getattr(where, name), [act]

    def called(*args, **kwargs):
        if left:
            left.pop()()
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, called)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize(
    ("where", "name"),
    [(work.Worker, "run"), (journal.Partial, "publish"), (journal.Partial, "remove"), (os, "replace")],
)
def test_a_second_identical_command_waits_and_loses_nothing(inputs, tmp_path, monkeypatch, out, where, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "_MOMENT", 0.05)
    run_merge(config(inputs, out="whole.safetensors"))
    settings = config(inputs, out=out, force=True)
    run_merge(settings.model_copy(update={"scale": (0.5,)}))
    seen = []

    def second():
        for part in (None, Part(2, 2)):
            with pytest.raises(CheckpointError, match=r"Wait for it") as error:
                run_merge(settings, part=part)
            seen.append(str(error.value))

    with monkeypatch.context() as patch:
        during(patch, where, name, second)
        run_merge(settings)
    assert len(seen) == 2
    written = Path(out) if out.endswith("safetensors") else Path(out, "model.safetensors")
    assert written.read_bytes() == Path("whole.safetensors").read_bytes()
    assert not list(Path().glob("*.partial"))


def test_who_comes_second_to_the_start_neither_fails_the_first_nor_removes_its_folder(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "_MOMENT", 0.05)
    settings = config(inputs, out="out")

    def second():
        with pytest.raises(CheckpointError, match="Wait for it"):
            run_merge(settings)

    during(monkeypatch, engine, "_check_space", second)
    run_merge(settings)
    assert tiny.read("out")


def test_of_two_plans_that_begin_at_once_one_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "_MOMENT", 0.05)
    one, other = config(inputs, out="out"), config(inputs, out="out", scale=(0.5,))

    def second():
        with pytest.raises(CheckpointError, match="Wait for it"):
            run_merge(other, part=Part(2, 2))

    during(monkeypatch, os, "replace", second)  # plan.json is about to get its name
    run_merge(one, part=Part(1, 2))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(other, part=Part(2, 2))
    run_merge(one)
    assert json.loads(Path("out/merge_report.json").read_text())["models"][1]["scale"] == 1


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_an_output_that_was_taken_away_while_it_got_its_name_is_missed(inputs, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(journal.Partial, "remove", lambda self: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            run_merge(config(inputs, out=out))
    Path(out).rename("elsewhere")
    with pytest.raises(CheckpointError, match=rf"{out}\.partial: the whole output that was there is gone\. Remove"):
        run_merge(config(inputs, out=out))


def test_what_a_killed_force_moved_aside_comes_back_when_another_merge_takes_over(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_merge(config(inputs, out="out"))
    old = contents("out")
    with monkeypatch.context() as patch:
        real = os.rename

        def rename(source, target):
            if target == Path("out"):
                raise KeyboardInterrupt
            real(source, target)

        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            run_merge(config(inputs, out="out", scale=(0.5,), force=True))
    assert not Path("out").exists()
    with pytest.raises(CheckpointError, match="is nan at"):
        run_merge(spoiled(inputs, tmp_path).model_copy(update={"force": True}))
    assert contents("out") == old


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
