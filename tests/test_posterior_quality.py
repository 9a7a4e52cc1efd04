"""The experiment on posteriors, at its smallest: its truth is the truth, its runs cost the same,
its claims hold.
"""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def experiment():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module("posterior_quality")
    finally:
        sys.path.remove(str(SCRIPTS))


def runs(experiment, likelihood, methods, passes=480, seeds=(0, 1)):
    """Means over seeds, by method."""
    means = {}
    for name in methods:
        records = [
            experiment.train(
                experiment.regression(likelihood, seed), experiment.METHODS[name], passes, "N", seed
            )
            for seed in seeds
        ]
        means[name] = {
            key: sum(r[key] for r in records) / len(records)
            for key in ("rank", "error", "ratio", "loss")
        }
    return means


@pytest.mark.parametrize("likelihood", ["regression", "multi_label_classification"])
def test_root_ggn_has_the_right_size_and_a_better_order_than_price_on_a_known_posterior(
    experiment, likelihood
):
    results = runs(
        experiment,
        likelihood,
        ["IVON price", "IVON ggn, k = 1", "IVON ggn, k = 8", "IVON ggn, k = 8, then flush"],
    )
    price, every, eighth, flush = results.values()
    assert price["ratio"] > 1.3  # the positivity term
    for row in (every, eighth, flush):
        assert 0.8 < row["ratio"] < 1.25
        assert row["rank"] > max(0.98, price["rank"])
        assert row["error"] < 0.5 * price["error"]
    assert flush["error"] < eighth["error"]
    assert eighth["loss"] < 1.1 * price["loss"]


def test_the_truth_of_a_regression_is_its_closed_form(experiment):
    for likelihood in ("regression", "multi_label_classification"):
        problem = experiment.regression(likelihood, 0)
        model = problem.start
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(1))
        x = problem.train["x"].double()
        p = (x @ model.weight.detach()[0].double()).sigmoid()
        weight = torch.ones_like(p) if likelihood == "regression" else p * (1 - p)
        expected = (weight[:, None] * x.square()).mean(0)
        truth = experiment.exact(problem, model)["weight"][0]
        torch.testing.assert_close(truth.double(), expected, rtol=1e-4, atol=1e-7)


def test_the_truth_of_the_transformer_is_that_of_its_single_gradients(experiment):
    torch.manual_seed(0)
    model = experiment.Transformer(12, width=8, length=6)
    rows = experiment.word_rows(
        ["b c d", "c c d e b", "f"], [0, 1, 1], {w: i for i, w in enumerate("abcdef", 2)}, 6
    )
    problem = experiment.Problem(
        model, rows, rows, 2, 3, experiment.exact, lambda name: True, 1e-3, {}
    )
    truth = experiment.exact(problem, model)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for i in range(3):
        logits = model(rows["input_ids"][i : i + 1], rows["attention_mask"][i : i + 1]).logits[0]
        p = logits.softmax(-1).detach()
        # one factor of diag(p) - p p' for two classes
        root = (p[0] * p[1]).sqrt() * (logits[1] - logits[0])
        for (name, parameter), g in zip(
            model.named_parameters(),
            torch.autograd.grad(root, list(model.parameters())),
            strict=True,
        ):
            assert g.shape == parameter.shape
            expected[name] += g.square() / 3
    for name, value in expected.items():
        torch.testing.assert_close(truth[name], value, rtol=1e-4, atol=1e-9)


def test_all_methods_cost_as_many_passes(experiment):
    problem = experiment.regression("regression", 0)
    for method in experiment.METHODS.values():
        record = experiment.train(problem, method, 48, "N", 0)
        spent = record["steps"] * method.cost + record["flush"]
        assert 48 - method.cost < spent <= 48
        assert (record["flush"] > 0) == method.flush


def test_agreement_knows_order_size_and_error(experiment):
    truth = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0])
    assert experiment.agreement(3 * truth, truth) == pytest.approx(
        {"rank": 1.0, "error": 2.0, "ratio": 3.0}
    )
    assert experiment.agreement(1 / truth, truth)["rank"] == pytest.approx(-1.0)


def test_without_the_data_its_sections_are_left_out_with_a_line(
    experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment, "DATA", tmp_path / "none")
    out = tmp_path / "runs.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["posterior_quality.py", "--only", "classifier", "overfitted", "--json", str(out)],
    )
    experiment.main()
    printed = capsys.readouterr().out
    assert "classifier: left out" in printed
    assert "overfitted: left out" in printed
    assert json.loads(out.read_text()) == []


def test_a_table_row_is_the_median_and_range_over_seeds(experiment):
    common = {"method": "IVON", "passes": 10, "steps": 5, "given": "N"}
    text = experiment.table(
        [{**common, "rank": r, "seed": s} for s, r in enumerate((0.5, 0.9, 0.7))]
    )
    assert text.splitlines()[-1] == "| IVON | 10 | 5 | N | 0.7 [0.5, 0.9] |"
