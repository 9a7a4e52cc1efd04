"""Two processes train what one trains, bit for bit alike, and fail alike."""

import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mergekit_bayes.finetune.run as module
from mergekit_bayes import launcher, ranks
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.posterior import open_posterior
from tests import tiny
from tests.finetuning import Look
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2

ROOT = Path(__file__).parent.parent
PLAIN = {
    "seed": 3,
    "ess": 1e5,
    "max_steps": 5,
    "flush_batches": 4,
    "mc_samples": 2,
    "weight_decay": 1e-4,
    "curvature": "price",
}
TASKS = ("causal-lm", "classification")
# Root-GGN draws its signs by rank, so that two ranks are no one process; else it is trained as the
# others are.
RUNS = {
    **{task: (task, {}) for task in TASKS},
    "ggn": ("causal-lm", {"curvature": "ggn", "curvature_every": 2}),
}


def settings(folder, task, name, **changes):
    return FinetuneConfig(
        **{
            "model": str(folder / task),
            "data": str(folder / "t.jsonl"),
            "output": str(folder / f"{task}-{name}"),
            **PLAIN,
            **changes,
        }
    )


def watched(config):
    """Fine-tune; return the report, the first step's gradient, and all parameters and states at the
    end.
    """
    make, look, kept = module.make_trainer, Look(), []

    def watch(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.add_callback(look)
        kept.append(trainer)
        original = look.on_step_end
        look.on_step_end = lambda *a, **k: None if hasattr(look, "gradient") else original(*a, **k)
        return trainer

    module.make_trainer = watch
    try:
        report = run_finetune(config, quiet=True)
    finally:
        module.make_trainer = make
    trainer = kept[0]
    tensors = [p.detach() for p in trainer.model.parameters()]
    tensors += [s[k] for s in trainer.optimizer.state.values() for k in ("momentum", "hess")]
    return report, look.gradient, torch.cat([t.flatten() for t in tensors])


def child(folder):
    """What each of two ranks does; rank 0 writes what the tests read."""
    results = {}
    for run, (task, changes) in RUNS.items():
        # Rows of unequal length, so padded, two micro-batches a step and rank.
        config = settings(
            folder,
            task,
            "two",
            batch_size=2,
            gradient_accumulation=2,
            posterior="ivon",
            num_processes=2,
            save_steps=2,
            keep_checkpoints=True,
            output=str(folder / f"{run}-two"),
            **changes,
        )
        report, gradient, final = watched(config)
        others = [torch.empty_like(final) for _ in range(ranks.world())]
        torch.distributed.all_gather(others, final)
        results[run] = {
            "report": report.model_dump(mode="json"),
            "world": ranks.world(),
            "replicas equal": torch.equal(*others),
        }
        if ranks.is_main():
            np.save(folder / f"{run}.npy", gradient)
            kept = folder / f"{run}-two.checkpoints"
            shutil.rmtree(kept / "checkpoint-5")
            kept.rename(folder / f"{run}-resumed.checkpoints")
        torch.distributed.barrier()
        run_finetune(
            config.model_copy(update={"output": str(folder / f"{run}-resumed"), "resume": True}),
            quiet=True,
        )
    results["errors"] = []
    for work in (fail_on(1), fail_on(0)):
        for together in (ranks.main_first, ranks.on_main):
            try:
                results["errors"].append(together(work))
            except BmergeError as error:
                results["errors"].append(f"{type(error).__name__}: {error}")
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, results["errors"])
    results["errors equal"] = everywhere[0] == everywhere[1]
    if ranks.is_main():
        (folder / "results.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


def fail_on(rank):
    def work():
        if int(os.environ["RANK"]) == rank:
            raise CheckpointError(f"rank {rank} has no disk")
        return "fine"

    return work


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two gloo processes have trained, and what they found."""
    folder = tmp_path_factory.mktemp("two")
    rng = np.random.default_rng(0)
    rows = [
        {"text": " ".join(rng.choice(WORDS[:10], rng.integers(3, 9))), "label": int(i % 2)}
        for i in range(24)
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tiny_gpt2(folder / "causal-lm")
    tiny_bert(folder / "classification")
    code = (
        "from pathlib import Path; from tests.test_ranks import child; "
        f"child(Path({str(folder)!r}))"
    )
    assert launcher.launch([sys.executable, "-c", code], 2) == 0
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("run", RUNS)
def test_replicas_end_equal_bit_for_bit(two, run):
    _, results = two
    assert results[run]["world"] == 2
    assert results[run]["replicas equal"]


@pytest.mark.parametrize("task", TASKS)
def test_two_ranks_equal_one_process_with_the_same_global_batch(two, task):
    """The loss is the mean over the observations of the whole step: micro-batches, padding and
    ranks.
    """
    folder, results = two
    config = settings(folder, task, "one", batch_size=8, posterior="ivon")
    report, gradient, _ = watched(config)
    from_two = np.load(folder / f"{task}.npy")
    np.testing.assert_allclose(from_two, gradient, rtol=1e-3, atol=2e-6 * abs(gradient).max())
    one, both = tiny.read(folder / f"{task}-one"), tiny.read(folder / f"{task}-two")
    base = tiny.read(folder / task)
    for name in one:
        moved = abs(one[name] - base[name]).max()
        np.testing.assert_allclose(both[name], one[name], atol=max(1e-6, 0.02 * moved))
    infos = []
    for name in ("one", "two"):
        with open_posterior(str(folder / f"{task}-{name}")) as posterior:
            infos.append(posterior.info)
    unit = "token" if task == "causal-lm" else "example"
    assert {i.unit for i in infos} == {unit}
    assert infos[0].observations == infos[1].observations == report.observations
    assert infos[0].training["loss_reduction"] == f"mean over {unit}s of a step"
    for name in ("steps", "batch_size", "beta2", "ess", "lr"):
        assert infos[0].training[name] == infos[1].training[name], name
    per_step = infos[0].observations / 3  # 24 rows are three steps
    assert infos[0].training["batch_size"] == pytest.approx(per_step)
    assert infos[0].health["kappa"] == infos[1].health["kappa"]
    assert report.loss == pytest.approx(results[task]["report"]["loss"], rel=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_resume_to_the_same_bytes(two, run):
    folder, _ = two
    for file in ("model.safetensors", "posterior/precision.posterior"):
        assert (folder / f"{run}-resumed" / file).read_bytes() == (
            folder / f"{run}-two" / file
        ).read_bytes()


def test_a_checkpoint_of_two_ranks_is_not_resumed_by_one(two):
    folder, _ = two
    shutil.copytree(
        folder / "causal-lm-resumed.checkpoints", folder / "causal-lm-alone.checkpoints"
    )
    config = settings(
        folder,
        "causal-lm",
        "alone",
        batch_size=2,
        gradient_accumulation=2,
        posterior="ivon",
        save_steps=2,
        resume=True,
    )
    with pytest.raises(ConfigError, match="processes is 2 there and 1 here"):
        run_finetune(config, quiet=True)


def test_an_error_of_one_rank_is_the_same_error_on_all(two):
    _, results = two
    one, zero = "CheckpointError: rank 1 has no disk", "CheckpointError: rank 0 has no disk"
    assert results["errors"] == [one, "fine", zero, zero]  # rank 0's work alone does not ask rank 1
    assert results["errors equal"]


def test_the_command_starts_two_processes_of_which_one_prints(tmp_path, two):
    folder, _ = two
    (tmp_path / "f.yaml").write_text(
        f"model: {folder / 'causal-lm'}\ndata: {folder / 't.jsonl'}\nmax_steps: 1\n"
        f"output: {tmp_path / 'out'}\nposterior: none\n"
    )
    line = [
        sys.executable,
        "-m",
        "bmerge_cli.main",
        "finetune",
        str(tmp_path / "f.yaml"),
        "--num-processes",
        "2",
    ]
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 1
    assert done.stderr.count("mean training loss") == 1
    assert "num_processes: 2" in (tmp_path / "out" / "finetune.yaml").read_text()
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("exists. Choose another output") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_fewer_processes_than_asked_for_are_refused(two, tmp_path):
    folder, _ = two
    with pytest.raises(ConfigError, match="2 were asked for and 1 run"):
        run_finetune(settings(folder, "causal-lm", "few", num_processes=2), quiet=True)


def test_a_failing_process_stops_the_others():
    script = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    begun = time.monotonic()
    assert launcher.launch([sys.executable, "-c", script], 2) == 7
    assert time.monotonic() - begun < 30


def test_the_processes_get_what_torchrun_would_set(tmp_path):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_USE_CPU")
    script = (
        "import os, json; e = os.environ; "
        f"json.dump({{k: e.get(k) for k in {names}}}, open(e['RANK'], 'w'))"
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert launcher.launch([sys.executable, "-c", script], 2) == 0
    finally:
        os.chdir(before)
    results = [json.loads((tmp_path / str(r)).read_text()) for r in range(2)]
    assert [f["RANK"] for f in results] == [f["LOCAL_RANK"] for f in results] == ["0", "1"]
    assert {f["WORLD_SIZE"] for f in results} == {"2"}
    assert len({f["MASTER_PORT"] for f in results}) == 1
    if not torch.cuda.is_available():
        assert results[0]["ACCELERATE_USE_CPU"] == "true"


def test_no_other_process_can_take_the_port_before_the_ranks_meet():
    """A port that is only found free may be another's when rank 0 opens it."""
    script = (
        "import errno, os, socket, sys\n"
        "try: socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT'])))\n"
        "except OSError as error: sys.exit(0 if error.errno == errno.EADDRINUSE else 1)\n"
        "sys.exit(1)"
    )
    assert launcher.launch([sys.executable, "-c", script], 2) == 0


@pytest.mark.skipif(
    sys.platform != "linux", reason="a parent's death is told to its children on Linux only"
)
def test_a_killed_command_leaves_no_process_behind(tmp_path):
    child = (
        "import os, pathlib, time; pathlib.Path('pid' + "
        "os.environ['RANK']).write_text(str(os.getpid())); "
        "time.sleep(60)"
    )
    parent = (
        "import sys; from mergekit_bayes import launcher; "
        f"launcher.launch([sys.executable, '-c', {child!r}], 2)"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    files = [tmp_path / f"pid{rank}" for rank in range(2)]
    wait_for(lambda: all(f.exists() and f.read_text() for f in files))
    command.kill()
    command.wait()
    wait_for(lambda: not any(Path(f"/proc/{f.read_text()}").exists() for f in files))


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_without_a_launcher_one_gpu_is_used_and_the_others_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launcher.idle_gpus() == 3
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launcher.idle_gpus() == 0
    with pytest.raises(ConfigError, match="this machine has 4 GPUs"):
        launcher.launch(["true"], 5)


@pytest.mark.parametrize(
    ("device", "there", "gpus", "expected"),
    [
        ("cpu", None, 0, None),
        ("cpu", None, 2, ""),
        ("cuda:0", None, 2, None),
        ("cuda:1", None, 2, "1"),
        ("cuda:1", "3, GPU-5", 2, "GPU-5"),
        ("mps", None, 0, None),
    ],
)
def test_what_trains_sees_the_device_that_it_is_to_take(monkeypatch, device, there, gpus, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if there is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    called = []
    monkeypatch.setattr(launcher, "_elsewhere", lambda call, seen: called.append(seen) or call())
    assert launcher.on_device(torch.device(device), int, "3") == 3
    assert called == ([] if expected is None else [expected])
    called.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher.on_device(torch.device(device), int, "3") == 3
    assert called == [expected]


@pytest.mark.slow
def test_what_runs_apart_sees_its_gpus_only_and_tells_how_it_ended(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher._elsewhere(partial(os.getenv, "CUDA_VISIBLE_DEVICES"), "GPU-5") == "GPU-5"
    assert launcher.apart(os.getenv, "WORLD_SIZE") is None
    with pytest.raises(ConfigError, match="ended without a message"):
        launcher.apart(os._exit, 9)
