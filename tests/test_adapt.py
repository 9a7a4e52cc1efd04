"""An adaptation from its settings to the stored model."""

import json

import pytest
import torch
import transformers
import yaml

from mergekit_bayes.adapt import AdaptConfig, AdaptReport
from mergekit_bayes.adapt.losses import kl_uniform
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.teacher import AdapterOff, FrozenCopy
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.models.encode import Collate, encode_rows
from mergekit_bayes.models.load import load_model
from tests.finetuning import texts
from tests.tiny_models import WORDS, tiny_bert, tiny_gpt2
from tests.two_ranks import found_by_two

STEPS = 8


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A language model and a classifier, and rows to remove, to add and to remember."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "base", layers=1)
    tiny_bert(folder / "classifier")
    texts(folder / "remove.jsonl", rows=24, seed=1)
    others = WORDS[9:]
    draws = torch.randint(len(others), (60, 7), generator=torch.Generator().manual_seed(2))
    lengths = [3 + i % 5 for i in range(60)]
    write(
        folder / "memory.jsonl",
        [
            {"text": " ".join(others[w] for w in row[:n])}
            for row, n in zip(draws.tolist(), lengths, strict=True)
        ],
    )
    texts(folder / "matched.jsonl", rows=10, seed=3)
    return folder


def settings(world, output, *, remove=True, memory=True, model="base", **changes):
    parts = {
        name: {"data": str(world / f"{name}.jsonl")}
        for name, used in (("remove", remove), ("memory", memory))
        if used
    }
    return AdaptConfig.model_validate(
        {
            "model": str(world / model),
            "output": str(output),
            "batch_size": 4,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "posterior": "none",
            "seed": 3,
            **parts,
            **changes,
        }
    )


def adapt(*args, **changes):
    return run_adapt(settings(*args, **changes), quiet=True)


def batch_of(loaded, path, label=None):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    return Collate(loaded.pad)(encode_rows(table, loaded, label=label))


@torch.no_grad()
def losses(model, batch):
    """Mean loss of an observation."""
    model.eval()
    return float(model(**batch).loss)


@torch.no_grad()
def divergence(start, model, batch):
    """Mean KL divergence of an observation, by hand."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    log_p, log_q = (m.eval()(**inputs).logits.log_softmax(-1) for m in (start, model))
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    if values.ndim == 2:
        values = values[:, :-1][batch["labels"][:, 1:] != -100]
    return float(values.mean())


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def adapted(world, tmp_path_factory):
    """A run that removes with a memory: its report and folder."""
    folder = tmp_path_factory.mktemp("adapted") / "out"
    return adapt(world, folder), folder


def test_removed_text_becomes_unlikely_and_the_memory_stays(world, adapted, tmp_path):
    """Without the memory the same steps move the model everywhere."""
    report, folder = adapted
    adapt(world, tmp_path / "free", memory=False)
    start, held, free = (load_model(str(f)) for f in (world / "base", folder, tmp_path / "free"))
    removed, memory = (batch_of(start, world / f"{name}.jsonl") for name in ("remove", "memory"))
    assert losses(held.model, removed) > losses(start.model, removed) + 0.5  # nats a token
    changes = [divergence(start.model, other.model, memory) for other in (held, free)]
    assert 0 < changes[0] < 0.1
    assert changes[1] > 4 * changes[0]
    tokens = int((removed["labels"] != -100).sum())
    assert (report.unit, report.steps, report.kept_step) == ("token", STEPS, STEPS)
    assert (report.removed, report.added, report.base) == (tokens, 0, 5 * tokens)
    assert report.kappa == pytest.approx(report.base / report.memory)
    assert 0 < report.reconstruction_error < 0.5
    assert report.estimator is None


def test_a_run_leaves_a_model_with_its_settings(world, adapted):
    report, folder = adapted
    assert report.path == folder
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]  # no checkpoints, no scratch
    assert not (folder / "posterior").exists()
    transformers.AutoTokenizer.from_pretrained(folder)
    stored = yaml.safe_load((folder / "adapt.yaml").read_text())
    again = AdaptConfig.model_validate(stored)
    assert again.model_copy(update={"model": ""}) == settings(world, folder, model="").model_copy(
        update={"model": ""}
    )


def test_a_run_says_what_its_memory_is_made_of(world, tmp_path, capsys):
    run_adapt(settings(world, tmp_path / "out", max_steps=1, memory_self_generated=3))
    told = capsys.readouterr().err
    assert "memory.jsonl and 3 texts that the model wrote; 57 examples, 6 held out" in told


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes(world, adapted, tmp_path):
    adapt(world, tmp_path / "out")
    _, folder = adapted
    for other, equal in ((tmp_path / "out", True), (world / "base", False)):
        same = (folder / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()
        assert same == equal


def test_added_text_becomes_likely_without_removed_rows_or_a_memory(world, tmp_path):
    report = adapt(
        world,
        tmp_path / "out",
        remove=False,
        memory=False,
        add={"data": str(world / "remove.jsonl")},
    )
    start, after = (load_model(str(f)) for f in (world / "base", tmp_path / "out"))
    added = batch_of(start, world / "remove.jsonl")
    assert losses(after.model, added) < losses(start.model, added) - 0.5
    assert (report.removed, report.memory, report.kappa) == (0, 0, 0)
    assert report.added == int((added["labels"] != -100).sum())
    assert report.reconstruction_error is None


def test_a_classifier_unlearns_its_rows_beside_a_memory_without_labels(world, tmp_path):
    report = adapt(world, tmp_path / "out", model="classifier", max_steps=16)
    start, after = (load_model(str(f)) for f in (world / "classifier", tmp_path / "out"))
    assert type(after.model) is type(start.model)
    removed = batch_of(start, world / "remove.jsonl", label="label")
    memory = batch_of(start, world / "memory.jsonl")
    assert losses(after.model, removed) > losses(start.model, removed) + 0.1
    assert divergence(start.model, after.model, memory) < 0.05
    assert (report.unit, report.removed) == ("example", 24)


def test_an_adapter_is_trained_against_the_model_without_it(world, tmp_path):
    """The stored adapter changes the base as much as the run did; the base is not copied."""
    lora = {"r": 2, "target_modules": ["c_attn", "c_fc"]}
    report = adapt(world, tmp_path / "out", lora=lora, max_steps=16)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    start, after = (load_model(str(f)) for f in (world / "base", tmp_path / "out"))
    removed, memory = (batch_of(start, world / f"{name}.jsonl") for name in ("remove", "memory"))
    assert losses(after.model, removed) > losses(start.model, removed) + 0.2
    assert 0 < divergence(start.model, after.model, memory) < 0.1
    assert report.reconstruction_error is not None
    with after.model.disable_adapter():
        assert losses(after.model, removed) == losses(start.model, removed)


def test_an_adapter_that_is_off_and_a_frozen_copy_are_the_same_start(world):
    import peft

    loaded = load_model(str(world / "base"))
    batch = batch_of(loaded, world / "remove.jsonl")
    copied = FrozenCopy(loaded.model)
    start = copied.log_likelihood(batch)
    assert -float(start.mean()) == pytest.approx(losses(loaded.model, batch), rel=1e-6)
    model = peft.get_peft_model(
        loaded.model,
        peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False),
    )
    assert abs(losses(model, batch) + float(start.mean())) > 1e-3
    off = AdapterOff(model)
    torch.testing.assert_close(off.log_likelihood(batch), start)
    logits = torch.zeros(len(start), model.config.vocab_size, requires_grad=True)
    divergences = [teacher.divergence(batch, logits) for teacher in (off, copied)]
    torch.testing.assert_close(*divergences)
    assert divergences[0].requires_grad
    assert losses(model, batch) != -float(start.mean())  # the adapter is on again


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_column": "prose"}, MismatchError, "'prose'"),
        ({"model": "classifier", "label_column": "class"}, MismatchError, "'class'"),
        ({"remove": False}, ConfigError, "nothing to do"),
        ({"resume": True}, ConfigError, "only with save_steps"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_leaves_nothing(
    world, tmp_path, changes, error, message
):
    with pytest.raises(error, match=message):
        adapt(world, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_stored_logits_tell_the_same_reconstruction_error_as_a_copy(world, adapted, tmp_path):
    """A stored teacher knows examples by their places, in whatever order they come."""
    report = adapt(world, tmp_path / "out", teacher="stored", top_k=len(WORDS) + 4)
    expected = adapted[0].reconstruction_error
    assert report.reconstruction_error == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("removal", ["ascent", "kl_uniform", "contrast"])
def test_every_removal_does_what_it_is_for(world, tmp_path, removal):
    contrast = {"data": str(world / "matched.jsonl")} if removal == "contrast" else None
    adapt(world, tmp_path / "out", removal=removal, contrast=contrast, memory=False)
    start, after = (load_model(str(f)) for f in (world / "base", tmp_path / "out"))
    removed = batch_of(start, world / "remove.jsonl")
    if removal == "contrast":  # the matched rows are like the removed ones here, so they hold it
        adapt(world, tmp_path / "npo", memory=False)
        assert losses(after.model, removed) < losses(
            load_model(str(tmp_path / "npo")).model, removed
        )
        return
    if removal == "ascent":
        assert losses(after.model, removed) > losses(start.model, removed) + 0.5
        return
    uniform = [
        kl_uniform(teacher._logits(removed)[0], "categorical").mean()
        for teacher in (FrozenCopy(start.model), FrozenCopy(after.model))
    ]
    assert uniform[1] < 0.5 * uniform[0]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["base", "classifier", "adapter"])
def test_an_interrupted_run_leaves_no_output_and_resumes_to_the_same_bytes(
    world, tmp_path, monkeypatch, task
):
    model = "classifier" if task == "classifier" else "base"
    changes = {"model": model, "save_steps": 2, "gradient_accumulation": 2}
    file = "model.safetensors"
    if task == "adapter":
        changes["lora"], file = {"r": 2, "dropout": 0.2}, "adapter_model.safetensors"
    whole = adapt(world, tmp_path / "whole", **changes)
    step, calls = transformers.Trainer.training_step, [0]

    def interrupted(self, *args, **kwargs):
        calls[0] += 1
        if calls[0] == 2 * 4 + 2:  # in the second half of the fifth step
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            adapt(world, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"npo_beta is 0\.1 there and 0\.2 here"):
        adapt(world, tmp_path / "out", resume=True, npo_beta=0.2, **changes)
    calls[0] = 100
    report = adapt(world, tmp_path / "out", resume=True, **changes)
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert report.model_copy(update={"path": whole.path}) == whole
    assert not (tmp_path / "out.checkpoints").exists()


def child(folder):
    """What each of two ranks does; rank 0 writes what the test reads."""
    from mergekit_bayes import ranks

    report = adapt(folder, folder / "two", batch_size=2, num_processes=2, max_steps=4)
    found = [None, None]
    record = {"world": ranks.world(), "report": report.model_dump(mode="json")}
    torch.distributed.all_gather_object(found, record)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_with_their_batches_together(world):
    """Up to rounding: the sums of a step are made in another order."""
    first, second = found_by_two("tests.test_adapt", world)
    assert first == second
    one = adapt(world, world / "one", max_steps=4)
    found = AdaptReport.model_validate(first["report"])
    assert found.steps == one.steps == 4
    assert (found.removed, found.memory, found.kappa) == (one.removed, one.memory, one.kappa)
    start, alone, both = (
        weights(load_model(str(world / name)).model) for name in ("base", "one", "two")
    )
    moved = (alone - start).norm()
    assert (both - alone).norm() < 0.02 * moved  # Adam divides by gradients near 0
    assert moved > 0
