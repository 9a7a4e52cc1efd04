"""No file stays open: not after a refusal, and not after a model was closed."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import BmergeError
from mergekit_bayes.hub import make_card, plan_push
from mergekit_bayes.inspect import run_inspect
from mergekit_bayes.lora import merge_adapters, open_adapter, open_model
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
        Path(name, "posterior").mkdir()
        Path(name, "model.precision.safetensors").rename(f"{name}/posterior/precision.safetensors")
    precision = "posterior/precision.safetensors"
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
