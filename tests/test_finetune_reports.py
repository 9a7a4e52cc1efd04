"""Logs, checkpoints and reports go where they are asked to go, also from several processes."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import transformers

from mergekit_bayes.checkpoint.side_files import side_files
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests import finetuning
from tests.finetuning import config, info_of
from tests.tiny_models import tiny_gpt2

data = finetuning.data


@pytest.mark.parametrize("quiet", [True, False])
def test_training_prints_nothing_on_stdout(tmp_path, data, quiet, capfd):
    run_finetune(config(tmp_path, data, logging_steps=1, max_steps=2), quiet=quiet)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_stay_beside_a_finished_model_only_if_asked(tmp_path, data, keep):
    settings = config(tmp_path, data, save_steps=6, posterior="none", keep_checkpoints=keep)
    run_finetune(settings, quiet=True)
    left = {p.name for p in tmp_path.iterdir() if p.name.startswith("out")}
    assert left == ({"out", "out.checkpoints"} if keep else {"out"})
    if keep:
        assert (tmp_path / "out.checkpoints" / "checkpoint-6" / "optimizer.pt").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("checkpoint")]


class Writer:
    """Stands for TensorBoard's, which is not installed here: one file of events a start."""

    starts = 0

    def __init__(self, log_dir):
        Writer.starts += 1
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._path, self._lines = Path(log_dir, f"events.out.tfevents.{Writer.starts}"), []
        self.flush()

    def add_scalar(self, name, value, step):
        self._lines.append(f"{step} {name} {value}\n")

    def add_text(self, name, text, *step):
        self._lines.append(f"{name}\n")

    def flush(self):
        self._path.write_text("".join(self._lines))

    close = flush


@pytest.fixture
def tensorboard(monkeypatch):
    """The real callback of transformers, with a writer of our own."""
    from transformers.integrations import integration_utils

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(Writer, "starts", 0)


def events(folder):
    return sorted(p.name for p in folder.rglob("events.out.*"))


@pytest.mark.parametrize(
    ("names", "changes"),
    [("tensorboard", {}), (["tensorboard"], {"save_steps": 2}), ("tensorboard", {"force": True})],
)
def test_the_files_of_a_report_are_in_the_model_s_folder_at_the_end(
    tmp_path, data, tensorboard, names, changes
):
    settings = {"report_to": names, "max_steps": 4, "logging_steps": 2, "posterior": "none"}
    if "force" in changes:  # an earlier model is replaced, with its logs
        run_finetune(config(tmp_path, data, **settings), quiet=True)
    run_finetune(config(tmp_path, data, **settings, **changes), quiet=True)
    assert len(events(tmp_path / "out" / "runs")) == 1
    (file,) = (tmp_path / "out" / "runs").rglob("events.out.*")
    assert "4 train/loss " in file.read_text()
    assert "4 train/sigma_over_rms " in file.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", "t.jsonl"}
    assert side_files(tmp_path / "out")
    assert not [f for f in side_files(tmp_path / "out") if "runs" in f.parts]


def test_a_stopped_run_keeps_its_logs_and_a_resumed_one_has_those_of_all_starts(
    tmp_path, data, tensorboard, monkeypatch
):
    settings = {"report_to": "tensorboard", "max_steps": 6, "save_steps": 2, "logging_steps": 1}
    step, calls = IVON.step, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(IVON, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(config(tmp_path, data, **settings), quiet=True)
    assert len(events(tmp_path / "out.checkpoints")) == 1
    run_finetune(config(tmp_path, data, **settings, resume=True), quiet=True)
    assert len(events(tmp_path / "out" / "runs")) == 2
    assert not (tmp_path / "out.checkpoints").exists()


def test_reports_without_files_leave_no_folder(tmp_path, data):
    settings = {"max_steps": 1, "posterior": "none"}
    run_finetune(config(tmp_path, data, report_to="none", **settings), quiet=True)
    with pytest.raises(ConfigError, match="report_to: paper is not supported"):
        run_finetune(config(tmp_path, data, report_to="paper", **settings, force=True), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", "t.jsonl"}


def test_a_report_without_checkpoints_leaves_those_of_an_earlier_run(tmp_path, data, tensorboard):
    settings = {"max_steps": 2, "posterior": "none"}
    run_finetune(config(tmp_path, data, save_steps=2, keep_checkpoints=True, **settings))
    again = config(tmp_path, data, report_to="tensorboard", force=True, **settings)
    run_finetune(again, quiet=True)
    assert (tmp_path / "out.checkpoints" / "checkpoint-2" / "optimizer.pt").exists()
    assert events(tmp_path / "out.checkpoints") == []


def test_quiet_is_quiet(tmp_path, data, capfd):
    settings = config(tmp_path, data, max_steps=2)
    capfd.readouterr()
    run_finetune(settings, quiet=True)
    run_precision(PrecisionConfig(model=str(tmp_path / "out"), data=data, force=True), quiet=True)
    assert capfd.readouterr().err == ""


DDP = """
import sys, torch.distributed
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
model, data, output = sys.argv[1:]
report = run_finetune(FinetuneConfig(model=model, data=data, output=output, batch_size=2,
                                     gradient_accumulation=2, flush_batches=4), quiet=True)
assert torch.distributed.get_world_size() == 2
print("report", report.model_dump_json())
"""


@pytest.mark.slow
def test_two_processes_write_one_model_and_give_one_report(tmp_path, data):
    script, out = tmp_path / "ddp.py", tmp_path / "out"
    script.write_text(DDP)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29543",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, str(script), str(tiny_gpt2(tmp_path / "m")), data, str(out)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [x for x in done.stdout.splitlines() if x.startswith("report")]
    assert len(reports) == 2
    assert reports[0] == reports[1]
    with open_posterior(str(out)) as posterior:
        # 48 rows, 2 a micro-batch, 2 micro-batches, 2 processes.
        assert posterior.info.training["steps"] == 6


@pytest.mark.slow
def test_accelerate_launch_trains_as_many_processes_as_asked(tmp_path, data):
    (tmp_path / "f.yaml").write_text(
        f"model: {tiny_gpt2(tmp_path / 'm')}\ndata: {data}\nmax_steps: 2\n"
        f"output: {tmp_path / 'out'}\nflush_batches: 2\n"
    )
    line = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "29545",
    ]
    command = [
        "-m",
        "bmerge_cli.main",
        "finetune",
        str(tmp_path / "f.yaml"),
        "--num-processes",
        "2",
        "--json",
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, "--multi_gpu", *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2
    # These flags start one process, silently: the command then starts the two itself.
    environment.pop("ACCELERATE_USE_CPU")
    (tmp_path / "out").rename(tmp_path / "moved")
    done = subprocess.run(
        [*line, "--cpu", *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2
    for folder in ("moved", "out"):
        with open_posterior(str(tmp_path / folder)) as posterior:
            assert posterior.info.training["processes"] == 2


def test_the_log_holds_loss_and_posterior_health_at_every_logging_step(tmp_path, data, capfd):
    run_finetune(
        config(
            tmp_path,
            data,
            logging_steps=2,
            max_steps=6,
            save_steps=6,
            keep_checkpoints=True,
            ess=1e7,
            beta2=0.99,
            curvature="price",
        )
    )
    history = json.loads(
        (tmp_path / "out.checkpoints" / "checkpoint-6" / "trainer_state.json").read_text()
    )
    logs = [entry for entry in history["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    with open_posterior(str(tmp_path / "out")) as posterior:
        for entry in logs:
            assert entry["init_fraction"] == pytest.approx(0.99 ** entry["step"])
            # (1 - beta2) ess / (2 B), B the observations of a step
            assert entry["kappa"] == pytest.approx(
                0.01 * 1e7 / (2 * posterior.info.training["batch_size"])
            )
        assert logs[-1]["sigma_over_rms"] == pytest.approx(posterior.info.health["sigma_over_rms"])
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "step 4/6  loss " in shown.err
    training = info_of(tmp_path / "out").training
    assert (
        f"6 steps of {training['batch_size']:,.0f} tokens, ivon: learning_rate 0.0001 (bound of "
        in shown.err
    )
    assert (
        f"ess {training['ess']:.3g}, beta2 0.99, curvature price, "
        f"hess_init {training['hess_init']:g}" in shown.err
    )
    assert "sigma_over_rms" in shown.err


def test_reports_go_where_they_are_asked_to_go(tmp_path, data, monkeypatch):
    seen = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Report)
    run_finetune(
        config(tmp_path, data, logging_steps=2, max_steps=2, report_to=["wandb"], posterior="none"),
        quiet=True,
    )
    assert {"loss", "learning_rate", "sigma_over_rms"} <= set(seen[0])
    assert not {"kappa", "hess_noise"} & set(seen[0])  # which say nothing under ggn
    with pytest.raises(ConfigError, match=r"report_to: paper is not supported"):
        run_finetune(config(tmp_path, data, report_to=["paper"], force=True), quiet=True)
