"""What a sample of a precision says: exact on small tensors, and what it finds faulty."""

import re

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.curvature import precision_health
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.posterior import PosteriorInfo, Prior
from mergekit_bayes.posterior.edits import Identity
from mergekit_bayes.posterior.grids import SIDE, Grid, positions, read_grids, sampled_names
from mergekit_bayes.posterior.information import doubts, floors, information
from mergekit_bayes.posterior.wording import information_in_words
from tests import tiny
from tests.curvatures import LAYERS, curvature


def record(**fields):
    mean = Identity(blocks="0" * 64)
    return PosteriorInfo(**({"estimator": "ggn", "unit": "token", "mean": mean} | fields))


def sample(tensors, tmp_path, layers=LAYERS):
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, tmp_path / "p.safetensors")
    with SafetensorsSource([tmp_path / "p.safetensors"]) as source:
        return read_grids(source, {name: name for name in sampled_names(tensors, layers)})


@pytest.mark.parametrize("shape", [(7,), (100,), (40, 3, 20), (33, 64), (2, 5), (1,)])
def test_a_grid_is_evenly_spaced_indices_of_both_axes(tmp_path, shape):
    tensor = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    grid = sample({"w": tensor}, tmp_path)["w"]
    matrix = tensor.reshape(shape[0], -1)
    rows, columns = (positions(n) for n in matrix.shape)
    np.testing.assert_array_equal(grid.values, matrix[rows][:, columns])
    assert max(len(rows), len(columns)) <= SIDE
    assert len(set(np.diff(rows))) <= 2


def test_a_sample_has_whole_layers_and_of_experts_the_first():
    names = [f"m.layers.{i}.{n}" for i in range(10) for n in ("q", "e.0.w", "e.1.w", "e.2.w")]
    found = sampled_names([*names, "wte.weight", "norm.weight"], 2)
    assert found == [f"m.layers.{i}.{n}" for i in (0, 5) for n in ("q", "e.0.w")]
    assert sampled_names(["a.weight", "b.weight"], 2) == ["a.weight", "b.weight"]


def test_numbers_of_small_tensors_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"a": rng.gamma(1, 1, (8, 4)), "b": 100 * rng.gamma(1, 1, 6)}
    tensors = {name: t.astype(np.float32) + np.float32(2) for name, t in tensors.items()}
    found = information(
        sample(tensors, tmp_path), record(prior=Prior(kind="isotropic", precision=2.0))
    )
    logs = [np.log(t.astype(float)).ravel() for t in tensors.values()]
    every = np.concatenate(logs)
    within = sum(x.size * x.var() for x in logs) / every.size
    assert found.within == pytest.approx(within / every.var())
    h = np.exp(every) - 2
    assert found.informative == pytest.approx(h.sum() ** 2 / (h**2).sum() / h.size, rel=1e-4)
    assert found.alone == pytest.approx(np.mean(h <= 0.02))
    assert (found.entries, found.matrix_entries, found.explained) == (38, 0, None)


def test_entries_of_the_prior_or_the_start_alone():
    ivon = record(
        estimator="ivon",
        ess=1000,
        prior=Prior(kind="isotropic", precision=10.0),
        training={"hess_init": 0.1},
    )
    assert floors(ivon) == (10.0, 110.0)
    values = np.array([[10.0, 10.05, 11.0, 50.0, 109.5, 111.5, 0.0, 10.0]])
    found = information({"w": Grid("w", values, values.shape)}, ivon)
    assert found.alone == 5 / 8
    assert floors(record()) == (0.0,)
    assert floors(record(prior=Prior(kind="unknown"))) == (0.0,)


FAULTS = {
    "constant": (lambda t, rng: np.full_like(t, t.mean()), "one number a tensor"),
    "nearly the start": (
        lambda t, rng: 1 + 0.001 * rng.random(t.shape),
        "one number a tensor",
    ),
    "permuted": (lambda t, rng: rng.permutation(t.ravel()).reshape(t.shape), "another order"),
    "noise": (lambda t, rng: np.exp(rng.normal(size=t.shape)), "is noise"),
    "transposed": (lambda t, rng: t.T if len(set(t.shape)) == 1 else t, "as if it were transposed"),
    "half zero": (lambda t, rng: t * (rng.random(t.shape) < 0.5), "entries .* are zero"),
    "half of the rows": (
        lambda t, rng: t * (np.arange(len(t)) < len(t) / 2).reshape(-1, *[1] * (t.ndim - 1)),
        "entries .* are zero",
    ),
}


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_curvature_is_not_doubted(tmp_path, seed, biases):
    found = information(sample(curvature(seed, biases=biases), tmp_path), None)
    assert doubts(found) == []
    assert found.explained > 0.7
    assert found.aligned > 0.3


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(tmp_path, name, biases):
    change, words = FAULTS[name]
    rng = np.random.default_rng(1)
    faulty = {n: change(t, rng).astype(np.float32) for n, t in curvature(2, biases=biases).items()}
    found = doubts(information(sample(faulty, tmp_path), None))
    assert any(re.search(words, doubt) for doubt in found), found


def test_transposing_all_square_matrices_changes_the_sign(tmp_path):
    tensors = curvature(3)
    turned = {n: t.T if len(set(t.shape)) == 1 else t for n, t in tensors.items()}
    one, other = (information(sample(t, tmp_path), None).aligned for t in (tensors, turned))
    assert one == pytest.approx(-other)
    conv = {n: t.T if t.ndim == 2 else t for n, t in tensors.items()}  # as GPT-2 stores them
    assert information(sample(conv, tmp_path), None).aligned == pytest.approx(one)


def test_of_few_entries_nothing_is_said(tmp_path):
    rng = np.random.default_rng(0)
    few = {"a.weight": rng.random((32, 32)).astype(np.float32), "b.weight": np.ones((20, 20), "f4")}
    assert doubts(information(sample(few, tmp_path), None)) == []
    assert information({}, None).informative == 0


@pytest.mark.filterwarnings("error")
def test_bad_and_empty_entries_are_left_out(tmp_path):
    tensors = curvature(0) | {"none.weight": np.zeros((0, 20), np.float32)}
    tensors["h.0.mlp.up.weight"][3] = np.nan
    tensors["h.1.mlp.up.weight"][:, 5] = np.inf
    tensors["h.2.mlp.up.weight"][7, 7] = -1
    found = information(sample(tensors, tmp_path), None)
    assert doubts(found) == []
    assert 0 < found.within < 1
    assert 0 < found.informative < 1
    for value in (np.nan, -1):
        worst = {name: np.full_like(t, value) for name, t in tensors.items()}
        found = information(sample(worst, tmp_path), None)
        assert found.within is None
        assert found.informative == 0
        assert doubts(found) == []
    zero = {name: np.zeros_like(t) for name, t in tensors.items()}
    assert doubts(information(sample(zero, tmp_path), None)) == [
        "100% of the entries of its matrices are zero"
    ]


def test_one_number_everywhere_does_not_vary(tmp_path):
    one = {name: np.full_like(t, 0.3) for name, t in curvature(0).items()}
    found = information(sample(one, tmp_path), None)
    assert found.within is None
    assert information_in_words(found, 10, None) == (
        "its positive entries do not vary, effective number of informative entries 10 of 10, "
        "0.0% are zero"
    )


def test_a_precision_without_a_prior_holds_none(tmp_path):
    found = information(sample(curvature(0), tmp_path), None)
    prior = record(prior=Prior(kind="isotropic", precision=2.0))
    start = record(prior=prior.prior, estimator="ivon", ess=9.0, training={"hess_init": 0.1})
    for info, words in (
        (record(), "are zero"),
        (prior, "hold the prior alone"),
        (start, "hold the prior or the start alone"),
    ):
        assert information_in_words(found, 10, info).endswith(words)


def test_inspect_shows_it_and_notes_doubts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    precision = curvature(0)
    mean = tiny.arrays(0, {name: t.shape for name, t in precision.items()})
    tiny.posterior("a.safetensors", mean, precision)
    report = run_inspect("a.safetensors")
    found = report.precision.information
    assert not [note for note in report.notes if "doubtful" in note]
    shown = CliRunner().invoke(app, ["inspect", "a.safetensors"], env={"COLUMNS": "400"})
    assert information_in_words(found, report.parameters, report.precision.info) in shown.output
    tiny.posterior("b.safetensors", mean, {n: np.full_like(t, 3) for n, t in precision.items()})
    assert "the precision is doubtful: it hardly differs from one number a tensor" in (
        run_inspect("b.safetensors").notes
    )
    pooled = {n: t.mean(axis=tuple(range(1, t.ndim)), keepdims=True) for n, t in precision.items()}
    tiny.posterior("c.safetensors", mean, pooled)
    assert run_inspect("c.safetensors").precision.information is None


@pytest.mark.parametrize(
    ("factor", "is_named"), [(1, False), (1.005, False), (1e-4, True), (13, True)]
)
def test_inspect_names_numbers_that_are_scaled_since_they_were_recorded(
    tmp_path, monkeypatch, factor, is_named
):
    monkeypatch.chdir(tmp_path)
    precision = curvature(0)
    tensors = {name: torch.from_numpy(t) for name, t in precision.items()}
    mean = tiny.arrays(0, {name: t.shape for name, t in precision.items()})
    scaled = {name: t * np.float32(factor) for name, t in precision.items()}
    tiny.posterior("a.safetensors", mean, scaled, health=precision_health(tensors))
    found = [note for note in run_inspect("a.safetensors").notes if "its record describes" in note]
    assert len(found) == is_named
    assert not is_named or f"are {factor:.3g} times those" in found[0]
