"""Two processes with half of every tensor fine-tune and store what one process does.

accelerate shards on GPUs only, and so does the command; here the ranks shard over the CPU's memory,
by the same code.
"""

import json
import os
import shutil
import time
import weakref
from functools import partial

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import mergekit_bayes.finetune.fsdp as fsdp
import mergekit_bayes.finetune.gathered as gathered
from mergekit_bayes import ranks
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import open_posterior
from tests import tiny
from tests.finetuning import texts
from tests.test_shards import FixedNoise
from tests.tiny_models import tiny_gpt2
from tests.two_ranks import found_by_two

# Compared with one process, which gets the same noise; root-GGN draws its signs by rank.
COMPARED = {
    "price": {"curvature": "price", "posterior": "ivon"},
    "adapter": {"curvature": "price", "posterior": "ivon", "lora": {"r": 1}},  # of one row
    "adamw": {"optimizer": "adamw", "posterior": "none", "learning_rate": 1e-3},
}
# With noise and signs of their own, stopped after the fourth step or after the last one.
RESUMED = {
    "ggn": {"curvature_every": 2},
    "bfloat16": {"curvature_every": 2, "dtype": "bfloat16"},
}
FILES = ("model.safetensors", "adapter_model.safetensors", "posterior/precision.posterior")


def settings(folder, name, **changes):
    return FinetuneConfig(
        **{
            "model": str(folder / "base"),
            "data": str(folder / "t.jsonl"),
            "output": str(folder / name),
            "seed": 3,
            "ess": 1e5,
            "max_steps": 5,
            "flush_batches": 4,
            "weight_decay": 1e-4,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "num_processes": 2,
            "shard": True,
            **changes,
        }
    )


def child(folder):
    """What each of two ranks does; rank 0 writes what the tests read."""
    fsdp.has_devices = lambda: True
    found = {}
    for name, changes in COMPARED.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(IVON, "_noise", FixedNoise._noise)
            if name == "adamw":  # as `accelerate launch --use_fsdp --fsdp_version 2` asks for it
                patch.setenv("ACCELERATE_USE_FSDP", "true")
                patch.setenv("FSDP_VERSION", "2")
                changes = {**changes, "shard": False}
            begun = time.process_time()
            report = run_finetune(settings(folder, f"{name}-two", **changes), quiet=True)
            found[name] = report.model_dump(mode="json")
            print(name, time.process_time() - begun)
    for name, changes in RESUMED.items():
        begun = time.process_time()
        found |= {f"{name} {k}": v for k, v in resumed(folder, name, changes).items()}
        print(name, time.process_time() - begun)
    found["world"] = ranks.world()
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(everywhere))


def resumed(folder, name, changes):
    """Train to the end, and then on from both checkpoints; what was alive while it was stored."""
    config = settings(folder, f"{name}-two", save_steps=4, keep_checkpoints=True, **changes)
    with pytest.MonkeyPatch.context() as patch:
        alive = watch_whole_tensors(patch)
        run_finetune(config, quiet=True)
    kept = folder / f"{name}-two.checkpoints"
    if ranks.is_main():
        shutil.copytree(kept, folder / f"{name}-last.checkpoints")
        shutil.rmtree(kept / "checkpoint-5")
        kept.rename(folder / f"{name}-fourth.checkpoints")
    dist.barrier()
    for at in ("fourth", "last"):
        again = {"output": str(folder / f"{name}-{at}"), "resume": True}
        run_finetune(config.model_copy(update=again), quiet=True)
    return {
        "alive": alive,
        "files": sorted(
            p.name for p in (folder / f"{name}-last.checkpoints/checkpoint-5").iterdir()
        ),
    }


def watch_whole_tensors(patch):
    """The bytes of other whole tensors that are alive whenever one is gathered."""
    alive, gathered_before = [], []

    def watched(original, tensor):
        there = [ref() for ref in gathered_before]
        alive.append(sum(t.nbytes for t in there if t is not None and t.ndim))
        del there
        whole = original(tensor)
        if whole is not None:
            gathered_before.append(weakref.ref(whole))
        return whole

    patch.setattr(gathered, "whole_tensor", partial(watched, gathered.whole_tensor))
    full = DTensor.full_tensor
    patch.setattr(DTensor, "full_tensor", lambda self: watched(full, self))
    return alive


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two gloo processes have trained, and what each found."""
    folder = tmp_path_factory.mktemp("two")
    texts(folder / "t.jsonl", rows=24)
    tiny_gpt2(folder / "base", layers=1)
    return folder, found_by_two("tests.test_finetune_shards", folder)


def stored(folder):
    """All tensors of a model or an adapter and of its precision."""
    tensors = {}
    for file in FILES:
        if (folder / file).exists():
            of_file = safetensors.numpy.load_file(folder / file)
            tensors |= {f"{file} {name}": value for name, value in of_file.items()}
    for name in (n for n in tensors if n.endswith("c_attn.bias")):
        # No output depends on the bias of the keys, whose gradient is rounding alone.
        tensors[name] = np.delete(tensors[name], np.s_[16:32])
    return tensors


@pytest.mark.parametrize("name", COMPARED)
def test_shards_train_what_one_process_trains(two, name, monkeypatch):
    """Up to rounding: a gradient is a mean of two halves there and one sum here, which moves the
    last bits of a float32, and IVON divides by the Hessian's root.
    """
    folder, reports = two
    monkeypatch.setattr(IVON, "_noise", FixedNoise._noise)
    one_process = {"shard": False, "num_processes": None, "batch_size": 4}
    config = settings(folder, f"{name}-one", **{**COMPARED[name], **one_process})
    report = run_finetune(config, quiet=True)
    ours, theirs = stored(folder / f"{name}-one"), stored(folder / f"{name}-two")
    assert list(ours) == list(theirs)
    start = stored(folder / "base")
    for tensor, value in ours.items():
        size = 1e-6 * abs(value).max() if "precision" in tensor else 1e-7  # a step is 1e-4
        np.testing.assert_allclose(theirs[tensor], value, rtol=1e-4, atol=size, err_msg=tensor)
        assert tensor not in start or abs(value - start[tensor]).max() > 1e-5
    for of_rank in reports:
        assert of_rank[name]["loss"] == pytest.approx(report.loss, rel=1e-5)
        for number, value in report.health.items():
            if number == "sigma_over_rms":  # a shard's median is not its matrix'
                continue
            assert of_rank[name]["health"][number] == pytest.approx(value, rel=0.1), number
    assert "shard: true" in (folder / f"{name}-two" / "finetune.yaml").read_text()


@pytest.mark.parametrize("at", ["fourth", "last"])
@pytest.mark.parametrize("name", RESUMED)
def test_shards_resume_to_the_same_bytes(two, name, at):
    folder, _ = two
    whole, again = folder / f"{name}-two", folder / f"{name}-{at}"
    files = [file for file in FILES if (whole / file).exists()]
    assert len(files) == 2
    for file in files:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("name", RESUMED)
def test_no_two_whole_tensors_are_alive_at_once(two, name):
    _, reports = two
    for of_rank in reports:
        assert len(of_rank[f"{name} alive"]) > 4
        assert max(of_rank[f"{name} alive"]) == 0
        names = of_rank[f"{name} files"]
        for kind in ("weights", "optimizer"):
            assert [f"{kind}-rank-{r}-of-2.safetensors" for r in range(2)] == [
                file for file in names if file.startswith(kind)
            ]
        assert not {"model.safetensors", "optimizer.pt"} & set(names)
