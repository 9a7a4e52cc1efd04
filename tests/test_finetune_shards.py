"""Two processes with half of every tensor fine-tune and store what one process does.

The command shards on GPUs only; here the ranks shard over the CPU's memory, by the same code.
"""

import json
import os
import shutil
import signal
import sys
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

import mergekit_bayes.finetune.evaluation as evaluation
import mergekit_bayes.finetune.fsdp as fsdp
import mergekit_bayes.finetune.gathered as gathered
from mergekit_bayes import launcher, ranks
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.data import load_run
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.finetune.store import final_curvature
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.optim import IVON
from tests import tiny
from tests.finetuning import info_of, texts
from tests.test_sharded_precision import square_two_batches_together
from tests.test_shards import FixedNoise
from tests.tiny_models import tiny_gpt2, tiny_mixtral
from tests.two_ranks import ROOT, found_by_two

# Compared with one process, which gets the same noise; root-GGN draws its signs by rank.
COMPARED = {
    "price": {"curvature": "price", "posterior": "ivon"},
    # Of one row each, which the second process has nothing of.
    "adapter": {"curvature": "price", "posterior": "ivon", "lora": {"r": 1}},
    "experts": {"curvature": "price", "posterior": "ivon", "model": "experts"},
    "adamw": {"optimizer": "adamw", "posterior": "none", "learning_rate": 1e-3},
    "packed": {
        "curvature": "price",
        "posterior": "ivon",
        "eval_data": "t.jsonl",
        "pack": "documents",
        "max_length": 28,
        "gradient_checkpointing": True,
    },
}
# With noise and signs of their own; stopped after the fourth step, or after the last one.
RESUMED = {
    "ggn": {"curvature_every": 2},
    "bfloat16": {"curvature_every": 2, "dtype": "bfloat16"},
    "ggn adapter": {"curvature_every": 2, "lora": {"r": 1}, "dtype": "bfloat16"},
    "adamw flush": {"optimizer": "adamw", "learning_rate": 1e-3},
    "autocast": {"curvature_every": 2, "bf16": True},
    # Measured so that the fourth step is the best one and the fifth the last that patience has.
    "best": {
        "curvature_every": 2,
        "posterior": "ivon",
        "eval_data": "t.jsonl",
        "load_best": True,
        "patience": 1,
    },
}
FAST = ("price", "ggn")
evaluation_measure = evaluation.measure
FILES = ("model.safetensors", "adapter_model.safetensors", "posterior/precision.posterior")
slow = pytest.mark.slow


def names(runs):
    """The names of runs as parameters, all but `FAST` marked slow."""
    return [name if name in FAST else pytest.param(name, marks=slow) for name in runs]


def settings(folder, name, **changes):
    return FinetuneConfig(
        **{
            "data": str(folder / "t.jsonl"),
            "output": str(folder / name),
            "seed": 3,
            "ess": 1e7,
            "max_steps": 5,
            "flush_batches": 4,
            "weight_decay": 1e-4,
            "batch_size": 2,
            "gradient_accumulation": 2,
            "num_processes": 2,
            "shard": True,
            **changes,
            "model": str(folder / changes.get("model", "base")),
            "eval_data": str(folder / changes["eval_data"]) if "eval_data" in changes else None,
        }
    )


def child(folder):
    """What each of two ranks does; rank 0 writes what the tests read."""
    fsdp.has_devices = lambda: True
    runs, found = json.loads((folder / "runs.json").read_text()), {}
    for name in (n for n in COMPARED if n in runs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(IVON, "_noise", FixedNoise._noise)
            patch.setattr(IVON, "_gathers", FixedNoise._gathers)
            changes = COMPARED[name]
            if name == "adamw":  # as `accelerate launch --use_fsdp --fsdp_version 2` asks for it
                patch.setenv("ACCELERATE_USE_FSDP", "true")
                patch.setenv("FSDP_VERSION", "2")
                changes = {**changes, "shard": False}
            if name == "experts":
                patch.setattr(gathered, "_FILE", 2000)
            report = run_finetune(settings(folder, f"{name}-two", **changes), quiet=True)
            found[name] = report.model_dump(mode="json")
    for name in (n for n in RESUMED if n in runs):
        found |= {f"{name} {k}": v for k, v in resumed(folder, name).items()}
    if "bfloat16" in runs:
        found["full disk"] = failing_store(folder)
    found["world"] = ranks.world()
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(everywhere))


def resumed(folder, name):
    """Train to the end, and then on from both checkpoints; what was alive while it was stored."""
    changes = {**RESUMED[name], "save_steps": 4, "keep_checkpoints": True}
    config = settings(folder, f"{name}-two", **changes)
    with pytest.MonkeyPatch.context() as patch:
        alive = watch_whole_tensors(patch)
        if name == "best":
            patch.setattr(evaluation, "measure", rising)
        run_finetune(config, quiet=True)
    kept = folder / f"{name}-two.checkpoints"
    files = sorted(path.name for path in (kept / "checkpoint-5").iterdir())
    dist.barrier()
    if ranks.is_main():
        shutil.copytree(kept, folder / f"{name}-last.checkpoints")
        shutil.rmtree(kept / "checkpoint-5")
        kept.rename(folder / f"{name}-fourth.checkpoints")
    dist.barrier()
    for at in ("fourth", "last"):
        again = {"output": str(folder / f"{name}-{at}"), "resume": True}
        with pytest.MonkeyPatch.context() as patch:
            if name == "best":
                patch.setattr(evaluation, "measure", rising)
            run_finetune(config.model_copy(update=again), quiet=True)
    return {"alive": alive, "files": files}


def rising(*given, **settings):
    """A held-out loss that rises where the real one falls."""
    return {"loss": -evaluation_measure(*given, **settings)["loss"]}


def failing_store(folder):
    """The message where the first process cannot write the second tensor, from the last step on."""
    if ranks.is_main():
        shutil.copytree(folder / "bfloat16-last.checkpoints", folder / "full.checkpoints")
    dist.barrier()
    written = []

    def write_bytes(self, name, offset, data):
        written.append(name)
        if len(written) > 1:
            raise CheckpointError(f"{name}: the disk is full")

    again = {**RESUMED["bfloat16"], "save_steps": 4, "resume": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathered.SafetensorsSink, "write_bytes", write_bytes)
        try:
            run_finetune(settings(folder, "full", **again), quiet=True)
        except CheckpointError as error:
            return str(error)
    return ""


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


def killed(folder):
    """Train with checkpoints, and be killed between the micro-batches of the last step."""
    fsdp.has_devices = lambda: True
    original, calls = transformers.Trainer.training_step, [0]

    def training_step(self, *args, **kwargs):
        calls[0] += self.state.global_step == 4
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", training_step)
        run_finetune(settings(folder, "killed", save_steps=2, **RESUMED["ggn"]), quiet=True)


def after(folder):
    """Go on from there."""
    fsdp.has_devices = lambda: True
    config = settings(folder, "killed", save_steps=2, resume=True, **RESUMED["ggn"])
    run_finetune(config, quiet=True)


def run_in_two(tmp_path_factory, runs):
    folder = tmp_path_factory.mktemp("two")
    texts(folder / "t.jsonl", rows=24)
    tiny_gpt2(folder / "base", layers=1)
    if "experts" in runs:
        tiny_mixtral(folder / "experts", tied=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    return folder, found_by_two("tests.test_finetune_shards", folder)


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """The folder in which two gloo processes have trained, and what each found."""
    return run_in_two(tmp_path_factory, FAST)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """As `fast`, of all other runs."""
    return run_in_two(tmp_path_factory, [n for n in (*COMPARED, *RESUMED) if n not in FAST])


@pytest.fixture
def two(name, request):
    return request.getfixturevalue("fast" if name in FAST else "others")


def stored(folder):
    """All tensors of a model or an adapter and of its precision."""
    tensors = {}
    for kind, pattern in (("mean", "*model*.safetensors"), ("precision", "posterior/*.posterior")):
        for file in folder.glob(pattern):
            of_file = safetensors.numpy.load_file(file)
            tensors |= {f"{kind} {name}": value for name, value in of_file.items()}
    for name in (n for n in tensors if n.endswith("c_attn.bias")):
        # No output depends on the bias of the keys, whose gradient is rounding alone.
        tensors[name] = np.delete(tensors[name], np.s_[16:32])
    return tensors


@pytest.mark.parametrize("name", names(COMPARED))
def test_shards_train_what_one_process_trains(two, name, monkeypatch):
    """Up to rounding: a gradient is a mean of two halves there and one sum here, which moves the
    last bits of a float32.
    """
    folder, reports = two
    monkeypatch.setattr(IVON, "_noise", FixedNoise._noise)
    monkeypatch.setattr(IVON, "_gathers", FixedNoise._gathers)
    one_process = {"shard": False, "num_processes": None, "batch_size": 4}
    config = settings(folder, f"{name}-one", **{**COMPARED[name], **one_process})
    report = run_finetune(config, quiet=True)
    ours, theirs = stored(folder / f"{name}-one"), stored(folder / f"{name}-two")
    assert set(ours) == set(theirs)
    start = stored(Path(config.model))
    for tensor, value in ours.items():
        size = 1e-5 * abs(value).max() if "precision" in tensor else 1e-7  # a step is 1e-4
        np.testing.assert_allclose(theirs[tensor], value, rtol=1e-4, atol=size, err_msg=tensor)
        assert tensor not in start or abs(value - start[tensor]).max() > 1e-5
    for of_rank in reports:
        assert of_rank[name]["loss"] == pytest.approx(report.loss, rel=1e-5)
        assert of_rank[name]["evaluation"] == pytest.approx(report.evaluation, rel=1e-5)
        for number, value in report.health.items():
            if number == "sigma_over_rms":  # a shard's median is not its matrix'
                continue
            assert of_rank[name]["health"][number] == pytest.approx(value, rel=0.1), number
    assert "shard: true" in (folder / f"{name}-two" / "finetune.yaml").read_text()
    configs = [(folder / f"{name}-{n}" / "config.json") for n in ("one", "two")]
    if configs[0].exists():
        assert configs[0].read_text() == configs[1].read_text()


@slow
def test_the_best_checkpoint_of_shards_is_stored_with_its_posterior(others):
    folder, _ = others
    info, kept = info_of(folder / "best-two"), folder / "best-fourth.checkpoints" / "checkpoint-4"
    assert info.training["steps"] == 4
    rows = [
        safetensors.numpy.load_file(kept / f"weights-rank-{r}-of-2.safetensors") for r in range(2)
    ]
    weights = tiny.read(folder / "best-two")
    for name, value in weights.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in rows]), value, name)


@slow
def test_large_models_are_stored_in_several_files(others):
    folder, _ = others
    several = folder / "experts-two"
    files = sorted(path.name for path in several.glob("model*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    assert set(tiny.read(several)) == set(tiny.read(folder / "experts"))
    transformers.AutoModelForCausalLM.from_pretrained(several)


@pytest.mark.parametrize("at", ["fourth", "last"])
@pytest.mark.parametrize("name", names(RESUMED))
def test_shards_resume_to_the_same_bytes(two, name, at):
    folder, _ = two
    whole, again = folder / f"{name}-two", folder / f"{name}-{at}"
    files = [file for file in FILES if (whole / file).exists()]
    assert len(files) == 2
    for file in files:
        assert (again / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("name", ["ggn", pytest.param("bfloat16", marks=slow)])
def test_no_two_whole_tensors_are_alive_at_once(two, name):
    """Neither while the model and its posterior are stored nor for a checkpoint."""
    _, reports = two
    for of_rank in reports:
        assert len(of_rank[f"{name} alive"]) > 4
        assert max(of_rank[f"{name} alive"]) == 0
        files = of_rank[f"{name} files"]
        for kind in ("weights", "optimizer"):
            assert [f"{kind}-rank-{r}-of-2.safetensors" for r in range(2)] == [
                file for file in files if file.startswith(kind)
            ]
        assert not {"model.safetensors", "optimizer.pt"} & set(files)


def test_the_flush_squares_the_batches_of_both_processes_together(fast, monkeypatch):
    folder, _ = fast
    one_process = {"shard": False, "num_processes": None, **RESUMED["ggn"]}
    config = settings(folder, "flush", **one_process, model="ggn-two")
    run = load_run(config, 1)
    square_two_batches_together(monkeypatch)
    expected = final_curvature(run)
    precision = tiny.read(folder / "ggn-two" / "posterior" / "precision.posterior")
    assert set(precision) == set(expected)
    info = info_of(folder / "ggn-two")
    assert (info.estimator, info.ess, info.observations) == ("ggn", run.observations, 175)
    for name, curvature in expected.items():
        value = info.ess * (curvature.numpy() + config.weight_decay)
        np.testing.assert_allclose(precision[name], value, rtol=2e-4, err_msg=name)


def test_what_shards_have_stored_is_merged_by_precision(fast, tmp_path):
    folder, _ = fast
    models = [folder / "price-two", tmp_path / "again"]
    shutil.copytree(*models)
    names = tuple(map(str, models))
    run_merge(MergeConfig(models=names, weights="precision", out=str(tmp_path / "merged")))
    merged, one = stored(tmp_path / "merged"), stored(models[0])
    assert set(one) == set(merged)
    for name, value in one.items():
        # The merge of a model with itself; its precision is for another ess.
        scale = merged[name].sum() / value.sum() if "precision" in name else 1
        np.testing.assert_allclose(merged[name], scale * value, rtol=1e-3, err_msg=name)


@slow
def test_all_processes_tell_what_the_first_one_could_not_write(others):
    folder, reports = others
    assert all("the disk is full" in of_rank["full disk"] for of_rank in reports)
    assert not (folder / "full").exists()
    assert (folder / "full.checkpoints" / "checkpoint-5").exists()


@slow
def test_a_killed_run_goes_on_to_the_same_bytes(fast):
    folder, _ = fast
    for function, status in ((killed, 128 + signal.SIGKILL), (after, 0)):
        code = (
            f"from pathlib import Path; from tests.test_finetune_shards import {function.__name__}"
            f" as run; run(Path({str(folder)!r}))"
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
            assert launcher.launch([sys.executable, "-c", code], 2) == status
        left = sorted(p.name for p in folder.glob("killed.checkpoints/checkpoint-*"))
        assert left == (["checkpoint-2", "checkpoint-4"] if function is killed else [])
    for file in (FILES[0], FILES[2]):
        assert (folder / "killed" / file).read_bytes() == (
            folder / "ggn-two" / file
        ).read_bytes(), file


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("way", ["bmerge", "accelerate"])
def test_shards_train_on_two_gpus(tmp_path, way):
    import subprocess

    texts(tmp_path / "t.jsonl", rows=24)
    tiny_gpt2(tmp_path / "base", layers=1)
    (tmp_path / "f.yaml").write_text(
        f"model: {tmp_path / 'base'}\ndata: {tmp_path / 't.jsonl'}\noutput: {tmp_path / 'out'}\n"
        "max_steps: 3\nsave_steps: 2\nbatch_size: 2\nflush_batches: 2\nbf16: true\n"
    )
    module = ["-m", "bmerge_cli.main", "finetune", str(tmp_path / "f.yaml"), "--json"]
    line = {
        "bmerge": [sys.executable, *module, "--num-processes", "2", "--shard"],
        "accelerate": [
            *("accelerate", "launch", "--use_fsdp", "--fsdp_version", "2"),
            *("--num_processes", "2", *module),
        ],
    }[way]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 3
    tensors = stored(tmp_path / "out")
    assert all(np.isfinite(value).all() for value in tensors.values())
    assert "shard: true" in (tmp_path / "out" / "finetune.yaml").read_text()
