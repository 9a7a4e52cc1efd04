"""Averages of the checkpoints of one run, in the order of their steps."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.merge import MergeConfig, plan_merge, run_merge
from mergekit_bayes.plan import recipe_path
from tests import tiny

STEPS = (100, 200, 1000, 1100)
AS_A_SHELL_LISTS_THEM = ("checkpoint-100", "checkpoint-1000", "checkpoint-1100", "checkpoint-200")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, step in enumerate(STEPS):
        folder = f"checkpoint-{step}"
        tiny.posterior(f"{folder}/model.safetensors", tiny.arrays(i), tiny.precisions(i))
        tiny.into_folder(folder)


def merge(*models, **settings):
    return run_merge(MergeConfig(models=models, out="out", trajectory=True, **settings))


def test_checkpoints_are_put_in_the_order_of_their_steps(run):
    report = merge(*AS_A_SHELL_LISTS_THEM)
    recipe = yaml.safe_load(recipe_path(Path("out")).read_text())
    assert recipe["models"] == [f"checkpoint-{step}" for step in STEPS]
    assert "4 checkpoints from step 100 to 1,100, shares alike" in report.notes
    written = tiny.read("out")
    for name, values in written.items():
        mean = np.mean([np.float64(tiny.arrays(i)[name]) for i in range(4)], axis=0)
        np.testing.assert_allclose(values, mean, rtol=1e-5, atol=1e-6)


def test_decay_gives_shares_that_fall_with_the_distance_in_steps(run):
    report = merge(*AS_A_SHELL_LISTS_THEM, decay=0.5)
    (note,) = (note for note in report.notes if "checkpoints" in note)
    assert "falling by 0.5 over 100 steps, the median distance of two: 100 has 0.00065, " in note
    assert note.endswith("200 has 0.0013, 1,000 has 0.333, 1,100 has 0.665")
    # The median distance is 100 steps.
    shares = np.array([0.5**10, 0.5**9, 0.5, 1.0])
    shares /= shares.sum()
    for name, values in tiny.read("out").items():
        parts = [s * np.float64(tiny.arrays(i)[name]) for i, s in enumerate(shares)]
        np.testing.assert_allclose(values, sum(parts), rtol=1e-5, atol=1e-6)


def test_precisions_weigh_each_entry(run):
    merge("checkpoint-200", "checkpoint-100", weights="precision")
    once = tiny.read("out")
    run_merge(
        MergeConfig(models=["checkpoint-100", "checkpoint-200"], out="by-hand", weights="precision")
    )
    for name, values in tiny.read("by-hand").items():
        np.testing.assert_array_equal(once[name], values)


def test_the_recipe_of_a_trajectory_makes_the_same_bytes(run):
    merge(*AS_A_SHELL_LISTS_THEM, decay=0.9)
    recipe = yaml.safe_load(recipe_path(Path("out")).read_text())
    run_merge(MergeConfig(**recipe, out="again"))
    for name, values in tiny.read("again").items():
        np.testing.assert_array_equal(values, tiny.read("out")[name])


REFUSED = {
    "no step": (["checkpoint-100", "last"], {}, "'last' ends in no step"),
    "one step twice": (["checkpoint-100", "other/checkpoint-100"], {}, "are of one step"),
    "one checkpoint twice": (["checkpoint-100", "checkpoint-100"], {}, "are of one step"),
    "a base": (["checkpoint-100"], {"base": "checkpoint-200"}, "no use for --base"),
    "scales": (["checkpoint-100", "checkpoint-200"], {"scale": (1.0, 2.0)}, "no use for --scale"),
    "sums": (["a-1", "a-2"], {"method": "ties"}, "--method ties adds their changes to a base"),
    "a decay alone": (["a", "b"], {"trajectory": False, "decay": 0.5}, "add --trajectory"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_trajectory_is_refused(kind):
    models, settings, message = REFUSED[kind]
    with pytest.raises(ConfigError, match=message):
        plan_merge(MergeConfig(models=models, **({"trajectory": True} | settings)))
