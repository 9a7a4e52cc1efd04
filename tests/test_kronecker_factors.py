"""The estimator of Kronecker factors: against naive hooks, exact where it should be, in a merge."""

import numpy as np
import pytest
import torch
from torch import nn

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.curvature.ggn import signed_roots
from mergekit_bayes.curvature.kronecker import kronecker_factors
from mergekit_bayes.curvature.outputs import scored_logits, trained_loss
from mergekit_bayes.curvature.squares import Scored
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2


class Regression(nn.Module):
    """A table of inputs and one linear layer to numbers, with the loss of a regression head."""

    def __init__(self, inputs):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(inputs, freeze=False)
        self.score = nn.Linear(inputs.shape[1], 2, bias=False)
        self.config = type("Config", (), {"problem_type": "regression", "num_labels": 2})()

    def forward(self, input_ids, attention_mask=None):
        logits = self.score(self.table(input_ids[:, 0]))
        return type("Output", (), {"logits": logits})()


def test_one_linear_layer_of_a_regression_is_exact():
    torch.manual_seed(0)
    rows, drawn = 12, 400
    model = Regression(torch.randn(rows, 3))
    ids = torch.arange(rows)[:, None]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * drawn
    found = kronecker_factors(model, batches)
    inputs = model.table.weight.detach()
    gram = inputs.T @ inputs
    (right,) = found.total["score.weight"] / drawn
    torch.testing.assert_close(right, gram, rtol=1e-4, atol=1e-4)
    # The GGN of a squared error in mean over outputs is 2 / outputs on every output.
    (left,) = found.outputs["score.weight"]
    torch.testing.assert_close(left, torch.eye(2), rtol=0.05, atol=0.05)
    assert found.matrices == {"score.weight": -1}
    assert set(found.total) == {"score.weight", "table.weight"}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("base", "a", "b")):
        tiny_gpt2(name, seed=i)
    texts("rows.jsonl", rows=24)


def estimate(name, **settings):
    settings = {"estimator": "kronecker", "batch_size": 4, "max_length": 16} | settings
    return run_precision(
        PrecisionConfig(model=name, data="rows.jsonl", output=f"{name}/posterior", **settings),
        quiet=True,
    )


def test_factors_are_the_second_moments_of_rows_and_gradients(world):
    model = load_model("base", "causal-lm").model.eval()
    ids = torch.randint(0, 27, (3, 7), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    found = kronecker_factors(model, [batch], seed=5)
    name = "transformer.h.0.mlp.c_fc.weight"
    module = model.transformer.h[0].mlp.c_fc
    kept = {}

    def keep(_, inputs, output):
        kept["x"] = inputs[0].detach()
        output.register_hook(lambda gradient: kept.update(g=gradient))

    module.register_forward_hook(keep)
    loss = trained_loss(model, ids)
    logits = scored_logits(model(input_ids=ids).logits, ids, ids, shifts=loss.shifts)
    generator = torch.Generator().manual_seed(5)
    (vector,) = signed_roots(Scored(logits.detach().float(), loss, generator))
    logits.backward(vector)
    x, g = kept["x"].flatten(0, 1), kept["g"].flatten(0, 1)
    torch.testing.assert_close(found.total[name][0], x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.outputs[name][0], g.T @ g / len(x), rtol=1e-4, atol=1e-7)


def test_a_posterior_of_factors_is_stored_and_merged(world):
    for name in ("base", "a", "b"):
        estimate(name)
    with open_posterior("a") as posterior:
        name = "transformer.h.0.mlp.c_fc.weight"
        stored = next(n for n in posterior.precision.specs if n.endswith("h.0.mlp.c_fc.weight"))
        rows, columns = posterior.mean.specs[stored].shape  # (inputs, outputs) of a Conv1D
        left, right = (
            read_tensor(posterior.precision.in_files, part)
            for part in posterior.precision.parts(stored)
        )
        assert (left.shape, right.shape) == ((1, rows, rows), (1, columns, columns))
        assert posterior.info.estimator == "kronecker"
    report = run_merge(
        MergeConfig(models=["a", "b"], base="base", weights="precision", out="merged")
    )
    assert report.changed_share > 0.9
    with open_posterior("merged") as posterior:
        assert posterior.precision.specs[stored].shape[0] == 3
        assert np.isfinite(read_tensor(posterior.mean, stored)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"pool": "row"}, "--pool row"), ({"prior": 2.0}, "--prior 2"), ({"blocks": 2}, "--blocks 2")],
)
def test_what_factors_cannot_be_is_refused(world, settings, message):
    with pytest.raises(ConfigError, match=message):
        estimate("base", **settings)
