"""Draws from a mixture: of each run as often as it weighs, and from that run's own posterior."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.draws import mix
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.metrics.classification import class_probabilities
from mergekit_bayes.mix import MixConfig, run_mix
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.mixed_draws import (
    MixtureDraws,
    component_counts,
    open_samplable_components,
)
from mergekit_bayes.models.sampling import PosteriorDraws, open_samplable
from tests import tiny_models

NARROW = 1e12  # a prior precision that leaves draws at the mean
TEXTS = ["the cat sat on the mat .", "a dull film , not good", "dog"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Two classifiers with posteriors, `a` and `b`, and `m`, in which b weighs three times a."""
    folder = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate("ab"):
        tiny_models.tiny_bert(folder / name, labels=3, seed=seed)
        tiny_models.give_posterior(folder / name, seed=seed)
    runs = (str(folder / "a"), str(folder / "b"))
    run_mix(MixConfig(runs=runs, out=str(folder / "m"), weights=(1, 3)))
    return folder


def opened(mixture, stack, **options):
    return open_samplable_components(open_samplable(str(mixture / "m")), stack, **options)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_draws_are_of_the_runs_and_leave_the_model_as_it_was(mixture, stack):
    loaded = load_model(str(mixture / "m"))
    with torch.no_grad():
        loaded.model.classifier.bias += 1  # not what any file holds
    before = weights(loaded.model)
    draws = MixtureDraws(loaded.model, opened(mixture, stack), 8, prior=NARROW)
    assert (draws.report.components, draws.report.samples, len(draws)) == ((2, 6), 8, 8)
    means = [weights(load_model(str(mixture / name)).model) for name in "ab"]
    with draws:
        for k in draws:
            mean = means[k >= 2]
            for name, weight in weights(loaded.model).items():
                assert torch.allclose(weight, mean[name], rtol=0, atol=1e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(loaded.model).items())


def test_the_draws_of_a_run_are_those_of_its_own_posterior(mixture, stack):
    loaded = load_model(str(mixture / "m"))
    components = opened(mixture, stack)
    with MixtureDraws(loaded.model, components, 4, seed=3) as draws:
        found = [weights(loaded.model) for _ in draws]
    expected = []
    for number, (posterior, *_) in enumerate(components):
        run = load_model(str(mixture / "ab"[number])).model
        with PosteriorDraws(run, posterior, draws.counts[number], seed=mix(3, number + 1)) as own:
            expected += [weights(run) for _ in own]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_components_are_drawn_by_their_weights():
    assert component_counts((0.25, 0.75), 8, 0) == (2, 6)
    assert component_counts((1.0,), 5, 0) == (5,)
    shares = np.array([component_counts((0.1, 0.2, 0.7), 4, seed) for seed in range(1000)])
    assert (shares.sum(axis=1) == 4).all()
    assert shares.mean(axis=0) / 4 == pytest.approx([0.1, 0.2, 0.7], abs=0.02)


def test_evaluate_averages_the_predictions_of_the_runs(mixture, tmp_path):
    rows = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"classify": {"x": str(file)}, "bootstrap": 0}
    report = run_evaluate(
        EvaluateConfig(model=str(mixture / "m"), samples=4, prior=NARROW, **settings)
    )
    single = {
        name: run_evaluate(EvaluateConfig(model=str(mixture / name), **settings)) for name in "ab"
    }
    drawn = report.sampled.draws
    names = tuple(str(mixture / name) for name in "ab")
    assert (drawn.components, drawn.runs) == ((1, 3), names)
    assert report.classification == single["b"].classification
    loaded = [load_model(str(mixture / name)) for name in "ab"]
    each = [
        class_probabilities(m.model, m.tokenizer, TEXTS, max_length=m.context, batch_size=8)
        for m in loaded
    ]
    averaged = 0.25 * np.exp(each[0]) + 0.75 * np.exp(each[1])
    nats = -np.log([row[i % 3] for i, row in enumerate(averaged)]).mean()
    arguments = f"evaluate {mixture / 'm'} --classify x={file} --samples 4 --bootstrap 0"
    shown = CliRunner().invoke(app, arguments.split(), env={"COLUMNS": "1000"}).stderr
    assert f"a mixture: samples 1 of '{names[0]}', 3 of '{names[1]}', and the entries" in shown
    assert f"the prior precision are those of '{names[0]}'" in shown
    assert report.sampled.classification["x"].nll.value == pytest.approx(nats, rel=1e-5)


def test_what_cannot_be_drawn_is_refused(mixture, stack, tmp_path):
    with pytest.raises(ConfigError, match="is a mixture, and each of its runs"):
        opened(mixture, stack, precision="elsewhere")
    with pytest.raises(ConfigError, match="samples 0"):
        MixtureDraws(load_model(str(mixture / "m")).model, opened(mixture, stack), 0)
    tiny_models.tiny_bert(tmp_path / "bare", labels=3)
    tiny_models.give_posterior(tmp_path / "bare", prior=0.0)
    run_mix(MixConfig(runs=(str(mixture / "a"), str(tmp_path / "bare")), out=str(tmp_path / "m")))
    plain = stack.enter_context(open_samplable(str(tmp_path / "m")))
    with pytest.raises(PrecisionError, match="mixture/2' cannot be sampled"):
        open_samplable_components(plain, stack)
    run_mix(MixConfig(runs=(str(mixture / "a"),), out=str(tmp_path / "one")))
    assert not open_samplable_components(open_samplable(str(tmp_path / "one")), stack)
    assert Path(tmp_path / "one/config.json").exists()
