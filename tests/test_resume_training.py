"""A run that was killed and resumed ends in the same bytes as one that was not."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError

import mergekit_bayes.finetune.checkpoints as checkpoints
import mergekit_bayes.finetune.refusals as refusals
import mergekit_bayes.finetune.store as store
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.checkpoints import holding
from mergekit_bayes.finetune.refusals import refuse_accelerator, refuse_launcher, refuse_quantised
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.optim import IVON
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2

LEFT = ("model.safetensors", "posterior/precision.posterior")


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS[:10], rng.integers(3, 8))), "label": int(i % 2)}
        for i in range(22)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(tmp_path / "t.jsonl")


def settings(tmp_path, data, name="out", **changes):
    """Eight steps of two micro-batches with ragged epochs of four; a checkpoint every third."""
    if "model" not in changes:
        changes["model"] = str(tmp_path / "base")
        if not (tmp_path / "base").exists():
            tiny_gpt2(tmp_path / "base")
    return FinetuneConfig(
        **{
            "output": str(tmp_path / name),
            "data": data,
            "batch_size": 3,
            "gradient_accumulation": 2,
            "max_steps": 7,
            "save_steps": 3,
            "keep_checkpoints": True,
            "flush_batches": 4,
            "seed": 3,
            "ess": 1e5,
            "logging_steps": 2,
            **changes,
        }
    )


# A clean process to fork from: it has loaded the libraries and started no thread.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["mergekit_bayes.finetune", "transformers.trainer", "datasets", "peft", __name__]
)


def killed(config, point):
    """Run a fine-tune in a child, which must die by SIGKILL at a point of POINTS."""
    child = CHILDREN.Process(target=run_until, args=(config, point))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL, point


def run_until(config, point):
    POINTS[point]()
    run_finetune(config, quiet=True)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_a_step(step):
    """Die with perturbed weights, between two micro-batches of a step."""
    original, calls = transformers.Trainer.training_step, [0]

    def training_step(self, *args, **kwargs):
        calls[0] += self.state.global_step == step - 1
        if calls[0] == 2:
            die()
        return original(self, *args, **kwargs)

    transformers.Trainer.training_step = training_step


def die_writing(name, at):
    """Die when half of the `at`-th optimizer.pt (or rng_state.pth, ...) is written."""
    original, calls = torch.save, [0]

    def half(value, file, *args, **kwargs):
        original(value, file, *args, **kwargs)
        if name in str(file):
            calls[0] += 1
            if calls[0] == at:
                os.truncate(file, os.path.getsize(file) // 2)
                die()

    torch.save = half


def die_marking(at):
    """Die when all files of the `at`-th checkpoint are there and its marker is not."""
    original, calls = checkpoints.sync_path, [0]

    def sync(path):
        original(path)
        if path.name.startswith(checkpoints.MARKER):
            calls[0] += 1
            if calls[0] == at:
                die()

    checkpoints.sync_path = sync


POINTS = {
    "before any checkpoint": lambda: die_in_a_step(2),
    "in the middle of a step": lambda: die_in_a_step(6),
    "in the middle of a checkpoint": lambda: die_writing("optimizer.pt", 2),
    "before a checkpoint's marker": lambda: die_marking(2),
    "after the last step": lambda: setattr(store, "final_curvature", die),
}


@pytest.mark.parametrize("optimizer", ["ivon", "adamw"])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, data, optimizer):
    """Parameters and the flush here; Hessian and momentum below."""
    expected = run_finetune(settings(tmp_path, data, "whole", optimizer=optimizer), quiet=True)
    points = list(POINTS) if optimizer == "ivon" else ["in the middle of a checkpoint"]
    for i, point in enumerate(points):
        config = settings(tmp_path, data, f"out{i}", optimizer=optimizer, resume=True)
        killed(config, point)
        assert not (tmp_path / f"out{i}").exists(), point
        report = run_finetune(config, quiet=True)
        for file in LEFT:
            assert (tmp_path / f"out{i}" / file).read_bytes() == (
                tmp_path / "whole" / file
            ).read_bytes(), point
        assert report.steps == expected.steps
        assert report.loss == pytest.approx(expected.loss, rel=1e-5), point
        assert report.health == expected.health


def test_hessian_and_momentum_continue_to_the_same_bits(tmp_path, data):
    states = {}
    for name in ("a", "b"):
        config = settings(tmp_path, data, name, posterior="ivon", mc_samples=2, resume=True)
        if name == "b":
            killed(config, "in the middle of a step")
        run_finetune(config, quiet=True)
        last = tmp_path / f"{name}.checkpoints" / "checkpoint-7"
        states[name] = torch.load(last / "optimizer.pt", weights_only=True)
    assert states["a"]["param_groups"] == states["b"]["param_groups"]
    for state, other in zip(
        states["a"]["state"].values(), states["b"]["state"].values(), strict=True
    ):
        for key in ("momentum", "hess", "step"):
            assert torch.equal(state[key], other[key])
    precision = "posterior/precision.posterior"
    assert (tmp_path / "a" / precision).read_bytes() == (tmp_path / "b" / precision).read_bytes()


@pytest.mark.parametrize("task", ["adapter", "classifier"])
def test_adapters_and_classifiers_with_dropout_resume_to_the_same_bytes(tmp_path, data, task):
    model = str((tiny_gpt2 if task == "adapter" else tiny_bert)(tmp_path / "m"))
    lora = {"r": 2, "dropout": 0.2, "target_modules": ["c_attn" if task == "adapter" else "query"]}
    for name in ("a", "b"):
        config = settings(
            tmp_path, data, name, model=model, lora=lora, posterior="ivon", resume=True
        )
        if name == "b":
            killed(config, "in the middle of a step")
        run_finetune(config, quiet=True)
    for file in ("adapter_model.safetensors", "posterior/precision.posterior"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_torn_checkpoint_is_skipped_with_a_note(tmp_path, data, caplog):
    run_finetune(settings(tmp_path, data), quiet=True)
    for name in ("checkpoint-6", "checkpoint-7"):
        file = tmp_path / "out.checkpoints" / name / "optimizer.pt"
        os.truncate(file, file.stat().st_size - 1)
    checkpoint = checkpoints.open_checkpoints(
        tmp_path / "out.checkpoints", resume=True, force=False
    )
    assert checkpoint.step == 3
    assert "checkpoint-7' is torn (optimizer.pt should hold" in caplog.text
    # Its marker must not vouch for files that the resumed run has only begun to write again.
    assert not (tmp_path / "out.checkpoints" / "checkpoint-6" / checkpoints.MARKER).exists()


def test_a_checkpoint_with_other_bytes_or_a_pipe_is_one_message(tmp_path, data):
    run_finetune(settings(tmp_path, data, posterior="none"), quiet=True)
    shutil.rmtree(tmp_path / "out")
    whole = tmp_path / "out.checkpoints" / "checkpoint-7"
    resumed = settings(tmp_path, data, posterior="none", resume=True)
    for last, names in (
        ("checkpoint-7", ("config.json", "optimizer.pt")),
        ("checkpoint-6", ("trainer_state.json", "optimizer.pt", "model.safetensors")),
    ):
        for name in names:
            file = whole.with_name(last) / name
            content = file.read_bytes()
            file.write_bytes(b"\xff" * len(content))
            with pytest.raises(CheckpointError, match=rf"{last}.* cannot be (loaded|read) \("):
                run_finetune(resumed, quiet=True)
            file.write_bytes(content)
        shutil.rmtree(whole, ignore_errors=True)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is neither a file nor a folder"):
        run_finetune(resumed, quiet=True)


def test_other_settings_than_the_checkpoints_are_refused_by_name(tmp_path, data):
    run_finetune(settings(tmp_path, data, posterior="none"), quiet=True)
    shutil.rmtree(tmp_path / "out")
    for changes, name in (
        (
            {"learning_rate": 2e-4},
            "learning_rate is 0.0001 there and 0.0002 here; lr is 0.1 there and 0.2 here",
        ),
        ({"max_steps": 8}, "max_steps is 7 there and 8 here"),
        ({"max_rows": 20}, "data holds something else"),
        ({"model": str(tiny_gpt2(tmp_path / "other", seed=5))}, "model holds something else"),
    ):
        with pytest.raises(ConfigError, match=name):
            run_finetune(settings(tmp_path, data, resume=True, **changes), quiet=True)
    # The same weights elsewhere are the same model.
    shutil.move(tmp_path / "base", tmp_path / "moved")
    run_finetune(settings(tmp_path, data, resume=True, model=str(tmp_path / "moved")), quiet=True)


def test_checkpoints_of_an_earlier_run_are_neither_taken_nor_lost_unasked(tmp_path, data):
    run_finetune(settings(tmp_path, data, posterior="none"), quiet=True)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"last is checkpoint-7\). Continue it with --resume"):
        run_finetune(settings(tmp_path, data, seed=4), quiet=True)
    run_finetune(settings(tmp_path, data, seed=4, save_steps=5, force=True), quiet=True)
    left = {p.name for p in (tmp_path / "out.checkpoints").glob("checkpoint-*")}
    assert left == {"checkpoint-5", "checkpoint-7"}


def test_a_flush_after_the_last_step_computes_as_one_after_training(tmp_path, data):
    """In bfloat16 where that is what training computed in."""
    changes = {"bf16": True, "max_steps": 3}
    run_finetune(settings(tmp_path, data, **changes), quiet=True)
    whole = [(tmp_path / "out" / file).read_bytes() for file in LEFT]
    again = settings(tmp_path, data, resume=True, force=True, **changes)
    run_finetune(again, quiet=True)
    assert [(tmp_path / "out" / file).read_bytes() for file in LEFT] == whole


def test_resuming_without_checkpoints_is_refused(tmp_path, data):
    with pytest.raises(ConfigError, match="only with save_steps"):
        run_finetune(settings(tmp_path, data, save_steps=None, resume=True), quiet=True)


class Accelerator:
    scaler, distributed_type, is_fsdp2 = None, "NO", False

    def __init__(self, **changes):
        self.__dict__.update(changes)


def test_what_ivon_cannot_do_is_refused_wherever_it_was_switched_on(tmp_path, data, monkeypatch):
    config = settings(tmp_path, data)
    for environment, match in (
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "Use bf16"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "^DeepSpeed is switched on"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "shard: true.*--num-processes"),
        ({"ACCELERATE_USE_FSDP": "true"}, "^FSDP1 .*--fsdp_version 2"),
        # Of a command that trains replicas only; bmerge finetune takes it as its own setting.
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "^FSDP2 .*trains replicas"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_launcher(config, environment)
    for accelerator, match in (
        (Accelerator(scaler=object()), "gradient scaler"),
        (Accelerator(distributed_type="DEEPSPEED"), "DeepSpeed"),
        (Accelerator(distributed_type="FSDP"), "FSDP1"),
        (Accelerator(distributed_type="FSDP", is_fsdp2=True), "FSDP2"),
    ):
        with pytest.raises(ConfigError, match=match):
            refuse_accelerator(accelerator, ivon=True)
    # AdamW lives with the scaler; replicas and bf16 are fine for both.
    refuse_accelerator(Accelerator(scaler=object()), ivon=False)
    refuse_accelerator(Accelerator(distributed_type="MULTI_GPU"), ivon=True)
    refuse_launcher(config, {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"})
    # And it is asked before anything is loaded.
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="DeepSpeed"):
        run_finetune(settings(tmp_path, data, model="no/such-model"))


def test_quantised_weights_are_not_trained_but_an_adapter_on_them_is():
    model = torch.nn.Linear(2, 2)
    refuse_quantised(model, "m")
    model.is_quantized = True
    with pytest.raises(ConfigError, match=r"'m' is quantised.*lora"):
        refuse_quantised(model, "m")
    model.weight = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"'weight' is int8.*lora"):
        refuse_quantised(model, "m")
    model.peft_config = {}
    refuse_quantised(model, "m")
    model.is_quantized = False
    del model.peft_config
    model.weight = torch.nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn))
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        refuse_quantised(model, "m")


def test_the_accelerators_scaler_is_seen_before_training(tmp_path, data, monkeypatch):
    monkeypatch.setattr(refusals, "refuse_launcher", lambda config: None)
    monkeypatch.setattr("accelerate.Accelerator.scaler", object(), raising=False)
    monkeypatch.setattr(IVON, "step", die)
    original = transformers.Trainer.__init__

    def switched_on(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.accelerator.scaler = object()

    monkeypatch.setattr(transformers.Trainer, "__init__", switched_on)
    with pytest.raises(ConfigError, match="Use bf16"):
        run_finetune(settings(tmp_path, data), quiet=True)


@pytest.mark.parametrize("save_steps", [None, 1])
def test_a_disk_that_is_full_is_said(tmp_path, data, monkeypatch, save_steps):
    """safetensors raises an error of its own for it, which is no OSError."""
    config = settings(tmp_path, data, max_steps=1, save_steps=save_steps, keep_checkpoints=False)

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"out.*: writing.* failed \(.*No space left"):
        run_finetune(config, quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_second_run_leaves_the_checkpoints_of_the_first_one_alone(tmp_path, data):
    config = settings(tmp_path, data, posterior="none", force=True, keep_checkpoints=False)
    folder = tmp_path / "out.checkpoints"
    folder.mkdir()
    with holding(folder):
        (folder / "checkpoint-1").mkdir()
        with pytest.raises(CheckpointError, match="another run writes its checkpoints there"):
            run_finetune(config, quiet=True)
        assert (folder / "checkpoint-1").is_dir()
    assert run_finetune(config, quiet=True).steps
    assert not folder.exists()
