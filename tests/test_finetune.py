"""Fine-tuning of tiny models leaves the right checkpoint and posterior on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import yaml

import mergekit_bayes.finetune.run as module
from mergekit_bayes.curvature.ggn import ggn_diagonal
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests import finetuning, tiny
from tests.finetuning import Look, config, texts
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2

data = finetuning.data


def test_a_language_model_leaves_a_checkpoint_and_a_full_posterior(tmp_path, data):
    report = run_finetune(config(tmp_path, data), quiet=True)
    folder = tmp_path / "out"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(folder)
    with open_posterior(str(folder)) as posterior:
        info = posterior.info
        loaded = load_model(str(folder))
        examples = encode_rows(
            {"text": [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]},
            loaded,
        )
        scored = sum(len(e["input_ids"]) - 1 for e in examples)
        assert (info.estimator, info.unit, info.observations, info.ess) == (
            "ggn",
            "token",
            scored,
            scored,
        )
        assert info.prior.precision == info.anchor.precision == pytest.approx(scored * 1e-6)
        assert (info.prior.kind, info.anchor.kind, info.sampled) == ("isotropic", "zero", 24)
        assert info.training["steps"] == report.steps == 12
        assert (info.training["curvature"], info.training["curvature_every"]) == ("ggn", 8)
        assert info.training["beta2"] == pytest.approx(max(0.5, 1 - 5 * 8 / 12))
        assert {
            "learning_rate",
            "lr",
            "ess",
            "hess_init",
            "beta1",
            "weight_decay",
            "mc_samples",
            "batch_size",
        } <= set(info.training)
        assert {"init_fraction", "kappa", "hess_median", "precision_median", "not_positive"} <= set(
            info.health
        )
        assert info.base.blocks != info.mean.blocks
        assert info.tokenizer
        assert info.dtype == "float32"
        assert (
            set(posterior.precision.specs)
            == {n for n, _ in model.named_parameters()}
            == set(posterior.mean.specs)
        )
        assert info.aliases == {"lm_head.weight": "transformer.wte.weight"}
        assert yaml.safe_load((folder / "finetune.yaml").read_text())["seed"] == 3
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_flush_is_the_curvature_at_the_final_mean_plus_the_prior(tmp_path, data):
    run_finetune(config(tmp_path, data, weight_decay=0.01, flush_batches=12), quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    examples = encode_rows(
        {"text": [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]}, loaded
    )
    curvature = ggn_diagonal(loaded.model, list(batches(examples, 4, Collate(2))) * 30, seed=9)
    with open_posterior(str(tmp_path / "out")) as posterior:
        n = posterior.info.observations
        name = "transformer.h.0.mlp.c_fc.weight"
        stored = torch.from_numpy(
            tiny.read(tmp_path / "out" / "posterior" / "precision.posterior")[name]
        )
        expected = n * curvature.total[name] / curvature.observations + n * 0.01
        assert (stored > n * 0.01).all()
        # 12 batches: a relative deviation of 0.4 per entry, much less for a tensor's sum.
        assert stored.sum().item() == pytest.approx(expected.sum().item(), rel=0.35)


def test_the_same_seed_gives_the_same_bytes(tmp_path, data):
    for name in ("x", "y"):
        run_finetune(config(tmp_path, data, output=str(tmp_path / name)), quiet=True)
    for file in ("model.safetensors", "posterior/precision.posterior"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_training_lowers_the_loss_with_either_optimizer(tmp_path, data):
    for optimizer in ("ivon", "adamw"):
        settings = config(
            tmp_path,
            data,
            optimizer=optimizer,
            output=str(tmp_path / optimizer),
            epochs=10,
            learning_rate=1e-3,
        )
        run_finetune(settings, quiet=True)
        losses = {}
        for folder in ("base", optimizer):
            loaded = load_model(str(tmp_path / folder))
            examples = encode_rows(
                {
                    "text": [
                        json.loads(line)["text"] for line in Path(data).read_text().splitlines()
                    ]
                },
                loaded,
            )
            (batch,) = batches(examples, 48, Collate(2))
            losses[folder] = loaded.model(**batch).loss.item()
        assert losses[optimizer] < 0.8 * losses["base"], losses


def test_ivons_own_posterior_is_stored_on_request(tmp_path, data):
    run_finetune(
        config(tmp_path, data, curvature="price", posterior="ivon", ess=1e5, weight_decay=1e-3),
        quiet=True,
    )
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert (posterior.info.estimator, posterior.info.ess) == ("ivon", 1e5)
        assert posterior.info.prior.precision == pytest.approx(1e5 * 1e-3)
        stored = tiny.read(tmp_path / "out" / "posterior" / "precision.posterior")
        assert all((v > 0).all() for v in stored.values())
    with pytest.raises(ConfigError, match="AdamW leaves none"):
        run_finetune(
            config(tmp_path, data, posterior="ivon", optimizer="adamw", output=str(tmp_path / "z"))
        )


@pytest.mark.parametrize("samples", [1, 2])
def test_accumulated_micro_batches_equal_one_batch(tmp_path, data, samples):
    """Rows of different lengths: the loss must be the mean over the tokens of the whole step."""
    for name, size, accumulation in (("one", 8, 1), ("four", 2, 4)):
        settings = config(
            tmp_path,
            data,
            output=str(tmp_path / name),
            batch_size=size,
            posterior="none",
            gradient_accumulation=accumulation,
            mc_samples=samples,
            ess=1e6,
            beta2=0.99,
            curvature="price",
        )
        run_finetune(settings, quiet=True)
    one, four = tiny.read(tmp_path / "one"), tiny.read(tmp_path / "four")
    base = tiny.read(tmp_path / "base")
    for name in one:
        moved = abs(one[name] - base[name]).max()
        np.testing.assert_allclose(one[name], four[name], atol=max(1e-6, 0.02 * moved))


def test_a_classifier_counts_examples(tmp_path, data):
    base = tiny_bert(tmp_path / "bert")
    run_finetune(config(tmp_path, data, model=base, epochs=20, learning_rate=3e-3), quiet=True)
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert (posterior.info.unit, posterior.info.observations) == ("example", 48)
    loaded = load_model(str(tmp_path / "out"))
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    batch = loaded.tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
    predicted = loaded.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.argmax(-1)
    assert (predicted == torch.tensor([r["label"] for r in rows])).float().mean() > 0.9


def test_an_adapter_has_its_posterior_beside_it_in_pefts_names(tmp_path, data):
    settings = config(tmp_path, data, lora={"r": 2, "target_modules": ["c_attn"]})
    run_finetune(settings, quiet=True)
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
        assert not (tmp_path / "out" / "README.md").exists()  # peft's is all placeholders
        assert set(posterior.precision.specs) == set(posterior.mean.specs)
        assert all("lora_" in n and ".default." not in n for n in posterior.mean.specs)
        # By it, adapters of one start can be merged by factors.
        assert len(posterior.info.training["initial_A"]) == 64
        assert posterior.info.unit == "token"
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str((tmp_path / "base").resolve())
    assert load_model(str(tmp_path / "out")).task == "causal-lm"


def test_fine_tunes_merge_and_load(tmp_path, data):
    base = tiny_gpt2(tmp_path / "base")
    for i, name in enumerate("ab"):
        file = texts(tmp_path / f"{name}.jsonl", seed=i)
        run_finetune(config(tmp_path, file, model=base, output=str(tmp_path / name)), quiet=True)
    report = run_merge(
        MergeConfig(
            models=(str(tmp_path / "a"), str(tmp_path / "b")),
            weights="precision",
            out=str(tmp_path / "ab"),
        )
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(report.path)
    for name, value in tiny.read(report.path).items():
        np.testing.assert_array_equal(dict(merged.named_parameters())[name].detach().numpy(), value)
    transformers.AutoTokenizer.from_pretrained(report.path)


@pytest.mark.parametrize("optimizer", ["adamw", "ivon"])
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_the_gradient_is_the_mean_over_a_steps_observations(
    tmp_path, data, task, optimizer, monkeypatch
):
    base = (tiny_gpt2 if task == "causal-lm" else tiny_bert)(tmp_path / "base")
    make = module.make_trainer
    look = Look()

    def watched(*args, **kwargs):
        trainer = make(*args, **kwargs)
        trainer.args.max_grad_norm = 0.0
        trainer.add_callback(look)
        return trainer

    monkeypatch.setattr(module, "make_trainer", watched)
    gradients = {}
    for size, accumulation in ((12, 1), (3, 4), (5, 3)):
        # Rows of unequal length, a ragged last micro-batch, and an ess that leaves no noise.
        settings = config(
            tmp_path,
            data,
            model=base,
            output=str(tmp_path / f"{size}"),
            batch_size=size,
            max_rows=12,
            max_steps=1,
            gradient_accumulation=accumulation,
            optimizer=optimizer,
            posterior="none",
            ess=1e30,
        )
        run_finetune(settings, quiet=True)
        gradients[size] = look.gradient
    for size in (3, 5):
        np.testing.assert_allclose(
            gradients[size], gradients[12], rtol=1e-3, atol=1e-6 * abs(gradients[12]).max()
        )


def labelled(path, labels):
    rows = [
        {"text": f"the {WORDS[i % 9]} sat", "label": labels[i % len(labels)]} for i in range(12)
    ]
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
    ("labels", "names"),
    [(["dog", "cat", "tree"], ["cat", "dog", "tree"]), ([0, 1], ["LABEL_0", "LABEL_1"])],
)
def test_an_encoder_gets_a_head_for_the_labels_of_the_data(tmp_path, encoder, labels, names, lora):
    file = labelled(tmp_path / "l.jsonl", labels)
    run_finetune(
        config(tmp_path, file, model=encoder, task="classification", lora=lora), quiet=True
    )
    loaded = load_model(str(tmp_path / "out"))
    assert loaded.task == "classification"
    assert list(loaded.model.config.id2label.values()) == names
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert {n for n in posterior.precision.specs if n.endswith("classifier.weight")}
        assert set(posterior.precision.specs) <= set(posterior.mean.specs)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["query"]}])
def test_a_head_is_read_as_it_was_trained_whatever_its_labels_are_called(tmp_path, encoder, lora):
    """By their names alone these labels would be independent.

    The next fine-tune, the evaluation and the precision take what the config says.
    """
    file, out = labelled(tmp_path / "l.jsonl", ["insult", "threat", "toxic"]), tmp_path / "out"
    settings = {"task": "classification", "lora": lora, "max_steps": 1}
    run_finetune(config(tmp_path, file, model=encoder, **settings), quiet=True)
    with open_posterior(str(out)) as posterior:
        assert posterior.info.training["loss"] == "softmax cross-entropy"
    report = run_evaluate(EvaluateConfig(model=str(out), classify={"a": file}))
    assert report.label_reading == "softmax: config.json says single_label_classification"
    report = run_precision(PrecisionConfig(model=str(out), data=file, force=True), quiet=True)
    assert report.loss == "softmax cross-entropy (config.json says single_label_classification)"
    if lora is None:
        again = str(tmp_path / "again")
        run_finetune(config(tmp_path, file, model=out, output=again, max_steps=1), quiet=True)
        stored = json.loads((tmp_path / "again" / "config.json").read_text())
        assert stored["problem_type"] == "single_label_classification"


def test_an_adapter_can_be_given_a_precision_of_its_own(tmp_path, data):
    run_finetune(
        config(tmp_path, data, lora={"r": 2, "target_modules": ["c_attn"]}, posterior="none"),
        quiet=True,
    )
    run_precision(PrecisionConfig(model=str(tmp_path / "out"), data=data))
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert set(posterior.precision.specs) == set(posterior.mean.specs)
        assert all("lora_" in n for n in posterior.precision.specs)


def test_bfloat16_weights_train_and_leave_a_float32_precision(tmp_path, data):
    run_finetune(config(tmp_path, data, dtype="bfloat16"), quiet=True)
    with open_posterior(str(tmp_path / "out")) as posterior:
        assert {s.dtype for s in posterior.mean.specs.values()} == {"BF16"}
        assert {s.dtype for s in posterior.precision.specs.values()} == {"F32"}
        assert posterior.info.dtype == "bfloat16"


def test_an_adapter_is_trained_on_a_base_of_four_bits(tmp_path, data, monkeypatch):
    """By the script of docs/finetuning.md."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    words = transformers.AutoTokenizer.from_pretrained(tiny_gpt2(tmp_path / "words"))
    shape = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.LlamaForCausalLM(shape).save_pretrained(tmp_path / "BASE")
    words.save_pretrained(tmp_path / "BASE")
    guide = (Path(__file__).parents[1] / "docs" / "finetuning.md").read_text()
    script = guide.partition("### QLoRA")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    settings = config(tmp_path, data, model=tmp_path / "base-4bit", lora={"r": 2}, max_steps=3)
    report = run_finetune(settings, quiet=True)
    assert report.estimator == "ggn"
    names = set(tiny.read(tmp_path / "out" / "posterior" / "precision.posterior"))
    factors = safetensors.numpy.load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(factors) == names
    assert all(np.any(value) for value in factors.values())  # B starts at zero
