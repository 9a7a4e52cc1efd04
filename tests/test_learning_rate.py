"""The learning rate of a fine-tune bounds a step, and that of earlier versions is converted."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_bayes.adapt import AdaptConfig
from mergekit_bayes.adapt.data import training_config
from mergekit_bayes.adapt.units import choose_units
from mergekit_bayes.configs import load_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune import FinetuneConfig, run_finetune
from mergekit_bayes.finetune.choices import Choices
from mergekit_bayes.finetune.rates import in_present_unit, optimizer_rate
from mergekit_bayes.finetune.refusals import refuse_before
from mergekit_bayes.optim import IVON
from mergekit_bayes.optim.rates import bound_from_rate, rate_from_bound, step_bound
from tests import finetuning, tiny
from tests.finetuning import config, info_of

data = finetuning.data
RESCALED = {"rescale_lr": True, "curvature": "price", "hess_init": 0.5, "weight_decay": 1e-3}


def test_round_rates_stay_round_both_ways():
    for mantissa in range(1, 100):
        for power in range(-9, -2):
            for clip in ("1e-3", "2e-3", "5e-4", "1e-2", "1"):
                lr = float(f"{mantissa}e{power}")
                bound = bound_from_rate(lr, float(clip))
                assert rate_from_bound(bound, float(clip)) == lr
    assert [rate_from_bound(b, 1e-3) for b in (1e-4, 3e-4, 1e-3)] == [0.1, 0.3, 1.0]
    assert rate_from_bound(0.999, 1e-2) == 99.9 != 0.999 / 1e-2
    assert rate_from_bound(1e-4, 5e-324) == bound_from_rate(1e300, 1e300) == math.inf


def weights(folder):
    return {
        file: (Path(folder) / file).read_bytes()
        for file in ("model.safetensors", "posterior/precision.posterior")
    }


@pytest.mark.parametrize("changes", [{}, pytest.param(RESCALED, marks=pytest.mark.slow)])
def test_a_converted_rate_makes_the_bits_of_the_old_one(tmp_path, data, monkeypatch, changes):
    """An earlier version gave IVON the rate of the settings as it was."""
    old = 0.3
    bound = bound_from_rate(old, 1e-3, 0.501 if changes else 1.0)
    settings = config(tmp_path, data, max_steps=4, learning_rate=bound, **changes)
    assert optimizer_rate(settings) == old
    run_finetune(settings, quiet=True)
    now = weights(tmp_path / "out")
    seen = []

    def arguments(self, seed):
        made = ivon_arguments(self, seed)
        seen.append(made["lr"])
        return {**made, "lr": old}

    ivon_arguments = Choices.ivon_arguments
    monkeypatch.setattr(Choices, "ivon_arguments", arguments)
    run_finetune(settings.model_copy(update={"force": True}), quiet=True)
    assert seen == [old]
    assert weights(tmp_path / "out") == now
    training = info_of(tmp_path / "out").training
    assert (training["learning_rate"], training["lr"]) == (bound, old)


@pytest.mark.parametrize("changes", [{}, {**RESCALED, "clip_radius": 1e-4}])
def test_no_weight_moves_further_than_the_rate_in_a_step(tmp_path, data, changes):
    """And most entries of the first step reach it, which a rate in another unit would not do."""
    rate = 2e-3
    changes = {"learning_rate": rate, "scheduler": "constant", "posterior": "none", **changes}
    run_finetune(config(tmp_path, data, max_steps=1, **changes), quiet=True)
    before, after = tiny.read(tmp_path / "base"), tiny.read(tmp_path / "out")
    moved = np.concatenate([abs(after[n] - before[n]).ravel() for n in before if n in after])
    assert moved.max() == pytest.approx(rate, rel=1e-3)


def test_the_log_tells_the_rate_of_the_settings(tmp_path, data, capfd):
    run_finetune(
        config(tmp_path, data, max_steps=4, logging_steps=2, posterior="none", learning_rate=2e-4)
    )
    told = capfd.readouterr().err
    assert "ivon: learning_rate 0.0002 (bound of a weight's change a step; lr 0.2), " in told
    # The schedule is linear: after one of four steps three quarters are left.
    assert "step 2/4" in told
    assert "learning_rate 0.00015" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"found 0\.1.*lr 0\.1 with clip_radius 0\.001 .*rate: 0\.0001\."),
        ({"learning_rate": 3, "clip_radius": 0.1}, r"clip_radius 0\.1 is learning_rate: 0\.3\."),
        ({"learning_rate": 300, **RESCALED}, r"is learning_rate: 0\.1503\."),
        ({"learning_rate": math.inf}, r"expected at most 0\.01, found inf\."),
        ({"clip_radius": math.inf}, r"clip_radius: with inf nothing bounds a step"),
        ({"clip_radius": 1e-320}, r"clip_radius: 9\.99\S+ with learning_rate 0\.0001 makes"),
    ],
)
def test_a_rate_of_another_unit_is_refused_with_the_converted_one(changes, message):
    given = {"model": "m", "data": "d", "output": "o", **changes}
    with pytest.raises(ConfigError, match=message):
        run_finetune(FinetuneConfig.model_validate(given), quiet=True)
    # AdamW has no clip radius, and its rate never had another unit.
    refuse_before(FinetuneConfig.model_validate(given | {"optimizer": "adamw"}))


def test_an_adaptation_refuses_it_as_well():
    given = {"model": "m", "output": "o", "add": "a", "learning_rate": 0.5}
    refuse_before(training_config(AdaptConfig.model_validate(given)))
    with pytest.raises(ConfigError, match=r"is learning_rate: 0\.0005\."):
        refuse_before(training_config(AdaptConfig.model_validate(given | {"optimizer": "ivon"})))


@pytest.mark.parametrize(("optimizer", "lr"), [("ivon", 0.3), ("adamw", 3e-4)])
def test_an_adaptation_hands_ivon_its_own_rate_and_reports_the_bound(optimizer, lr):
    given = {"model": "m", "output": "o", "learning_rate": 3e-4, "base_observations": 5}
    config = AdaptConfig.model_validate(given | {"optimizer": optimizer})
    units = choose_units(config, None, {"add": 10}, None, "token")
    assert (units.learning_rate, units.lr, units.record()["lr"]) == (3e-4, lr, lr)
    assert "learning_rate 0.0003, " in units.summary()


def test_the_largest_rate_and_none_at_all_are_taken():
    for rate in (0.0, 0.01):
        given = {"model": "m", "data": "d", "output": "o", "learning_rate": rate}
        refuse_before(FinetuneConfig.model_validate(given))


OLD = {"optimizer": "ivon", "lr": 0.3, "clip_radius": 1e-3}


@pytest.mark.parametrize(
    ("stored", "rate"),
    [
        ({**OLD, "learning_rate": None}, 3e-4),
        ({**OLD, "learning_rate": 0.3}, 3e-4),
        ({**OLD, "learning_rate": 3e-4}, 3e-4),
        ({**OLD, **RESCALED, "learning_rate": 0.3}, 1.503e-4),
        ({"optimizer": "adamw", "lr": 0.3, "learning_rate": None}, 0.3),
        ({"optimizer": "ivon", "learning_rate": 0.3, "units": {"lr": 0.3}}, 3e-4),
        ({"optimizer": "ivon", "learning_rate": None, "units": {"lr": 0.3}}, None),
        ({"optimizer": "ivon", "learning_rate": 3e-4, "units": {"lr": 0.3}}, 3e-4),
        ({**OLD, "learning_rate": None, "clip_radius": "wide"}, None),
        ({**OLD, "learning_rate": None, "lr": []}, None),
        ({"learning_rate": None, "units": 3}, None),
    ],
)
def test_the_rate_of_a_checkpoint_is_read_in_the_present_unit(stored, rate):
    assert in_present_unit(stored)["learning_rate"] == rate


# Keys of a checkpoint's settings that the versions with the other unit did not have.
AFTERWARDS = (
    *("eval_data", "eval_steps", "load_best", "patience"),
    *("attn_implementation", "gradient_checkpointing", "torch_compile"),
)


def as_before(checkpoint, rate):
    """Write a checkpoint's marker as an earlier version did."""
    marker = json.loads((checkpoint / "whole.json").read_text())
    marker["settings"]["learning_rate"] = rate
    for name in AFTERWARDS:
        del marker["settings"][name]
    marker["settings"] |= {"text_column": "text", "pack": True}
    (checkpoint / "whole.json").write_text(json.dumps(marker))


def test_a_checkpoint_of_an_earlier_version_is_resumed_or_told_in_the_present_unit(tmp_path, data):
    kept = {"posterior": "none", "max_steps": 4, "save_steps": 2, "keep_checkpoints": True}
    kept |= {"pack": "joined", "max_length": 16}
    run_finetune(config(tmp_path, data, **kept), quiet=True)
    through = tiny.read(tmp_path / "out")
    for path in ("out", "out.checkpoints/checkpoint-4"):
        shutil.rmtree(tmp_path / path)
    as_before(tmp_path / "out.checkpoints" / "checkpoint-2", None)
    settings = config(tmp_path, data, resume=True, **kept)
    other = settings.model_copy(update={"learning_rate": 2e-3})
    with pytest.raises(
        ConfigError, match=r"learning_rate is 0\.0001 there and 0\.002 here; lr is 0\.1 there"
    ):
        run_finetune(other, quiet=True)
    again = settings.model_copy(update={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="gradient_checkpointing is false there and true here"):
        run_finetune(again, quiet=True)
    run_finetune(settings, quiet=True)
    for name, tensor in tiny.read(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, through[name])


def test_the_bound_of_a_group_is_the_furthest_that_ivon_moves_an_entry():
    for given in ({"rescale_lr": False}, {"rescale_lr": True}):
        w = torch.nn.Parameter(torch.zeros(4))
        optimizer = IVON(
            [w], lr=0.7, ess=1.0, hess_init=0.5, clip_radius=1e-3, weight_decay=0.1, **given
        )
        with optimizer.sampled_params(train=True):
            (w * torch.tensor([1e3, -1e3, 1e2, 1e-9])).sum().backward()
        optimizer.step()
        bound = step_bound(optimizer.param_groups[0], 0.7)
        torch.testing.assert_close(w.detach().abs()[:3], torch.full((3,), bound))


def test_settings_of_the_repository_are_in_the_present_unit():
    for path in sorted(Path(__file__).parent.parent.glob("configs/finetune/*.yaml")):
        refuse_before(load_config(FinetuneConfig, path))
