"""The Trainer mixin: the mean is what is saved, a stop leaves nothing perturbed, replicas stay
equal.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.trainer import unwrap
from tests.trainers import GGN, trainer


def test_one_group_keeps_the_prior_that_was_asked_for(tmp_path):
    t = trainer(tmp_path)
    t.train()
    groups = unwrap(t.optimizer).param_groups
    assert len(groups) == 1
    assert groups[0]["weight_decay"] == 1e-3


def test_a_compiled_backward_pass_keeps_its_buffers_for_the_curvature(tmp_path):
    """The slow test of compiled chat settings needs it; to compile a model takes a minute."""

    class Looks(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(torch._functorch.config.donated_buffer)

    seen, before = [], torch._functorch.config.donated_buffer
    trainer(tmp_path, [Looks()], max_steps=1).train()
    assert seen == [False]
    assert torch._functorch.config.donated_buffer == before


class Means(transformers.TrainerCallback):
    """Remembers the weights that callbacks see, and may stop in the middle of a step."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def _look(self, model):
        self.seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self._look(model)

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self._look(model)
        if self.stop_at is not None and state.global_step == self.stop_at:
            control.should_training_stop = True


def test_callbacks_only_ever_see_the_mean(tmp_path):
    means = Means()
    t = trainer(tmp_path, [means], gradient_accumulation_steps=2)
    t.train()
    step_ends = means.seen[1::2]
    for substep, before in zip(means.seen[2::2], step_ends, strict=False):
        assert torch.equal(substep, before)


def test_a_stop_in_the_middle_of_a_step_leaves_nothing_perturbed(tmp_path):
    means = Means(stop_at=2)
    t = trainer(tmp_path, [means], gradient_accumulation_steps=2, max_steps=10)
    t.train()
    final = torch.cat([p.detach().flatten() for p in t.model.parameters()])
    assert torch.equal(final, means.seen[-1])
    assert t.state.global_step == 2


def test_what_an_interrupted_step_left_is_dropped(tmp_path):
    t = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=1)
    t._collected = [{"input_ids": torch.full((2, 4), 10**9)}]  # would raise if it were run
    t.train()
    assert t.state.global_step == 1


def test_settings_that_would_break_ivon_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_grad_norm=0"):
        trainer(tmp_path, max_grad_norm=1.0).train()
    copies = trainer(tmp_path)
    copies.args._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs are visible to one process"):
        copies.create_optimizer()


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="not IVON"):
        unwrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


class Scripted(transformers.TrainerCallback):
    """Decides which step is the best, and remembers the trained parameters of each."""

    def __init__(self, losses):
        self.losses, self.seen = losses, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = {
            n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad
        }

    def evaluate(self, trainer):
        return lambda *args, **kwargs: {"eval_loss": self.losses[trainer.state.global_step - 1]}


BEST = {
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}


@pytest.mark.parametrize("adapter", [False, True])
def test_the_best_model_has_its_own_posterior_and_not_the_last_one(tmp_path, adapter):
    script = Scripted([3.0, 1.0, 2.0, 4.0])
    t = trainer(tmp_path, [script], eval_dataset=True, adapter=adapter, **BEST)
    t.evaluate = script.evaluate(t)
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-2")
    trained = {n: p for n, p in t.model.named_parameters() if n in script.seen[2]}
    for name, p in trained.items():
        assert torch.equal(p, script.seen[2][name]), name
    assert not all(torch.equal(p, script.seen[4][n]) for n, p in trained.items())
    saved = torch.load(tmp_path / "out" / "checkpoint-2" / "optimizer.pt")["state"]
    precision = unwrap(t.optimizer).precision(t.model.named_parameters())
    assert len(precision) == len(saved) == len(trained)
    for entry, tensor in zip(saved.values(), precision.values(), strict=True):
        assert entry["step"] == 2
        torch.testing.assert_close(tensor, 1e4 * (entry["hess"] + 1e-3), rtol=1e-6, atol=0)


def test_a_best_checkpoint_without_a_posterior_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="save_only_model=False"):
        trainer(tmp_path, eval_dataset=True, save_only_model=True, **BEST).train()


def test_curvature_is_taken_every_so_many_steps_and_trains(tmp_path):
    t = trainer(
        tmp_path,
        ivon={**GGN, "curvature_every": 3, "mc_samples": 2, "antithetic": True},
        max_steps=7,
    )
    before = torch.cat([p.detach().flatten() for p in t.model.parameters()]).clone()
    t.train()
    state = next(iter(unwrap(t.optimizer).state.values()))
    assert int(state["estimates"]) == 3
    assert not torch.equal(before, torch.cat([p.detach().flatten() for p in t.model.parameters()]))


def test_both_of_a_pair_see_the_same_dropout(tmp_path):
    """With a linear loss of the noise nothing but dropout differs between +eps and -eps as eps goes
    to zero.
    """
    t = trainer(tmp_path, ivon={"mc_samples": 2, "antithetic": True, "ess": 1e14})
    for module in t.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    losses, inner = [], t.accelerator.backward
    t.accelerator.backward = lambda loss, **kw: (
        losses.append(float(loss.detach())),
        inner(loss, **kw),
    )
    t.train()
    assert len(losses) == 8
    for first, second in zip(losses[::2], losses[1::2], strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    assert len({round(x, 3) for x in losses}) > 2


DDP = """
import sys, torch
from pathlib import Path
from tests.trainers import GGN, trainer
for ivon in ({}, GGN, {"mc_samples": 2, "antithetic": True, "restore": "redraw"}):
    t = trainer(Path(sys.argv[1]) / str(__import__('os').environ['RANK']), ivon=ivon)
    assert t.accelerator.num_processes == 2, t.accelerator.num_processes
    t.train()
    weights = float(sum(p.double().abs().sum() for p in t.model.parameters()))
    hess = float(sum(s['hess'].double().sum() for s in t.optimizer.optimizer.state.values()))
    # One write for a line, so that the lines of two ranks do not mix.
    sys.stdout.write(f'digest {ivon} {weights} {hess}\\n')
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_two_replicas_stay_equal_bit_for_bit(tmp_path):
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29541",
    ]
    done = subprocess.run(
        [*line, str(script), str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    digests = [x for x in done.stdout.splitlines() if x.startswith("digest")]
    assert len(digests) == 6
    assert len(set(digests)) == 3
