"""What a fine-tune on shards refuses: where, with what, and files that are not its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekit_bayes.finetune.fsdp as fsdp
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.curvature.health import glance, glanced_health, precision_health
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.fsdp import as_launched, refuse_coded, without_plugin
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.finetune.shard_files import load_optimizer, load_weights, save_shards
from mergekit_bayes.models import places
from mergekit_bayes.models.load import Loaded
from mergekit_bayes.optim import IVON
from tests.two_ranks import ROOT

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def config(**changes):
    return FinetuneConfig(model="no/such-model", data="none.jsonl", output="out", **changes)


@pytest.mark.parametrize(
    ("gpus", "environment", "changes", "match"),
    [
        (False, {"WORLD_SIZE": "2"}, {"shard": True}, "^shard: this machine has no GPU"),
        (False, {"WORLD_SIZE": "2", **FSDP2}, {}, "^shard: this machine has no GPU"),
        (True, {}, {"shard": True}, "^shard: there is one process.*--num-processes N"),
        (True, {"WORLD_SIZE": "2"}, {"shard": True, "rank_noise": True}, "^rank_noise: .*sample"),
        (
            True,
            {"WORLD_SIZE": "2"},
            {"shard": True, "torch_compile": True},
            "^torch_compile: a sharded model is not compiled",
        ),
        (
            True,
            {"WORLD_SIZE": "2", **FSDP2, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            {},
            "Leave torch_compile .*dynamo_backend",
        ),
        (
            True,
            {"WORLD_SIZE": "2", **FSDP2, "FSDP_OFFLOAD_PARAMS": "true"},
            {},
            "asks for --fsdp_offload_params",
        ),
        (
            True,
            {"WORLD_SIZE": "2", **FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "asks for --fsdp_activation_checkpointing",
        ),
        (
            True,
            {"WORLD_SIZE": "2", **FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            {},
            "asks for a parallelism config",
        ),
        (True, {"ACCELERATE_USE_FSDP": "true"}, {"shard": True}, "^FSDP1 .*--fsdp_version 2"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_loaded(
    gpus, environment, changes, match, monkeypatch
):
    monkeypatch.setattr(fsdp, "has_devices", lambda: gpus)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=match):
        run_finetune(config(**changes), quiet=True)


def test_a_launcher_that_asks_for_fsdp2_asks_for_shards(monkeypatch):
    assert not as_launched(config()).shard
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert as_launched(config()).shard
    with without_plugin():
        assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_quantised_weights_are_not_sharded():
    model = torch.nn.Linear(2, 2)
    refuse_coded(Loaded(model, None, "causal-lm", Path("m")), "m")
    model.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'m' is quantised \('weight' is uint8\)"):
        refuse_coded(Loaded(model, None, "causal-lm", Path("m")), "m")


def test_a_tensor_that_is_stored_with_others_is_refused(monkeypatch):
    def joined(model, tensors):
        return {"ab": torch.cat(list(tensors.values()))} if tensors else {}

    monkeypatch.setattr(places, "checkpoint_names", joined)
    with pytest.raises(MismatchError, match="'ab' is one tensor of the model's file"):
        places.stored_places(None, {"a": torch.ones(2), "b": torch.ones(3)})


def trained():
    """A small model, its optimizer after a step, and the files of their only rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = IVON(model.parameters(), lr=0.1, ess=10.0)
    with optimizer.sampled_params(train=True):
        model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def test_files_of_shards_hold_all_that_training_changes(tmp_path):
    model, optimizer = trained()
    files = tmp_path / "new" / "w.safetensors", tmp_path / "new" / "o.safetensors"
    save_shards(model, optimizer, *files)
    save_shards(model, optimizer, *files)  # again, after a checkpoint that was torn
    torch.manual_seed(1)
    other = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    again = IVON(other.parameters(), lr=0.5, ess=20.0)
    load_weights(other, files[0])
    load_optimizer(other, again, files[1])
    for (name, ours), theirs in zip(
        model.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert set(optimizer.state[p]) == set(again.state[q])
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, again.state[q][name]), name
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert group.items() <= again.param_groups[0].items()


def write(file, specs, metadata=None):
    with SafetensorsSink(file, {n: TensorSpec(*s) for n, s in specs.items()}, metadata or {}):
        pass


WEIGHTS = {
    "0.weight": ("F32", (2, 3)),
    "0.bias": ("F32", (2,)),
    "1.weight": ("F32", (2,)),
    "1.bias": ("F32", (2,)),
    "1.running_mean": ("F32", (2,)),
    "1.running_var": ("F32", (2,)),
    "1.num_batches_tracked": ("I64", ()),
}
GROUP = {"param_groups": json.dumps([{"lr": 0.1, "ess": 1.0, "mc_samples": 1}])}


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        ({**WEIGHTS, "0.weight": ("F32", (1, 3))}, r"rows of '0.weight' are \[1, 3\].*\[2, 3\]"),
        ({**WEIGHTS, "2.weight": ("F32", (2,))}, "holds '2.weight', which is not trained"),
        ({n: s for n, s in WEIGHTS.items() if n != "0.bias"}, "does not hold '0.bias'"),
        (None, "Remove this checkpoint|cannot be opened|bytes are too few"),
    ],
)
def test_weights_that_are_not_this_ranks_are_refused_by_name(tmp_path, specs, match):
    model, _ = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = tmp_path / "w.safetensors"
    if specs is None:
        file.write_bytes(b"x")
    else:
        write(file, specs)
    with pytest.raises(CheckpointError, match=match):
        load_weights(model, file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("specs", "metadata", "match"),
    [
        ({}, {}, "does not hold the optimizer's settings"),
        ({}, {"param_groups": "[1]"}, "does not hold the optimizer's settings"),
        ({}, {"param_groups": "[{}, {}]"}, "does not hold the optimizer's settings"),
        ({}, {"param_groups": "{"}, "does not hold the optimizer's settings"),
        ({"0.weight hess": ("F32", (3, 2))}, GROUP, r"'0.weight hess' are \[3, 2\].*\[2, 3\]"),
        ({"9.weight hess": ("F32", (2,))}, GROUP, "'9.weight hess', which is not trained"),
    ],
)
def test_a_state_that_is_not_this_ranks_is_refused_by_name(tmp_path, specs, metadata, match):
    model, optimizer = trained()
    file = tmp_path / "o.safetensors"
    write(file, specs, metadata)
    with pytest.raises(CheckpointError, match=match):
        load_optimizer(model, optimizer, file)


def test_health_of_rows_is_that_of_the_whole():
    whole = {"a": torch.rand(7, 3) + 0.1, "b": torch.tensor([2.0]), "c": torch.tensor([1.0, -1.0])}
    halves = [[t[:4] for t in whole.values()], [t[4:] for t in whole.values()]]  # some are empty
    assert glanced_health([glance(half, 2) for half in halves]) == precision_health(whole)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices to shard over")
def test_the_command_says_once_that_there_is_no_gpu(tmp_path):
    (tmp_path / "f.yaml").write_text("model: m\ndata: d.jsonl\noutput: o\n")
    line = [sys.executable, "-m", "bmerge_cli.main", "finetune", str(tmp_path / "f.yaml")]
    line += ["--num-processes", "2", "--shard"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("no GPU to shard over") == 1, done.stderr
