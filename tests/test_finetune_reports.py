"""Logs, checkpoints and reports go where they are asked to go, also from several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune.run import run_finetune
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


def test_checkpoints_are_kept_beside_the_output_not_in_it(tmp_path, data):
    run_finetune(config(tmp_path, data, save_steps=6, posterior="none"), quiet=True)
    assert (tmp_path / "out.checkpoints" / "checkpoint-6" / "optimizer.pt").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("checkpoint")]


def test_quiet_is_quiet(tmp_path, data, capfd):
    settings = config(tmp_path, data, max_steps=2)
    capfd.readouterr()
    run_finetune(settings, quiet=True)
    run_precision(PrecisionConfig(model=str(tmp_path / "out"), data=data, force=True), quiet=True)
    assert capfd.readouterr().err == ""
    run_precision(PrecisionConfig(model=str(tmp_path / "out"), data=data, force=True))
    assert "curvature" in capfd.readouterr().err


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
    assert f"6 steps of {training['batch_size']:,.0f} tokens, ivon: lr " in shown.err
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
