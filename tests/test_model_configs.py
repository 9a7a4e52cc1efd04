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
