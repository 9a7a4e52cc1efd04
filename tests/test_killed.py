"""What a process that is killed has left beside its output, and who removes it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from mergekit_bayes.checkpoint import replacing as replacing_module
from mergekit_bayes.checkpoint import scratch as scratch_module
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.errors import CheckpointError

# From Python 3.12 on: threads, of which torch has some, do not go on in a forked process.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def write(target, text, *, force=False):
    """Write a folder with a file, or a file."""
    with replacing(target, force=force) as partial:
        if target.suffix:
            partial.write_text(text)
        else:
            partial.mkdir()
            (partial / "file").write_text(text)


def text(target):
    return (target if target.suffix else target / "file").read_text()


@contextmanager
def stopped(run, where=None):
    """A process that does something until it calls `where[1]` of `where[0]`, and waits there."""
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        try:

            def wait(*_, **__):
                os.write(says, b"!")
                time.sleep(60)

            if where is not None:
                real, calls = getattr(*where[:2]), []

                def count(*arguments, **options):
                    calls.append(1)
                    return (wait if len(calls) > where[2] else real)(*arguments, **options)

                setattr(*where[:2], count)
            run()
            wait()
        finally:
            os._exit(1)
    os.close(says)
    try:
        assert os.read(ready, 1) == b"!", "the process never came there"
        yield
    finally:
        os.close(ready)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def kill(run, where=None):
    with stopped(run, where):
        pass


MOMENTS = {  # module, function, and how many calls of it are made before the process is killed
    "before its lock": (os, "open", 0),
    "before it holds its lock": (scratch_module.fcntl, "flock", 0),
    "before it has a folder": (Path, "mkdir", 1),
    "while it writes": (Path, "write_text", 0),
    "before it publishes": (replacing_module, "_publish", 0),
    "before it removes the rest": (scratch_module, "_put_back", 0),
    "while it removes the rest": (shutil, "rmtree", 0),
}
UNTIDY = ("before it removes the rest", "while it removes the rest")
RENAMES = {
    "before the old one moves": (os, "rename", 0),
    "before the new one moves": (os, "rename", 1),
}


@pytest.mark.parametrize("name", ["out", "out.txt"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, name, moment):
    target = tmp_path / name
    kill(lambda: write(target, "killed"), MOMENTS[moment])
    assert [p for p in tmp_path.iterdir() if p != target]
    if target.exists():
        assert text(target) == "killed"
    write(target, "new", force=True)
    assert text(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("moment", RENAMES)
def test_a_replacement_that_is_killed_halfway_loses_nothing(tmp_path, moment):
    target = tmp_path / "out"
    write(target, "old")
    kill(lambda: write(target, "killed", force=True), RENAMES[moment])
    with pytest.raises(CheckpointError, match="exists"):  # put back
        write(target, "new")
    assert text(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("moment", {**MOMENTS, **RENAMES})
def test_a_process_that_is_stopped_cleans_up_itself(tmp_path, monkeypatch, moment, stop):
    """As Ctrl-C stops it, or a signal that the command line turns into an exit."""
    target = tmp_path / "out"
    write(target, "old")
    module, name, calls = {**MOMENTS, **RENAMES}[moment]
    real, made = getattr(module, name), []

    def stops(*arguments, **options):
        made.append(1)
        if len(made) == calls + 1:
            raise stop
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, stops)
    with suppress(KeyboardInterrupt, SystemExit, CheckpointError):
        write(target, "new", force=True)
    assert len(made) > calls
    monkeypatch.undo()
    assert text(target) in ("old", "new")
    if moment not in UNTIDY:
        assert list(tmp_path.iterdir()) == [target]
    write(target, "newer", force=True)
    assert list(tmp_path.iterdir()) == [target]


def test_an_old_folder_whose_place_has_been_taken_is_kept(tmp_path):
    target = tmp_path / "out"
    write(target, "old")
    kill(lambda: write(target, "killed", force=True), RENAMES["before the new one moves"])
    target.mkdir()
    write(target, "new", force=True)
    assert text(target) == "new"
    assert [text(p) for p in tmp_path.glob(".out.bmerge-*/old")] == ["old"]


def test_the_folder_of_a_process_that_lives_is_left_alone(tmp_path):
    target = tmp_path / "out"
    with stopped(lambda: write(target, "first"), MOMENTS["while it writes"]):
        write(target, "second")
        (other,) = [p for p in tmp_path.iterdir() if p != target]
        assert (other / "new/out").is_dir()
    write(target, "third", force=True)
    assert list(tmp_path.iterdir()) == [target]


def left_over(parent, name=".out.bmerge-abcdefgh"):
    folder = parent / name
    (folder / "new").mkdir(parents=True)
    (folder / "lock").touch()
    return folder


def test_what_looks_left_over_and_is_not_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    beside = tmp_path / "beside"
    beside.mkdir()
    kept = left_over(tmp_path / "elsewhere")
    (beside / ".out.bmerge-aaaaaaaa").symlink_to(kept)
    (left_over(beside, ".out.bmerge-bbbbbbbb") / "notes.txt").touch()
    (left_over(beside, ".out.bmerge-cccccccc") / "lock").unlink()
    left_over(beside, ".out.bmerge-longer-name")
    left_over(beside, ".other.bmerge-abcdefgh")
    (beside / ".out.bmerge-dddddddd").touch()
    before = set(tmp_path.rglob("*"))
    write(beside / "out", "new")
    assert before <= set(tmp_path.rglob("*"))
    foreign = left_over(beside)
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        write(beside / "out", "new", force=True)
    assert foreign.exists()
    write(beside / "out", "new", force=True)
    assert not foreign.exists()


def test_a_folder_that_is_kept_is_not_left_over(tmp_path):
    with Scratch(tmp_path, "bmerge-") as scratch:
        (scratch.new / "model").mkdir()
        scratch.keep()
    with Scratch(tmp_path, "bmerge-"):
        assert (scratch.new / "model").is_dir()
    assert len(list(tmp_path.iterdir())) == 1


def write_late(target):
    """Write what another process has written meanwhile."""
    with replacing(target, force=False) as partial:
        write(partial, "mine")
        write(target, "another's")


@pytest.mark.parametrize("name", ["out", "out.txt"])
@pytest.mark.parametrize("has_links", [True, False])
def test_what_appears_meanwhile_is_kept_unless_forced(tmp_path, monkeypatch, name, has_links):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    target, link = tmp_path / name, tmp_path / f"link{Path(name).suffix}"
    link.symlink_to(tmp_path / "nowhere")
    if not has_links:
        monkeypatch.setattr(os, "link", refuse)
    for run in (lambda: write_late(target), lambda: write(link, "mine")):
        with pytest.raises(CheckpointError, match="exists"):
            run()
    assert text(target) == "another's"
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {target, link}


@pytest.mark.parametrize("name", ["out", "out.txt"])
def test_a_link_is_replaced_itself(tmp_path, name):
    kept, link = tmp_path / f"kept{Path(name).suffix}", tmp_path / name
    write(kept, "kept")
    link.symlink_to(kept)
    write(link, "new", force=True)
    assert not link.is_symlink()
    assert (text(link), text(kept)) == ("new", "kept")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "n" * 251 + ".txt", "lock", "new", "old"])
def test_any_name_that_a_disk_takes_can_be_written(tmp_path, name):
    for content in ("one", "two"):
        write(tmp_path / name, content, force=True)
        assert text(tmp_path / name) == content
    kill(lambda: write(tmp_path / name, "killed", force=True), MOMENTS["while it writes"])
    write(tmp_path / name, "three", force=True)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_the_output_gets_the_usual_modes_and_the_scratch_folder_the_narrowest(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out", force=False) as partial:
            partial.mkdir()
            (partial / "file").touch()
            assert (partial.parent.parent.stat().st_mode & 0o777) == 0o700
    finally:
        os.umask(before)
    modes = [p.stat().st_mode & 0o777 for p in (tmp_path / "out", tmp_path / "out/file")]
    assert modes == [0o750, 0o640]


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_killed_command_leaves_nothing_that_its_next_run_does_not_remove(tmp_path, signal_number):
    torch.save({f"w{i}": torch.ones(1 << 22) for i in range(16)}, tmp_path / "m.bin")
    line = [sys.executable, "-m", "bmerge_cli.main", "convert", "m.bin", "-o", "out.safetensors"]
    has_begun = 0
    for _ in range(4):
        process = subprocess.Popen(line, cwd=tmp_path)
        while process.poll() is None and not list(tmp_path.glob(".out*/new/out*")):
            time.sleep(0.002)
        has_begun += process.poll() is None
        process.send_signal(signal_number)
        process.wait()
        assert len(list(tmp_path.glob(".out*"))) <= 1
        (tmp_path / "out.safetensors").unlink(missing_ok=True)
    assert has_begun
    subprocess.run(line, cwd=tmp_path, check=True)
    assert {p.name for p in tmp_path.iterdir()} == {"m.bin", "out.safetensors"}
