"""Inputs that somebody writes to during a merge: nothing is published that mixes old and new."""

import errno
import json
import os
import random
import shutil
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import yaml

from mergekit_bayes.checkpoint import stamps
from mergekit_bayes.checkpoint.identity import files_identity
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.stamps import (
    ChangedError,
    Stamp,
    changed_since,
    documents_in,
    refuse_changed,
    stamps_of,
    to_json,
)
from mergekit_bayes.documents import parse_json
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.lora import merge_adapters
from mergekit_bayes.merge import MergeConfig, Part, carry_out, plan_merge, run_merge
from mergekit_bayes.merge import run as engine
from mergekit_bayes.stream import units as units_module
from tests import adapters, tiny
from tests.interrupted import interrupt

SHAPES = {"wte.weight": (400, 250), "h.0.weight": (60, 30)}  # sampled blocks are 64 of 400 kB
BLOCK, BLOCKS = 4096, 16


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    for seed, name in enumerate(("base", "a", "b")):
        file = folder / f"{name}.safetensors"
        tiny.posterior(file, tiny.arrays(seed, SHAPES), tiny.precisions(seed, SHAPES))
    for file in folder.iterdir():
        os.utime(file, (10**9, 10**9))
    return folder


@pytest.fixture
def here(originals, tmp_path, monkeypatch):
    """`base`, `a` and `b` with precisions in the working folder, written long ago."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(units_module, "UNIT", 20_000)
    for file in originals.iterdir():
        shutil.copy2(file, tmp_path / file.name)
    return tmp_path


def config(**settings):
    given = {"base": "base.safetensors", "weights": "precision", "out": "out.safetensors"}
    return MergeConfig(models=("a.safetensors", "b.safetensors"), **(given | settings))


def overwrite(file):
    with open(file, "r+b") as content:
        content.seek(-3000, os.SEEK_END)
        content.write(b"\x3e" * 3000)


def append(file):
    with open(file, "ab") as content:
        content.write(b"more")


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def spoil(file):
    """As somebody does who saves another model there: for a moment the entries make no sense."""
    with open(file, "r+b") as content:
        content.seek(-300_000, os.SEEK_END)
        content.write(b"\xff" * 300_000)


def replace(file):
    shutil.copy2("base.safetensors", "other")
    os.replace("other", file)


def between_blocks(file, *, restore=True):
    """Change all bytes of the large tensor that are not sampled, and set the time back."""
    status, content = file.stat(), bytearray(file.read_bytes())
    before = files_identity([file])
    size = 4 * 400 * 250
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    first = len(content) - max(e["data_offsets"][1] for e in header.values() if "dtype" in e)
    first += next(e for n, e in header.items() if n.endswith("wte.weight"))["data_offsets"][0]
    tensor = np.frombuffer(content, np.uint8)[first : first + size]
    changed = np.ones(size, bool)
    for i in range(BLOCKS):
        start = (size - BLOCK) * i // (BLOCKS - 1)
        changed[start : start + BLOCK] = False
    assert changed.sum() > 300_000
    tensor[changed] ^= 1
    with file.open("r+b") as opened:  # the merge that reads it should find all its bytes
        opened.write(content)
    assert files_identity([file]) == before
    if restore:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def merge_while(settings, change, share=0.5, **options):
    """Merge, and call `change` once this share is written."""
    calls = []

    def progress(written, total):
        if written >= share * total and not calls:
            calls.append(written)
            change()

    try:
        return run_merge(settings, threads=1, progress=progress, **options)
    finally:
        assert calls, "the change was not made"


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("change", [overwrite, append, truncate, spoil, replace])
def test_an_input_that_changes_during_the_merge_is_refused(here, change, share):
    file = Path("a.safetensors")
    with pytest.raises(ChangedError, match=r"^a\.safetensors: was changed .* run the same command"):
        merge_while(config(), lambda: change(file), share)
    assert not Path("out.safetensors").exists()
    assert not Path("out.safetensors.partial").exists()


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_an_input_that_is_gone_stops_the_merge_and_it_goes_on_once_it_is_back(here, share):
    """As on a disk that is away for a while: what is written stays."""
    file = Path("a.safetensors")
    with pytest.raises(
        CheckpointError, match=r"^a\.safetensors: cannot be opened any more"
    ) as error:
        merge_while(config(), lambda: file.rename("elsewhere"), share)
    assert not isinstance(error.value, ChangedError)
    assert not Path("out.safetensors").exists()
    Path("elsewhere").rename(file)
    said = []
    with closing(plan_merge(config())) as plan:
        carry_out(plan, say=said.append)
    assert said == ["resuming 'out.safetensors': 100% is written already"]
    assert Path("out.safetensors").read_bytes() == written(config())


def test_an_error_of_the_disk_is_not_taken_for_a_change(here, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    def unmount():
        monkeypatch.setattr(os, "preadv", fail)
        monkeypatch.setattr(stamps, "_stamp", fail)

    with pytest.raises(CheckpointError, match=r"reading '.*' failed"):
        merge_while(config(), unmount, 0.1)
    monkeypatch.undo()
    assert Path(here, "out.safetensors.partial").exists()


@pytest.mark.parametrize("name", ["base.safetensors", "base.posterior", "b.posterior"])
def test_every_input_is_looked_at(here, name):
    with pytest.raises(ChangedError, match=f"^{name}: was changed"):
        merge_while(config(), lambda: overwrite(Path(name)))
    assert not list(here.glob("out*"))


def test_a_change_between_plan_and_work_is_refused_before_the_work(here):
    with closing(plan_merge(config())) as plan:
        overwrite(Path("a.safetensors"))
        with pytest.raises(ChangedError):
            carry_out(plan)
    assert not list(here.glob("out*"))


def test_a_change_during_the_plan_is_refused(here, monkeypatch):
    from mergekit_bayes.plan import plan as planning

    real = planning.match_tensors
    monkeypatch.setattr(
        planning, "match_tensors", lambda *a: overwrite(Path("a.safetensors")) or real(*a)
    )
    with pytest.raises(ChangedError, match=r"^a\.safetensors"):
        plan_merge(config())


def folders():
    """`base` and `a` as folders with configs and a tokenizer."""
    for name in ("base", "a"):
        Path(name).mkdir()
        shutil.move(f"{name}.safetensors", f"{name}/model.safetensors")
        for document in ("config.json", "generation_config.json", "added_tokens.json"):
            Path(name, document).write_text("{}")
            os.utime(Path(name, document), (10**9, 10**9))
        Path(name, "LICENSE").write_text(name)
    return MergeConfig(models=("a",), base="base", out="out")


@pytest.mark.parametrize(
    "name", ["base/config.json", "a/generation_config.json", "a/added_tokens.json", "base/LICENSE"]
)
def test_a_side_file_that_changes_is_refused(here, name):
    settings = folders()
    with pytest.raises(ChangedError, match=f"^{name}: was changed"):
        merge_while(settings, lambda: Path(name).write_text('{"other": 1}'))
    assert not list(here.glob("out*"))
    merge_while(settings, lambda: Path("a/README.md").write_text("not read by a merge"))


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "adapter_config.json", "posterior/precision.posterior"],
)
@pytest.mark.parametrize("alone", [False, True], ids=["on its base", "alone"])
def test_an_adapter_that_changes_is_refused(tmp_path, monkeypatch, name, alone):
    monkeypatch.chdir(tmp_path)
    adapters.base(Path("base"))
    for seed in (1, 2):
        made = adapters.factors(seed)
        precise = adapters.precise(made, seed)
        adapters.adapter(Path(f"t{seed}"), made, precision=precise, info={"unit": "token"})
    file = Path("t2", name)

    def change(*_):
        file.write_bytes(file.read_bytes() + b" ")

    def merge():
        if alone:
            merge_adapters(["t1", "t2"], Path("out"), weights="precision", progress=change)
        else:
            models = ("base+t1", "base+t2")
            merge_while(MergeConfig(models=models, weights="precision", out="out"), change)

    with pytest.raises(ChangedError, match=f"^{file}: was changed"):
        merge()
    assert not list(tmp_path.glob("*out*"))


def written(settings):
    """What a merge of the inputs as they are writes."""
    run_merge(settings.model_copy(update={"out": "fresh.safetensors"}))
    return Path("fresh.safetensors").read_bytes()


@pytest.mark.parametrize("how", ["stopped", "in parts"])
def test_what_was_merged_before_an_input_changed_is_merged_again(here, monkeypatch, how):
    """Nothing tells the plans apart: size and sampled blocks of the input are the same."""
    if how == "stopped":
        interrupt(monkeypatch, config(), 3)
    else:
        run_merge(config(), part=Part(1, 2))
    between_blocks(Path("a.safetensors"), restore=False)
    if how == "in parts":
        run_merge(config(), part=Part(2, 2))
    said = []
    with closing(plan_merge(config())) as plan:
        carry_out(plan, say=said.append)
    assert any("'a.safetensors' was written to after parts" in line for line in said)
    assert Path("out.safetensors").read_bytes() == written(config())


def test_a_part_during_which_an_input_changed_counts_for_nothing(here):
    file = Path("a.safetensors")
    status, before = file.stat(), file.read_bytes()
    run_merge(config(), part=Part(1, 2))
    with pytest.raises(ChangedError):
        merge_while(config(), lambda: overwrite(file), part=Part(2, 2))
    file.write_bytes(before)  # brought back, with its time
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with closing(plan_merge(config())) as plan:
        done = engine._partial(plan).journals.done()
        first = {u.id for u in engine.units_of(plan) if Part(1, 2).takes(u.position)}
    assert set(done) == first
    run_merge(config())
    assert Path("out.safetensors").read_bytes() == written(config())


def test_an_input_that_changes_during_the_end_of_a_stopped_merge_leaves_nothing(here, monkeypatch):
    interrupt(monkeypatch, config(), 3)
    with pytest.raises(ChangedError):
        merge_while(config(), lambda: overwrite(Path("b.safetensors")))
    assert not list(here.glob("out*"))


PATH, WRITTEN = Path("m"), 10**18
SINCE = {
    "same": (Stamp(8, WRITTEN, (1, 5)), True, False),
    "written again": (Stamp(8, WRITTEN + 1, (1, 5)), True, True),
    "other size": (Stamp(9, WRITTEN, (1, 5)), True, True),
    "numbered anew by the file system": (Stamp(8, WRITTEN, (1, 6)), True, False),
    "elsewhere, a copy": (Stamp(8, WRITTEN + 10**12, (2, 6)), False, False),
    "elsewhere, on a network disk": (Stamp(8, WRITTEN + 10**9, (2, 5)), False, False),
    "elsewhere, written again": (Stamp(8, WRITTEN + 10**12, (2, 5)), False, True),
}


@pytest.mark.parametrize("case", SINCE)
def test_stamps_are_compared_as_far_as_they_mean_the_same_there(case):
    now, same_machine, is_changed = SINCE[case]
    recorded = json.loads(json.dumps(to_json({PATH: Stamp(8, WRITTEN, (1, 5))})))
    found = changed_since(recorded, {PATH: now}, same_machine=same_machine)
    assert found == ([PATH] if is_changed else [])


def test_names_that_are_no_text_are_recorded_as_text():
    stamped = {Path(os.fsdecode(b"m\xff")): Stamp(8, 1, (1, 5))}
    recorded = parse_json(json.dumps(to_json(stamped)))
    changed = {path: stamp._replace(written=2) for path, stamp in stamped.items()}
    assert changed_since(recorded, stamped, same_machine=True) == []
    assert changed_since(recorded, changed, same_machine=True) == list(stamped)


@pytest.mark.parametrize("recorded", [None, 1, [], {}, {"m": 1}, {"m": ["x", None, {}]}])
def test_a_record_that_is_none_says_nothing(recorded):
    assert changed_since(recorded, {PATH: Stamp(8, 1, (1, 5))}, same_machine=True) == []


def test_documents_are_no_tensors_and_no_card(tmp_path):
    for name in ("config.json", "tokenizer.json", "README.md", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    assert [p.name for p in documents_in(tmp_path)] == ["config.json", "tokenizer.json"]
    assert documents_in(tmp_path / "missing") == []
    assert stamps_of([tmp_path / "missing"]) == {}


def test_a_file_that_was_copied_with_its_time_is_another_file_only_while_it_is_open(here):
    """Some network file systems number a file anew, so that only open files have a number."""
    file = Path("a.safetensors")
    with SafetensorsSource([file]) as source:
        loose = stamps_of([file])
        shutil.copy2(file, "copy")
        os.replace("copy", file)
        refuse_changed(loose)
        with pytest.raises(ChangedError, match="another file has its name"):
            refuse_changed(source.inputs)


@pytest.mark.slow
def test_whenever_an_input_is_overwritten_the_output_is_of_one_version(tmp_path, monkeypatch):
    """Another thread writes the new version, a piece at a time, from a random moment on."""
    monkeypatch.chdir(tmp_path)
    shapes = {f"h.{i}.weight": (500, 400) for i in range(12)}
    for seed, name in enumerate(("base", "old", "new")):
        tiny.write(f"{name}.safetensors", tiny.arrays(seed, shapes))

    def merge(model, out):
        settings = MergeConfig(models=(model,), base="base.safetensors", out=out, force=True)
        run_merge(settings, threads=2)
        return Path(out).read_bytes()

    whole = {merge(f"{name}.safetensors", f"{name}.whole.safetensors") for name in ("old", "new")}
    began = time.perf_counter()
    merge("old.safetensors", "out.safetensors")
    seconds, rng = time.perf_counter() - began, random.Random(0)
    new = Path("new.safetensors").read_bytes()
    pieces = [new[start : start + (1 << 18)] for start in range(0, len(new), 1 << 18)]
    refused = 0

    def overwrite_later():
        time.sleep(rng.uniform(0, 1.3 * seconds))
        with open("a.safetensors", "r+b", buffering=0) as file:
            for piece in pieces:
                file.write(piece)

    for _ in range(40):
        shutil.copyfile("old.safetensors", "a.safetensors")
        os.utime("a.safetensors", (10**9, 10**9))
        writer = threading.Thread(target=overwrite_later)
        writer.start()
        try:
            assert merge("a.safetensors", "out.safetensors") in whole
        except ChangedError:
            refused += 1
        finally:
            writer.join()
    assert refused


# --verify


def test_without_verify_a_change_that_leaves_size_time_and_samples_is_not_seen(here):
    """The documented limit: sampled blocks and the file's times are all that is compared."""
    file = Path("a.safetensors")
    merge_while(config(), lambda: between_blocks(file))
    shutil.copy2("b.safetensors", file)
    recipe = MergeConfig(**yaml.safe_load(Path("out.merge_recipe.yaml").read_text()))
    assert "full_identities" not in recipe.model_fields_set
    with pytest.raises(MismatchError):
        plan_merge(recipe.model_copy(update={"out": "again.safetensors"}))


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ("precision", "a.safetensors"),
        ("precision", "b.posterior"),
        ("uniform", "base.safetensors"),
    ],
)
def test_verify_sees_it_during_the_merge_and_in_the_recipe(here, weights, name):
    settings, file = config(verify=True, weights=weights), Path(name)
    with pytest.raises(ChangedError, match="all bytes together have another hash"):
        merge_while(settings, lambda: between_blocks(file))
    assert not list(here.glob("out*"))
    between_blocks(file)  # which undoes itself
    report = run_merge(settings)
    recipe = yaml.safe_load(Path("out.merge_recipe.yaml").read_text())
    assert recipe["full_identities"] == {model.ref: model.full for model in report.models}
    assert set(recipe["full_precision_identities"]) == set(recipe["precision_identities"])
    again = MergeConfig(**recipe, out="again.safetensors")
    run_merge(again)
    assert Path("again.safetensors").read_bytes() == Path("out.safetensors").read_bytes()
    assert yaml.safe_load(Path("again.merge_recipe.yaml").read_text()) == recipe
    between_blocks(file)
    for verify in (True, False):  # hashes that are on record are compared in any case
        changed = again.model_copy(update={"out": "more.safetensors", "verify": verify})
        with pytest.raises(MismatchError, match=r"is not what .* out of the recipe"):
            plan_merge(changed)
    # A recipe of sampled blocks, as all were before, cannot tell.
    old = {key: value for key, value in recipe.items() if not key.startswith("full_")}
    plan_merge(MergeConfig(**(old | {"verify": False}), out="more.safetensors")).close()


def test_verify_sees_another_record_of_the_same_precision(here):
    run_merge(config(verify=True))
    recipe = yaml.safe_load(Path("out.merge_recipe.yaml").read_text()) | {"out": "more.safetensors"}
    Path("a.posterior").unlink()
    tiny.posterior(
        "same.safetensors", tiny.arrays(1, SHAPES), tiny.precisions(1, SHAPES), observations=3.0
    )
    os.rename("same.posterior", "a.posterior")
    with pytest.raises(MismatchError, match=r"the precision of 'a\.safetensors' is not what"):
        plan_merge(MergeConfig(**recipe))
    old = {key: value for key, value in recipe.items() if not key.startswith("full_")}
    plan_merge(MergeConfig(**old)).close()


def test_verify_tells_the_plans_of_a_stopped_merge_apart(here):
    settings = config(verify=True, weights="uniform")
    run_merge(settings, part=Part(1, 2))
    between_blocks(Path("a.safetensors"))
    with pytest.raises(CheckpointError, match="another merge"):
        run_merge(settings)


def test_verify_of_an_adapter_on_its_base_hashes_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapters.base(Path("base"))
    adapters.adapter(Path("t"), adapters.factors(1))
    report = run_merge(MergeConfig(models=("base+t",), base="base", verify=True, out="out"))
    base, adapted = (model.full for model in report.models)
    assert adapted.split("+")[0] == base
    recipe = yaml.safe_load(Path("out/merge_recipe.yaml").read_text())
    assert recipe["full_identities"] == {"base": base, "base+t": adapted}
    run_merge(MergeConfig(**recipe, out="again"))
