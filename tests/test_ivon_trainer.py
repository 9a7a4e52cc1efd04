"""`IvonTrainer` chooses as a fine-tune does and stores what a merge takes; so can loops."""

import json
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune import run_finetune
from mergekit_bayes.lora import INITIAL_A
from mergekit_bayes.models.encode import Collate, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import identify, open_posterior
from mergekit_bayes.trainer import (
    IvonTrainer,
    add_logit_curvature,
    ivon_settings,
    save_trained,
    unwrap,
)
from mergekit_bayes.trainer import chosen as chosen_module
from mergekit_bayes.trainer.choices import initial_a
from tests import finetuning, tiny
from tests.finetuning import config, info_of
from tests.tiny_models import tiny_bert, tiny_gpt2
from tests.trainers import ROWS, Trainer
from tests.two_ranks import found_by_two

data = finetuning.data


def trainer(tmp_path, base=None, rows=None, kind=IvonTrainer, model=None, ivon=None, **arguments):
    base = base or tiny_gpt2(tmp_path / "base")
    loaded = load_model(str(base))
    settings = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "seed": 3,
        "max_steps": 3,
        "learning_rate": 1e-4,
        **arguments,
    }
    options = {} if ivon is None else {"ivon": ivon}
    return kind(
        model=loaded.model if model is None else model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=encode_rows(ROWS, loaded) if rows is None else rows,
        data_collator=Collate(2),
        **options,
    )


def test_it_trains_as_bmerge_finetune_does(tmp_path, data):
    """The same settings, and with the same order of the rows the same bits."""
    run_finetune(config(tmp_path, data, max_steps=3, posterior="ivon"), quiet=True)
    loaded = load_model(str(tmp_path / "base"))
    texts = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    t = trainer(tmp_path, tmp_path / "base", encode_rows({"text": texts}, loaded))
    t.train()
    t.save_model(str(tmp_path / "mine"))
    ours, mine = info_of(tmp_path / "out"), info_of(tmp_path / "mine")
    for name in ("lr", "ess", "beta1", "beta2", "clip_radius", "weight_decay", "curvature_every"):
        assert mine.training[name] == ours.training[name], name
    for name in ("estimator", "unit", "observations", "ess", "prior", "anchor", "mean", "base"):
        assert getattr(mine, name) == getattr(ours, name), name
    assert mine.training["loss"] == ours.training["loss"]
    for file in ("model.safetensors", "posterior/precision.posterior"):
        stored, expected = tiny.read(tmp_path / "mine" / file), tiny.read(tmp_path / "out" / file)
        for name, tensor in expected.items():
            np.testing.assert_array_equal(stored[name], tensor)


def test_the_log_holds_the_rate_that_was_given(tmp_path):
    t = trainer(tmp_path, learning_rate=3e-4, logging_steps=1)
    t.train()
    assert unwrap(t.optimizer).defaults["lr"] == 0.3
    rates = [entry["learning_rate"] for entry in t.state.log_history if "loss" in entry]
    assert rates == pytest.approx([3e-4, 2e-4, 1e-4])
    assert t.args.max_grad_norm == 0


def test_settings_that_are_given_are_taken_and_the_rest_is_chosen(tmp_path):
    given = {"curvature": "price", "ess": 1e6, "beta2": 0.95, "restore": "redraw"}
    t = trainer(tmp_path, ivon=given, max_steps=1)
    t.train()
    optimizer = unwrap(t.optimizer)
    group = optimizer.param_groups[0]
    assert (group["ess"], group["beta2"], optimizer.curvature) == (1e6, 0.95, "price")
    assert (optimizer.restore, group["clip_radius"], group["seed"]) == ("redraw", 1e-3, 3)
    t.save_model(str(tmp_path / "tuned"))
    assert info_of(tmp_path / "tuned").estimator == "ivon"


def test_an_adapters_posterior_lies_beside_it(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path / "base")))
    settings = peft.LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(loaded.model, settings)
    start = initial_a(model)
    t = trainer(tmp_path, tmp_path / "base", model=model)
    t.train()
    t.save_model(str(tmp_path / "tuned"))
    weights = tiny.read(tmp_path / "tuned" / "adapter_model.safetensors")
    precision = tiny.read(tmp_path / "tuned" / "posterior" / "precision.posterior")
    assert {n: p.shape for n, p in precision.items()} == {n: w.shape for n, w in weights.items()}
    assert info_of(tmp_path / "tuned").training[INITIAL_A] == start != initial_a(t.model)


def test_a_classifier_counts_examples_and_its_loss_is_the_mean_of_the_step(tmp_path):
    base = tiny_bert(tmp_path / "bert")
    loaded = load_model(str(base))
    texts = ["the cat sat", "a dog ran", "good film"] * 4
    rows = [
        {**row, "labels": i % 2}
        for i, row in enumerate(
            encode_rows({"text": texts, "label": [0, 1, 0] * 4}, loaded, label="label")
        )
    ]
    t = trainer(tmp_path, base, rows)
    t.train()
    t.save_model(str(tmp_path / "tuned"))
    info = info_of(tmp_path / "tuned")
    assert (info.unit, info.observations) == ("example", 12)


def test_of_many_rows_a_part_is_counted(tmp_path, monkeypatch):
    exact = trainer(tmp_path, max_steps=1)
    exact.train()
    monkeypatch.setattr(chosen_module, "_COUNTED", 8)
    part = trainer(tmp_path, tmp_path / "base", max_steps=1)
    part.train()
    assert part.observations == exact.observations  # the rows repeat after four
    counted = [len(row["input_ids"]) - 1 for row in part.train_dataset]
    assert exact.observations == (sum(counted), "token")


@pytest.mark.slow
def test_counting_changes_nothing_of_the_training(tmp_path):
    """A collator that draws would otherwise give other masks than without a count."""

    class Draws(Collate):
        def __call__(self, rows):
            torch.rand(1)
            return super().__call__(rows)

    states = []
    for ess in ({}, {"ess": 1e9}):  # with an ess of one's own nothing is counted
        t = trainer(tmp_path, tmp_path / "base" if states else None, ivon=ess, max_steps=1)
        t.data_collator = Draws(2)
        t.train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": 0.01}, r"weight_decay: 0\.01 has no effect on IVON.*prior precision"),
        ({"max_grad_norm": 0.5}, r"max_grad_norm: 0\.5 has no effect on IVON.*clip_radius"),
        ({"optim": "adafactor"}, r"optim: adafactor has no effect"),
        ({"adam_beta2": 0.95}, r"adam_beta2: 0\.95 has no effect"),
        (
            {"learning_rate": 0.1},
            r"learning_rate: expected at most 0\.01.*is learning_rate: 0\.0001",
        ),
        ({"ivon": {"lr": 0.1}}, r"lr: give learning_rate"),
        ({"ivon": {"weight_decy": 1}}, r"no setting 'weight_decy'; did you mean 'weight_decay'"),
    ],
)
def test_arguments_that_mean_something_else_are_refused(tmp_path, arguments, message):
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **arguments).train()


@pytest.mark.slow
def test_data_without_a_length_need_an_ess(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path / "base")))
    rows = datasets.IterableDataset.from_generator(lambda: iter(encode_rows(ROWS, loaded)))
    with pytest.raises(ConfigError, match="no length"):
        trainer(tmp_path, tmp_path / "base", rows).train()
    t = trainer(tmp_path, tmp_path / "base", rows, ivon={"ess": 1e9})
    t.train()
    save_trained(t.model, unwrap(t.optimizer), tmp_path / "tuned", observations=100)
    assert info_of(tmp_path / "tuned").observations == 100


def test_the_published_settings_of_the_mixin_stay_as_they_are(tmp_path):
    t = trainer(tmp_path, kind=Trainer, max_grad_norm=0.0)
    t.optimizer_cls_and_kwargs = IVON, {"lr": 0.1, "ess": 1e4}
    t.train()
    assert unwrap(t.optimizer).curvature == "price"


class Small(torch.nn.Module):
    """A network of torch alone, with tied weights and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 4, bias=False)
        self.second = torch.nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, inputs):
        return self.second(self.norm(self.first(inputs)))


def trained(model, steps=3, **given):
    torch.manual_seed(1)
    optimizer = IVON(model.parameters(), **ivon_settings(model, 64, steps, **given))
    for _ in range(steps):
        inputs = torch.randn(8, 4)
        with optimizer.sampled_params(train=True):
            logits = model(inputs)
            add_logit_curvature(optimizer, logits)
            torch.nn.functional.cross_entropy(logits, torch.arange(8) % 4).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("wrapped", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_module_of_torch_is_stored_with_its_posterior(tmp_path, wrapped):
    torch.manual_seed(0)
    model = Small()
    optimizer = trained(model)
    given = torch.compile(model) if wrapped else model
    save_trained(given, optimizer, tmp_path / "m", observations=64, unit="example")
    stored = tiny.read(tmp_path / "m" / "model.safetensors")
    norm = {f"norm.{n}" for n in model.norm.state_dict()} - {"norm.num_batches_tracked"}
    assert set(stored) == {"first.weight"} | norm  # those of floats
    expected = optimizer.precision(model.named_parameters())
    written = tiny.read(tmp_path / "m" / "posterior" / "precision.posterior")
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(written[name], tensor.numpy())
    with (
        open_posterior(str(tmp_path / "m")) as posterior,
        SafetensorsSource([tmp_path / "m" / "model.safetensors"]) as source,
    ):
        assert posterior.info.mean == identify(source)
        group = optimizer.param_groups[0]
        assert posterior.info.prior.precision == group["ess"] * group["weight_decay"]


def test_nothing_half_written_is_left_and_nothing_is_replaced_unasked(tmp_path):
    model = Small()
    optimizer = trained(model)
    save_trained(model, optimizer, tmp_path / "m", observations=64, unit="example")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        save_trained(model, optimizer, tmp_path / "m", observations=64)
    optimizer.state[model.first.weight]["hess"][0, 0] = torch.nan
    with pytest.raises(Exception, match="not finite"):
        save_trained(model, optimizer, tmp_path / "m", observations=64, force=True)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_posterior_that_no_record_describes_is_refused(tmp_path):
    model = Small()
    for optimizer in (
        trained(model, adapt_prior=True),
        trained(model, prior={model.first.weight: (None, torch.ones(4, 4))}),
    ):
        with pytest.raises(ConfigError, match="not one number for all weights"):
            save_trained(model, optimizer, tmp_path / "m", observations=64)
    with pytest.raises(ConfigError, match="no precision of any parameter"):
        save_trained(Small(), trained(Small()), tmp_path / "m", observations=64)


def test_logits_of_tokens_need_labels_and_draws_are_made_where_they_are_due():
    model = torch.nn.Linear(3, 5)
    optimizer = IVON(model.parameters(), **ivon_settings(model, 64, 100, curvature_every=2))
    labels = torch.tensor([[1, 2, -100, 4]])
    for step in range(3):
        with optimizer.sampled_params(train=True):
            logits = model(torch.ones(1, 4, 3))
            if step == 0:
                with pytest.raises(ValueError, match=r"need labels of shape \(1, 4\)"):
                    add_logit_curvature(optimizer, logits)
            add_logit_curvature(optimizer, logits, labels)
            logits.sum().backward()
        seen = optimizer._transient.observations
        assert seen == (2 if step % 2 == 0 else 0)  # two of the last three tokens are scored
        optimizer.step()
    assert {int(state["estimates"]) for state in optimizer.state.values()} == {2}


def child(folder):
    """Each of two ranks trains a half of every parameter; rank 0 says what it has stored."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 4))
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = trained(model)
    whole = {n: p.full_tensor() for n, p in optimizer.precision(model.named_parameters()).items()}
    mean = {n: p.full_tensor() for n, p in model.named_parameters()}
    save_trained(model, optimizer, folder / "m", observations=64, unit="example")
    errors = []
    try:
        save_trained(model, optimizer, folder / "m", observations=64)
    except CheckpointError as error:
        errors.append(str(error))
    found = [None, None]
    dist.all_gather_object(found, {"world": dist.get_world_size(), "errors": errors})
    if dist.get_rank() == 0:
        stored = tiny.read(folder / "m" / "model.safetensors")
        precision = tiny.read(folder / "m" / "posterior" / "precision.posterior")
        for name, tensor in mean.items():
            np.testing.assert_array_equal(stored[name], tensor.detach().numpy())
            np.testing.assert_array_equal(precision[name], whole[name].numpy())
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_shards_are_gathered_and_an_error_is_one_on_all_ranks(tmp_path):
    for found in found_by_two("tests.test_ivon_trainer", tmp_path):
        assert len(found["errors"]) == 1
        assert "exists" in found["errors"][0]
