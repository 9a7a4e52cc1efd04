"""After a fine-tune with IVON weights are drawn with the noise of its training, without a flag."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import ConfigError, PrecisionError
from mergekit_bayes.evaluate import EvaluateConfig
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.finetune import run_finetune
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.data import load_run
from mergekit_bayes.finetune.identity import refuse_other_settings
from mergekit_bayes.finetune.rates import learning_rate
from mergekit_bayes.finetune.training import make_trainer, training_arguments
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.models.sampling import (
    PosteriorDraws,
    open_samplable,
    prior_obstacle,
    sampling_obstacle,
)
from mergekit_bayes.optim import IVON
from mergekit_bayes.posterior import Identity, PosteriorInfo, Predictive, open_posterior
from mergekit_bayes.posterior.info import parse_info
from mergekit_bayes.trainer import save_trained
from mergekit_bayes.trainer.choices import choose_ivon, predictive
from tests import finetuning, tiny
from tests.finetuning import config, info_of
from tests.tiny_models import tiny_bert

data = finetuning.data


@pytest.mark.parametrize("posterior", ["flush", "ivon"])
@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_a_default_fine_tune_is_drawn_at_three_times_the_variance_of_its_training(
    tmp_path, data, posterior, lora
):
    bert = tiny_bert(tmp_path / "bert")
    settings = config(tmp_path, data, model=bert, max_steps=9, posterior=posterior, lora=lora)
    run_finetune(settings, quiet=True)
    out = str(tmp_path / "out")
    info, training = info_of(out), info_of(out).training
    assert info.predictive is not None
    loaded = load_model(out)
    with open_samplable(out) as opened:
        draws = PosteriorDraws(loaded.model, opened, 2)
        stored = tiny.read(opened.precision.files[0])
        for place in draws._places:
            h = stored[place.name] / info.ess - info.prior.precision / info.ess
            floor = training["damping"] + training["weight_decay"]
            expected = np.sqrt(3 / (training["ess"] * (np.maximum(h, 0) + floor)))
            np.testing.assert_allclose(draws._deviation(place), expected, rtol=1e-3)
        # No weight was trained under more noise than 15 % of the median matrix.
        assert draws.report.largest_sigma <= 3**0.5 / (training["ess"] * training["damping"]) ** 0.5
        assert 0.05 < draws.report.sigma_over_rms < 0.3
    report = run_evaluate(
        EvaluateConfig(model=out, classify={"t": data}, samples=3, bootstrap=20), quiet=True
    )
    change = report.sampled.classification_change["t"].nll.value
    assert abs(change) < 0.1  # where draws from the bare prior are far away
    with open_samplable(out) as opened:
        wide = PosteriorDraws(loaded.model, opened, 1, prior=info.prior.precision)
        assert wide.report.largest_sigma > 10 * draws.report.largest_sigma


@pytest.mark.parametrize("posterior", ["flush", "ivon"])
def test_the_screen_gives_no_advice_about_a_default_fine_tune(tmp_path, data, posterior):
    bert = tiny_bert(tmp_path / "b")
    run_finetune(config(tmp_path, data, model=bert, max_steps=4, posterior=posterior), quiet=True)
    result = CliRunner().invoke(
        app, ["evaluate", str(tmp_path / "out"), "--classify", data, "--samples", "2"]
    )
    assert result.exit_code == 0, result.output
    assert "2 samples of" in result.output
    assert "--prior" not in result.output
    assert "--posterior-temperature" not in result.output


def test_flags_take_the_place_of_the_record(tmp_path, data):
    run_finetune(config(tmp_path, data, model=tiny_bert(tmp_path / "b"), max_steps=4), quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    recorded = info_of(tmp_path / "out").predictive

    def width(**flags):
        with open_samplable(str(tmp_path / "out")) as opened:
            report = PosteriorDraws(loaded.model, opened, 1, **flags).report
        return report.prior, report.temperature, report.given

    assert width() == (recorded.prior, recorded.temperature, False)
    assert width(temperature=0.5) == (recorded.prior, 0.5, False)
    assert width(prior=7.0) == (7.0, 1.0, True)
    assert width(prior=7.0, temperature=2.0) == (7.0, 2.0, True)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adamw"}, {"curvature": "price"}, {"damping": 0}]
)
def test_other_trainings_record_no_noise(tmp_path, data, changes):
    run_finetune(config(tmp_path, data, max_steps=2, **changes), quiet=True)
    info = info_of(tmp_path / "out")
    assert info.predictive is None
    assert "predictive" not in info.model_dump()


def test_a_loop_of_ones_own_records_it_as_well(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = IVON(
        model.parameters(), lr=0.1, ess=100, curvature="ggn", curvature_every=1, damping=0.5
    )
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            z = model(torch.randn(4, 3))
            optimizer.add_curvature(z.sum(), 4)
            z.square().mean().backward()
        optimizer.step()
    save_trained(model, optimizer, tmp_path / "m", observations=64, unit="example")
    info = info_of(tmp_path / "m")
    inside = 100 * (0.5 + 1e-4)
    assert info.predictive == Predictive(prior=inside, temperature=3.0)
    assert info.prior.precision == info.anchor.precision == pytest.approx(100 * 1e-4)
    # The damping, which no data have said, is not in what a merge weighs by.
    hess = {name: optimizer.state[p]["hess"] for name, p in model.named_parameters()}
    for name, precision in optimizer.precision(model.named_parameters()).items():
        torch.testing.assert_close(precision, 100 * (hess[name] - 0.5 + 1e-4), rtol=1e-4, atol=1e-4)


def test_the_noise_is_bounded_by_its_share_of_the_weights():
    torch.manual_seed(0)
    model = torch.nn.Linear(50, 50)
    rms = float(model.weight.detach().square().mean().sqrt())
    for given in ({}, {"ess": 5e4}):
        chosen = choose_ivon(model, 200, 40, weight_decay=1e-6, **given)
        assert chosen.ess == given.get("ess", 1e6)
        assert (chosen.ess * chosen.damping) ** -0.5 == pytest.approx(0.15 * rms)
    many = choose_ivon(model, 3e7, 40, weight_decay=1e-6)
    assert many.ess == 3e7
    assert (many.ess * many.damping) ** -0.5 == pytest.approx(0.15 * rms)
    without = choose_ivon(model, 200, 40, weight_decay=1e-6, damping=0.0)
    assert (without.ess * 1e-6) ** -0.5 == pytest.approx(0.05 * rms)
    assert choose_ivon(model, 200, 40, weight_decay=1e-6, curvature="price").damping == 0
    assert predictive(1.0, ess=1.0, damping=0.0, weight_decay=1.0) is None


def test_damping_is_added_to_every_estimate_and_pulls_nothing():
    seen = {}
    for damping in (0.0, 0.5):
        w = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        optimizer = IVON(
            [w],
            lr=1.0,
            ess=1e12,
            beta1=0.0,
            weight_decay=1e-9,
            clip_radius=1e-3,
            curvature="ggn",
            curvature_every=1,
            damping=damping,
        )
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.add_curvature(2 * w[0], 1)  # the second weight is used by nothing
                w[0].sum().backward()
            optimizer.step()
        seen[damping] = w.detach().clone(), optimizer.state[w]["hess"].clone()
    torch.testing.assert_close(seen[0.5][1], torch.tensor([4.5, 0.5]))
    torch.testing.assert_close(seen[0.0][1], torch.tensor([4.0, 0.0]))
    assert seen[0.5][0][1] == pytest.approx(3.0, abs=1e-7)
    assert seen[0.0][0][1] < 2.998  # without damping the prior pulls it by all of the bound


def test_damping_is_of_the_ggn_and_not_negative():
    w = torch.nn.Parameter(torch.ones(2))
    for bad in ({"damping": -1.0, "curvature": "ggn"}, {"damping": 0.1}):
        with pytest.raises(ValueError, match=r"damping=.* is out of range"):
            IVON([w], lr=1.0, ess=1.0, **bad)
    IVON([w], lr=1.0, ess=1.0, curvature="ggn", weight_decay=0.0, damping=0.1)


def test_damping_of_another_curvature_is_refused_in_the_settings(tmp_path, data):
    with pytest.raises(ConfigError, match="damping"):
        run_finetune(config(tmp_path, data, curvature="price", damping=0.1), quiet=True)


@pytest.mark.parametrize(
    ("steps", "rate"), [(50, 1e-4), (100, 1e-4), (200, 5e-5), (313, 1e-2 / 313), (5000, 1e-5)]
)
def test_a_classifiers_rate_falls_with_the_length_of_the_run(tmp_path, data, steps, rate):
    settings = config(tmp_path, data)
    assert learning_rate(settings, steps, "classification") == pytest.approx(rate)
    assert learning_rate(settings, steps, "causal-lm") == 1e-4
    adapter = config(tmp_path, data, lora={})
    assert learning_rate(adapter, steps, "classification") == pytest.approx(10 * rate)
    assert learning_rate(adapter, steps, "causal-lm") == 1e-3
    adamw = settings.model_copy(update={"optimizer": "adamw"})
    assert learning_rate(adamw, steps, "classification") == 1e-4
    given = settings.model_copy(update={"learning_rate": 3e-4})
    assert learning_rate(given, steps, "classification") == 3e-4


@pytest.mark.parametrize("value", [0, -1.0, "NaN", 1e39])
def test_a_width_that_is_none_is_refused(tmp_path, data, value):
    run_finetune(config(tmp_path, data, max_steps=2), quiet=True)
    with open_posterior(str(tmp_path / "out")) as opened:
        record = json.loads(opened.info.model_dump_json())
        file = opened.precision.files[0]
    record["predictive"]["temperature"] = float(value)
    with pytest.raises(PrecisionError, match=r"predictive\.temperature"):
        parse_info({"bmerge": json.dumps(record)}, file)


def test_names_of_an_adapter_and_a_model_are_those_of_the_file(tmp_path, data):
    """`PosteriorDraws` finds the places of a fine-tune's own file."""
    run_finetune(config(tmp_path, data, max_steps=2), quiet=True)
    loaded = load_model(str(tmp_path / "out"))
    with open_posterior(str(tmp_path / "out")) as opened:
        assert set(checkpoint_names(loaded.model, dict(loaded.model.named_parameters()))) >= set(
            opened.precision.specs
        )


def test_an_optimizers_checkpoint_of_an_earlier_version_has_no_damping():
    """Its h has none in it, so that none may be taken off again."""

    def made(damping):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        return w, IVON(
            [w], lr=0.1, ess=10, curvature="ggn", curvature_every=1, damping=damping, beta2=0.5
        )

    w, old = made(0.0)
    with old.sampled_params(train=True):
        old.add_curvature((2 * w).sum(), 1)
        w.sum().backward()
    old.step()
    saved = old.state_dict()
    for group in saved["param_groups"]:
        del group["damping"]
    v, new = made(0.5)
    new.load_state_dict(saved)
    assert [group["damping"] for group in new.param_groups] == [0.0]
    expected = old.precision([("w", w)])["w"]
    assert torch.equal(new.precision([("w", v)])["w"], expected)
    assert float(expected.min()) > 10


def test_a_group_has_its_own_damping_from_the_start():
    w, v = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [w], "damping": 2.0}, {"params": [v]}]
    optimizer = IVON(groups, lr=0.1, ess=10, curvature="ggn", damping=0.5)
    with optimizer.sampled_params(train=True):
        pass
    assert [float(optimizer.state[p]["hess"][0]) for p in (w, v)] == [2.0, 0.5]
    for precision in optimizer.precision([("w", w), ("v", v)]).values():
        torch.testing.assert_close(precision, torch.full((2,), 10 * 1e-4))


@pytest.mark.parametrize(
    ("identity", "is_refused"),
    [({"damping": 0.0}, False), ({"damping": None}, False), ({"damping": 0.01}, True)],
)
def test_a_checkpoint_without_damping_is_one_of_none(identity, is_refused):
    checkpoint = Checkpoint(Path("c"), 1, {"seed": 0}, 0.0)
    if is_refused:
        with pytest.raises(ConfigError, match=r"damping is 0\.0 there and 0\.01 here"):
            refuse_other_settings(checkpoint, {"seed": 0} | identity)
    else:
        refuse_other_settings(checkpoint, {"seed": 0} | identity)


def test_a_way_to_draw_is_no_prior_of_the_precision():
    """What reads 1/S itself, as the leverage of an adaptation, needs a prior inside S."""
    identity = Identity(blocks="0", full=None)
    info = PosteriorInfo(
        estimator="ggn", mean=identity, predictive=Predictive(prior=1.0, temperature=1.0)
    )
    assert sampling_obstacle(info) is None
    assert "without a proper prior" in prior_obstacle(info)


def test_the_trainers_arguments_have_the_rate_that_was_chosen(tmp_path, data):
    bert = tiny_bert(tmp_path / "b")
    settings = config(tmp_path, data, model=bert, max_steps=200, posterior="none")
    arguments = training_arguments(settings, tmp_path / "t", quiet=True)
    trainer = make_trainer(load_run(settings, 1), arguments, quiet=True)
    assert trainer.args.learning_rate == pytest.approx(5e-5)
