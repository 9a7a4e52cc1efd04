"""A step is undone for what it does to the memory, not for which examples of it come next."""

from types import SimpleNamespace

import pytest
import torch

from mergekit_bayes.adapt.leap import LeapGuard
from mergekit_bayes.adapt.objective import PARTS, Terms
from mergekit_bayes.adapt.teacher import FrozenCopy
from tests.cases import Classifier

USUAL, RARE = torch.tensor([[0.1, 0.0]]), torch.tensor([[0.0, 3.0]])


class Loop:
    """A training loop with a guard, whose steps are given."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Classifier(torch.nn.Linear(2, 3), None)
        self.teacher = FrozenCopy(self.model)
        run = SimpleNamespace(
            config=SimpleNamespace(leap=4.0), loaded=SimpleNamespace(model=self.model)
        )
        self.guard = LeapGuard(run, self.objective, self.teacher)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optimizer, factor=1.0)
        self.made = 0

    def objective(self, model, batch):
        logits = model(batch["input_ids"]).logits
        loss = self.teacher.divergence(batch, logits).mean()
        return Terms(loss, {"memory": loss.detach()}, loss.new_zeros(()))

    def step(self, inputs, change):
        """See the memory by these inputs; then move the weights, unless the step before is undone.

        Returns:
            Whether it was undone.
        """
        batch = {
            "input_ids": inputs,
            "attention_mask": torch.ones_like(inputs),
            "labels": torch.zeros(len(inputs), dtype=torch.long),
            "part": torch.full((len(inputs),), PARTS.index("memory")),
        }
        self.guard(self.model, batch).total.backward()
        refused = self.guard.refused
        self.guard.on_pre_optimizer_step(
            None, SimpleNamespace(global_step=self.made), None, self.optimizer, self.schedule
        )
        self.made += 1
        if self.guard.refused > refused:
            return True
        with torch.no_grad():
            self.model.module.weight[0] += change
        return False


def test_a_rare_example_whose_divergence_is_large_already_is_no_leap():
    loop = Loop()
    for _ in range(10):
        assert not loop.step(USUAL, 0.08)
    weights = loop.model.module.weight.detach().clone()
    seen = [loop.teacher.divergence(b, loop.model(b["input_ids"]).logits.detach()) for b in rows()]
    assert float(seen[1]) > 10 * max(0.01, float(seen[0]))
    assert not loop.step(RARE, 0.0)
    assert loop.guard.refused == 0
    assert torch.equal(loop.model.module.weight, weights)


@pytest.mark.parametrize("change", [3.0, float("nan")])
def test_a_step_that_makes_the_same_examples_diverge_is_undone(change):
    loop = Loop()
    for _ in range(10):
        assert not loop.step(USUAL, 0.08)
    weights = loop.model.module.weight.clone()
    loop.step(USUAL, change)
    assert loop.step(RARE, 0.08)
    assert loop.guard.refused == 1
    assert torch.equal(loop.model.module.weight, weights)
    assert loop.optimizer.param_groups[0]["lr"] == 0.5


def rows():
    for inputs in (USUAL, RARE):
        yield {
            "input_ids": inputs,
            "attention_mask": torch.ones_like(inputs),
            "labels": torch.zeros(len(inputs), dtype=torch.long),
        }
