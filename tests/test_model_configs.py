"""Models whose configs give the same weights another meaning are refused, and drifts are told."""

import json
from pathlib import Path

import pytest

from mergekit_bayes.errors import MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.plan.model_configs import find_differences
from tests import tiny

LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
# Each key with two values under which the same weights compute something else altogether.
OTHER_MEANINGS = (
    ("num_attention_heads", 4, 2),
    ("n_head", 12, 6),
    ("encoder_attention_heads", 8, 4),
    ("num_key_value_heads", 4, 2),
    ("head_dim", 64, 128),
    ("hidden_act", "silu", "gelu"),
    ("activation_function", "gelu_new", "relu"),
    ("hidden_activation", "gelu_pytorch_tanh", "relu"),
    ("dense_act_fn", "relu", "gelu_new"),
    ("feed_forward_proj", "relu", "gated-gelu"),
    ("position_embedding_type", "absolute", "relative_key"),
    ("alibi", True, False),
    ("rope_interleave", True, False),
    ("do_layer_norm_before", True, False),
    ("use_parallel_residual", True, False),
    ("is_decoder", True, False),
    ("embedding_multiplier", 12.0, 1.0),
    ("residual_multiplier", 0.22, 1.0),
    ("logits_scaling", 8.0, 16.0),
    ("scale_embedding", True, False),
    ("query_pre_attn_scalar", 256, 144),
    ("scale_attn_by_inverse_layer_idx", True, False),
)
# Each key with two values between which models are merged in practice.
DRIFTS = (
    ("rms_norm_eps", 1e-6, 1e-5),
    ("layer_norm_epsilon", 1e-5, 1e-12),
    ("sliding_window", 4096, None),
    ("max_position_embeddings", 2048, 32768),
    ("final_logit_softcapping", 30.0, 50.0),
    ("num_experts_per_tok", 2, 3),
    ("layer_types", ["full_attention"], ["sliding_attention"]),
    ("hidden_act", "gelu", "gelu_new"),
    ("model_type", "llama", "mistral"),
    ("rope_theta", 1e4, 1e6),
    ("rope_scaling", None, {"rope_type": "linear", "factor": 2.0}),
    ("rope_parameters", {"rope_theta": 5e5}, {"rope_theta": 2e7}),
    ("rotary_pct", 0.25, 0.5),
)
# Pairs of configs that say the same in other words.
SAME = (
    ({"hidden_act": "silu"}, {"hidden_act": "swish"}),
    ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 500000, "rope_type": "default"}}),
    ({}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    ({"rope_theta": 10000.0, "rope_scaling": None}, {}),
    (
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}},
    ),
    (
        {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            }
        },
    ),
    ({"rotary_pct": 0.25}, {"rope_parameters": {"partial_rotary_factor": 0.25}}),
    ({"rms_norm_eps": 1e-05}, {"rms_norm_eps": 0.00001}),
    ({"sliding_window": None}, {}),
    ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),  # None is as many as heads
    ({"position_embedding_type": "absolute"}, {"position_embedding_type": None}),
    ({"num_attention_heads": 4}, {"text_config": {"num_attention_heads": 4}}),
    ({"pruned_heads": {}}, {"pruned_heads": {"0": [1]}}),  # which the shapes tell
    ({"hidden_dropout": 0.1, "use_cache": True}, {"hidden_dropout": 0.0, "use_cache": False}),
    ({"torch_dtype": "float32"}, {"dtype": "bfloat16"}),
)

# Configs as their authors published them, without what transformers adds when it saves them.
PUBLISHED = [
    {
        "model_type": "deberta-v2",
        "hidden_act": "gelu",
        "pos_att_type": "p2c|c2p",
        "relative_attention": True,
        "position_biased_input": False,
        "layer_norm_eps": 1e-7,
        "num_attention_heads": 12,
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "norm_rel_ebd": "layer_norm",
        "max_relative_positions": -1,
        "position_buckets": 256,
        "max_position_embeddings": 512,
        "type_vocab_size": 0,
    },
    {
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_hidden_layers": 4,
        "rope_theta": 5e5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "attn_scale": 0.1,
        "layer_types": None,
    },
    {
        "model_type": "llama4_text",
        "no_rope_layers": [],
        "num_hidden_layers": 4,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "attn_scale": 0.1,
    },
    {
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 28,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "qwen3",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 36,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "head_dim": 128,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "qwen2_vl",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 28,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_size": 1536,
        "num_hidden_layers": 2,
        "vision_config": {
            "depth": 2,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "hidden_size": 1536,
            "patch_size": 14,
        },
    },
    {
        "model_type": "qwen2_5_vl",
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 70,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_size": 1536,
        "num_hidden_layers": 2,
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "num_heads": 16,
            "hidden_size": 1280,
            "fullatt_block_indexes": [7],
        },
    },
    {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 512,
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "model_type": "siglip_vision_model",
            "vision_use_head": False,
        },
    },
    {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "_sliding_window_pattern": 6,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "num_attention_heads": 4,
        "head_dim": 256,
    },
    {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "cache_implementation": "hybrid",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_activation": None,
        "rope_theta": 10000.0,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 5e5,
        "max_position_embeddings": 131072,
        "head_dim": 64,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_attention_heads": 32,
        "rms_norm_eps": 1e-5,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
    },
    {
        "model_type": "mistral",
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "mixtral",
        "sliding_window": None,
        "rope_theta": 1e6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "phi3",
        "sliding_window": 2047,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "phi",
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "qk_layernorm": False,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "phi3",
        "hidden_size": 96,
        "num_attention_heads": 4,
        "rope_scaling": {"type": "longrope", "long_factor": [1.0] * 12, "short_factor": [1.0] * 12},
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "gpt_neox",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "hidden_act": "gelu",
        "num_attention_heads": 8,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "stablelm",
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_head": 12,
        "n_ctx": 1024,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "n_layer": 2,
    },
    {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "num_heads": 6,
        "d_kv": 64,
        "layer_norm_epsilon": 1e-6,
        "num_layers": 2,
    },
    {"model_type": "t5", "num_heads": 8, "d_kv": 64, "num_layers": 2},
    {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "num_attention_heads": 12,
        "layer_norm_eps": 1e-12,
        "num_hidden_layers": 2,
    },
    {"model_type": "distilbert", "activation": "gelu", "n_heads": 12, "n_layers": 2},
    {
        "model_type": "falcon",
        "alibi": False,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "hidden_size": 4544,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "opt",
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "num_hidden_layers": 2,
    },
    {
        "model_type": "modernbert",
        "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
        "hidden_activation": "gelu",
        "local_attention": 128,
        "global_attn_every_n_layers": 3,
        "num_hidden_layers": 4,
    },
    {
        "model_type": "deepseek_v3",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "qk_rope_head_dim": 64,
        "rope_interleave": True,
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "scoring_func": "sigmoid",
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
    },
    {
        "model_type": "gpt_oss",
        "layer_types": ["sliding_attention", "full_attention"],
        "num_hidden_layers": 2,
        "sliding_window": 128,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
    },
    {
        "model_type": "qwen3_moe",
        "rope_theta": 1e6,
        "sliding_window": None,
        "use_sliding_window": False,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 2,
    },
    {
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "rope_theta": 5e6,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    {"model_type": "cohere", "logit_scale": 0.0625, "rope_theta": 10000.0, "num_hidden_layers": 2},
    {
        "model_type": "cohere2",
        "logit_scale": 0.25,
        "rope_theta": 50000,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "num_hidden_layers": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "rotary_pct": 1.0,
    },
    {
        "model_type": "granite",
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
        "rope_theta": 10000.0,
        "num_hidden_layers": 2,
    },
    {"model_type": "olmo2", "rope_theta": 500000, "num_hidden_layers": 2},
    {
        "model_type": "whisper",
        "activation_function": "gelu",
        "scale_embedding": False,
        "num_hidden_layers": 2,
    },
    {"model_type": "roberta", "hidden_act": "gelu", "is_decoder": False, "num_hidden_layers": 2},
    {
        "model_type": "llava",
        "text_config": {
            "_name_or_path": "x",
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
        },
        "vision_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "model_type": "clip_vision_model",
        },
    },
]


def nested(key, value):
    """A config as models with several modalities have it."""
    return {"model_type": "some_vlm", "text_config": {key: value}}


@pytest.mark.parametrize(("key", "one", "other"), OTHER_MEANINGS)
def test_another_meaning_is_found_in_either_order_and_in_nested_configs(key, one, other):
    forms = [lambda v: {key: v}, lambda v: nested(key, v), lambda v: {"vision_config": {key: v}}]
    for form in forms:
        for a, b in ((one, other), (other, one)):
            (difference,) = find_differences(form(a), form(b))
            assert difference.key.endswith(key)
            assert (difference.donors, difference.other) == (a, b)
            assert difference.meaning is not None
    assert find_differences({key: one}, nested(key, one)) == []
    assert len(find_differences({key: one}, nested(key, other))) == 1
    assert find_differences({key: one}, {}) == find_differences({}, {key: one}) == []


@pytest.mark.parametrize(("key", "one", "other"), DRIFTS)
def test_a_drift_is_found_and_is_no_other_meaning(key, one, other):
    for a, b in ((one, other), (other, one)):
        differences = find_differences({key: a}, {key: b})
        assert differences
        assert all(difference.meaning is None for difference in differences)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_in_other_words_is_no_difference(one, other):
    assert find_differences(one, other) == find_differences(other, one) == []


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_a_published_config_and_what_transformers_saves_of_it_are_the_same(number):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    published = PUBLISHED[number]
    saved = CONFIG_MAPPING[published["model_type"]](**published).to_dict()
    assert find_differences(published, saved) == find_differences(saved, published) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"pos_att_type": "p2c|c2p"}, {"pos_att_type": ["p2c"]}),
        ({"no_rope_layers": [1, 1, 1, 0]}, {"no_rope_layers": [1, 0, 1, 0]}),
        (
            {"use_sliding_window": True, "sliding_window": 4096},
            {"use_sliding_window": True, "sliding_window": 512},
        ),
        ({"model_type": "llama"}, {"model_type": "llama", "rope_theta": 1e6}),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
            {"rope_scaling": {"type": "yarn", "mrope_section": [1], "factor": 4.0}},
        ),
    ],
)
def test_other_values_in_the_words_of_published_configs_are_found(one, other):
    assert find_differences(one, other)
    assert find_differences(other, one)


def test_rotary_bases_of_two_types_of_layers_are_compared_with_one_of_all():
    local = {"rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert [d.key for d in find_differences({"rope_theta": 1e6}, local)] == [
        "sliding_attention.rope_theta"
    ]
    modern = {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    assert [d.key for d in find_differences(modern, modern | {"global_rope_theta": 8e4})] == [
        "full_attention.rope_theta"
    ]


def models(tmp_path, *configs):
    refs = []
    for i, config in enumerate(configs):
        tiny.write(tmp_path / f"m{i}/model.safetensors", tiny.arrays(i))
        if config is not None:
            (tmp_path / f"m{i}/config.json").write_text(json.dumps(config))
        refs.append(str(tmp_path / f"m{i}"))
    return tuple(refs)


def test_a_merge_refuses_other_meanings_and_says_the_key_and_both_values(tmp_path):
    refs = models(tmp_path, LLAMA, LLAMA | {"num_attention_heads": 2})
    out = tmp_path / "out"
    for settings in ({"models": refs}, {"models": refs[1:], "base": refs[0]}):
        with pytest.raises(
            MismatchError, match=r"m1' has num_attention_heads 2 \(there 4\).*--on-config base"
        ):
            run_merge(MergeConfig(**settings, out=str(out)))
        assert not out.exists()
    report = run_merge(MergeConfig(models=refs, on_config="base", out=str(out)))
    assert any("num_attention_heads 2" in note for note in report.notes)
    assert json.loads((out / "config.json").read_text())["num_attention_heads"] == 4
    # A model that takes no part is not compared, and one that is named as a file of a folder is.
    run_merge(MergeConfig(models=refs[1:], base=refs[0], scale=(0.0,), out=str(tmp_path / "x")))
    files = tuple(f"{ref}/model.safetensors" for ref in refs)
    with pytest.raises(MismatchError, match="num_attention_heads"):
        run_merge(MergeConfig(models=files, out=str(tmp_path / "y.safetensors")))


def test_models_are_compared_with_each_other_where_the_base_has_no_config(tmp_path):
    refs = models(tmp_path, None, LLAMA, LLAMA | {"num_attention_heads": 2}, LLAMA)
    file = str(tmp_path / "m0/model.safetensors")
    for base in (file, refs[0]):
        with pytest.raises(MismatchError, match=r"m2' has num_attention_heads 2 \(there 4\)"):
            run_merge(MergeConfig(models=refs[1:3], base=base, out=str(tmp_path / "out")))
        run_merge(
            MergeConfig(models=(refs[1], refs[3]), base=base, out=str(tmp_path / "ok"), force=True)
        )
    # The written config is that of a model that is added, and is the one that all must have.
    for scales in ((0.0, 1.0), (-1e-3, 1.0)):
        run = MergeConfig(
            models=refs[1:3],
            base=file,
            scale=scales,
            on_config="base",
            out=str(tmp_path / "o"),
            force=True,
        )
        run_merge(run)
        assert json.loads((tmp_path / "o/config.json").read_text())["num_attention_heads"] == 2


@pytest.mark.parametrize(
    "damaged",
    [
        {"vocab_size": [5], "text_config": {"vocab_size": "x"}},
        {"rope_parameters": {"full": {"rope_theta": [1]}, "x": 3}, "rope_scaling": [1]},
        {"rope_scaling": {"rope_type": [1, 2], "type": {}}, "model_type": ["a"]},
        {"pos_att_type": [[1], {}], "layer_types": 3, "no_rope_layers": {"a": []}},
        {"use_sliding_window": [], "sliding_window": {}, "hidden_activation": [{}]},
        {"eos_token_id": {"a": 1}, "quantization_config": [1], "text_config": [2]},
    ],
)
def test_a_config_with_values_of_other_types_is_compared_all_the_same(tmp_path, damaged):
    plain = {"vocab_size": 7, "model_type": "llama", "rope_theta": 5, "sliding_window": 4}
    refs = models(tmp_path, plain, damaged)
    for number, (base, task) in enumerate((refs, refs[::-1])):
        run_merge(MergeConfig(models=(task,), base=base, out=str(tmp_path / f"out{number}")))


def test_a_merge_tells_what_drifts_once_for_each_model(tmp_path):
    drifted = LLAMA | {"rope_theta": 2e7, "rms_norm_eps": 1e-5}
    refs = models(tmp_path, LLAMA, drifted, LLAMA, None)
    report = run_merge(MergeConfig(models=refs, out=str(tmp_path / "out")))
    (note,) = report.notes
    assert "m1' has rms_norm_eps 1e-05 (there 1e-06), rope_theta 2e+07 (there 10000)" in note
    assert (
        Path(report.path, "config.json").read_bytes() == (tmp_path / "m0/config.json").read_bytes()
    )


def test_the_base_of_an_adapter_is_compared(tmp_path):
    from tests.adapters import adapter, base, factors

    for name, act in (("one", "silu"), ("two", "relu")):
        base(tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | {"hidden_act": act}))
    adapter(tmp_path / "adapter", factors(0))
    refs = tuple(f"{tmp_path / name}+{tmp_path / 'adapter'}" for name in ("one", "two"))
    with pytest.raises(MismatchError, match=r"hidden_act 'relu' \(there 'silu'\)"):
        run_merge(MergeConfig(models=refs, out=str(tmp_path / "out")))
