"""Settings of single models: how they may name a model, and the advice where no name fits."""

import pytest

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.plan.settings import BY_MODEL, MergeConfig
from tests import three_models

world = three_models.world
VALUES = {"precision": "elsewhere", "isotropic": 2.0, "observations": "3x"}


def config(**settings):
    given = {"models": ("a.safetensors",), "base": "base.safetensors", "weights": "precision"}
    return MergeConfig(**given | settings)


@pytest.mark.parametrize("setting", BY_MODEL)
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("BASE", "base.safetensors"),
        ("./base.safetensors", "base.safetensors"),
        ("x/..//a.safetensors", "a.safetensors"),
        ("base", "base"),
    ],
)
def test_a_model_may_be_named_by_another_spelling(setting, name, model):
    assert getattr(config(**{setting: {name: VALUES[setting]}}), setting) == {
        model: VALUES[setting]
    }


def test_a_model_that_is_called_base_keeps_its_name():
    named = config(models=("BASE",), observations={"BASE": "3x"})
    assert named.observations == {"BASE": "3x"}


def test_the_base_may_be_called_base_in_a_merge(world):
    with (
        plan_merge(config(observations={"BASE": "3x"})) as by_word,
        plan_merge(config(observations={"base.safetensors": "3x"})) as by_name,
    ):
        counts = [[model.weighing.count for model in plan.inputs] for plan in (by_word, by_name)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"observations": {"BAS": "3x"}},
            "Name it as given: a.safetensors, base.safetensors, or BASE",
        ),
        ({"method": "linear", "weights": "uniform"}, "Did you mean 'task_arithmetic'?"),
        (
            {"method": "linear", "weights": "uniform", "base": None, "models": ("a", "b")},
            "Did you mean 'average'?",
        ),
        ({"method": "tie", "weights": "uniform"}, "Did you mean 'ties'?"),
    ],
)
def test_advice_names_what_would_work(world, settings, text):
    with pytest.raises(ConfigError) as error:
        plan_merge(config(**settings))
    assert text in str(error.value)
