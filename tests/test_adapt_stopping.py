"""What ends an adaptation, which weights it leaves, and what it keeps on the way."""

import math
from types import SimpleNamespace

import pytest
import torch
import transformers

from mergekit_bayes.adapt import AdaptConfig, Check, Until
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.stopping import Stopping, progress
from mergekit_bayes.errors import CheckpointError
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, rows to remove and rows of a memory."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "base", layers=1)
    texts(folder / "remove.jsonl", rows=12, seed=1)
    texts(folder / "memory.jsonl", rows=20, seed=2)
    return folder


def settings(world, tmp_path, **changes):
    return AdaptConfig.model_validate(
        {
            "model": str(world / "base"),
            "output": str(tmp_path / "out"),
            "remove": {"data": str(world / "remove.jsonl")},
            "memory": {"data": str(world / "memory.jsonl")},
            "batch_size": 4,
            "max_steps": 6,
            "seed": 3,
            "posterior": "none",
            **changes,
        }
    )


def weights(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_kept_step_is_the_model_that_a_shorter_run_leaves(world, tmp_path):
    run_adapt(settings(world, tmp_path, max_steps=3, keep_steps=[1, 2]), quiet=True)
    shorter = settings(world, tmp_path, max_steps=2, output=str(tmp_path / "shorter"))
    run_adapt(shorter, quiet=True)
    kept = tmp_path / "out.steps"
    assert sorted(p.name for p in kept.iterdir()) == ["1", "2"]
    assert torch.equal(weights(kept / "2"), weights(tmp_path / "shorter"))
    assert not torch.equal(weights(kept / "2"), weights(tmp_path / "out"))
    assert (kept / "2" / "adapt.yaml").is_file()
    assert (kept / "2" / "tokenizer.json").is_file()
    assert not (kept / "2" / "posterior").exists()


def test_kept_steps_of_an_earlier_run_are_neither_mixed_nor_lost_unasked(world, tmp_path):
    kept = tmp_path / "out.steps"
    run_adapt(settings(world, tmp_path, max_steps=1, keep_steps=[1]), quiet=True)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"out\.steps' exists, where keep_steps stores"):
        run_adapt(settings(world, tmp_path, max_steps=2, keep_steps=[2]), quiet=True)
    with pytest.raises(CheckpointError, match="would replace"):
        run_adapt(
            settings(world, tmp_path, model=str(kept / "1"), keep_steps=[2], force=True), quiet=True
        )
    (kept / "notes").mkdir()
    run_adapt(settings(world, tmp_path, max_steps=2, keep_steps=[2], force=True), quiet=True)
    assert sorted(p.name for p in kept.iterdir()) == ["2", "notes"]


def share(toxic, step=1, rise=None, kl=None):
    return Check(step=step, toxic_share=toxic, held_out_rise=rise, memory_kl=kl)


def test_progress_is_the_share_of_the_way_to_the_nearest_goal():
    toxic, rise = Until(toxic_share=0.05), Until(held_out_rise=0.2)
    both = Until(toxic_share=0.05, held_out_rise=0.2)
    start = share(0.25, 0, rise=0.0)
    assert progress(share(0.15), start, toxic) == pytest.approx(0.5)
    assert progress(share(0.05), start, toxic) == 1
    assert progress(share(0.04), share(0.05, 0), toxic) == 1  # no way to go
    assert progress(share(0.3), start, toxic) < 0
    assert progress(share(None, rise=0.1), start, rise) == pytest.approx(0.5)
    assert progress(share(0.15, rise=0.15), start, both) == pytest.approx(0.75)
    assert progress(share(None, kl=0.1), start, Until(memory_kl=0.2)) is None


class Scripted:
    """Stands for `Checks`: finds what the test says, and counts how often it was asked."""

    def __init__(self, found):
        self.found, self.asked = found, 0
        self.autocast = None

    def __call__(self, step):
        self.asked += 1
        return self.found[step].model_copy(update={"step": step})

    def state(self):
        return 1.5

    def restore(self, state):
        assert state == 1.5


class OneWeight(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.zeros(1), requires_grad=False)


def ended(found, **until):
    """The steps made, the weight at the end (that of its step) and the outcome."""
    model = OneWeight()
    config = AdaptConfig.model_validate(
        {"model": "m", "output": "o", "check_every": 10, "until": until, "prompts": "p"}
    )
    run = SimpleNamespace(config=config, loaded=SimpleNamespace(model=model))
    stopping = Stopping(run, Scripted(found), SimpleNamespace(refused=0), None)
    stopping.begin(None)
    step = 0
    while not stopping.is_over and step < max(found):
        step += 1
        model.w.data += 1
        control = SimpleNamespace(should_training_stop=step == max(found))
        stopping.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert control.should_training_stop == (stopping.is_over or step == max(found))
    outcome = stopping.finish(step)
    assert outcome.kept_step == model.w.item()
    return step, outcome.kept_step, outcome.reached


def test_a_goal_ends_the_run_and_the_best_check_is_kept(caplog):
    """Toxic shares by step; a check comes every tenth step and after the last one."""
    falls = {0: share(0.3), 10: share(0.1), 20: share(0.04), 30: share(0.0)}
    assert ended(falls, toxic_share=0.05) == (20, 20, True)
    assert not caplog.messages
    stalls = {0: share(0.3), 10: share(0.1), 20: share(0.1), 25: share(0.2)}
    assert ended(stalls, toxic_share=0.05) == (25, 10, False)
    assert "no goal was reached within the budget and 25 steps" in caplog.text
    assert "check at step 10  toxic 10.0%" in caplog.text
    assert ended({0: share(0.04), 10: share(0.0)}, toxic_share=0.05) == (0, 0, True)
    assert "nothing is trained" in caplog.text
    rises = {0: share(None, rise=0), 10: share(None, rise=-1), 20: share(None, rise=-2)}
    assert ended(rises, held_out_rise=0.2) == (20, 0, False)


def test_a_budget_ends_the_run_and_the_last_check_within_it_is_kept(caplog):
    kls = {0: 0.0, 10: 0.01, 20: 0.02, 30: 0.04, 40: 0.0}
    found = {step: share(0.3 - step / 100, kl=kl) for step, kl in kls.items()}
    assert ended(found, memory_kl=0.03) == (30, 20, None)
    assert ended(found, memory_kl=0.05) == (40, 40, None)
    # Within the budget the best counts, and a goal reached beyond it does not.
    assert ended(found, memory_kl=0.03, toxic_share=0.01) == (30, 20, False)
    assert ended(found, memory_kl=0.03, toxic_share=0.1) == (20, 20, True)
    found[30] = share(0.0, kl=math.nan)
    assert ended(found, memory_kl=0.03, toxic_share=0.01) == (30, 20, False)
