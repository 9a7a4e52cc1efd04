"""A merge killed at any moment is resumed by the same command and ends in the same bytes."""

import json
import multiprocessing
import os
import random
import shutil
import signal
from contextlib import closing, suppress
from pathlib import Path

import pytest

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import Part, carry_out, plan_merge, run_merge
from mergekit_bayes.merge import run as engine
from mergekit_bayes.merge.tally import UnitTally
from mergekit_bayes.stream import units as units_module
from tests import interrupted, tiny
from tests.interrupted import SHAPES, config, contents, interrupt, spoiled, units_done

inputs = interrupted.inputs
SCENARIOS = {
    "file": {"out": "out.safetensors"},
    "folder": {"out": "out", "max_shard_size": "4KB"},
    "sync": {"out": "out", "max_shard_size": "12KB"},
    "force": {"out": "out", "force": True},
}
CALLS = ("pwrite", "write", "replace", "rename", "unlink", "mkdir", "fsync")


def merge_until(call, settings, folder, sync):
    """In a child: merge, and be killed at the given call to the system, half of it done."""
    os.chdir(folder)
    units_module.UNIT = 500
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
def test_a_merge_killed_at_random_points_ends_in_the_same_bytes(
    inputs, tmp_path, monkeypatch, scenario
):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergekit_bayes.merge", "tests.test_resume"])
    monkeypatch.setattr(units_module, "UNIT", 500)
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
    points = random.Random(0).sample(range(1, total - 12), 10) + list(
        range(total - 12, total + 1, 2)
    )
    resumed = 0
    for point in points:
        folder = fresh(str(point))
        assert child(context, point, settings, folder, sync) == -signal.SIGKILL, point
        there = {n: b for n, b in contents().items() if n == target or n.startswith(f"{target}/")}
        whole = {n: b for n, b in expected.items() if n == target or n.startswith(f"{target}/")}
        assert there in ({}, whole, {"out/config.json": b"old", "out/old.txt": b"old"}), point
        resumed += bool(list(folder.glob("*.partial/journal*")))
        if there == whole and not list(folder.glob("*.partial/*.json")):
            assert set(contents()) - {f"{target}.partial/lock"} == set(
                expected
            )  # it was killed after the last step
            continue
        run_merge(settings, threads=1, sync=sync)
        assert contents() == expected, point
    assert resumed > len(points) // 2


def test_what_is_done_is_not_done_again(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 500)
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
        tiny.posterior(
            tmp_path / f"{name}.safetensors", tiny.arrays(7, SHAPES), tiny.precisions(7, SHAPES)
        )
    settings = config(tmp_path, out="out")
    run_merge(settings, part=Part(1, 2))
    for file in tmp_path.glob("a.*"):
        file.unlink()
    tiny.posterior(tmp_path / "a.safetensors", tiny.arrays(8, SHAPES), tiny.precisions(7, SHAPES))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(settings)


@pytest.mark.parametrize("host", [None, "another machine, or a container's next name"])
def test_unfinished_lines_of_another_boot_are_believed_with_sync_only(
    inputs, tmp_path, monkeypatch, host
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 500)
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
        patch.setattr(
            os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")) or real(fd)
        )
        run_merge(settings, part=Part(1, 1))
    assert {"model.safetensors", "precision.posterior", "journal-1-of-1.jsonl"} <= {
        Path(p).name for p in synced
    }
    file = next(Path("out.partial").glob("journal*"))
    first, *lines = file.read_text().splitlines()
    first = json.loads(first) | {"boot": "another", "host": "another"}
    file.write_text("\n".join([json.dumps(first), *lines]) + "\n")
    assert not units_done(monkeypatch, settings)


def test_a_part_that_began_before_a_power_cut_and_was_finished_after_it_is_believed_from_there(
    tmp_path,
):
    lines = [
        {"plan": "p", "sync": False, "boot": "one", "host": "h"},
        {"unit": 0, "tally": UnitTally().to_json()},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"},
        {"unit": 1, "tally": UnitTally().to_json()},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"},
        {"unit": 2, "tally": UnitTally().to_json()},
        {"synced": True},
        {"plan": "p", "sync": False, "boot": "two", "host": "h"},
        {"unit": 3, "tally": UnitTally().to_json()},
        {"plan": "q", "sync": True, "boot": "two", "host": "h"},
        {"unit": 4, "tally": UnitTally().to_json()},
    ]
    (tmp_path / "journal-1-of-1.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    assert set(engine.Partial(tmp_path, "p").journals.done()) == {1, 2}


def resize(file, by):
    os.truncate(file, file.stat().st_size + by)


def test_data_that_vanished_from_a_stopped_merge_is_made_anew(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out")
    run_merge(settings)
    expected = contents("out")
    shutil.rmtree("out")
    for name in ("model.safetensors", "posterior/precision.posterior"):
        for act in (Path.unlink, lambda file: resize(file, -1), lambda file: resize(file, 9)):
            run_merge(settings, part=Part(1, 2))
            run_merge(settings, part=Part(2, 2))
            act(Path("out.partial/out", name))
            with pytest.raises(
                CheckpointError, match=r"is gone\. The same command without --shard starts again"
            ):
                run_merge(settings, part=Part(2, 2))
            said = []
            with closing(plan_merge(settings)) as plan:
                carry_out(plan, say=said.append)
            assert any("is gone. The merge starts again" in line for line in said)
            assert contents("out") == expected
            shutil.rmtree("out")


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_that_name_that_is_no_merge_is_left_alone(inputs, tmp_path, monkeypatch, force):
    monkeypatch.chdir(tmp_path)
    bad = spoiled(inputs, tmp_path)
    for name, text in (("precious.txt", "x"), ("plan.json", '{"my": "plan"}'), ("out/x", "x")):
        Path("out.partial", name).parent.mkdir(parents=True)
        Path("out.partial", name).write_text(text)
        before = contents()
        for settings in (config(inputs, out="out", force=force), bad):
            with pytest.raises(
                CheckpointError, match=r"is another folder: it has '(precious|plan|out)"
            ):
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


def test_force_onto_a_link_to_a_folder_writes_where_it_points(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("store").mkdir()
    run_merge(config(inputs, out="store/real", scale=(0.5,)))
    Path("link").symlink_to(tmp_path / "store/real")
    run_merge(config(inputs, out="whole"))
    for _ in range(2):
        run_merge(config(inputs, out="link", force=True))
        assert (
            Path("store/real/model.safetensors").read_bytes()
            == Path("whole/model.safetensors").read_bytes()
        )
    assert Path("link").is_symlink()
    assert sorted(os.listdir()) == ["link", "store", "whole"]
    assert os.listdir("store") == ["real"]
