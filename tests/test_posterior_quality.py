"""The experiment on posteriors, at its smallest: its truth, the cost of its runs, its claims."""

import dataclasses
import importlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def experiment():
    """The script and the modules that it is made of."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        return SimpleNamespace(
            script=importlib.import_module("posterior_quality"),
            problems=importlib.import_module("posterior_problems"),
            runs=importlib.import_module("posterior_runs"),
            published=importlib.import_module("posterior_published"),
        )
    finally:
        sys.path.remove(str(SCRIPTS))


def runs(experiment, likelihood, methods, passes=480, seeds=(0, 1)):
    """Means over seeds, by method."""
    means = {}
    for name in methods:
        records = [
            experiment.runs.train(
                experiment.problems.regression(likelihood, seed),
                experiment.runs.METHODS[name],
                passes,
                "N",
                seed,
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
    means = runs(
        experiment,
        likelihood,
        [
            "IVON price, our settings",
            "IVON ggn, k = 1",
            "IVON ggn, k = 8",
            "IVON ggn, k = 8, then flush",
        ],
    )
    price, every, eighth, flush = means.values()
    assert price["ratio"] > 1.3  # the positivity term
    for row in (every, eighth, flush):
        assert 0.8 < row["ratio"] < 1.25
        assert row["rank"] > max(0.98, price["rank"])
        assert row["error"] < 0.5 * price["error"]
    assert flush["error"] < eighth["error"]
    assert eighth["loss"] < 1.1 * price["loss"]


def test_the_truth_of_a_regression_is_its_closed_form(experiment):
    for likelihood in ("regression", "multi_label_classification"):
        problem = experiment.problems.regression(likelihood, 0)
        model = problem.start
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(1))
        x = problem.train["x"].double()
        p = (x @ model.weight.detach()[0].double()).sigmoid()
        weight = torch.ones_like(p) if likelihood == "regression" else p * (1 - p)
        expected = (weight[:, None] * x.square()).mean(0)
        truth = experiment.problems.exact(problem, model)["weight"][0]
        torch.testing.assert_close(truth.double(), expected, rtol=1e-4, atol=1e-7)


def test_the_truth_of_the_transformer_is_that_of_its_single_gradients(experiment):
    torch.manual_seed(0)
    model = experiment.problems.Transformer(12, width=8, length=6)
    rows = experiment.problems.word_rows(
        ["b c d", "c c d e b", "f"], [0, 1, 1], {w: i for i, w in enumerate("abcdef", 2)}, 6
    )
    problem = experiment.problems.Problem(
        model, rows, rows, 2, 3, experiment.problems.exact, lambda name: True, 1e-3, {}
    )
    truth = experiment.problems.exact(problem, model)
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
    problem = experiment.problems.regression("regression", 0)
    for method in experiment.runs.METHODS.values():
        record = experiment.runs.train(problem, method, 48, "N", 0)
        spent = record["steps"] * method.cost + record["flush"]
        assert 48 - method.cost < spent <= 48
        assert (record["flush"] > 0) == method.flush


def test_agreement_knows_order_size_and_error(experiment):
    truth = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0])
    assert experiment.runs.agreement(3 * truth, truth) == pytest.approx(
        {"rank": 1.0, "error": 2.0, "ratio": 3.0}
    )
    assert experiment.runs.agreement(1 / truth, truth)["rank"] == pytest.approx(-1.0)


def test_without_the_data_its_sections_are_left_out_with_a_line(
    experiment, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(experiment.script, "DATA", tmp_path / "none")
    out = tmp_path / "runs.json"
    monkeypatch.setattr(
        sys,
        "argv",
        ["posterior_quality.py", "--only", "classifier", "overfitted", "--json", str(out)],
    )
    experiment.script.main()
    printed = capsys.readouterr().out
    assert "classifier: left out" in printed
    assert "overfitted: left out" in printed
    assert json.loads(out.read_text()) == []


def test_a_table_row_is_the_median_and_range_over_seeds(experiment):
    common = {"method": "IVON", "passes": 10, "steps": 5, "given": "N"}
    text = experiment.script.table(
        [{**common, "rank": r, "seed": s} for s, r in enumerate((0.5, 0.9, 0.7))]
    )
    assert text.splitlines()[-1] == "| IVON | 10 | 5 | N | 0.7 [0.5, 0.9] |"


def published_runs(experiment, problem):
    """All rows of all sections with published settings."""
    parts = ("linear_runs", "logistic_runs", "classifier_runs", "network_runs")
    return [run for part in parts for run in getattr(experiment.published, part)(problem)]


def test_kappa_and_the_share_of_the_start_follow_from_the_settings(experiment):
    problem = experiment.problems.regression("regression", 0)
    problem = dataclasses.replace(problem, observations=50_000)  # 25 a row, as tokens are
    cifar = experiment.published.CIFAR  # 50 rows
    plan = experiment.runs.planned(problem, cifar, 2000, "default", 0)
    assert plan["ess"] == 50_000
    assert plan["kappa"] == pytest.approx(1e-5 * 50_000 / (2 * 50 * 25))
    assert plan["start"] == pytest.approx(0.99999**2000)
    ours = experiment.runs.METHODS["IVON price, our settings"]
    for ess in (5e4, 2e5):
        plan = experiment.runs.planned(problem, ours, 480, ess, 0)
        assert plan["kappa"] == pytest.approx(5 / 480 * ess / (2 * 16 * 25))


def test_a_ratio_stands_beside_a_kappa_wherever_h_is_made_of_noise(experiment):
    problem = experiment.problems.regression("regression", 0)
    for name, method in experiment.runs.METHODS.items():
        plan = experiment.runs.planned(problem, method, 48, "N", 0)
        assert ("kappa" in plan) == (name.startswith("IVON price") and not method.flush), name
    for name, method, _ in published_runs(experiment, problem):
        plan = experiment.runs.planned(problem, method, 48, "N", 0)
        assert ("kappa" in plan) == name.startswith("IVON"), name


def test_only_rows_that_do_not_bear_an_authors_name_have_settings_of_ours(experiment):
    assert all(
        "our settings" in name or "ggn" in name or "Adam" in name or "flush" in name
        for name in experiment.runs.METHODS
        if name != "IVON price, antithetic"  # pairs are not the authors'
    )
    problem = experiment.problems.regression("regression", 0)
    for name, method, _ in published_runs(experiment, problem):
        assert method.alone == ("our settings" not in name), name


COMMON = {"beta1": 0.9, "clip_radius": math.inf, "rescale_lr": True, "mc_samples": 1}
PUBLISHED = {
    "IVON, CIFAR": {
        **COMMON,
        "lr": 0.2,
        "ess": 2000.0,  # N
        "hess_init": 0.5,
        "beta2": 0.99999,
        "weight_decay": 2e-4,
    },
    "IVON, UCI": {
        **COMMON,
        "lr": 0.02,
        "ess": 6000.0,
        "hess_init": 0.5,
        "beta2": 0.999,
        "weight_decay": 5e-3,
        "mc_samples": 5,
    },
    "IVON, GPT-2": {
        **COMMON,
        "lr": 300.0,
        "ess": 1e10,
        "hess_init": 1e-3,
        "beta2": 0.99999,
        "weight_decay": 1e-6,
        "clip_radius": 1e-3,
    },
    "IVON, LoRA": {
        **COMMON,
        "lr": 0.03,
        "ess": 1e7,
        "hess_init": 1e-3,
        "beta2": 0.99999,
        "weight_decay": 0.0,
        "clip_radius": 1e-3,
        "rescale_lr": False,
    },
    "bSAM, CIFAR": {
        "lr": 0.5,
        "ess": 2000.0,
        "hess_init": 1 - 10 / 2000,  # s starts at 1, with the prior in it
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 10 / 2000,
        "rho": 0.01,
        "damping": 0.1,
    },
    "VOGN, CIFAR, but one sample": {
        "lr": 0.01,
        "ess": 2000.0,
        "hess_init": 8e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 1 / 2000,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_with_an_authors_name_has_all_settings_of_its_source(experiment, name):
    problem = experiment.problems.regression("regression", 0)
    methods = [m for row, m, _ in published_runs(experiment, problem) if row == name]
    assert methods
    # Neither the section nor the length of the run changes any of them.
    for method in methods:
        for passes, ess in ((480, "default"), (4800, 1e5)):
            parameters = list(problem.start.parameters())
            made, _ = experiment.runs.make_optimizer(problem, method, parameters, passes, ess, 0)
            settings = {k: made.param_groups[0][k] for k in PUBLISHED[name]}
            assert settings == pytest.approx(PUBLISHED[name])


def test_published_settings_run_with_their_schedule_and_batch(experiment, monkeypatch):
    problem = experiment.problems.regression("multi_label_classification", 0)
    seen = []
    real = experiment.runs.one_step

    def spy(model, optimizer, rows, generator, max_norm):
        seen.append((optimizer.param_groups[0]["lr"], len(rows["labels"]), max_norm))
        real(model, optimizer, rows, generator, max_norm)

    monkeypatch.setattr(experiment.runs, "one_step", spy)
    records = experiment.script.published(
        "published_logistic",
        problem,
        [
            ("GPT-2", experiment.published.GPT2, 100),
            ("UCI", experiment.published.UCI, 20),
            ("VOGN", experiment.published.vogn(2000), 3),
        ],
        0,
        experiment.runs.train,
    )
    assert [(r["batch"], r["steps"]) for r in records] == [(16, 100), (8, 4), (128, 3)]
    assert all(math.isfinite(r["ratio"]) for r in records)
    assert [r.get("hess_noise", 0.0) > 0 for r in records] == [True, True, False]
    gpt2, uci, vogn = seen[:100], seen[100:104], seen[104:]
    rates = [rate for rate, _, _ in gpt2]
    assert rates[0] == 0  # a warm-up over 2 of 100 steps, then a cosine
    assert max(rates) == rates[2] == pytest.approx(300)
    assert rates[51] == pytest.approx(150, rel=0.01)
    assert {norm for _, _, norm in gpt2} == {1.0}
    assert uci == [(0.02, 8, None)] * 4
    assert [rate for rate, _, _ in vogn] == pytest.approx([0.01, 0.01 * 0.9**10, 0.01 * 0.9**20])


def test_settings_are_printed_without_training(experiment, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment.runs, "one_step", lambda *given: pytest.fail("it trained"))
    out = tmp_path / "runs.json"
    monkeypatch.setattr(
        sys,
        "argv",
        "posterior_quality.py --settings --seeds 0 --only linear published_linear wrong "
        f"--json {out}".split(),
    )
    experiment.script.main()
    printed = capsys.readouterr().out
    assert "| IVON, UCI | 8 | 75000 | 15000 | 6,000 | 6,000 | 0.375 | 3.04e-07 |" in printed
    assert "| IVON price, our settings | 0.1 | 120 | 120 | N | 2,000 | 2.6 | 0.00605 |" in printed
    assert "wrong: left out" in printed
    assert not any("ratio" in record for record in json.loads(out.read_text()))


ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))


def tables(text):
    """The tables of a document, each a list of rows of cells."""
    rows = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line[1:-1].split("|")])
        elif rows:
            yield rows
            rows = []


def test_documents_say_kappa_beside_a_ratio_of_h_and_whose_settings_a_row_has(experiment):
    problem = experiment.problems.regression("regression", 0)
    known = {name for name, _, _ in published_runs(experiment, problem)}
    known |= set(experiment.runs.METHODS)
    compared = 0
    for path in DOCS:
        for head, _, *rows in tables(path.read_text()):
            if "method" not in head or not any(cell.endswith("ratio") for cell in head):
                continue
            for row in (dict(zip(head, cells, strict=True)) for cells in rows):
                name = row["method"]
                assert name in known, f"{path.name}: {name}"
                is_noise = name.startswith(("IVON price", "IVON, ")) and "flush" not in name
                assert bool(row["kappa"]) == is_noise, f"{path.name}: {row}"
                compared += is_noise
    assert compared > 20


def test_documents_never_say_that_ivon_is_off_without_its_kappa():
    claims = 0
    for path in [*DOCS, *(ROOT / "mergekit_bayes").rglob("*.py")]:
        for paragraph in re.split(r"\n\s*\n|\n\s*- ", path.read_text()):
            text = " ".join(paragraph.split())
            is_price = re.search("price[` ]|as published|noise times gradient", text)
            is_other = re.search("ggn|GGN", text)  # what lags has no kappa
            if "times too large" in text and (is_price or ("IVON" in text and not is_other)):
                assert "kappa" in text, f"{path.name}: {text}"
                claims += 1
    assert claims
