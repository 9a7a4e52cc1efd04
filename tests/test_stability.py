"""The standard error of a curvature from one pass is that of many passes over fresh examples."""

import json

import numpy as np
import pytest
import scipy.stats
import torch

from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.curvature import ggn_diagonal
from mergekit_bayes.curvature.stability import K, Part, Subsamples, row_sums, stability
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from mergekit_bayes.precision.settings import LayerStability, PrecisionReport, Stability
from mergekit_bayes.precision.stability import in_words, refuse_few
from tests.tiny_models import WORDS, tiny_gpt2


def collect(squares):
    """The subsamples of a pass over batches of these (rows, entries), one observation each."""
    subsamples, total = Subsamples(), torch.zeros_like(squares[0])
    for i, batch in enumerate(squares, 1):
        total += batch
        subsamples.after_batch({"w": total}, i)
    return subsamples.parts()


@pytest.mark.parametrize("count", [4, 5, 7, 15, 16, 17, 31, 64, 100, 333])
def test_parts_are_disjoint_consecutive_and_nearly_equal(count):
    squares = [torch.full((2, 3), float(i)) for i in range(count)]
    parts = collect(squares)
    sizes = [part.observations for part in parts]
    assert len(parts) == K
    assert count - sum(sizes) < count / 8
    assert max(sizes) <= 2 * min(sizes)
    start = 0
    for part in parts:
        expected = sum(squares[start : start + part.observations]).sum(1)
        torch.testing.assert_close(part.rows["w"], expected)
        start += part.observations


def test_few_copies_are_kept_however_long_the_pass():
    subsamples = Subsamples()
    for i in range(1000):
        subsamples.after_batch({"w": torch.tensor(float(i))}, i + 1)
        assert len(subsamples.copies) < 16


def test_fewer_batches_than_subsamples_have_no_parts():
    assert Subsamples().parts() == collect([torch.ones(2, 2)] * (K - 1)) == ()


def test_rows_of_a_scalar_and_of_more_axes():
    assert row_sums(torch.tensor(3.0)).tolist() == [3.0]
    assert row_sums(torch.ones(2, 3, 4)).tolist() == [12.0, 12.0]


def test_the_error_is_that_of_fresh_samples():
    # Rows of gamma variables: the relative error of a mean of n is sqrt(1 / (shape n)).
    torch.manual_seed(0)
    gamma = torch.distributions.Gamma(0.5, 1.0)
    draws = list(gamma.sample((200, 2000, 1)) * torch.linspace(1, 9, 2000)[:, None])
    found = stability(collect(draws), {"w": 2000}, {"layer": ["w"]})["layer"]
    assert found.relative_error == pytest.approx((1 / (0.5 * 200)) ** 0.5, rel=0.08)
    halves = [sum(draws[:50]) + sum(draws[100:150]), sum(draws[50:100]) + sum(draws[150:])]
    expected = scipy.stats.spearmanr(*(h.numpy().ravel() for h in halves)).statistic
    assert found.rank_correlation == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_the_error_of_a_model_is_that_of_other_rows(tmp_path):
    loaded = load_model(str(tiny_gpt2(tmp_path / "m")))
    rng = np.random.default_rng(0)
    means, errors = [], []
    for seed in range(16):
        texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(64)]
        examples = encode_rows({"text": texts}, loaded)
        found = ggn_diagonal(loaded.model, batches(examples, 2, Collate(loaded.pad)), seed=seed)
        means.append({n: row_sums(t) / found.observations for n, t in found.total.items()})
        sizes = {name: total.numel() for name, total in found.total.items()}
        layers = stability(found.parts, sizes, {"all": list(sizes)})
        errors.append(layers["all"].relative_error)
    squares, weights = [], []
    for name, size in sizes.items():
        rows = np.stack([mean[name].numpy() for mean in means])
        rows = rows[:, rows.sum(0) > 0]
        squares.append(((rows.std(0, ddof=1) / rows.mean(0)) ** 2).mean())
        weights.append(size)
    actual = np.average(squares, weights=weights) ** 0.5
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(actual, rel=0.2)


def test_layers_are_weighted_by_entries_and_dead_ones_left_out():
    rows = torch.arange(1.0, 11.0)
    parts = [
        Part({"same": rows, "noisy": rows * (1 + (k % 2)), "dead": 0 * rows}, 1) for k in range(K)
    ]
    layers = {"a": ["same"], "b": ["noisy"], "ab": ["same", "noisy"], "dead": ["dead"]}
    found = stability(parts, {"same": 30, "noisy": 10, "dead": 10}, layers)
    # F_k is 1, 2, 1, 2: mean 3/2, sum of squared differences 1, standard error sqrt(1 / 3 / 4).
    noisy = (1 / 12) ** 0.5 / 1.5
    assert {name: layer.relative_error for name, layer in found.items()} == pytest.approx(
        {"a": 0.0, "b": noisy, "ab": noisy / 2}
    )


def test_rank_correlation_is_that_of_scipy_with_ties():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 6, 200).astype(float), rng.integers(0, 6, 200).astype(float)
    for pair in ((one, other), (one, one + other)):
        expected = scipy.stats.spearmanr(*pair).statistic
        assert rank_correlation(*pair) == pytest.approx(expected)
    assert rank_correlation(one, np.ones(200)) is None


def report(**changes):
    found = Stability(
        relative_error=0.031,
        rank_correlation=0.987,
        layers=(
            LayerStability(name="embeddings", relative_error=0.2, rank_correlation=0.5),
            LayerStability(name="h.0", relative_error=0.03, rank_correlation=0.99),
        ),
        more_examples=300,
    )
    fields = {
        "path": "p",
        "estimator": "ggn",
        "unit": "token",
        "loss": "",
        "observations": 1,
        "source": "data",
        "rows": 1000,
        "sampled": 100,
        "device": "cpu",
        "dtype": "float32",
        "health": {},
        "stability": found,
    }
    return PrecisionReport(**(fields | changes))


def test_the_line_says_how_many_more_rows_would_halve_the_error():
    assert in_words(report()) == (
        "stability: relative standard error of a row's curvature 0.031 (largest 0.2, in "
        "embeddings), rank correlation between halves 0.99; 300 more rows would halve the error "
        "(--examples 400)"
    )
    assert in_words(report(rows=150)).endswith("halve the error, of which the data have 50")
    for source, told in (
        ("self-generated", "error (--self-generated 400 --examples 400)"),
        ("random-tokens", "error (--random-tokens 4000 --examples 400)"),
    ):
        assert in_words(report(rows=100, observations=1000, source=source)).endswith(told)
    assert "fewer than 4 batches" in in_words(report(stability=None))
    assert "ivon averages" in in_words(report(stability=None, estimator="ivon"))
    none = {"rows": None, "sampled": None, "stability": None, "estimator": "adam"}
    assert "unknown, since second moments" in in_words(report(**none))


def test_too_few_rows_are_told_with_what_makes_more():
    with pytest.raises(ConfigError, match=r"but there are 3 rows\. Name more data\."):
        refuse_few(3, 3)
    with pytest.raises(ConfigError, match=r"but there is 1 row\. Raise --random-tokens, or"):
        refuse_few(1, 1, "random-tokens")


def test_an_estimate_reports_it_and_too_few_rows_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    data = tmp_path / "t.jsonl"
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(12)]
    data.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    model = tiny_gpt2(tmp_path / "m")
    config = PrecisionConfig(model=str(model), data=str(data), examples=8, batch_size=1)
    with pytest.raises(ConfigError, match=r"at least 4 rows.*--examples is 3"):
        run_precision(config.model_copy(update={"examples": 3}))
    assert not (model / "posterior").exists()
    found = run_precision(config).stability
    assert [layer.name for layer in found.layers] == [
        "embeddings",
        "transformer.h.0",
        "transformer.h.1",
        "rest",
    ]
    assert 0 < found.relative_error < 1
    assert 0 < found.rank_correlation <= 1
    assert found.more_examples == 24
    with open_posterior(str(model)) as posterior:
        assert posterior.info.health["relative_error"] == found.relative_error
    again = config.model_copy(update={"batch_size": 8, "force": True})
    assert run_precision(again).stability is None
