"""What ends an adaptation, which weights it leaves, and what it keeps on the way."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import mergekit_bayes.adapt.run as run_module
from mergekit_bayes import ranks
from mergekit_bayes.adapt import AdaptConfig, Check, Until
from mergekit_bayes.adapt.checks import Checks
from mergekit_bayes.adapt.data import load_run
from mergekit_bayes.adapt.leap import LeapGuard
from mergekit_bayes.adapt.objective import PARTS
from mergekit_bayes.adapt.run import run_adapt
from mergekit_bayes.adapt.stopping import Stopping, progress
from mergekit_bayes.adapt.teacher import FrozenCopy
from mergekit_bayes.errors import CheckpointError
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2
from tests.two_ranks import found_by_two


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, rows to remove and rows of a memory."""
    folder = tmp_path_factory.mktemp("world")
    tiny_gpt2(folder / "base", layers=1)
    texts(folder / "remove.jsonl", rows=12, seed=1)
    texts(folder / "memory.jsonl", rows=20, seed=2)
    return folder


@pytest.fixture(autouse=True)
def without_collection(monkeypatch):
    """Accelerate collects garbage before every run, which takes longer than such a run."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


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
    assert "no goal was reached within 25 steps. The check" in caplog.text
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


def checked(world, tmp_path, **changes):
    """Settings with all three measurements."""
    (world / "words.txt").write_text("bad\ndull\n")
    return settings(
        world,
        tmp_path,
        **{
            "prompts": str(world / "memory.jsonl"),
            "scorer": f"words:{world / 'words.txt'}",
            "prompt_rows": 4,
            "new_tokens": 4,
            "continuations": 2,
            "check_every": 2,
            "memory_held_out": 0.2,
            **changes,
        },
    )


def test_checks_measure_and_change_nothing(world, tmp_path):
    config = checked(world, tmp_path, until={"held_out_rise": 1e9}, max_steps=3)
    report = run_adapt(config, quiet=True)
    assert [check.step for check in report.checks] == [0, 2, 3]
    assert (report.steps, report.kept_step, report.reached) == (3, 3, False)
    first, *_, last = report.checks
    assert (first.held_out_rise, first.memory_kl) == (0, pytest.approx(0, abs=1e-7))
    # The same by the models themselves.
    base, adapted = (
        transformers.AutoModelForCausalLM.from_pretrained(f) for f in (world / "base", report.path)
    )
    run = load_run(config)
    with torch.no_grad():
        rise = mean_loss(adapted, run.held.removed) - mean_loss(base, run.held.removed)
        kl = np.mean(np.concatenate([kls(base, adapted, e) for e in run.held.memory]))
    assert last.held_out_rise == pytest.approx(rise, rel=1e-4)
    assert last.memory_kl == pytest.approx(kl, rel=1e-3)
    assert last.toxic_share * 8 == round(last.toxic_share * 8)
    rows = (world / "remove.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(rows[:-1]))  # a tenth was held out
    run_adapt(
        settings(
            world,
            tmp_path,
            remove={"data": str(tmp_path / "part.jsonl")},
            output=str(tmp_path / "plain"),
            memory_held_out=0.2,
            max_steps=3,
        ),
        quiet=True,
    )
    assert torch.equal(weights(tmp_path / "plain"), weights(tmp_path / "out"))


def test_a_check_has_the_same_noise_every_time_and_leaves_none_behind(world, tmp_path):
    run = load_run(checked(world, tmp_path, until={"toxic_share": 0.5}, continuations=20))
    model = run.loaded.model.train()
    measure = Checks(run, FrozenCopy(model))
    before = torch.get_rng_state()
    measure._scorer = measure._scorer._replace(
        score=lambda texts: [float(torch.rand(()) < 0.0 or "bad" in text) for text in texts]
    )
    first, again = measure(0), measure(0)
    assert first == again
    assert 0 < first.toxic_share < 1
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def logits_of(model, example):
    return model(torch.tensor([example["input_ids"]])).logits[0, :-1].double()


def mean_loss(model, examples):
    losses = [
        torch.nn.functional.cross_entropy(
            logits_of(model, e), torch.tensor(e["labels"][1:]), reduction="none"
        )
        for e in examples
    ]
    return float(torch.cat(losses).mean())


def kls(base, model, example):
    p, q = (logits_of(m, example).log_softmax(-1) for m in (base, model))
    return (p.exp() * (p - q)).sum(-1).numpy()


def stop_before(monkeypatch, step):
    """Interrupt the run in the gradient of a step."""
    original = transformers.Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_checks(world, tmp_path, monkeypatch):
    """With leaps, and a best check before the checkpoint from which it goes on."""
    changes = {
        "until": {"toxic_share": 1e-9},
        "learning_rate": 0.02,
        "leap": 1.5,
        "max_steps": 12,
        "check_every": 3,
        "save_steps": 5,
    }
    whole = run_adapt(checked(world, tmp_path, output=str(tmp_path / "a"), **changes), quiet=True)
    assert whole.refused_steps > 1
    assert whole.kept_step < whole.steps
    config = checked(world, tmp_path, output=str(tmp_path / "b"), resume=True, **changes)
    with monkeypatch.context() as patch:
        stop_before(patch, whole.steps)
        with pytest.raises(KeyboardInterrupt):
            run_adapt(config, quiet=True)
    resumed = run_adapt(config, quiet=True)
    assert resumed.model_copy(update={"path": whole.path}) == whole
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("leap", [4.0, 1e30])
def test_a_leap_of_the_memorys_divergence_is_undone(world, tmp_path, leap, caplog):
    config = checked(
        world,
        tmp_path,
        prompt_rows=1,
        leap=leap,
        learning_rate=0.5,
        max_steps=20,
        check_every=20,
    )
    report = run_adapt(config, quiet=True)
    if leap > 1e9:
        assert report.refused_steps == 0
        assert report.checks[-1].memory_kl > 0.5
        return
    assert 3 <= report.refused_steps < 10
    assert 0 < report.checks[-1].memory_kl < 0.1
    assert caplog.text.count("is undone: it takes the KL divergence") == report.refused_steps


class Stubbed(LeapGuard):
    """A guard to whom every example has, before a step, the divergence that was seen last."""

    def _divergence(self, examples):
        return self.seen

    def see(self, model, divergence):
        """Make a micro-batch with this divergence."""
        self.seen = self._recent[-1] if self._recent else 0.0
        self._objective = lambda *_: SimpleNamespace(
            means={"memory": torch.tensor(float(divergence))}
        )
        self(model, {"part": torch.tensor([PARTS.index("memory")])})


def refused(found):
    """The steps that the guard undoes when it finds these divergences, one a step."""
    model = OneWeight()
    optimizer = torch.optim.SGD([model.w], lr=1.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    run = SimpleNamespace(
        config=SimpleNamespace(leap=4.0, keep_steps=(), has_checks=False),
        loaded=SimpleNamespace(model=model),
    )

    guard, steps = Stubbed(run, None, None), []
    for step, divergence in enumerate(found):
        guard.see(model, divergence)
        state, before = SimpleNamespace(global_step=step), guard.refused
        guard.on_pre_optimizer_step(None, state, None, optimizer=optimizer, lr_scheduler=rates)
        steps += [step] * (guard.refused - before)
    return steps


def test_what_is_a_leap():
    assert refused([0, 0.02, 0.09]) == [2]
    assert refused([0, 0.02, 0.07]) == []
    assert refused([0, 0.001, 0.039, 0.041, 0.1]) == []  # of the floor, and then of the mean
    assert refused([0, 0.041]) == [1]
    assert refused([0, math.nan]) == [1]
    assert refused([0, 0.02, 0.09, 0.09]) == [2]  # the weights before the step are not undone
    assert refused([0.019 * t**2 for t in range(12)]) == []


def test_an_undone_step_leaves_weights_and_optimizer_as_they_were_before_it():
    model = OneWeight()
    optimizer = torch.optim.AdamW([model.w], lr=0.5, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    run = SimpleNamespace(
        config=SimpleNamespace(leap=4.0, keep_steps=(), has_checks=False),
        loaded=SimpleNamespace(model=model),
    )
    guard = Stubbed(run, None, None)
    weights, moments = [0.0], []
    for step, divergence in enumerate([0.0, 0.02, 0.09, 0.02]):
        guard.see(model, divergence)
        model.w.grad = torch.ones(1)
        state = SimpleNamespace(global_step=step)
        guard.on_pre_optimizer_step(None, state, None, optimizer=optimizer, lr_scheduler=rates)
        optimizer.step()
        rates.step()
        weights.append(model.w.item())
        moments.append(optimizer.state[model.w]["exp_avg"].item())
    assert weights[1:3] == pytest.approx([-0.5, -1.0])
    assert weights[3] == weights[1]  # as before the second step
    assert weights[4] == pytest.approx(weights[1] - 0.25, rel=1e-3)  # at half the rate
    assert moments[2] == moments[1] < moments[3]
    assert guard.refused == 1


@pytest.mark.slow
def test_a_leap_under_ivon_drops_the_samples_of_the_step(world, tmp_path):
    """IVON's step would raise, or take the gradients at the refused weights, if they stayed."""
    config = checked(
        world,
        tmp_path,
        optimizer="ivon",
        learning_rate=0.01,
        leap=1.01,
        max_steps=8,
        check_every=8,
        prompt_rows=1,
    )
    report = run_adapt(config, quiet=True)
    assert report.refused_steps >= 3
    assert report.checks[-1].memory_kl < 0.2


def child(folder):
    """What each of two ranks finds: leaps, checks, and a run that goes on from a checkpoint."""
    (folder / "words.txt").write_text("bad\n")
    found = []
    for name in ("whole", "resumed"):
        config = settings(
            folder,
            folder,
            output=str(folder / name),
            prompts=str(folder / "memory.jsonl"),
            scorer=f"words:{folder / 'words.txt'}",
            prompt_rows=2,
            new_tokens=3,
            until={"held_out_rise": 1e9, "memory_kl": 5.0},
            check_every=3,
            learning_rate=0.5,
            keep_steps=[1, 4],
            save_steps=2,
            keep_checkpoints=True,
            num_processes=2,
            resume=True,
        )
        report, model = watched(config)
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(mine) for _ in range(2)]
        torch.distributed.all_gather(others, mine)
        found.append(
            {
                "report": report.model_dump(mode="json", exclude={"path"}),
                "replicas equal": torch.equal(*others),
                "sum": float(mine.double().sum()),
            }
        )
        if ranks.is_main() and name == "whole":
            kept = folder / "whole.checkpoints"
            shutil.rmtree(kept / "checkpoint-6")
            shutil.copytree(kept, folder / "resumed.checkpoints")
        torch.distributed.barrier()
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, {"runs": found, "world": ranks.world()})
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(everywhere))
    torch.distributed.destroy_process_group()


def watched(config):
    """The report of a run, and this rank's model as the run has left it."""
    kept, load = [], run_module.load_run

    def load_and_keep(config):
        kept.append(load(config))
        return kept[-1]

    run_module.load_run = load_and_keep
    try:
        return run_adapt(config, quiet=True), kept[0].loaded.model
    finally:
        run_module.load_run = load


@pytest.mark.slow
def test_two_ranks_check_undo_and_go_on_alike(world, tmp_path):
    for name in ("base", "remove.jsonl", "memory.jsonl"):
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    first, second = found_by_two("tests.test_adapt_stopping", tmp_path)
    assert first == second
    whole, resumed = first["runs"]
    assert whole == resumed
    assert whole["replicas equal"]
    assert whole["report"]["refused_steps"] >= 2
    assert [check["step"] for check in whole["report"]["checks"]] == [0, 3, 6]
    assert sorted(p.name for p in (tmp_path / "whole.steps").iterdir()) == ["1", "4"]
