"""No file stays open: not after a refusal, and not after a model was closed."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_bayes.checkpoint.own_files import open_own
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.convert import run_convert
from mergekit_bayes.documents import DocumentError, read_mapping, read_text
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.hub import make_card, plan_push
from mergekit_bayes.inspect import run_inspect
from mergekit_bayes.lora import merge_adapters, open_adapter, open_model
from mergekit_bayes.merge import MergeConfig, Part, run_merge
from mergekit_bayes.models.sampling import open_samplable
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import open_posterior, save_posterior
from tests import tiny
from tests.adapters import adapter, base, factors, precise


def open_files():
    """How many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def refused(call, *args, **options):
    """Call, expect a refusal, and expect that it closes what it opened."""
    before = open_files()
    with pytest.raises(BmergeError):
        call(*args, **options)
    assert open_files() == before


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """Models, posteriors and adapters, each of which is broken in another way."""
    monkeypatch.chdir(tmp_path)
    made = factors(0)
    for name in ("good", "cut", "foreign", "unread"):
        tiny.posterior(f"{name}/model.safetensors", tiny.arrays(0), tiny.precisions(0))
        tiny.into_folder(name)
    precision = "posterior/precision.posterior"
    Path("cut", precision).write_bytes(Path("cut", precision).read_bytes()[:-1])
    Path("foreign/model.safetensors").unlink()
    tiny.write("foreign/model.safetensors", tiny.arrays(1))
    Path("unread", precision).unlink()
    tiny.write(f"unread/{precision}", tiny.precisions(0), metadata={"bmerge": "{"})
    tiny.write("twice/model-1.safetensors", {"w": np.zeros(2, np.float32)})
    tiny.write("twice/model-2.safetensors", {"w": np.zeros(2, np.float32)})
    index = {"weight_map": {"w": "model-1.safetensors", "v": "model-2.safetensors"}}
    Path("twice/model.safetensors.index.json").write_text(json.dumps(index))
    base(tmp_path / "base")
    adapter(tmp_path / "adapter", made, precision=precise(made, 0))
    adapter(tmp_path / "rank", made, rank_pattern={"q": 3})
    adapter(tmp_path / "shape", factors(0, layers={"m.q": (6, 5)}))
    adapter(tmp_path / "moved", factors(1))
    Path("moved/posterior").mkdir()
    Path("moved", precision).write_bytes(Path("adapter", precision).read_bytes())


def test_a_refusal_closes_every_file(broken):
    refused(SafetensorsSource, [Path("good/model.safetensors"), Path("cut/posterior")])
    for name in ("cut", "unread", "twice"):
        refused(open_posterior, name)
        refused(run_inspect, "good", precision=f"{name}/posterior")
    for name in ("rank", "moved", "good"):
        refused(open_adapter, name)
        refused(open_model, f"base+{name}")
    refused(open_model, "base+shape")
    refused(run_inspect, "good", "base")
    refused(plan_push, Path("foreign"), "org/x")
    refused(plan_push, Path("unread"), "org/x")
    refused(make_card, Path("cut"))
    refused(merge_adapters, ["adapter", "rank"], Path("out"))
    refused(merge_adapters, ["adapter", "moved"], Path("out"), space="factor")
    mean, info = {"other": np.zeros(2, np.float32)}, open_posterior("good")
    info.close()
    refused(save_posterior, Path("base"), mean, info.info)


def test_closing_a_model_closes_every_file(broken):
    before = open_files()
    for ref in ("good", "base+adapter"):
        for options in ({}, {"isotropic": 1.0}, {"with_precision": False}):
            with open_model(ref, **options):
                assert open_files() > before
            assert open_files() == before
    with open_adapter("adapter"):
        assert open_files() == before + 2
    assert open_files() == before


def test_a_file_that_finds_no_room_is_closed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    specs = {"w": TensorSpec("F32", (2,))}
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refused(SafetensorsSink, tmp_path / "a.safetensors", specs, {})
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        refused(write_nothing, tmp_path / "b.safetensors", specs)


def write_nothing(path, specs):
    with SafetensorsSink(path, specs, {}):
        pass


# What a posterior's record may be changed to, all of which is refused.
RECORDS = {
    "cut": lambda record: "{",
    "list": lambda record: "[]",
    "format": lambda record: json.dumps(record | {"format": 9}),
    "type": lambda record: json.dumps(record | {"ess": "many"}),
    "digits": lambda record: json.dumps(record).replace(
        '"ess":', '"ess": 1' + 5000 * "0" + ', "x":'
    ),
    "prior": lambda record: json.dumps(record | {"prior": {"kind": "other"}}),
    "surrogate": lambda record: json.dumps(record | {"unit": "\ud800"}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_refused_record_leaves_no_file_open(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        tiny.posterior(f"{name}.safetensors", tiny.arrays(0), tiny.precisions(0))
    with SafetensorsSource([Path("bad.posterior")]) as source:
        record = json.loads(source.metadata["bmerge"])
    Path("bad.posterior").unlink()
    text = RECORDS[kind](record)
    tiny.write("bad.posterior", tiny.precisions(0), metadata={"bmerge": text})
    good, bad = "good.safetensors", "bad.safetensors"
    refused(open_posterior, bad)
    refused(open_model, bad)
    refused(open_samplable, bad)
    refused(open_posterior, good, precision="bad.posterior")
    refused(run_inspect, bad)
    refused(run_inspect, good, precision="bad.posterior")
    for models, precision in (((good, bad), {}), ((good,), {good: "bad.posterior"})):
        settings = MergeConfig(models=models, weights="precision", precision=precision, out="o")
        refused(plan_merge, settings)
        refused(run_merge, settings, part=Part(1, 2))
    assert not Path("o.partial").exists()


def test_a_refused_merge_leaves_no_file_open(broken):
    good, other = "good", "good/model.safetensors"
    shapes = {n: np.full(s, np.nan, np.float32) for n, s in tiny.SHAPES.items()}
    tiny.write("nan/model.safetensors", shapes)
    Path("taken").mkdir()
    Path("taken/x").touch()
    Path("mine.partial").mkdir()
    Path("mine.partial/x").touch()
    Path("link.partial").symlink_to("taken")
    for models, out, settings in (
        ((good, "nan"), "o", {}),
        ((good, other), "taken", {}),
        ((good, other), "mine", {}),
        ((good, other), "link", {}),
        ((good, other), "good", {}),
        ((good, "missing"), "o", {}),
        ((good, "twice"), "o", {}),
        ((good, "adapter"), "o", {}),
        ((good, "base+shape"), "o", {}),
        ((good, "base"), "o", {}),
        ((good, other), "o", {"identities": {good: "0" * 64}}),
    ):
        config = MergeConfig(models=models, out=out, **settings)
        refused(run_merge, config)
        refused(run_merge, config, part=Part(1, 2))


def test_what_is_no_document_is_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    os.mkfifo("pipe")
    Path("large").write_bytes(b"[" * 100)
    Path("latin-1").write_bytes(b"\xe9")
    for name in ("folder", "pipe", "large", "latin-1", "missing"):
        before = open_files()
        with pytest.raises((DocumentError, OSError)):
            read_text(Path(name), limit=10)
        assert open_files() == before
        refused(read_mapping, Path(name))


def test_a_refused_pickle_or_scratch_file_is_closed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("list", [1]), ("code", {"a": Path}), ("entry", {"a": 5})):
        torch.save(content, f"{name}.bin")
        refused(run_convert, f"{name}.bin", f"{name}.safetensors")
    Path("text.bin").write_text("x")
    refused(run_convert, "text.bin", "text.safetensors")
    Path("file").touch()
    Path("hard").hardlink_to("file")
    Path("link").symlink_to("file")
    os.mkfifo("pipe")
    for name in ("hard", "link", "pipe"):
        refused(open_own, Path(name), os.O_RDWR)
