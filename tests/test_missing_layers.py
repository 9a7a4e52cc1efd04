"""Layers or experts that one model lacks: lost, of another depth, or not needed."""

import json

import pytest

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.merge import MergeConfig
from mergekit_bayes.plan import plan_merge
from tests import tiny

PARTS = ("attn.q.weight", "mlp.gate.bias", "mlp.up.weight")


def layers(numbers, prefix="model.layers", parts=PARTS):
    return {f"{prefix}.{i}.{part}": (3, 3) for i in numbers for part in parts}


def experts(layers, numbers):
    prefix = "model.layers.{}.mlp.experts"
    return {n: s for i in layers for n, s in moe(prefix.format(i), numbers).items()}


def moe(prefix, numbers):
    return layers(numbers, prefix, ("up.weight", "down.weight"))


def write(folder, shapes, config=None, seed=0):
    tiny.write(folder / "model.safetensors", tiny.arrays(seed, {"norm.weight": (3,), **shapes}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def told(tmp_path, donor, other, *configs, base=True, **settings):
    """What a merge says of a task (`other`) on a base (`donor`), or of both in an average."""
    donors_config, others_config = configs or (None, None)
    one = write(tmp_path / "donor", donor, donors_config)
    two = write(tmp_path / "other", other, others_config, seed=1)
    models = {"base": one, "models": (two,)} if base else {"models": (one, two)}
    with pytest.raises(MismatchError) as error:
        plan_merge(MergeConfig(out=str(tmp_path / "out"), **models, **settings)).close()
    return str(error.value)


def both_ways(tmp_path, whole, part, config, parts_config, **settings):
    """The messages where the donor has all, and where the task has."""
    yield told(tmp_path / "1", whole, part, config, parts_config, **settings)
    yield told(tmp_path / "2", part, whole, parts_config, config, **settings)


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    ("numbers", "config"),
    [
        ((0, 1), {"num_hidden_layers": 4}),  # the last shard
        ((0, 1), {"text_config": {"num_hidden_layers": 4}}),
        ((0, 1), {"n_layer": 4}),
        ((0, 1), {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}),
        ((2, 3), {"num_hidden_layers": 4}),  # the first one
        ((2, 3), None),
        ((0, 2, 3), {"num_hidden_layers": 4}),  # one in the middle
        ((0, 2, 3), None),
        ((0, 3), {"num_hidden_layers": 2}),  # a wrong config beside
    ],
)
def test_a_model_with_fewer_layers_than_its_config_counts_is_incomplete(
    tmp_path, base, numbers, config
):
    for message in both_ways(
        tmp_path, layers(range(4)), layers(numbers), {"num_hidden_layers": 4}, config, base=base
    ):
        assert "its files are incomplete." in message
        assert "--on-missing" not in message


def test_tensors_that_are_lost_of_a_layer_that_is_there_are_incomplete(tmp_path):
    part = layers(range(4))
    del part["model.layers.3.mlp.up.weight"]
    config = {"num_hidden_layers": 4}
    for message in both_ways(tmp_path, layers(range(4)), part, config, config):
        assert "'model.layers.*.mlp.up.weight' of other layers" in message
        assert "--on-missing" not in message


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    ("prefix", "counted"),
    [
        ("model.layers", lambda n: {"num_hidden_layers": n}),
        ("transformer.h", lambda n: {"n_layer": n}),
        ("decoder.block", lambda n: {"num_layers": 9, "num_decoder_layers": n}),
        ("model.encoder.layers", lambda n: {"encoder_layers": n, "decoder_layers": 9}),
        (
            "model.vision_tower.layers",
            lambda n: {"vision_config": {"depth": n}, "text_config": {"num_hidden_layers": 9}},
        ),
        # Layers for further tokens do not explain two more.
        ("model.layers", lambda n: {"num_hidden_layers": n, "num_nextn_predict_layers": 1}),
    ],
)
def test_models_of_other_depths_are_told_as_that_and_no_flag_is_proposed(
    tmp_path, base, prefix, counted
):
    whole, part = layers(range(4), prefix), layers(range(2), prefix)
    for message in both_ways(tmp_path, whole, part, counted(4), counted(2), base=base):
        assert f"There are 2 '{prefix}.*'" in message
        assert "models of different size cannot be merged" in message
        assert "incomplete" not in message
        assert "--on-missing" not in message


def test_without_a_config_both_causes_are_told_and_no_flag(tmp_path):
    for message in both_ways(tmp_path, layers(range(4)), layers(range(2)), None, None):
        assert "files are incomplete" in message
        assert "different size" in message
        assert "--on-missing" not in message


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("key", ["num_nextn_predict_layers", "num_mtp_layers"])
def test_layers_for_further_tokens_may_be_absent(tmp_path, base, key):
    """DeepSeek-V3 and GLM-4.5 store them as one layer more than `num_hidden_layers` counts."""
    further = layers([2]) | {"model.layers.2.eh_proj.weight": (3, 6)}
    config = {"num_hidden_layers": 2, key: 1}
    whole, part = layers(range(2)) | further, layers(range(2))
    for message in both_ways(tmp_path, whole, part, config, config, base=base):
        assert "further tokens" in message
        assert f"--on-missing {'base' if base else 'skip'}" in message
        assert "incomplete" not in message
    whole["score.weight"] = (2, 3)  # another tensor: the flag would drop that too
    (message, _) = both_ways(tmp_path / "more", whole, part, config, config, base=base)
    assert "further tokens" not in message


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"num_experts": 2}, "different size cannot be merged"),
        ({"num_local_experts": 4}, "its files are incomplete"),
        ({}, "No config.json says how many"),
    ],
)
def test_experts_are_counted_as_layers_are(tmp_path, config, cause):
    whole, part = experts(range(2), range(4)), experts(range(2), range(2))
    for message in both_ways(tmp_path, whole, part, {"num_experts": 4}, config):
        assert cause in message
        assert "--on-missing" not in message


def test_a_hole_in_the_numbers_of_both_models_is_no_loss(tmp_path):
    """A Sequential has numbers for what has no parameters, too."""
    whole, part = layers((0, 2, 4), "head.net"), layers((0, 2), "head.net")
    for message in both_ways(tmp_path, whole, part, None, None):
        assert "different size" in message
    part = layers((0, 4), "head.net")
    for message in both_ways(tmp_path / "hole", whole, part, None, None):
        assert "its files are incomplete." in message


def test_layers_are_counted_also_where_the_names_of_the_models_differ(tmp_path):
    """What the donor lacks keeps its own name, and its layers are those of the renamed ones."""
    short, long = layers(range(2)), layers(range(4), "language_model.model.layers")
    counted = {"num_hidden_layers": 2}, {"num_hidden_layers": 4}
    message = told(tmp_path, short, long, *counted)
    assert "different size cannot be merged" in message
    assert "--on-missing" not in message
