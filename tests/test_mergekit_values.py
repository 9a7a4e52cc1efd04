"""Settings of mergekit's recipes: scalars, gradients, filters, levels, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.mergekit.document import read_recipe
from mergekit_bayes.mergekit.objects import Filter, Recipe
from mergekit_bayes.mergekit.values import check_settings, given_settings, setting_at, value_at

MLP = "model.layers.3.mlp.up_proj.weight"
FINITE = st.floats(-1e6, 1e6)


@given(st.lists(FINITE, min_size=1, max_size=9), st.floats(0, 1))
def test_a_gradient_is_a_polyline_through_its_values(values, position):
    at = value_at(tuple(values), MLP, position)
    assert min(values) - 1e-6 <= at <= max(values) + 1e-6
    for i, value in enumerate(values):
        assert value_at(tuple(values), MLP, i / max(len(values) - 1, 1)) == value
    constant = value_at((values[0],) * len(values), MLP, position)
    assert constant == pytest.approx(values[0], rel=1e-12)


@pytest.mark.parametrize(
    ("values", "expected"),
    [  # as mergekit 0.1.5 gives them in the six layers of a model
        ((0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ((0, 1, 0), [0, 0.4, 0.8, 0.8, 0.4, 0]),
        ((1, 0.5), [1, 0.9, 0.8, 0.7, 0.6, 0.5]),
        ((2,), [2, 2, 2, 2, 2, 2]),
        (tuple(range(11)), [0, 2, 4, 6, 8, 10]),
        (("0.5", "1"), [0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ((True, False), [1, 0.8, 0.6, 0.4, 0.2, 0]),
    ],
)
def test_gradients_are_those_of_mergekit(values, expected):
    assert [value_at(values, MLP, i / 5) for i in range(6)] == pytest.approx(expected)


def test_a_gradient_of_truth_values_is_a_staircase():
    at = [value_at((0, 0, 1), MLP, i / 5, "truth") for i in range(6)]
    assert at == [False] * 5 + [True]
    at = [value_at((True, False), MLP, i / 5, "truth") for i in range(6)]
    assert at == [True] * 5 + [False]


@pytest.mark.parametrize("layers", range(2, 60))
def test_a_staircase_steps_at_its_layer_whatever_the_rounding_of_positions(layers):
    """With a value for each layer, each layer has its own."""
    values = tuple(i % 2 == 0 for i in range(layers))
    at = tuple(value_at(values, MLP, i / (layers - 1), "truth") for i in range(layers))
    assert at == values


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("mlp", True),
        ("layers.3.", True),
        ("up_proj.weight", True),
        (MLP, True),
        ("*", True),
        ("", True),
        (None, True),
        ("MLP", False),
        ("layers.*.mlp", False),
        ("mlp*", False),
        ("*mlp", False),
        (" mlp", False),
        ("layers.1.", False),
    ],
)
def test_a_filter_is_a_part_of_the_name(text, matches):
    assert value_at((Filter(filter=text, value=3),), MLP, 0) == (3 if matches else None)


def test_the_first_filter_that_matches_counts_and_may_be_a_gradient():
    filters = (
        Filter(filter="self_attn", value=3),
        Filter(filter="mlp", value=(0, 1)),
        Filter(filter=None, value=7),
        Filter(filter="norm", value=2),
    )
    names = ("layers.0.self_attn.q_proj", "layers.0.mlp.up_proj", "model.norm.weight")
    assert [value_at(filters, name, 0.25) for name in names] == [3, 0.25, 7]


def test_where_no_filter_matches_the_next_level_is_asked():
    source = {"weight": (Filter(filter="mlp", value=8),)}
    slice_ = {"weight": (Filter(filter="self_attn", value=9),)}
    levels = (source, slice_, {"t": 1}, {"weight": 100})
    names = ("mlp.up", "self_attn.q", "norm")
    assert [setting_at("weight", levels, name, 0) for name in names] == [8, 9, 100]
    assert setting_at("density", levels, "mlp.up", 0) is None
    assert setting_at("weight", levels[:1], "norm", 0) is None


def test_a_zero_or_false_of_a_near_level_is_a_value():
    assert setting_at("weight", ({"weight": 0}, {"weight": 1}), MLP, 0) == 0
    assert setting_at("normalize", ({"normalize": False}, {}), MLP, 0, "truth") is False


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("1e-8", "number", 1e-8),  # YAML reads it as text
        (True, "number", 1.0),
        (3.0, "whole", 3),
        ("3", "whole", 3),
        ("No", "truth", False),
        (1, "truth", True),
        ("word", "text", "word"),
    ],
)
def test_a_value_is_read_as_what_its_setting_is(value, kind, expected):
    read = value_at(value, MLP, 0, kind)
    assert read == expected
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("abc", "number", "expected a number, found 'abc'"),
        ("nan", "number", "expected a number"),
        ("1e999", "number", "expected a number"),
        (float("nan"), "number", "expected a number"),
        (2.5, "whole", "expected a whole number, found 2.5"),
        (True, "whole", "expected a whole number"),
        ((1, 2), "whole", "expected a whole number, found 1.5"),
        (2, "truth", "expected true or false, found 2"),
        (0.5, "truth", "expected true or false"),
        ("maybe", "truth", "expected true or false"),
        (5, "text", "expected text"),
    ],
)
def test_a_value_of_another_kind_is_refused(value, kind, message):
    with pytest.raises(ConfigError, match=message):
        value_at(value, MLP, 0.5, kind)
    with pytest.raises(ConfigError, match=r"'x' in 'model\.layers\.3"):
        setting_at("x", ({"x": value},), MLP, 0.5, kind)


def recipe(**keys: object) -> Recipe:
    models = [{"model": "a", "parameters": {"weight": 1}}]
    return read_recipe({"merge_method": "ties", "models": models, **keys}, "r.yml")


def test_all_settings_are_listed_with_their_keys():
    slices = [
        {
            "sources": [{"model": "a", "layer_range": [0, 1], "parameters": {"scale": 1}}],
            "parameters": {"t": 2},
        }
    ]
    content = {
        "merge_method": "x",
        "modules": {"part": {"slices": slices, "parameters": {"t": 3}}},
        "parameters": {"t": 4},
    }
    found = [tuple(s) for s in given_settings(read_recipe(content, "r.yml"))]
    assert found == [
        ("parameters.t", "t", 4, False),
        ("modules.part.parameters.t", "t", 3, False),
        ("modules.part.slices[0].parameters.t", "t", 2, False),
        ("modules.part.slices[0].sources[0].parameters.scale", "scale", 1, True),
    ]
    assert ("models[0].parameters.weight", "weight", 1, True) in list(given_settings(recipe()))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"parameters": {"normalise": 1}}, r"parameters.normalise: .*did you mean 'normalize'\?"),
        ({"parameters": {"qqq": 1}}, "parameters.qqq: .*possible are normalize, weight"),
        (
            {"models": [{"model": "a", "parameters": {"normalize": True}}]},
            r"models\[0\].parameters.normalize: .*all models together",
        ),
        (
            {"models": [{"model": "a", "parameters": {"weight": [1, "x"]}}]},
            r"models\[0\].parameters.weight: expected a number, found 'x'",
        ),
        (
            {"parameters": {"normalize": [{"filter": "m", "value": [True, 3]}]}},
            "parameters.normalize: expected true or false, found 3",
        ),
    ],
)
def test_settings_that_the_rule_cannot_use_are_refused_by_their_key(keys, message):
    check_settings(recipe(), {"weight": "number"}, {"normalize": "truth"})
    with pytest.raises(ConfigError, match="r.yml: " + message):
        check_settings(recipe(**keys), {"weight": "number"}, {"normalize": "truth"})
