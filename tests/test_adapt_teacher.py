"""The stored teacher says what the start says, and how much it leaves out is known exactly."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import kl_div

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.data import batches_of, load_run
from mergekit_bayes.adapt.objective import HELD, PARTS
from mergekit_bayes.adapt.refusals import refuse_model, refuse_start
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.stored import Stored, stored_teacher
from mergekit_bayes.adapt.teacher import FrozenCopy, run, scored
from mergekit_bayes.errors import ConfigError
from tests.finetuning import texts
from tests.tiny_models import tiny_bert, tiny_gpt2

REMOVE, MEMORY = PARTS.index("remove"), PARTS.index("memory")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "base", layers=1)
    tiny_bert(folder / "classifier", labels=3)
    texts(folder / "remove.jsonl", rows=9, seed=1)
    texts(folder / "memory.jsonl", rows=13, seed=2)
    return folder


def settings(world, **changes):
    return AdaptConfig.model_validate(
        {
            "model": str(world / "base"),
            "output": str(world / "out"),
            "remove": {"data": str(world / "remove.jsonl")},
            "memory": {"data": str(world / "memory.jsonl")},
            "memory_held_out": 0.3,
            "batch_size": 4,
            "posterior": "none",
            "teacher": "stored",
            **changes,
        }
    )


def moved(run):
    """The run's model, away from its start."""
    torch.manual_seed(0)
    for p in run.loaded.model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return run.loaded.model


def shuffled(adapted, part, examples):
    """One batch of a part's examples, in another order than they were stored in."""
    batches = list(batches_of(adapted, examples, part))
    whole = {
        name: torch.cat([b[name] for b in batches if len(b["part"]) == 4][::-1])
        for name in ("part", "index")
    }
    adapted_rows = [examples[i] for i in whole["index"].tolist()]
    (batch,) = batches_of(
        SimpleNamespace(
            loaded=adapted.loaded, config=SimpleNamespace(batch_size=len(adapted_rows))
        ),
        adapted_rows,
        part,
    )
    return {**batch, **whole}


@pytest.mark.parametrize("model", ["base", "classifier"])
def test_with_all_outputs_it_is_the_start_itself(world, model):
    adapted = load_run(settings(world, model=str(world / model), top_k=1000))
    stored, exact = stored_teacher(adapted), FrozenCopy(adapted.loaded.model)
    student = moved(adapted)
    parts = (
        (REMOVE, adapted.parts["remove"]),
        (MEMORY, adapted.parts["memory"]),
        (HELD, adapted.held.memory),
    )
    for part, examples in parts:
        batch = shuffled(adapted, part, examples)
        if part == REMOVE:
            torch.testing.assert_close(stored.log_likelihood(batch), exact.log_likelihood(batch))
            continue
        found = []
        for teacher in (stored, exact):
            logits, _ = scored(run(student, batch), batch["labels"], batch["input_ids"])
            loss = teacher.divergence(batch, logits)
            student.zero_grad()
            loss.sum().backward()
            found += [loss.detach(), *(p.grad.clone() for p in student.parameters())]
        for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert found[0].sum() > 0


@pytest.mark.parametrize("k", [1, 5, 22])
def test_what_is_left_out_is_the_divergence_inside_of_the_rest(k):
    """In float64, on 23 outputs, for a model that only hands on what it is given."""
    torch.manual_seed(k)
    z0, z = 3 * torch.randn(40, 23, dtype=torch.float64), torch.randn(40, 23, dtype=torch.float64)
    z0[0, 1:] = -1e4  # p_0 has nothing but one output
    labels = torch.arange(40) % 23
    batch = {
        "input_ids": torch.zeros(40, 1, dtype=torch.long),
        "attention_mask": torch.ones(40, 1),
        "labels": labels,
        "part": torch.full((40,), MEMORY),
        "index": torch.arange(40),
    }
    stored = Stored(Given(z0), [], [batch], k)
    z.requires_grad_()
    found = stored.divergence(batch, z)
    p0, log_p = z0.softmax(-1), z.log_softmax(-1)
    whole = kl_div(log_p, p0, reduction="none").sum(-1)
    rest = torch.ones_like(p0).scatter(-1, p0.topk(k).indices, 0.0)
    r0, r = (p0 * rest).sum(-1), (log_p.exp() * rest).sum(-1)
    inside = (rest * torch.special.xlogy(p0, (p0 / r0[:, None]))).sum(-1) - (
        p0 * rest * (log_p - r[:, None].log())
    ).sum(-1)
    torch.testing.assert_close((whole - found)[1:], inside[1:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0], whole[0])
    assert (whole - found > -1e-12).all()
    if k == 1:
        assert (whole - found)[1:].min() > 1e-3
    (gradient,) = torch.autograd.grad(found.sum(), z)
    binned = torch.zeros_like(p0)  # d KL_k / dz = p - p_0, with p_0's rest shared out as p's
    binned += torch.where(rest > 0, (r0 / r)[:, None] * log_p.exp().detach(), p0)
    torch.testing.assert_close(gradient, log_p.exp().detach() - binned.detach())


class Given(torch.nn.Module):
    """A classifier with these logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.w = logits, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits)


def test_a_run_with_it_holds_the_memory_and_stores_what_it_says(world, tmp_path, monkeypatch):
    monkeypatch.setattr("gc.collect", lambda *_: 0)
    losses = {}
    for name, changes in (("copy", {"teacher": "copy"}), ("stored", {"top_k": 1000})):
        config = settings(
            world, output=str(tmp_path / name), max_steps=3, until={"memory_kl": 1.0}, **changes
        )
        losses[name] = run_adapt(config, quiet=True)
    a, b = losses["copy"], losses["stored"]
    assert a.checks[-1].memory_kl == pytest.approx(b.checks[-1].memory_kl, rel=1e-3)
    assert a.reconstruction_error == pytest.approx(b.reconstruction_error, rel=1e-2)


def test_models_that_cannot_do_what_is_asked_are_refused(world):
    loaded = load_run(settings(world, model=str(world / "classifier"))).loaded
    assert loaded.model.config.problem_type == "single_label_classification"
    with pytest.raises(ConfigError, match=r"prompts: .* continues no text"):
        refuse_model(settings(world, prompts="p"), loaded)
    for problem in ("multi_label_classification", "regression"):
        loaded.model.config.problem_type = problem
        with pytest.raises(ConfigError, match=rf"config.json says {problem}.*one label of two"):
            refuse_model(settings(world), loaded)
    with pytest.raises(ConfigError, match="softmax, and this model has none"):
        Stored(loaded.model, [], [], 1)


def test_a_start_that_is_no_whole_model_is_refused(world, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    for model, base in (
        (str(adapter), "org/base"),
        (f"{world / 'base'}+{adapter}", world / "base"),
    ):
        message = f"`bmerge merge {base}+{adapter} -o WHOLE`"
        with pytest.raises(ConfigError, match=re.escape(message)):
            refuse_start(settings(world, model=model))
    with pytest.raises(ConfigError, match=r"no head of a classifier.*bmerge finetune"):
        refuse_start(settings(world, task="classification"))


def test_trained_weights_that_round_steps_away_are_told(world, caplog):
    for changes, is_told in (({}, True), ({"lora": {"r": 1}}, False)):
        caplog.clear()
        load_run(settings(world, **{"dtype": "bfloat16", **changes}))
        assert ("the trained weights are bfloat16" in caplog.text) == is_told
