"""The Trainer mixin: the mean is what is saved, a stop leaves nothing perturbed, replicas stay equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models import Collate, encode_rows, load_model
from mergekit_bayes.optim import IVON
from mergekit_bayes.trainer import IvonTrainerMixin, unwrap
from tests.tiny_models import tiny_gpt2

ROWS = {"text": ["the cat sat on the mat .", "a dog ran", "good film", "the tree was dull and bad"] * 4}


class Trainer(IvonTrainerMixin, transformers.Trainer):
    pass


def trainer(tmp_path, callbacks=(), **arguments):
    loaded = load_model(str(tiny_gpt2(tmp_path / "m")))
    settings = {"output_dir": str(tmp_path / "out"), "max_grad_norm": 0.0, "use_cpu": True, "report_to": [],
                "per_device_train_batch_size": 2, "learning_rate": 0.1, "disable_tqdm": True, "save_strategy": "no",
                "remove_unused_columns": False, "max_steps": 4, **arguments}  # fmt: skip
    return Trainer(
        model=loaded.model,
        args=transformers.TrainingArguments(**settings),
        train_dataset=encode_rows(ROWS, loaded),
        data_collator=Collate(2),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(IVON, {"lr": 0.1, "ess": 1e4, "weight_decay": 1e-3, "beta2": 0.9}),
    )


def test_one_group_keeps_the_prior_that_was_asked_for(tmp_path):
    t = trainer(tmp_path)
    t.train()
    groups = unwrap(t.optimizer).param_groups
    assert len(groups) == 1
    assert groups[0]["weight_decay"] == 1e-3


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
    t._held = [{"input_ids": torch.full((2, 4), 10**9)}]  # would raise if it were run
    t.train()
    assert t.state.global_step == 1


def test_settings_that_would_break_ivon_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_grad_norm=0"):
        trainer(tmp_path, max_grad_norm=1.0).train()


def test_another_optimizer_is_refused():
    with pytest.raises(ConfigError, match="not IVON"):
        unwrap(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


DDP = """
import sys, torch
from pathlib import Path
from tests.test_trainer import trainer
t = trainer(Path(sys.argv[1]) / str(__import__('os').environ['RANK']))
assert t.accelerator.num_processes == 2, t.accelerator.num_processes
t.train()
print('digest', float(sum(p.double().abs().sum() for p in t.model.parameters())),
      float(sum(s['hess'].double().sum() for s in t.optimizer.optimizer.state.values())))
"""


@pytest.mark.slow
def test_two_replicas_stay_equal_bit_for_bit(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parent.parent)}  # fmt: skip
    script = tmp_path / "ddp.py"
    script.write_text(DDP)
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541"]
    done = subprocess.run([*line, str(script), str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    digests = [x for x in done.stdout.splitlines() if x.startswith("digest")]
    assert len(digests) == 2
    assert digests[0] == digests[1]
