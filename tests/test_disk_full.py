"""A full disk or a refused write is reported, and the same command continues afterwards."""

import errno
import os
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge import Part, output, plan_merge, run_merge
from mergekit_bayes.merge import run as engine
from mergekit_bayes.stream import units as units_module
from tests import interrupted
from tests.interrupted import config, contents, units_done

inputs = interrupted.inputs


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
    monkeypatch.setattr(
        os, "replace", lambda a, b: events.append(f"-> {Path(b).name}") or real_replace(a, b)
    )
    monkeypatch.setattr(os, "rename", lambda a, b: events.append(f"-> {b}") or real_rename(a, b))
    run_merge(config(inputs, out="out"), sync=True)
    written = {f"out.partial/{p.relative_to('.')}" for p in (Path("out"), *Path("out").rglob("*"))}
    whole, moved = events.index("-> whole.json"), events.index("-> out")
    assert written <= set(events[:whole])
    assert events[whole - 1] == "out.partial/whole.json.new"
    assert events[whole + 1 : moved] == ["out.partial"]
    assert events[moved + 1 :] == ["."]


def refuse_once(monkeypatch, where, name, wanted):
    """The disk is full at one call."""
    real, left = getattr(where, name), [1]

    def act(*args, **kwargs):
        if left and wanted(*args):
            left.pop()
            raise OSError(
                errno.ENOSPC,
                os.strerror(errno.ENOSPC),
                str(args[0]) if isinstance(args[0], Path) else None,
            )
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, act)


def units_written():
    return len(Path("out.partial/journal-1-of-1.jsonl").read_text().splitlines()) - 1


REFUSALS = {
    "data": (
        os,
        "pwrite",
        lambda *a: len(a[1]) > 500 and units_written() > 5,
        r"model\.safetensors: writing failed",
    ),
    "journal": (
        os,
        "write",
        lambda *a: b'"unit": 7' in a[1],
        r"journal-1-of-1\.jsonl: No space left on device\. Once",
    ),
    "recipe": (
        output,
        "write_own",
        lambda p, *_: p.name == "merge_recipe.yaml",
        r"merge_recipe\.yaml: No space",
    ),
    "report": (
        output,
        "write_own",
        lambda p, *_: p.name == "merge_report.json",
        r"merge_report\.json: No space",
    ),
    "header": (os, "pwrite", lambda *a: a[2] == 0, r"model\.safetensors: writing failed"),
    "whole": (os, "replace", lambda a, b: Path(b).name == "whole.json", "out: writing failed"),
}


@pytest.mark.parametrize("where", REFUSALS)
def test_a_disk_that_fills_up_is_said_and_the_same_line_goes_on(
    inputs, tmp_path, monkeypatch, where
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 500)
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


def test_a_full_disk_is_told_of_the_output_and_not_of_a_file_beside_it(tmp_path, monkeypatch):
    target = tmp_path / "p.safetensors"
    refuse_once(monkeypatch, os, "posix_fallocate", lambda *a: True)
    with (
        pytest.raises(CheckpointError) as error,
        replacing(target, force=False) as partial,
        SafetensorsSink(partial, {"w": TensorSpec("F32", (3,))}, {}),
    ):
        pass
    assert str(error.value).startswith(f"{target}: writing failed (No space left on device)")
    assert ".bmerge-" not in str(error.value)


def test_a_disk_that_is_full_from_the_start_leaves_nothing(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        refuse_once(patch, os, "posix_fallocate", lambda *a: True)
        with pytest.raises(CheckpointError, match="writing failed"):
            run_merge(config(inputs, out="out"))
    assert not os.listdir()


def test_a_journal_that_cannot_be_opened_is_said(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(inputs, out="out.safetensors")
    run_merge(settings, part=Part(1, 2))
    real = os.open

    def opened(path, flags, *rest, **options):
        if Path(path).name == "journal-1-of-2.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", opened)
        with pytest.raises(CheckpointError, match=r"journal-1-of-2\.jsonl: Permission denied"):
            run_merge(settings, part=Part(1, 2))
    assert run_merge(settings) is not None
