"""Settings and models that cannot be trained are refused first, and a failure leaves nothing."""

import json

import pytest
import transformers

import mergekit_bayes.finetune.store as store
import mergekit_bayes.finetune.training as training
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.load import load_model
from tests import finetuning
from tests.finetuning import config
from tests.tiny_models import tiny_bert

data = finetuning.data


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


@pytest.mark.parametrize(
    ("labels", "problem_type"), [(3, "multi_label_classification"), (2, "regression"), (1, None)]
)
def test_a_head_for_another_loss_is_refused_before_training(tmp_path, data, labels, problem_type):
    base = tiny_bert(tmp_path / "head", labels=labels, problem_type=problem_type)
    with pytest.raises(
        ConfigError,
        match=f"{labels} output.*{problem_type or 'regression'}; bmerge finetune trains",
    ):
        run_finetune(config(tmp_path, data, model=base), quiet=True)
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_under_the_final_name(tmp_path, data, monkeypatch):
    monkeypatch.setattr(
        store, "save_posterior", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("stop"))
    )
    with pytest.raises(RuntimeError, match="stop"):
        run_finetune(config(tmp_path, data), quiet=True)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "t.jsonl"}


def test_settings_that_make_no_sense_are_named(tmp_path, data):
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        run_finetune(config(tmp_path, data, scheduler="cosin"))
    with pytest.raises(ConfigError, match=r"lora: .*nope"):
        run_finetune(config(tmp_path, data, lora={"target_modules": ["nope"]}))
    with pytest.raises(ConfigError, match=r"weight_decay > 0.* or curvature: price"):
        run_finetune(config(tmp_path, data, weight_decay=0.0))
    run_finetune(
        config(tmp_path, data, weight_decay=0.0, optimizer="adamw", max_steps=1, posterior="none"),
        quiet=True,
    )
    with pytest.raises(ConfigError, match="batch_size"):
        parse_config(
            FinetuneConfig, {"model": "m", "output": "o", "data": "d", "batch_size": 0}, "f.yaml"
        )


def test_several_gpus_without_a_launcher_are_no_data_parallel(tmp_path, data, monkeypatch):
    monkeypatch.setattr(
        transformers.TrainingArguments,
        "n_gpu",
        property(lambda self: getattr(self, "_n_gpu", 4) or 4),
    )
    arguments = training.training_arguments(config(tmp_path, data), tmp_path / "x", quiet=True)
    assert arguments.n_gpu == 1


@pytest.mark.parametrize("task", ["auto", "causal-lm"])
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_an_encoder_is_not_run_as_a_causal_language_model(tmp_path, name, task):
    path = tiny_bert(tmp_path / "bert")
    settings = json.loads((path / "config.json").read_text()) | {"architectures": [name]}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"an encoder \({name}\), which sees the token"):
        load_model(str(path), task)
    assert load_model(str(path), "classification").task == "classification"
    (path / "config.json").write_text(json.dumps(settings | {"is_decoder": True}))
    assert load_model(str(path), task).task == "causal-lm"
