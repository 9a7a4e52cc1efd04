"""A chat fine-tune with evaluation, best checkpoint and early stop, resumed to the same bytes."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import mergekit_bayes.finetune.evaluation as evaluation
import mergekit_bayes.finetune.hooks as hooks
from mergekit_bayes.configs import load_config
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.data import load_run
from mergekit_bayes.finetune.evaluation import has_lost_patience, measure
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.encode import IGNORED, Collate
from mergekit_bayes.models.examples import read_examples
from mergekit_bayes.models.load import load_model
from tests import tiny
from tests.chats import chats
from tests.finetuning import config, info_of, texts
from tests.test_packing import documents
from tests.tiny_models import tiny_bert, tiny_llama

SHIPPED = Path(__file__).parent.parent / "configs" / "finetune" / "chat.yaml"


@pytest.fixture
def world(tmp_path):
    """A tiny Llama and conversations; makes the shipped settings with changes for its size."""
    tiny_llama(tmp_path / "m")
    data, held = chats(tmp_path / "c.jsonl", 40), chats(tmp_path / "h.jsonl", 12, seed=1)

    def settings(out="out", *changes):
        paths = f"model={tmp_path / 'm'}", f"data={data}", f"eval_data={held}"
        size = "max_length=64", "lora={r: 2, alpha: 4}", "gradient_accumulation=1", "save_steps=2"
        more = "max_steps=6", "logging_steps=1", "warmup_steps=0", "flush_batches=2"
        output = f"output={tmp_path / out}", "keep_checkpoints=true"
        return load_config(FinetuneConfig, SHIPPED, [*paths, *size, *more, *output, *changes])

    return settings


def losses(folder):
    """The held-out losses by their steps, as the last checkpoint has them."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def contents(folder):
    """The bytes of the adapter and of its precision."""
    names = ("adapter_model.safetensors", "posterior/precision.posterior")
    return [(folder / name).read_bytes() for name in names]


def stopped(monkeypatch, settings, step):
    """Run until a step, in whose middle it is interrupted."""
    original = hooks.IvonRunTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.IvonRunTrainer, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            run_finetune(settings, quiet=True)


def test_the_shipped_chat_settings_train_evaluate_choose_and_resume(
    world, tmp_path, monkeypatch, capfd
):
    report = run_finetune(world("whole"))
    errors = capfd.readouterr().err
    assert "conversations in the column 'messages', of which the assistant's turns are" in errors
    assert "step 4/6  held out:  loss " in errors
    assert "  grad_norm " in errors
    assert "pack: 40 rows are packed into " in errors
    assert not any(word in errors for word in ("resuming", "patience", "warmup_steps"))
    measured = losses(tmp_path / "whole.checkpoints")
    assert list(measured) == [2, 4, 6]
    assert report.best_step == min(measured, key=measured.get)
    assert report.evaluation["loss"] == min(measured.values())
    assert report.evaluation["perplexity"] == pytest.approx(math.exp(report.evaluation["loss"]))
    # The loss is that of the stored model over all scored tokens, whatever was packed with what.
    loaded = load_model(str(tmp_path / "whole"))
    apart = read_examples(str(tmp_path / "h.jsonl"), loaded).examples
    assert measure(loaded.model, apart, Collate(2), 3)["loss"] == pytest.approx(
        report.evaluation["loss"], rel=1e-5
    )
    stored = info_of(tmp_path / "whole")
    assert report.observations == stored.observations
    for name, value in report.evaluation.items():
        assert stored.training[f"eval_{name}"] == value
    stopped(monkeypatch, world("halves"), 5)
    capfd.readouterr()
    resumed = run_finetune(world("halves", "resume=true"))
    assert f"resuming from '{tmp_path / 'halves'}.checkpoints/checkpoint-4'" in (
        capfd.readouterr().err
    )
    assert contents(tmp_path / "halves") == contents(tmp_path / "whole")
    assert (resumed.evaluation, resumed.best_step) == (report.evaluation, report.best_step)
    # Other held-out rows would have chosen otherwise.
    chats(tmp_path / "h.jsonl", 5, seed=7)
    with pytest.raises(ConfigError, match="eval_data holds something else"):
        run_finetune(world("halves", "resume=true", "force=true"), quiet=True)
    with pytest.raises(ConfigError, match="the adapter starts from other factors; seed is 0 there"):
        run_finetune(world("halves", "resume=true", "force=true", "seed=3"), quiet=True)


def test_the_best_checkpoint_is_stored_with_its_posterior_and_training_stops(
    world, tmp_path, monkeypatch, capfd, caplog
):
    """The second checkpoint has the lowest loss, and the fourth is the last of twelve steps."""

    def measuring(*losses):
        left = iter(losses)
        monkeypatch.setattr(evaluation, "measure", lambda *_, **__: {"loss": next(left)})

    changes = "posterior=ivon", "patience=2", "max_steps=12", "warmup_steps=12"
    measuring(2.0, 1.0, 3.0, 1.5)
    report = run_finetune(world("whole", *changes))
    said = "step 8/12  stopped by patience: no lower held-out loss in the last 2 evaluations"
    assert said in capfd.readouterr().err
    assert "the rate never reaches learning_rate 0.001" in caplog.text
    checkpoints = tmp_path / "whole.checkpoints"
    assert (report.best_step, report.steps, report.evaluation) == (4, 8, {"loss": 1.0})
    assert info_of(tmp_path / "whole").training["steps"] == 4
    stored = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    best = checkpoints / "checkpoint-4"
    assert stored == (best / "adapter_model.safetensors").read_bytes()
    assert stored != (checkpoints / "checkpoint-8" / "adapter_model.safetensors").read_bytes()
    states = torch.load(best / "optimizer.pt", weights_only=True)["state"].values()
    hessian = torch.cat([state["hess"].flatten() for state in states]).sort()[0]
    info, file = info_of(tmp_path / "whole"), "posterior/precision.posterior"
    precisions = [torch.from_numpy(t) for t in tiny.read(tmp_path / "whole" / file).values()]
    precision = torch.cat([tensor.flatten() for tensor in precisions]).sort()[0]
    inside = info.prior.precision / info.ess - info.training["damping"]
    torch.testing.assert_close(precision / info.ess, hessian + inside, rtol=1e-3, atol=1e-8)
    # Stopped while it stored the model: there is no step to make, and the same is stored.
    again = run_finetune(world("whole", *changes, "resume=true", "force=true"), quiet=True)
    assert again == report
    assert (tmp_path / "whole" / "adapter_model.safetensors").read_bytes() == stored
    whole = contents(tmp_path / "whole")
    measuring(2.0, 1.0)
    stopped(monkeypatch, world("halves", *changes), 6)
    measuring(3.0, 1.5)
    run_finetune(world("halves", *changes, "resume=true"), quiet=True)
    assert contents(tmp_path / "halves") == whole


def test_a_best_checkpoint_that_is_not_of_the_run_is_refused(world, tmp_path, monkeypatch):
    stopped(monkeypatch, world(), 4)
    file = tmp_path / "out.checkpoints" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["best_model_checkpoint"] = str(tmp_path / "m")
    size = file.stat().st_size
    file.write_text(json.dumps(state).ljust(size)[:size])
    with pytest.raises(CheckpointError, match=r"names '.*m' as the best checkpoint"):
        run_finetune(world("out", "resume=true"), quiet=True)


@pytest.mark.parametrize("left", [4, 6])
def test_a_best_checkpoint_that_is_gone_is_missed_before_any_step(
    world, tmp_path, monkeypatch, left
):
    """Else the last weights would be stored as the best ones."""
    losses = iter((1.0, 2.0, 3.0))
    monkeypatch.setattr(evaluation, "measure", lambda *_, **__: {"loss": next(losses)})
    run_finetune(world("out", "optimizer=adamw", "posterior=none"), quiet=True)
    checkpoints = tmp_path / "out.checkpoints"
    for step in (2, 6) if left == 4 else (2, 4):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    shutil.rmtree(tmp_path / "out")
    again = world("out", "optimizer=adamw", "posterior=none", "resume=true")
    with pytest.raises(CheckpointError, match=rf"-2' is the best .*-{left}' .* it is gone"):
        run_finetune(again, quiet=True)


def test_a_best_checkpoint_that_was_made_late_is_found(tmp_path):
    """As that of a sharded model, whose folder is not there yet when the Trainer looks for it."""
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(best_global_step=4, best_model_checkpoint="checkpoint-2")
    evaluation.BestCheckpoint().on_save(args, state, None)
    assert state.best_model_checkpoint == "checkpoint-2"
    (tmp_path / "checkpoint-4").mkdir()
    evaluation.BestCheckpoint().on_save(args, state, None)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize(
    ("measured", "patience", "expected"),
    [
        ([], 1, False),
        ([3, 2, 1], 1, False),
        ([1, 2], 1, True),
        ([1, 2], 2, False),
        ([1, 1, 1], 2, True),
        ([3, 1, 2, 0.5, 2], 2, False),
        ([math.nan, 1, 2], 2, False),
        ([math.nan, math.nan], 1, True),
    ],
)
def test_patience_counts_evaluations_since_the_best_one(measured, patience, expected):
    history = [entry for loss in measured for entry in ({"loss": 9.0}, {"eval_loss": loss})]
    assert has_lost_patience(history, patience) is expected


def test_the_held_out_loss_is_the_mean_over_all_scored_tokens(tmp_path, monkeypatch):
    """Not the mean of its batches' means, and with no dropout: in eval mode."""
    model = load_model(str(tiny_llama(tmp_path))).model.train()
    examples = documents(7)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        labels = torch.tensor(example["labels"][1:])
        logits = model(input_ids=ids).logits[0, :-1].detach()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != IGNORED).sum())
    for size in (1, 3, 100):
        found = measure(model, examples, Collate(2), size)
        assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert model.training
    # Ranks share the batches, of which the last one has none left here.
    sums = []
    monkeypatch.setattr(evaluation, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(evaluation, "own_number", lambda rank=rank: rank)
        monkeypatch.setattr(
            evaluation, "mean_over_ranks", lambda value: sums.append(value) or value
        )
        measure(model, examples, Collate(2), 3)
    assert sums[0] + sums[3] == pytest.approx(total, rel=1e-5)
    assert sums[2] + sums[5] == count


def test_a_classifier_tells_its_accuracy(tmp_path):
    data, held = texts(tmp_path / "t.jsonl"), texts(tmp_path / "h.jsonl", rows=20, seed=1)
    model = str(tiny_bert(tmp_path / "b"))
    best = {"save_steps": 5, "load_best": True, "learning_rate": 0.01}
    settings = config(tmp_path, data, model=model, eval_data=held, optimizer="adamw", **best)
    report = run_finetune(settings, quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    (batch,) = [Collate(2)(read_examples(held, loaded, label="label").examples)]
    with torch.no_grad():
        hits = loaded.model(**batch).logits.argmax(-1) == batch["labels"]
    assert report.evaluation["accuracy"] == pytest.approx(float(hits.float().mean()))
    assert report.best_step in (5, 10, 12)


def test_a_step_of_packed_rows_has_the_loss_of_unpacked_ones(world):
    """The Trainer divides by the tokens that are scored, of which the first of a row is none."""
    changes = "max_steps=1", "batch_size=40", "optimizer=adamw", "posterior=none", "eval_data=null"
    changes = *changes, "load_best=false", "patience=null", "save_steps=null"
    packed, apart = (
        run_finetune(world(f"pack-{how}", *changes, f"pack={how}"), quiet=True)
        for how in ("documents", "false")
    )
    assert packed.observations == apart.observations
    assert packed.loss == pytest.approx(apart.loss, rel=1e-5)


def test_activations_that_are_computed_again_change_nothing(world, tmp_path, monkeypatch):
    """The backward pass of the curvature goes through them, too."""
    common = "curvature_every=1", "max_steps=2", "ess=1e4", "posterior=ivon", "eval_data=null"
    common = *common, "load_best=false", "patience=null", "save_steps=null"
    mlp, calls = transformers.models.llama.modeling_llama.LlamaMLP, []
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda *a: calls.append(name) or forward(*a))
    for name in ("true", "false"):
        run_finetune(world(name, *common, f"gradient_checkpointing={name}"), quiet=True)
    assert contents(tmp_path / "true") == contents(tmp_path / "false")
    assert calls.count("true") > 1.5 * calls.count("false")


def test_an_attention_is_used_or_refused_by_name(world, monkeypatch):
    run = load_run(world("out", "attn_implementation=eager"), 1)
    assert run.loaded.model.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match="attn_implementation: flash_attention_2 cannot be used"):
        load_run(world("out", "attn_implementation=flash_attention_2"), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="flex_attention has no backward pass on a CPU"):
        load_run(world("out", "attn_implementation=flex_attention"), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["eval_data=null", "load_best=false"], "patience needs held-out rows"),
        (["save_steps=null"], "load_best chooses among checkpoints: give save_steps"),
        (["eval_steps=1"], "eval_steps is 1 and save_steps 2. Leave eval_steps out"),
        (
            ["scheduler=greedy", "eval_data=null", "load_best=false", "patience=null"],
            "scheduler: greedy follows the loss .* eval_data",
        ),
        (["scheduler=warmup_stable_decay"], "needs numbers of its own, .* one of linear, cosine,"),
        (["chat_template=none.jinja"], "none.jinja cannot be read"),
        (["data={path: c.jsonl, weight: 0}"], "data.weight: expected a number above 0"),
        (["data=[{path: c.jsonl, wait: 2}]"], "did you mean 'weight'"),
    ],
)
def test_settings_that_do_not_go_together_are_named(world, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_finetune(world("out", *changes), quiet=True)


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(world, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}")
    run = load_run(world("out", f"chat_template={template}"), 1)
    assert run.loaded.tokenizer.chat_template == template.read_text()  # which is stored
    assert not {token for e in run.examples for token in e["input_ids"]} & set(
        run.loaded.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
    )


@pytest.mark.slow
def test_a_compiled_model_trains_to_the_same_weights(world, tmp_path):
    """With the shipped settings, in which the backward pass is gone through twice."""
    for name in ("true", "false"):
        changes = "posterior=none", "load_best=false", "patience=null"
        run_finetune(world(name, *changes, f"torch_compile={name}"), quiet=True)
    found = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("true", "false")
    ]
    for ours, theirs in zip(*(model.parameters() for model in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
