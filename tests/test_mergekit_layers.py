"""Slices of models: which tensors each tensor of the output is made of, and what configs say."""

import contextlib
import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.mergekit.document import read_recipe
from mergekit_bayes.mergekit.layer_configs import LayerOrigin, config_changes
from mergekit_bayes.mergekit.layers import (
    ModelNames,
    find_stack,
    is_behind,
    layer_sources,
    map_models,
    map_slices,
)

LLAMA = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def names(layers: int, prefix: str = "model.layers", tails=LLAMA, outside=None) -> list[str]:
    if outside is None:
        outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return [*outside, *(f"{prefix}.{i}.{tail}" for i in range(layers) for tail in tails)]


def model(ref: str, layers: int, **keys) -> ModelNames:
    return ModelNames(ref, names(layers, **keys), layers)


def slices(*rows):
    """Slices of (model, start, end) and the models of their sources."""
    content = {
        "merge_method": "x",
        "slices": [
            {"sources": [{"model": m.ref, "layer_range": [start, end]} for m, start, end in row]}
            for row in rows
        ],
    }
    recipe = read_recipe(content, "r.yml")
    return recipe.slices, [[m for m, _, _ in row] for row in rows], recipe.label


def by_name(tensors):
    found = {tensor.name: tensor for tensor in tensors}
    assert len(found) == len(tensors)
    return found


A, B, C = model("A", 6), model("B", 8), model("C", 4)


def test_layers_are_numbered_anew_and_the_ends_are_of_the_first_and_last_slice():
    tensors = by_name(map_slices(*slices([(A, 0, 3)], [(B, 2, 6)], [(C, 3, 4)])))
    assert sorted(tensors) == sorted(names(8))
    q = "model.layers.{}.self_attn.q_proj.weight"
    made_of = [(tensors[q.format(i)].slice, *tensors[q.format(i)].sources) for i in range(8)]
    expected = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4), (1, 5), (2, 3)]
    assert made_of == [(index, q.format(number)) for index, number in expected]
    ends = {name: tensors[name].slice for name in names(0)}
    assert ends == {
        "model.embed_tokens.weight": 0,
        "model.norm.weight": 2,
        "lm_head.weight": 2,
    }


def test_positions_restart_in_each_slice_and_are_zero_outside_of_layers():
    tensors = by_name(map_slices(*slices([(A, 0, 3)], [(B, 2, 6)], [(C, 3, 4)])))
    at = [tensors[f"model.layers.{i}.mlp.up_proj.weight"].position for i in range(8)]
    assert at == pytest.approx([0, 0.5, 1, 0, 1 / 3, 2 / 3, 1, 1])
    assert {tensors[name].position for name in names(0)} == {0}


def test_each_source_of_a_slice_has_its_own_layers():
    tensors = by_name(map_slices(*slices([(A, 0, 3), (B, 5, 8)])))
    assert tensors["model.layers.1.mlp.up_proj.weight"].sources == (
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.6.mlp.up_proj.weight",
    )
    assert tensors["lm_head.weight"].sources == ("lm_head.weight",) * 2


def test_a_tensor_that_a_source_lacks_is_none():
    tied = model("T", 6, outside=("model.embed_tokens.weight", "model.norm.weight"))
    biased = model("Q", 6, tails=(*LLAMA, "self_attn.q_proj.bias"))
    tensors = by_name(map_slices(*slices([(A, 0, 2), (tied, 0, 2), (biased, 4, 6)])))
    assert tensors["lm_head.weight"].sources == ("lm_head.weight", None, "lm_head.weight")
    bias = tensors["model.layers.0.self_attn.q_proj.bias"]
    assert bias.sources == (None, None, "model.layers.4.self_attn.q_proj.bias")


@pytest.mark.parametrize(
    ("prefix", "tails", "before", "behind"),
    [
        ("transformer.h", ("attn.c_attn.weight",), ("wte", "wpe"), ("transformer.ln_f.weight",)),
        ("h", ("attn.c_attn.weight",), ("wte.weight",), ("ln_f.weight", "ln_f.bias")),
        ("gpt_neox.layers", ("a.weight",), ("gpt_neox.embed_in.weight",), ("embed_out.weight",)),
        ("gpt_neox.layers", ("a.weight",), (), ("gpt_neox.final_layer_norm.bias",)),
        ("transformer.h", ("a.w",), ("transformer.word_embeddings_layernorm.bias",), ()),
        ("bert.encoder.layer", ("a.w",), ("bert.embeddings.LayerNorm.bias",), ("cls.p.bias",)),
        ("model.layers", ("a.w",), ("model.vision_tower.post_layernorm.bias",), ()),
        ("model.layers", ("a.w",), ("multi_modal_projector.norm.weight",), ()),
        ("model.layers", ("a.w",), (), ("model.embedding_norm.weight", "model.final_norm.weight")),
        ("backbone.layers", ("mixer.A_log",), ("backbone.embedding.w",), ("backbone.norm_f.w",)),
        (
            "model.layers",
            ("block_sparse_moe.experts.0.w1.weight", "block_sparse_moe.experts.7.w1.weight"),
            (),
            ("lm_head.bias",),
        ),
        ("alphas", ("",), (), ()),
    ],
)
def test_layers_are_found_by_their_numbers_in_any_architecture(prefix, tails, before, behind):
    def of(count):
        inside = [".".join(filter(None, (prefix, str(i), t))) for i in range(count) for t in tails]
        return [*before, *behind, *inside]

    first, last = ModelNames("F", of(12), 12), ModelNames("L", of(3), None)
    tensors = by_name(map_slices(*slices([(first, 0, 12)], [(last, 1, 3)])))
    assert sorted(tensors) == sorted(of(14))
    assert {tensors[name].slice for name in before} <= {0}
    assert {tensors[name].slice for name in behind} <= {1}
    tail = f".{tails[-1]}" if tails[-1] else ""
    assert tensors[f"{prefix}.13{tail}"].sources == (f"{prefix}.2{tail}",)


def test_models_with_other_prefixes_are_named_as_the_first_one():
    inner = "model.language_model"
    outside = (f"{inner}.embed_tokens.weight", f"{inner}.norm.weight", "lm_head.weight")
    nested = model("V", 6, prefix=f"{inner}.layers", outside=outside)
    tensors = by_name(map_slices(*slices([(A, 0, 2)], [(nested, 1, 2)])))
    assert sorted(tensors) == sorted(names(3))
    assert tensors["model.norm.weight"].sources == (f"{inner}.norm.weight",)
    assert tensors["model.layers.2.mlp.up_proj.weight"].sources == (
        f"{inner}.layers.1.mlp.up_proj.weight",
    )
    tensors = by_name(map_slices(*slices([(nested, 0, 2)], [(A, 1, 2)])))
    assert tensors[f"{inner}.norm.weight"].sources == ("model.norm.weight",)


def test_towers_of_other_modalities_are_no_layers_of_the_language_model():
    tower = names(6, "vision_tower.encoder.layers", ("a.weight", "b.weight", "c.w", "d.w"), ())
    both = ModelNames("V", [*tower, *names(6)], 6)
    assert find_stack(both).prefix == "model.layers."
    tensors = by_name(map_slices(*slices([(both, 0, 1)], [(A, 0, 1)])))
    assert sorted(tensors) == sorted([*tower, *names(2)])
    assert {tensors[name].slice for name in tower} == {0}
    assert {tensors[name].sources for name in tower} == {(name,) for name in tower}


def test_of_whole_models_each_stack_has_positions_of_its_own():
    tower = names(3, "vision_tower.layers", ("a.weight",), ())
    tensors = by_name(map_models([ModelNames("V", [*tower, *names(5)], 5)]))
    at = [tensors[name].position for name in tower]
    assert at == [0, 0.5, 1]
    at = [tensors[f"model.layers.{i}.mlp.up_proj.weight"].position for i in range(5)]
    assert at == [0, 0.25, 0.5, 0.75, 1]
    assert tensors["lm_head.weight"].position == 0


def test_whole_models_may_lack_tensors_but_not_layers():
    tied = model("T", 6, outside=("model.embed_tokens.weight", "model.norm.weight"))
    tensors = by_name(map_models([A, tied]))
    assert tensors["lm_head.weight"].sources == ("lm_head.weight", None)
    assert tensors["model.norm.weight"].sources == ("model.norm.weight",) * 2
    with pytest.raises(MismatchError, match=r"6 'model.layers.\*' in 'A' and 8 in 'B'.*'slices'"):
        map_models([A, B])


def test_layers_that_predict_further_tokens_are_at_the_end_of_whole_models():
    longer = ModelNames("N", names(7), 6)
    tensors = by_name(map_models([longer, A]))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert [tensors[name.format(i)].position for i in (5, 6)] == [1, 1]
    assert tensors[name.format(6)].sources == (name.format(6), None)
    with pytest.raises(MismatchError, match=r"'N' has the layers 0 to 6 .* expected 0 to 5, as"):
        map_slices(*slices([(longer, 0, 2)]))


def test_an_encoder_and_a_decoder_have_no_common_layers():
    both = [*names(4, "encoder.block", ("a.w",), ()), *names(4, "decoder.block", ("a.w",), ())]
    with pytest.raises(MismatchError, match=r"'decoder.block.\*' and 'encoder.block.\*'"):
        map_slices(*slices([(ModelNames("T5", both, 4), 0, 1)]))
    tensors = by_name(map_models([ModelNames("T5", both, 4)]))
    assert tensors["encoder.block.3.a.w"].position == tensors["decoder.block.3.a.w"].position == 1


@pytest.mark.parametrize(
    ("found", "layers", "message"),
    [
        (
            [n for n in names(6) if ".3." not in n],
            6,
            "the layers 0 to 2, 4 to 5 .* expected 0 to 5",
        ),
        ([n for n in names(6) if ".3." not in n], None, "0 to 2, 4 to 5"),
        (names(5), 6, "the layers 0 to 4 of 'model.layers"),
        (["model.layers.0.a", "model.layers.999999999.a"], None, "expected 0 to 999999999"),
        (names(0), 6, "no numbered layers"),
        ([], None, "no numbered layers"),
    ],
)
def test_models_without_all_of_their_layers_are_refused(found, layers, message):
    with pytest.raises(MismatchError, match=message):
        map_slices(*slices([(ModelNames("M", found, layers), 0, 1)]))


def test_a_range_behind_the_last_layer_is_refused_by_its_key():
    message = r"slices\[1\].sources\[1\].layer_range: expected an end of at most 4, .*'C', found 7"
    with pytest.raises(ConfigError, match=message):
        map_slices(*slices([(A, 0, 1)], [(A, 3, 6), (C, 4, 7)]))


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B, C]), st.integers(0, 7), st.integers(1, 8)),
        min_size=1,
        max_size=6,
    )
)
def test_every_layer_of_every_slice_is_in_the_output_once_and_in_order(rows):
    rows = [(m, a, b) for m, a, b in rows if a < b <= m.layers] or [(A, 0, 6)]
    given_ = slices(*[[row] for row in rows])
    tensors = by_name(map_slices(*given_))
    flat = [(m, i) for m, a, b in rows for i in range(a, b)]
    assert sorted(tensors) == sorted(names(len(flat)))
    sources = layer_sources(given_[0])
    for j, (m, i) in enumerate(flat):
        tensor = tensors[f"model.layers.{j}.mlp.up_proj.weight"]
        assert rows[tensor.slice][0] is m
        assert tensor.sources == (f"model.layers.{i}.mlp.up_proj.weight",)
        assert sources[j] == (tensor.slice, i)


def test_names_that_are_used_behind_the_layers_are_told_from_those_before():
    assert is_behind("model.decoder.project_out.weight")
    assert not is_behind("model.decoder.project_in.weight")
    assert not is_behind("model.rotary_emb.inv_freq")


def changes(config, *layers):
    before = copy.deepcopy(config)
    origins = [LayerOrigin(f"M{c.get('id', '')}", c, i) for c, i in layers]
    changed = config_changes(config, origins)
    assert config == before
    return changed


def every_layer(config, count):
    return [(config, i) for i in range(count)]


QWEN2 = {
    "num_hidden_layers": 4,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "eos_token_id": [1, 2, 3, 4],
    "hidden_size": 4,
}
CONFIGS = [
    QWEN2,
    {"n_layer": 3},
    {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
    {"num_hidden_layers": 4, "mlp_only_layers": [0, 2], "decoder_sparse_step": 2},
    {"num_hidden_layers": 4, "first_k_dense_replace": 1, "moe_layer_freq": 1},
    {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "max_window_layers": 28},
    {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    {"num_hidden_layers": 3, "hybrid_override_pattern": "M*-"},
    {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    {"text_config": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}, "hidden_size": 3},
    {"hidden_size": 3},
    {"num_hidden_layers": 2, "hidden_size_per_layer_input": 8},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_all_layers_in_their_order_change_nothing(config):
    depth = next((v for k, v in (config.get("text_config") or config).items() if "layer" in k), 3)
    assert changes(config, *every_layer(config, depth)) == {}


def test_lists_are_gathered_from_the_configs_of_the_layers_models():
    a = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "mlp_only_layers": [0]}
    b = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [1, 2]}
    assert changes(a, (a, 0), (b, 1), (b, 2), (a, 1)) == {
        "num_hidden_layers": 4,
        "layer_types": ["full", "y", "z", "sliding"],
        "mlp_only_layers": [0, 1, 2],
    }
    older = {"num_hidden_layers": 2}
    assert changes(a, (older, 1)) == {
        "num_hidden_layers": 1,
        "layer_types": ["sliding"],
        "mlp_only_layers": [],
    }


@pytest.mark.parametrize(
    ("config", "numbers", "expected"),
    [
        ({"n_layer": 3}, [0, 1, 1, 2], {"n_layer": 4}),
        ({"num_layers": 3, "n_layers": 3}, [0], {"num_layers": 1, "n_layers": 1}),
        (QWEN2, [0, 0, 1, 2, 3], {"num_hidden_layers": 5, "max_window_layers": 3}),
        (QWEN2, [2, 3], {"num_hidden_layers": 2, "max_window_layers": 0}),
        ({**QWEN2, "use_sliding_window": False}, [3, 0], {"num_hidden_layers": 2}),
        (
            {"num_hidden_layers": 4, "first_k_dense_replace": 2},
            [0, 2, 3],
            {"num_hidden_layers": 3, "first_k_dense_replace": 1},
        ),
        (
            {"num_hidden_layers": 4, "num_kv_shared_layers": 2},
            [0, 1, 2, 3, 3],
            {"num_hidden_layers": 5, "num_kv_shared_layers": 3},
        ),
        (
            {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
            [0, 1, 1],
            {"num_layers": 3, "attention_types": [[["global", "local", "local"], 1]]},
        ),
        (
            {"num_hidden_layers": 3, "hybrid_override_pattern": "M*-"},
            [2, 0],
            {"num_hidden_layers": 2, "hybrid_override_pattern": "-M"},
        ),
        (
            {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
            [0, 1, 2, 2, 3],
            {"num_hidden_layers": 5, "moe_layer_end_index": 4},
        ),
        (
            {"num_hidden_layers": 4, "block_types": ["r", "r", "a"]},
            [0, 1, 1, 2, 3],
            {"num_hidden_layers": 5, "block_types": ["r", "r", "r", "a", "r"]},
        ),
        (
            {"num_hidden_layers": 4, "block_types": ["r", "r", "a"]},
            [0, 1, 2, 3, 1, 2],
            {"num_hidden_layers": 6},
        ),
        (
            {"num_hidden_layers": 4, "decoder_sparse_step": 2},
            [0, 1, 0, 1, 2, 3],
            {"num_hidden_layers": 6},
        ),
        (
            {"num_hidden_layers": 2, "sliding_window_pattern": 2, "layer_types": ["s", "f"]},
            [1, 0, 0],
            {"num_hidden_layers": 3, "layer_types": ["f", "s", "s"]},
        ),
        (
            {"text_config": {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}},
            [1, 1],
            {"no_rope_layers": [0, 0]},
        ),
    ],
)
def test_what_a_config_says_of_layers_follows_them(config, numbers, expected):
    assert changes(config, *[(config, i) for i in numbers]) == expected


@pytest.mark.parametrize(
    ("config", "numbers", "message"),
    [
        (QWEN2, [0, 2, 1], "'max_window_layers' .* of layer 2 .* of its layer 1"),
        ({"num_hidden_layers": 4, "first_k_dense_replace": 1}, [1, 0], "'first_k_dense_replace'"),
        ({"num_hidden_layers": 4, "num_kv_shared_layers": 1}, [3, 0], "'num_kv_shared_layers'"),
        (
            {"num_hidden_layers": 4, "moe_layer_end_index": 2},
            [3, 0],
            "'moe_layer_end_index' .* of layer 1",
        ),
        ({"num_hidden_layers": 4, "decoder_sparse_step": 2}, [1], "'decoder_sparse_step'"),
        ({"num_hidden_layers": 4, "full_attention_interval": 4}, [0, 3], "'full_attention_int"),
        (
            {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
            [1],
            "'attn_layer_period'",
        ),
        (
            {"num_hidden_layers": 4, "hidden_size_per_layer_input": 8},
            [0, 1],
            "must keep all layers",
        ),
        ({"num_layers": 2, "attention_types": [["global"]]}, [0], "'attention_types'"),
    ],
)
def test_what_a_config_cannot_say_of_the_layers_is_refused(config, numbers, message):
    with pytest.raises(MismatchError, match=message):
        changes(config, *[(config, i) for i in numbers])


def test_a_list_of_another_length_than_the_layers_is_refused():
    config = {"num_hidden_layers": 2, "layer_types": ["a", "b"]}
    other = {"num_hidden_layers": 3, "layer_types": ["a", "b"], "id": 1}
    message = r"'layer_types' .* of 'M1' has 2 values, .* each of the 3 layers of 'M1'"
    with pytest.raises(MismatchError, match=message):
        changes(config, (other, 0))
    with pytest.raises(MismatchError, match=r"'layer_types' .* of the output has 2 values"):
        changes(config, ({"num_hidden_layers": 3}, 0))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    [
        *(
            "num_hidden_layers",
            "layer_types",
            "mlp_only_layers",
            "max_window_layers",
            "text_config",
        ),
        *("num_kv_shared_layers", "moe_layer_end_index", "block_types", "attention_types"),
        *("hybrid_override_pattern", "decoder_sparse_step", "attn_layer_period"),
        *("attn_layer_offset", "use_sliding_window", "sliding_window_pattern"),
    ]
)
_CONFIGS = st.dictionaries(_KEYS, _VALUES)


@settings(max_examples=50)
@given(_CONFIGS, _CONFIGS, st.integers(1, 4))
def test_any_configs_give_changes_or_a_mismatch(config, other, layers):
    config = {"num_hidden_layers": 4, **config}
    origins = [LayerOrigin("M", c, i) for c in (config, other) for i in range(layers)]
    with contextlib.suppress(MismatchError):
        assert config_changes(config, origins) is not None


_NAMES = st.lists(st.lists(st.sampled_from(["a", "0", "00", "1", "2", "norm", ""]), max_size=4))


@given(_NAMES, st.none() | st.integers(0, 3))
def test_any_names_are_mapped_or_refused(found, layers):
    unique = {".".join(name): None for name in found}
    given_ = slices([(ModelNames("M", list(unique), layers), 0, 1)])
    with contextlib.suppress(MismatchError, ConfigError):
        tensors = map_slices(*given_)
        assert len(by_name(tensors)) <= len(unique)
    assert set(by_name(map_models([ModelNames("M", list(unique), layers)]))) == set(unique)
