"""Where others can write, nothing that they prepared is used, followed or overwritten.

Every merge here meets a scratch folder that another account, or an archive, could have prepared. It
is refused with the way out, and the files to which it leads keep their bytes and modes.
"""

import ast
import os
import shutil
import stat
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_bayes.checkpoint.own_files import make_own_folder, write_own
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import (
    make_checkpoint_folder,
    open_checkpoints,
    remove_if_empty,
)
from mergekit_bayes.merge import Part, carry_out, plan_merge, run_merge
from mergekit_bayes.merge import run as engine
from tests import interrupted
from tests.interrupted import config

inputs = interrupted.inputs
OTHER = os.geteuid() + 1000  # an account that is not this one
AS_ROOT = os.geteuid() == 0


@pytest.fixture
def victim(tmp_path, monkeypatch):
    """A file of this account that must not change."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "home" / "victim"
    file.parent.mkdir()
    file.write_bytes(b"precious" * 1000)
    file.chmod(0o640)
    return file


def state(file):
    status = file.stat()
    return file.read_bytes(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime_ns


def give_away(path, monkeypatch):
    """Let a path belong to another account: really as root, else by what the system says of it."""
    if AS_ROOT:
        os.chown(path, OTHER, OTHER, follow_symlinks=False)
        return
    inode = path.lstat().st_ino
    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(os, name, of_another(getattr(os, name), inode))


def of_another(real, inode):
    def act(*args, **options):
        status = real(*args, **options)
        if status.st_ino != inode:
            return status
        return changed(status, owner=OTHER)

    return act


def changed(status, *, mode=0, owner=None):
    """What the system says of a file, with more bits of its mode or another owner."""
    owner = status.st_uid if owner is None else owner
    fields = (status.st_mode | mode, *status[1:4], owner, *status[5:10])
    more = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blocks", "st_blksize")
    return os.stat_result(fields, {name: getattr(status, name) for name in more})


def foreign(folder, monkeypatch):
    give_away(folder, monkeypatch)


def foreign_and_open(folder, monkeypatch):
    folder.chmod(0o777)
    give_away(folder, monkeypatch)


def open_to_all(folder, monkeypatch):
    folder.chmod(0o777)


def a_link(folder, monkeypatch):
    elsewhere = folder.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def a_file(folder, monkeypatch):
    shutil.rmtree(folder)
    folder.write_text("x")


def inside(name, make):
    def prepare(folder, victim):
        path = folder / name
        if not path.is_dir():
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path, victim)

    return prepare


def link(path, victim):
    path.symlink_to(victim)


def dead_link(path, victim):
    path.symlink_to(victim.with_name("new"))


def hard_link(path, victim):
    path.hardlink_to(victim)


def link_of_folder(path, victim):
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(victim.parent)


def pipe(path, victim):
    os.mkfifo(path)


FOLDERS = {
    "foreign": (foreign, "belongs to the account"),
    "foreign, and open": (foreign_and_open, "belongs to the account"),
    "open to all": (open_to_all, r"can be written by every account \(its mode is 777\)"),
    "a link": (a_link, "is a link"),
    "a file": (a_file, "is no folder"),
}
HARMFUL = {
    "link": (link, "is a link"),
    "dead link": (dead_link, "is a link"),
    "hard link": (hard_link, "another name elsewhere"),
    "pipe": (pipe, "not a file|neither a file"),
    "link to a folder": (link_of_folder, "is a link"),
}
# Names at which a merge into a folder writes, and what could be there instead.
NAMES = {
    "lock": ("link", "dead link", "hard link", "pipe"),
    "journal-1-of-1.jsonl": ("link",),
    "journal-1-of-2.jsonl": ("link", "hard link", "pipe"),
    "plan.json.new": ("link",),
    "whole.json.new": ("link",),
    "out": ("link to a folder",),
    "out/model.safetensors": ("link", "dead link", "hard link", "pipe"),
    "out/config.json": ("link", "hard link"),
    "out/merge_recipe.yaml": ("link",),
    "out/merge_report.json": ("link",),
    "out/1_Pooling": ("link to a folder",),
    "out/posterior": ("link to a folder",),
    "out/posterior/posterior.json": ("link",),
    "out/posterior/precision.posterior": ("link",),
    "replaced": ("link to a folder",),
}
CONTENTS = {
    f"{name}: {kind}": (inside(name, HARMFUL[kind][0]), HARMFUL[kind][1])
    for name, kinds in NAMES.items()
    for kind in kinds
}


@pytest.fixture(scope="module")
def begun(inputs, tmp_path_factory):
    """The plan of a merge of which one part is done, and its scratch folder."""
    target = tmp_path_factory.mktemp("begun") / "out"
    with closing(plan_merge(config(inputs, out=str(target)))) as plan:
        carry_out(plan, part=Part(1, 2))
        yield plan, engine.partial_path(target)


def copied(begun, tmp_path, *, empty=False):
    """The plan of the same merge in a folder of its own, and its scratch folder."""
    plan, folder = begun
    copy = engine.partial_path(tmp_path / "out")
    copy.mkdir() if empty else shutil.copytree(folder, copy)
    return replace(plan, target=tmp_path / "out"), copy


def ways_to_go_on(plan):
    forced = replace(plan, config=plan.config.model_copy(update={"force": True}))
    return (
        lambda: carry_out(plan),
        lambda: carry_out(forced),
        lambda: carry_out(plan, part=Part(1, 2)),
        lambda: engine.join(plan, Part(1, 2)),
        lambda: engine.join(plan, Part(2, 2)),
    )


def refuse(plan, folder, said, victim):
    """Every way to go on is refused, and leaves everything as it is."""
    before, names = state(victim), sorted(victim.parent.iterdir())
    for act in ways_to_go_on(plan):
        with pytest.raises(CheckpointError, match=said) as error:
            act()
        assert str(folder) in str(error.value)
        assert "Remove it, or choose another output." in str(error.value)
        assert state(victim) == before
        assert sorted(victim.parent.iterdir()) == names
    assert not plan.target.exists()


@pytest.mark.parametrize("empty", [False, True], ids=["begun", "empty"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_this_account_did_not_make_is_refused(
    begun, tmp_path, monkeypatch, victim, kind, empty
):
    prepare, said = FOLDERS[kind]
    plan, folder = copied(begun, tmp_path, empty=empty)
    prepare(folder, monkeypatch)
    refuse(plan, folder, said, victim)


@pytest.mark.parametrize("kind", CONTENTS)
def test_what_leads_out_of_the_folder_is_refused(begun, tmp_path, victim, kind):
    prepare, said = CONTENTS[kind]
    plan, folder = copied(begun, tmp_path)
    prepare(folder, victim)
    refuse(plan, folder, said, victim)


def test_a_file_of_another_account_in_an_own_folder_is_refused(
    begun, tmp_path, monkeypatch, victim
):
    plan, folder = copied(begun, tmp_path)
    give_away(folder / "lock", monkeypatch)
    refuse(plan, folder, "lock belongs to the account", victim)


def test_a_link_of_another_account_is_not_followed_to_the_output(
    inputs, tmp_path, monkeypatch, victim
):
    shared, target = tmp_path / "shared", tmp_path / "home"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "out").symlink_to(target)
    before = state(victim)
    give_away(shared / "out", monkeypatch)
    with pytest.raises(CheckpointError, match="is a link of the account"):
        run_merge(config(inputs, out=str(shared / "out"), force=True))
    assert state(victim) == before
    assert os.listdir(target) == ["victim"]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_an_own_merge_goes_on_under_every_umask(begun, tmp_path, umask):
    plan, _ = begun
    plan = replace(plan, target=tmp_path / "out")
    folder = engine.partial_path(plan.target)
    before = os.umask(umask)
    try:
        carry_out(plan, part=Part(1, 2))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o775 & ~umask)  # as an earlier version has made it
        assert carry_out(plan) is not None
    finally:
        os.umask(before)
    assert not folder.exists()
    assert stat.S_IMODE(plan.target.stat().st_mode) == 0o777 & ~umask
    model = plan.target / "model.safetensors"
    assert stat.S_IMODE(model.stat().st_mode) == 0o666 & ~umask


def test_a_file_system_without_owners_and_modes_is_used(begun, tmp_path, monkeypatch):
    """It says the same of all that this account makes there: another owner, open to all."""
    plan, folder = copied(begun, tmp_path)
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: changed(real(file), mode=0o777))
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    assert carry_out(plan) is not None
    assert not folder.exists()


@pytest.mark.parametrize("kind", FOLDERS)
def test_checkpoints_that_another_account_prepared_are_not_loaded(tmp_path, monkeypatch, kind):
    prepare, said = FOLDERS[kind]
    folder = tmp_path / "out.checkpoints"
    make_checkpoint_folder(folder)
    prepare(folder, monkeypatch)
    if kind == "a link":  # checkpoints may be kept on another disk
        make_checkpoint_folder(folder)
        give_away(folder, monkeypatch)
    with pytest.raises(CheckpointError, match=said):
        make_checkpoint_folder(folder)
    remove_if_empty(folder)  # as a run that was refused does at its end


def test_a_link_in_place_of_a_checkpoint_is_not_followed(tmp_path, victim):
    folder = tmp_path / "out.checkpoints"
    make_checkpoint_folder(folder)
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-2").symlink_to(victim.parent)
    before = state(victim)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is a link"):
        open_checkpoints(folder, resume=False, force=True)
    assert state(victim) == before


def test_a_text_replaces_what_has_its_name_and_not_what_that_leads_to(tmp_path, victim):
    before = state(victim)
    for make in (link, dead_link, hard_link, pipe):
        make_own_folder(tmp_path / "own")
        (tmp_path / "own" / "text").unlink(missing_ok=True)
        make(tmp_path / "own" / "text", victim)
        write_own(tmp_path / "own" / "text", "new")
        assert (tmp_path / "own" / "text").read_text() == "new"
        assert state(victim) == before
    link_of_folder(tmp_path / "own", victim)
    with pytest.raises(CheckpointError, match="is a link"):
        write_own(tmp_path / "own" / "victim", "new")
    assert state(victim) == before


# The rooms that write files, and why others cannot have put links where they write. A new room is
# added here with its reason; `replacing` yields a path in a folder that mkdtemp has just made.
WRITERS = {
    "adapt/store": "into the folder of `replacing`",
    "checkpoint/contained": "a new file, below the folder of `replacing` or OUT.partial",
    "checkpoint/locks": "own_files opens it",
    "checkpoint/own_files": "it checks what it opens",
    "checkpoint/scratch": "in a new folder of mkdtemp; it follows no link to a lock left over",
    "checkpoint/sink": "a new file, or one that own_files opens",
    "compare/files": "into the folder of `replacing`",
    "compare/picture": "into the folder of `replacing`",
    "compare/relearn": "in a new folder of scratch",
    "curvature/parts": "in a folder that make_own_folder has checked; own_files opens it",
    "mix": "into the folder of `replacing`; the record by own_files",
    "preview/files": "into the folder of `replacing`",
    "preview/picture": "into the folder of `replacing`",
    "detox/journey": "in `replacing`, or in `steps`, which make_own_folder has checked",
    "detox/picture": "to the path of `replacing`",
    "entry": "to devices that stand for streams that are closed",
    "extract/output": "into the folder of `replacing`",
    "extract/run": "into the folder of `replacing`",
    "evaluate/files": "into the folder of `replacing`",
    "evaluate/panel_locks": "into the folder of `replacing`",
    "finetune/checkpoints": "into the folder of `replacing`",
    "finetune/gathered": "into the folder of `replacing`",
    "finetune/shard_files": "in a folder that make_own_folder has checked; own_files opens it",
    "finetune/store": "into the folder of `replacing`",
    "render": "to the device that holds nothing",
    "libraries": "into a file in memory",
    "kernels/machine_code": "a new file of mkstemp, in a folder that only this account writes to",
    "lora/merging": "into the folder of `replacing`",
    "lora/output": "into the folder of `replacing`",
    "merge/journal": "own_files opens it",
    "merge/partial": "own_files opens it",
    "merge/side_files": "in OUT.partial, in which refuse_planted found no link",
    "trainer/saving": "into the folder of `replacing`",
}
WRITE_CALLS = {
    *("write_text", "write_bytes", "savefig", "save_pretrained", "save_file", "touch"),
    *("copyfile", "copy", "copy2", "copytree", "move", "symlink_to", "hardlink_to"),
}
WRITE_FLAGS = {"O_CREAT", "O_WRONLY", "O_RDWR"}


def is_write(node):
    """Whether a node of the syntax tree makes or opens a file to write to it."""
    if isinstance(node, ast.Attribute) and node.attr in WRITE_FLAGS:
        return True
    if not isinstance(node, ast.Call):
        return False
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    owner = ast.unparse(node.func).rpartition(".")[0]
    if name in ("copy", "move"):
        return owner == "shutil"
    if name == "write_bytes" and len(node.args) > 1:
        return False  # a tensor's bytes, into a sink
    modes = [a.value for a in node.args[:2] if isinstance(a, ast.Constant)]
    opens = name in ("open", "fdopen") and any(set(str(m)) & set("wax+") for m in modes)
    return name in WRITE_CALLS or opens


def test_every_room_that_writes_says_why_it_follows_no_link_of_others():
    root = Path(__file__).parents[1]
    packages = (root / "mergekit_bayes", root / "cli" / "bmerge_cli")
    writers = {
        str(file.relative_to(package).with_suffix(""))
        for package in packages
        for file in package.rglob("*.py")
        if any(is_write(node) for node in ast.walk(ast.parse(file.read_text())))
    }
    assert writers <= WRITERS.keys()
    assert len(writers) > 10
