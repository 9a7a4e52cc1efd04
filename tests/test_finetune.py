"""Fine-tuning end to end on tiny models: what lands on disk, and that it is right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

import mergekit_bayes.finetune as module
import mergekit_bayes.finetune.store as store
import mergekit_bayes.finetune.training as training
from mergekit_bayes.configs import load_config, parse_config
from mergekit_bayes.curvature import ggn_diagonal
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models import Collate, batches, encode_rows, load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig, run_precision
from tests import tiny
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2


def texts(path, rows=48, seed=0):
    rng = np.random.default_rng(seed)
    with Path(path).open("w") as file:
        for _ in range(rows):
            label = int(rng.integers(2))
            words = [*rng.choice(WORDS[:10], rng.integers(3, 8)), "good" if label else "bad"]
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return str(path)


@pytest.fixture
def data(tmp_path):
    return texts(tmp_path / "t.jsonl")


def config(tmp_path, data, **changes):
    base = tiny_gpt2(tmp_path / "base") if "model" not in changes else changes.pop("model")
    return FinetuneConfig(**{"model": str(base), "output": str(tmp_path / "out"), "data": data, "batch_size": 4,
                             "flush_batches": 6, "seed": 3, **changes})  # fmt: skip


def test_a_language_model_leaves_a_checkpoint_and_a_full_posterior(tmp_path, data):
    report = run_finetune(config(tmp_path, data), quiet=True)
    folder = tmp_path / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
    posterior = open_posterior(str(folder))
    info = posterior.info
    loaded = load_model(str(folder))
    examples = encode_rows({"text": [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]}, loaded)
    scored = sum(len(e["input_ids"]) - 1 for e in examples)
    assert (info.estimator, info.unit, info.observations, info.ess) == ("ggn", "token", scored, scored)
    assert info.prior.precision == info.anchor.precision == pytest.approx(scored * 1e-6)
    assert (info.prior.kind, info.anchor.kind, info.sampled) == ("isotropic", "zero", 24)
    assert info.training["steps"] == report.steps == 12
    assert (info.training["curvature"], info.training["curvature_every"]) == ("ggn", 8)
    assert info.training["beta2"] == pytest.approx(max(0.5, 1 - 5 * 8 / 12))
    assert {"lr", "ess", "hess_init", "beta1", "weight_decay", "mc_samples", "batch_size"} <= set(info.training)
    assert {"init_fraction", "kappa", "hess_median", "precision_median", "not_positive"} <= set(info.health)
    assert info.base.blocks != info.mean.blocks
    assert info.tokenizer
    assert info.dtype == "float32"
    assert set(posterior.precision.specs) == {n for n, _ in model.named_parameters()} == set(posterior.mean.specs)
    assert info.aliases == {"lm_head.weight": "transformer.wte.weight"}
    assert yaml.safe_load((folder / "finetune.yaml").read_text())["seed"] == 3
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    posterior.close()


def test_the_flush_is_the_curvature_at_the_final_mean_plus_the_prior(tmp_path, data):
    run_finetune(config(tmp_path, data, weight_decay=0.01, flush_batches=12), quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    examples = encode_rows({"text": [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]}, loaded)
    found = ggn_diagonal(loaded.model, list(batches(examples, 4, Collate(2))) * 30, seed=9)
    posterior = open_posterior(str(tmp_path / "out"))
    n = posterior.info.observations
    name = "transformer.h.0.mlp.c_fc.weight"
    stored = torch.from_numpy(tiny.read(tmp_path / "out" / "posterior" / "precision.safetensors")[name])
    expected = n * found.total[name] / found.observations + n * 0.01
    assert (stored > n * 0.01).all()
    # 12 batches: a relative deviation of 0.4 per entry, much less for a tensor's sum.
    assert stored.sum().item() == pytest.approx(expected.sum().item(), rel=0.35)
    posterior.close()


def test_the_same_seed_gives_the_same_bytes(tmp_path, data):
    for name in ("x", "y"):
        run_finetune(config(tmp_path, data, output=str(tmp_path / name)), quiet=True)
    for file in ("model.safetensors", "posterior/precision.safetensors"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_training_lowers_the_loss_with_either_optimizer(tmp_path, data):
    for optimizer in ("ivon", "adamw"):
        settings = config(tmp_path, data, optimizer=optimizer, output=str(tmp_path / optimizer), epochs=10,
                          learning_rate=1.0 if optimizer == "ivon" else 1e-3)  # fmt: skip
        run_finetune(settings, quiet=True)
        losses = {}
        for folder in ("base", optimizer):
            loaded = load_model(str(tmp_path / folder))
            examples = encode_rows(
                {"text": [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]}, loaded
            )
            (batch,) = batches(examples, 48, Collate(2))
            losses[folder] = loaded.model(**batch).loss.item()
        assert losses[optimizer] < 0.8 * losses["base"], losses


def test_ivons_own_posterior_is_stored_on_request(tmp_path, data):
    run_finetune(config(tmp_path, data, curvature="price", posterior="ivon", ess=1e5, weight_decay=1e-3), quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert (posterior.info.estimator, posterior.info.ess) == ("ivon", 1e5)
    assert posterior.info.prior.precision == pytest.approx(1e5 * 1e-3)
    stored = tiny.read(tmp_path / "out" / "posterior" / "precision.safetensors")
    assert all((v > 0).all() for v in stored.values())
    posterior.close()
    with pytest.raises(ConfigError, match="AdamW leaves none"):
        run_finetune(config(tmp_path, data, posterior="ivon", optimizer="adamw", output=str(tmp_path / "z")))


@pytest.mark.parametrize("samples", [1, 2])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, data, samples):
    """Rows of different lengths: the loss must be the mean over the tokens of the whole step."""
    for name, size, accumulation in (("one", 8, 1), ("four", 2, 4)):
        settings = config(tmp_path, data, output=str(tmp_path / name), batch_size=size, posterior="none",
                          gradient_accumulation=accumulation, mc_samples=samples, ess=1e6, beta2=0.99,
                          curvature="price")  # fmt: skip
        run_finetune(settings, quiet=True)
    one, four = tiny.read(tmp_path / "one"), tiny.read(tmp_path / "four")
    base = tiny.read(tmp_path / "base")
    for name in one:
        moved = abs(one[name] - base[name]).max()
        np.testing.assert_allclose(one[name], four[name], atol=max(1e-6, 0.02 * moved))


def test_a_classifier_counts_examples(tmp_path, data):
    base = tiny_bert(tmp_path / "bert")
    run_finetune(config(tmp_path, data, model=base, epochs=20, learning_rate=3.0), quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert (posterior.info.unit, posterior.info.observations) == ("example", 48)
    posterior.close()
    loaded = load_model(str(tmp_path / "out"))
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    batch = loaded.tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
    predicted = loaded.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert (predicted == torch.tensor([r["label"] for r in rows])).float().mean() > 0.9


def test_an_adapter_has_its_posterior_beside_it_in_pefts_names(tmp_path, data):
    settings = config(tmp_path, data, lora={"r": 2, "target_modules": ["c_attn"]})
    run_finetune(settings, quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert set(posterior.precision.specs) == set(posterior.mean.specs)
    assert all("lora_" in n and ".default." not in n for n in posterior.mean.specs)
    assert len(posterior.info.training["initial_A"]) == 64  # lets adapters of one start be merged by factors
    assert posterior.info.unit == "token"
    posterior.close()
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert load_model(str(tmp_path / "out")).task == "causal-lm"


def test_fine_tunes_merge_and_load(tmp_path, data):
    base = tiny_gpt2(tmp_path / "base")
    for i, name in enumerate("ab"):
        file = texts(tmp_path / f"{name}.jsonl", seed=i)
        run_finetune(config(tmp_path, file, model=base, output=str(tmp_path / name)), quiet=True)
    report = run_merge(MergeConfig(models=(str(tmp_path / "a"), str(tmp_path / "b")), weights="precision",
                                   out=str(tmp_path / "ab")))  # fmt: skip
    merged = transformers.AutoModelForCausalLM.from_pretrained(report.path)
    for name, value in tiny.read(report.path).items():
        np.testing.assert_array_equal(dict(merged.named_parameters())[name].detach().numpy(), value)
    transformers.AutoTokenizer.from_pretrained(report.path)


def test_refusals_come_before_training(tmp_path, data):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        run_finetune(config(tmp_path, data))
    with pytest.raises(MismatchError, match="no column 'body'"):
        run_finetune(config(tmp_path, data, text_column="body", force=True))
    with pytest.raises(MismatchError, match="is left"):
        run_finetune(config(tmp_path, data, where={"label": 7}, force=True))
    with pytest.raises(CheckpointError, match="no such file"):
        run_finetune(config(tmp_path, str(tmp_path / "none.jsonl"), force=True))


@pytest.mark.parametrize(("labels", "problem_type"), [(3, "multi_label_classification"), (2, "regression"), (1, None)])
def test_a_head_for_another_loss_is_refused_before_training(tmp_path, data, labels, problem_type):
    base = tiny_bert(tmp_path / "head", labels=labels, problem_type=problem_type)
    with pytest.raises(ConfigError, match=f"{labels} output.*{problem_type or 'regression'}; bmerge finetune trains"):
        run_finetune(config(tmp_path, data, model=base), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_under_the_final_name(tmp_path, data, monkeypatch):
    monkeypatch.setattr(store, "save_posterior", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        run_finetune(config(tmp_path, data), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "t.jsonl"}


class Look(transformers.TrainerCallback):
    """Keeps the gradient that the optimizer was given in its first step, as its momentum holds it."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = optimizer.state
        name = "momentum" if "momentum" in next(iter(states.values())) else "exp_avg"
        self.gradient = np.concatenate([states[p][name].flatten().numpy() for p in model.parameters()]) / (1 - 0.9)


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("kind", ["causal-lm", "classification"])
def test_the_gradient_is_the_mean_over_a_steps_observations(tmp_path, data, kind, optimizer, monkeypatch):
    base = (tiny_gpt2 if kind == "causal-lm" else tiny_bert)(tmp_path / "base")
    make = module.make_trainer
    look = Look()

    def watched(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.args.max_grad_norm = 0.0
        trainer.add_callback(look)
        return trainer

    monkeypatch.setattr(module, "make_trainer", watched)
    found = {}
    for size, accumulation in ((12, 1), (3, 4), (5, 3)):
        # Rows of unequal length, a ragged last micro-batch, and an ess that leaves no noise.
        settings = config(tmp_path, data, model=base, output=str(tmp_path / f"{size}"), batch_size=size, max_rows=12,
                          max_steps=1, gradient_accumulation=accumulation, optimizer=optimizer, posterior="none",
                          ess=1e30)  # fmt: skip
        run_finetune(settings, quiet=True)
        found[size] = look.gradient
    for size in (3, 5):
        np.testing.assert_allclose(found[size], found[12], rtol=1e-3, atol=1e-6 * abs(found[12]).max())


@pytest.mark.parametrize("quiet", [True, False])
def test_training_prints_nothing_on_stdout(tmp_path, data, quiet, capfd):
    run_finetune(config(tmp_path, data, logging_steps=1, max_steps=2), quiet=quiet)
    assert capfd.readouterr().out == ""


def labelled(path, labels):
    rows = [{"text": f"the {WORDS[i % 9]} sat", "label": labels[i % len(labels)]} for i in range(12)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def encoder(tmp_path):
    bert = tiny_bert(tmp_path / "bert")
    transformers.AutoModel.from_pretrained(bert).save_pretrained(tmp_path / "encoder")
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["query"]}])
@pytest.mark.parametrize(
    ("labels", "names"), [(["dog", "cat", "tree"], ["cat", "dog", "tree"]), ([0, 1], ["LABEL_0", "LABEL_1"])]
)
def test_an_encoder_gets_a_head_for_the_labels_of_the_data(tmp_path, encoder, labels, names, lora):
    file = labelled(tmp_path / "l.jsonl", labels)
    run_finetune(config(tmp_path, file, model=encoder, task="classification", lora=lora), quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.task == "classification"
    assert list(loaded.model.config.id2label.values()) == names
    posterior = open_posterior(str(tmp_path / "out"))
    assert {n for n in posterior.precision.specs if n.endswith("classifier.weight")}
    assert set(posterior.precision.specs) <= set(posterior.mean.specs)
    posterior.close()


def test_an_adapter_can_be_given_a_precision_of_its_own(tmp_path, data):
    run_finetune(config(tmp_path, data, lora={"r": 2, "target_modules": ["c_attn"]}, posterior="none"), quiet=True)
    run_precision(PrecisionConfig(model=str(tmp_path / "out"), data=data))
    posterior = open_posterior(str(tmp_path / "out"))
    assert set(posterior.precision.specs) == set(posterior.mean.specs)
    assert all("lora_" in n for n in posterior.precision.specs)
    posterior.close()


def test_bfloat16_weights_train_and_leave_a_float32_precision(tmp_path, data):
    run_finetune(config(tmp_path, data, dtype="bfloat16"), quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert {s.dtype for s in posterior.mean.specs.values()} == {"BF16"}
    assert {s.dtype for s in posterior.precision.specs.values()} == {"F32"}
    assert posterior.info.dtype == "bfloat16"
    posterior.close()


def test_settings_that_make_no_sense_are_named(tmp_path, data):
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        run_finetune(config(tmp_path, data, scheduler="cosin"))
    with pytest.raises(ConfigError, match=r"lora: .*nope"):
        run_finetune(config(tmp_path, data, lora={"target_modules": ["nope"]}))
    with pytest.raises(ConfigError, match=r"weight_decay > 0.* or curvature: price"):
        run_finetune(config(tmp_path, data, weight_decay=0.0))
    run_finetune(config(tmp_path, data, weight_decay=0.0, optimizer="adamw", max_steps=1, posterior="none"), quiet=True)
    with pytest.raises(ConfigError, match="batch_size"):
        parse_config(FinetuneConfig, {"model": "m", "output": "o", "data": "d", "batch_size": 0}, "f.yaml")


def test_checkpoints_are_kept_beside_the_output_not_in_it(tmp_path, data):
    run_finetune(config(tmp_path, data, save_steps=6, posterior="none"), quiet=True)
    assert (tmp_path / "out.checkpoints" / "checkpoint-6" / "optimizer.pt").exists()
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith("checkpoint")]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs" / "finetune").glob("*.yaml")))
def test_the_shipped_settings_load(path):
    load_config(FinetuneConfig, path)


def test_beta2_follows_from_the_steps_that_are_really_made(tmp_path, data):
    """Ragged epochs: 48 rows in batches of 5, two of them a step, are five steps an epoch."""
    settings = config(tmp_path, data, batch_size=5, gradient_accumulation=2, epochs=12, curvature="price")
    report = run_finetune(settings, quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert posterior.info.training["steps"] == report.steps == 60
    assert posterior.info.training["beta2"] == pytest.approx(1 - 5 / 60)
    assert report.health["init_fraction"] == pytest.approx((1 - 5 / 60) ** 60)
    posterior.close()


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
report = run_finetune(FinetuneConfig(model=model, data=data, output=output, batch_size=2, gradient_accumulation=2,
                                     flush_batches=4), quiet=True)
assert torch.distributed.get_world_size() == 2
print("report", report.model_dump_json())
"""


@pytest.mark.slow
def test_two_processes_write_one_model_and_give_one_report(tmp_path, data):
    script, out = tmp_path / "ddp.py", tmp_path / "out"
    script.write_text(DDP)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29543"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, str(script), str(tiny_gpt2(tmp_path / "m")), data, str(out)], capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [x for x in done.stdout.splitlines() if x.startswith("report")]
    assert len(reports) == 2
    assert reports[0] == reports[1]
    posterior = open_posterior(str(out))
    assert posterior.info.training["steps"] == 6  # 48 rows, 2 a micro-batch, 2 micro-batches, 2 processes
    posterior.close()


@pytest.mark.slow
def test_accelerate_launch_trains_as_many_processes_as_asked(tmp_path, data):
    (tmp_path / "f.yaml").write_text(f"model: {tiny_gpt2(tmp_path / 'm')}\ndata: {data}\nmax_steps: 2\n"
                                     f"output: {tmp_path / 'out'}\nflush_batches: 2\n")  # fmt: skip
    line = [str(Path(sys.executable).parent / "accelerate"), "launch", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29545"]  # fmt: skip
    command = ["-m", "bmerge_cli.main", "finetune", str(tmp_path / "f.yaml"), "--num-processes", "2", "--json"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, "--multi_gpu", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2
    # These flags start one process, silently: the command then starts the two itself.
    environment.pop("ACCELERATE_USE_CPU")
    (tmp_path / "out").rename(tmp_path / "moved")
    done = subprocess.run([*line, "--cpu", *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["steps"] == 2
    for folder in ("moved", "out"):
        posterior = open_posterior(str(tmp_path / folder))
        assert posterior.info.training["processes"] == 2
        posterior.close()


def test_the_log_holds_loss_and_posterior_health_at_every_logging_step(tmp_path, data, capfd):
    run_finetune(
        config(tmp_path, data, logging_steps=2, max_steps=6, save_steps=6, ess=1e7, beta2=0.99, curvature="price")
    )
    history = json.loads((tmp_path / "out.checkpoints" / "checkpoint-6" / "trainer_state.json").read_text())
    logs = [entry for entry in history["log_history"] if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    posterior = open_posterior(str(tmp_path / "out"))
    for entry in logs:
        assert entry["init_fraction"] == pytest.approx(0.99 ** entry["step"])
        # (1 - beta2) ess / (2 B), B the observations of a step
        assert entry["kappa"] == pytest.approx(0.01 * 1e7 / (2 * posterior.info.training["batch_size"]))
    assert logs[-1]["sigma_over_rms"] == pytest.approx(posterior.info.health["sigma_over_rms"])
    posterior.close()
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "step 4/6  loss " in shown.err
    training = info_of(tmp_path / "out").training
    assert f"6 steps of {training['batch_size']:,.0f} tokens, ivon: lr " in shown.err
    assert f"ess {training['ess']:.3g}, beta2 0.99, curvature price, hess_init {training['hess_init']:g}" in shown.err
    assert "sigma_over_rms" in shown.err


def info_of(path):
    posterior = open_posterior(str(path))
    posterior.close()
    return posterior.info


def test_the_settings_that_were_chosen_are_told_before_training(tmp_path, data, capfd):
    run_finetune(config(tmp_path, data, max_steps=80))
    info = info_of(tmp_path / "out")
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("80 steps of ")]
    assert f", ess {info.training['ess']:.3g}, beta2 0.5, curvature ggn every 8 steps" in line
    run_finetune(config(tmp_path, data, max_steps=2, optimizer="adamw", posterior="none", force=True))
    assert "tokens, adamw: lr 0.0001, weight_decay 1e-06\n" in capfd.readouterr().err


def test_a_length_above_the_models_context_is_said(tmp_path, data, caplog):
    for length in (None, 16, 5000):
        told = {} if length is None else {"max_length": length}
        run_finetune(config(tmp_path, data, max_steps=1, posterior="none", force=True, **told), quiet=True)
        assert ("so rows are cut there and not at 5000" in caplog.text) == (length == 5000)


def test_noise_that_drowns_the_weights_is_said_once_while_there_is_time(tmp_path, data, caplog):
    run_finetune(config(tmp_path, data, logging_steps=1, max_steps=4, ess=1e3, posterior="none"), quiet=True)
    assert sum("of a tensor's weights: raise ess or weight_decay" in r.message for r in caplog.records) == 1
    caplog.clear()
    settings = config(tmp_path, data, max_steps=4, ess=1e8, beta2=0.9, posterior="ivon", curvature="price", force=True)
    run_finetune(settings, quiet=True)
    assert "kappa is" in caplog.text
    assert "of hess_init is still in the Hessian" in caplog.text


def test_reports_go_where_they_are_asked_to_go(tmp_path, data, monkeypatch):
    seen = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    from transformers.integrations import integration_utils

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Report)
    run_finetune(
        config(tmp_path, data, logging_steps=2, max_steps=2, report_to=["wandb"], posterior="none"), quiet=True
    )
    assert {"loss", "learning_rate", "sigma_over_rms"} <= set(seen[0])
    assert not {"kappa", "hess_noise"} & set(seen[0])  # which say nothing under ggn
    with pytest.raises(ConfigError, match=r"report_to: paper is not supported"):
        run_finetune(config(tmp_path, data, report_to=["paper"], force=True), quiet=True)


def test_several_gpus_without_a_launcher_are_no_data_parallel(tmp_path, data, monkeypatch):
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 4) or 4))
    arguments = training.training_arguments(config(tmp_path, data), tmp_path / "x", quiet=True)
    assert arguments.n_gpu == 1


@pytest.mark.parametrize("changes", [{"curvature": "price", "antithetic": True}, {"curvature_every": 2}])
def test_variants_of_ivon_are_settings(tmp_path, data, changes):
    run_finetune(config(tmp_path, data, posterior="ivon", save_steps=4, **changes), quiet=True)
    posterior = open_posterior(str(tmp_path / "out"))
    assert {k: posterior.info.training[k] for k in changes} == changes
    assert posterior.info.training["mc_samples"] == (2 if "antithetic" in changes else 1)
    # h of the root-GGN draws may be merged with a flush, that of the published form may not.
    assert posterior.info.estimator == ("ivon" if "curvature" in changes else "ggn")
    posterior.close()
    (tmp_path / "out").rename(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out.checkpoints" / "checkpoint-12")
    run_finetune(config(tmp_path, data, posterior="ivon", save_steps=4, resume=True, **changes), quiet=True)
    for file in ("model.safetensors", "posterior/precision.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_masked_language_model_is_not_run_as_a_causal_one_unasked(tmp_path):
    path = tiny_bert(tmp_path / "bert")
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(settings | {"architectures": ["BertForMaskedLM"]}))
    with pytest.raises(ConfigError, match="sees the token that it predicts"):
        load_model(str(path))
    assert load_model(str(path), "classification").task == "classification"


def test_the_guide_lists_every_setting_with_its_default():
    guide = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
    listed = guide.partition("## All settings")[2].partition("\n## ")[0]
    for name, field in (FinetuneConfig.model_fields | module.LoraSettings.model_fields).items():
        assert f"`{name}`" in listed
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            shown = re.search(rf"`{name}` \(([\d.e-]+)", listed)
            assert float(shown[1]) == field.default, name


def test_the_scripts_of_the_guide_run(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
    trainer, loop, gather = re.findall(r"```python\n(.*?)```", guide, re.S)
    monkeypatch.chdir(tmp_path)
    loaded = load_model(str(tiny_gpt2(tmp_path / "base")))
    examples = encode_rows({"text": ["the cat sat on the mat .", "a dog ran", "good film", "bad film"]}, loaded)
    names = {"model": loaded.model, "tokenizer": loaded.tokenizer, "examples": examples, "collate": Collate(2)}
    exec(trainer.replace("100", "8").replace('"out",', '"out", report_to=[], use_cpu=True,'), names)
    assert set(names["precision"]) == {n for n, _ in loaded.model.named_parameters()}
    load_model(str(tmp_path / "base"))
    names |= {"batches": batches(examples, 2, Collate(2)), "optimizer": IVON(loaded.model.parameters(), 0.1, 1e6)}
    before = [p.detach().clone() for p in loaded.model.parameters()]
    exec(loop, names)
    assert not all(torch.equal(a, b) for a, b in zip(before, loaded.model.parameters(), strict=True))
    exec(gather, names)
    assert set(names["precision"]) == {n for n, _ in loaded.model.named_parameters()} <= set(names["mean"])


def test_an_adapters_default_rate_is_ten_times_that_of_whole_weights(tmp_path, data):
    for optimizer, rate in (("ivon", 0.1), ("adamw", 1e-4)):
        whole = config(tmp_path, data, optimizer=optimizer)
        assert training.learning_rate(whole) == rate
        assert training.learning_rate(whole.model_copy(update={"lora": module.LoraSettings()})) == 10 * rate
