"""Variants of LoRA that are not read are refused by name, and broken ones by their cause."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import open_adapted, open_adapter
from tests import tiny
from tests.adapters import base, factors, tensors_of, written
from tests.lora_variants import (
    EMBEDDING,
    HEAD,
    MAGNITUDE,
    Q_BIAS,
    VARIANTS,
    load,
    make_bases,
    peft,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return make_bases(tmp_path_factory.mktemp("bases"))


# What is not read: the setting, and what the message says.
REFUSED = {
    "kasa_config": ({"alpha": 1}, "kasa_config.*merge_and_unload"),
    "monteclora_config": ({"num_samples": 2}, "monteclora_config.*merge_and_unload"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora.*merge_and_unload"),
    "arrow_config": ({"top_k": 1}, "depends on the input"),
    "alora_invocation_tokens": ([1], "depends on the input"),
    "use_qalora": (True, "quantised base"),
    "layer_replication": ([[0, 1]], "layer_replication.*passthrough"),
}
INITIALISATIONS = {
    "pissa_niter_16": "drawn at random.*path_initial_model_for_weight_conversion",
    "corda": "path_initial_model_for_weight_conversion",
    "lora_ga": "wrong base.*path_initial_model_for_weight_conversion",
    "loftq": "LoftQ quantised",
    "Novel": "not known here",
}
# Set to something else than PEFT's default, and without effect on what is stored.
WITHOUT_EFFECT = {
    "auto_mapping": {"base_model_class": "X"},
    "peft_version": "9.9",
    "revision": "main",
    "inference_mode": True,
    "lora_dropout": 0.1,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "velora_config": {"scale": 2.0},
    "eva_config": {"rho": 2.0},
    "corda_config": {"cache_file": "x"},
    "lora_ga_config": {"scale": "unit"},
    "loftq_config": {"loftq_bits": 4},
    "megatron_config": {"a": 1},
    "megatron_core": "other.core",
    "qalora_group_size": 32,
}
# Read; other tests hold what they do.
READ = {
    *("peft_type", "task_type", "base_model_name_or_path", "fan_in_fan_out", "modules_to_save"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "ensure_weight_tying",
    *("bias", "lora_bias", "use_dora", "trainable_token_indices", "init_lora_weights"),
}


def test_every_setting_of_the_installed_peft_is_read_refused_or_without_effect(tmp_path):
    made = tensors_of(factors(0))
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    # A field that a later PEFT adds is in none of these, and to be looked at.
    assert fields == {*READ, *REFUSED, *WITHOUT_EFFECT}
    older = {"enable_lora": ([True, False], "enable_lora.*merge_and_unload")}
    for key, (value, message) in (REFUSED | older).items():
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            open_adapter(str(written(tmp_path / key, made, **{key: value})))
    for name, message in INITIALISATIONS.items():
        with pytest.raises(ConfigError, match=f"init_lora_weights='{name}'.*{message}"):
            open_adapter(str(written(tmp_path / name, made, init_lora_weights=name)))
    folder = base(tmp_path / "base")
    quiet = written(tmp_path / "quiet", made, **WITHOUT_EFFECT, merge_weights=True)
    with open_adapted(f"{folder}+{quiet}") as opened:
        assert opened.mean.notes == ()


def test_a_setting_that_is_not_known_is_refused_where_it_switches_something_on(tmp_path):
    made, folder = tensors_of(factors(0)), base(tmp_path / "base")
    for i, value in enumerate((True, {"a": 1}, [1])):
        with pytest.raises(ConfigError, match=r"use_novel.*not known here.*take it out"):
            open_adapter(str(written(tmp_path / f"on{i}", made, use_novel=value)))
    for i, value in enumerate((False, None, {}, [], "")):
        ref = f"{folder}+{written(tmp_path / f'off{i}', made, use_novel=value)}"
        with open_adapted(ref) as opened:
            assert opened.mean.notes == ()
    with open_adapted(f"{folder}+{written(tmp_path / 'n', made, novel_size=3)}") as opened:
        assert "novel_size=3" in opened.mean.notes[0]


def delta(rows, columns=4):
    return {f"{PREFIX}m.table.token_adapter.trainable_tokens_delta": np.ones((rows, columns), "f4")}


BAD = [
    ({}, {"r": 3}, MismatchError, r"rank 3 \(r\)\."),
    ({}, {"rank_pattern": {"k": 2, "q": 4, ".": 5}}, MismatchError, "rank 4 .rank_pattern, 'q', "),
    ({}, {"use_dora": True}, CheckpointError, "has no magnitude beside it"),
    ({MAGNITUDE: np.ones(6, "f4")}, {}, ConfigError, "does not have use_dora"),
    ({MAGNITUDE: np.ones(5, "f4")}, {"use_dora": True}, MismatchError, "has 6 outputs"),
    ({MAGNITUDE: np.ones((2, 3), "f4")}, {"use_dora": True}, MismatchError, "has 6 outputs"),
    ({MAGNITUDE: np.ones(6, "i8")}, {"use_dora": True}, CheckpointError, "is I64"),
    ({}, {"lora_bias": True}, CheckpointError, "has no bias beside it"),
    ({Q_BIAS: np.ones(6, "f4")}, {}, ConfigError, "does not have lora_bias"),
    ({Q_BIAS: np.ones(6, "f4")}, {"lora_bias": True}, MismatchError, "does not hold: PEFT"),
    ({Q_BIAS: np.ones((0,), "f4")}, {"lora_bias": True}, MismatchError, "has 6 outputs"),
    ({}, {"bias": "some"}, ConfigError, "none, all or lora_only"),
    ({}, {"trainable_token_indices": [1]}, CheckpointError, "holds no trained rows"),
    (delta(1), {}, CheckpointError, "does not say of which tokens"),
    (delta(1), {"trainable_token_indices": {"lm_head": [1]}}, CheckpointError, "of which tokens"),
    (delta(2), {"trainable_token_indices": [1]}, MismatchError, "2 rows, and .* 1 tokens"),
    (delta(1), {"trainable_token_indices": [9]}, MismatchError, "replaces row 9 .* has 9"),
    (delta(1), {"trainable_token_indices": [10**30]}, MismatchError, "replaces row 10000"),
    (delta(1), {"trainable_token_indices": [-1]}, ConfigError, "-1 .* negative"),
    (delta(2), {"trainable_token_indices": [3, 3]}, ConfigError, "3 .* named twice"),
    (delta(1, 5), {"trainable_token_indices": [1]}, MismatchError, "rows of 5 columns"),
    (delta(1), {"trainable_token_indices": "m"}, ConfigError, "a list of token ids"),
    (delta(1), {"trainable_token_indices": [True]}, ConfigError, "a list of token ids"),
    (
        {f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 9), "f4")},
        {},
        CheckpointError,
        "no other factor .lora_embedding_B.",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 0), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {},
        CheckpointError,
        "no entries",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 4), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((9, 2), "f4"),
        },
        {},
        MismatchError,
        r"changes a weight of \[4, 9\], but",
    ),
    (
        {
            f"{PREFIX}m.q.lora_embedding_A": np.ones((2, 9), "f4"),
            f"{PREFIX}m.q.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {},
        ConfigError,
        "factors of a linear layer and of an embedding",
    ),
    (
        {
            f"{PREFIX}m.table.lora_embedding_A": np.ones((2, 9), "f4"),
            f"{PREFIX}m.table.lora_embedding_B": np.ones((4, 2), "f4"),
        },
        {"init_lora_weights": "pissa"},
        ConfigError,
        "linear layers only",
    ),
]


@pytest.mark.parametrize(("extra", "settings", "kind", "message"), BAD)
def test_what_does_not_belong_together_is_told_by_its_cause(
    tmp_path, extra, settings, kind, message
):
    tensors = {"m.table.weight": (9, 4), "m.q.weight": (6, 4)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    made = tensors_of(factors(0, layers={"m.q": (6, 4)}))
    folder = written(tmp_path / "a", made | extra, **settings)
    with pytest.raises(kind, match=f"(?s){message}"):
        open_adapted(f"{tmp_path / 'base'}+{folder}")


def test_values_that_cannot_be_used_are_told_when_they_are_read(tmp_path):
    tensors = {"m.q.weight": (6, 4), "m.q.bias": (6,)}
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, tensors))
    made = tensors_of(factors(0, layers={"m.q": (6, 4)}))
    infinite = np.full(6, np.inf, np.float32)
    for name, key, tensor in ((MAGNITUDE, "use_dora", "weight"), (Q_BIAS, "lora_bias", "bias")):
        folder = written(tmp_path / key, made | {name: infinite}, **{key: True})
        with (
            open_adapted(f"{tmp_path / 'base'}+{folder}") as opened,
            pytest.raises(CheckpointError, match="entries that are not finite"),
        ):
            read_tensor(opened.mean, f"m.q.{tensor}")
    tiny.write(tmp_path / "zero/model.safetensors", {"m.q.weight": np.zeros((6, 4), np.float32)})
    still = {name: np.zeros_like(values) for name, values in made.items()}
    folder = written(tmp_path / "still", still | {MAGNITUDE: np.ones(6, "f4")}, use_dora=True)
    with (
        open_adapted(f"{tmp_path / 'zero'}+{folder}") as opened,
        pytest.raises(CheckpointError, match="by which DoRA divides"),
    ):
        read_tensor(opened.mean, "m.q.weight")


@pytest.mark.parametrize("name", ["tied by embedding", "whole tied embedding"])
def test_an_embedding_and_a_head_that_are_kept_tied_and_were_trained_apart_are_refused(
    tmp_path, bases, name
):
    folder = trained(tmp_path / "a", bases / "tied", r=2, **VARIANTS[name])
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    changed = next(n for n in stored if "lm_head" in n and "base_layer" not in n)
    stored[changed] = stored[changed] + 1
    save_file(stored, file)
    with pytest.raises(CheckpointError, match="trained apart"):
        open_adapted(f"{bases / 'tied'}+{folder}")


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("is_stored", [False, True])
def test_factors_of_a_head_whose_embedding_has_trained_rows_are_refused(
    tmp_path, bases, is_stored, prefix
):
    settings = {"target_modules": ["lm_head"], "trainable_token_indices": [3, 1]}
    folder = trained(tmp_path / "a", bases / "tied", r=2, **settings)
    copy = tmp_path / "base"
    load(bases / "tied", torch.float32).save_pretrained(copy)
    stored = load_file(copy / "model.safetensors")
    more = {HEAD: stored[EMBEDDING].clone()} if is_stored else {}
    bare = {name.removeprefix(prefix): values for name, values in (stored | more).items()}
    save_file(bare, copy / "model.safetensors")
    with pytest.raises(ConfigError, match="the embedding that it is tied to"):
        open_adapted(f"{copy}+{folder}")


def test_a_refused_variant_ends_the_command_with_one_message(tmp_path):
    folder = written(tmp_path / "a", tensors_of(factors(0)), kasa_config={"alpha": 1.0})
    ref = f"{base(tmp_path / 'base')}+{folder}"
    words = ["merge", ref, "--base", str(tmp_path / "base"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "kasa_config" in result.stderr
    assert "Traceback" not in result.output
