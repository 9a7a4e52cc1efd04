"""Adapters that are not read are refused by who wrote them, with a way that works."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.lora import open_adapted, open_adapter
from mergekit_bayes.merge import MergeConfig, run_merge
from tests import tiny
from tests.adapters import adapter, base, factors, tensors_of, written

PREFIX = "base_model.model."
REFUSED = {
    "lora_unet_down_blocks_0.lora_down.weight": r"kohya-ss.*fuse_lora",
    "unet.down.attn.to_q.lora.down.weight": r"diffusers.*fuse_lora",
    "model.layers.0.q_proj.lora_a": r"MLX.*mlx_lm\.fuse",
    "layers.0.attn.q_proj.lora_a.weight": r"torchtune.*PEFT's form",
    "transformer.h.0.attn.attn.lora_A": r"LitGPT.*merge_lora",
    "decoder.layers.0.adapter.linear_in.weight": r"NeMo.*merge_lora_weights",
    "bert.layer.0.adapters.task.adapter_down.0.weight": r"AdapterHub.*merge_adapter",
    "m.q.dora_scale": r"LyCORIS.*DoRA.*merge_and_unload",
    "m.q.vera_lambda_b": r"VeRA.*merge_and_unload",
    "m.q.ia3_l": r"IA3.*merge_and_unload",
    "m.q.hada_w1_a": r"LoHa.*merge_and_unload",
    "m.q.lokr_w1": r"LoKr.*merge_and_unload",
    "m.q.oft_R": r"OFT.*merge_and_unload",
    "m.q.boft_R": r"OFT.*merge_and_unload",
    "m.q.lora_E": r"AdaLoRA.*merge_and_unload",
    "m.q.fourierft_spectrum": r"other than LoRA.*merge_and_unload",
    "prompt_embeddings": r"virtual tokens.*nothing to merge",
    "m.q.base_layer.weight": r"whole PeftModel.*save_pretrained",
    "m.norm.weight": r"neither lora_A, lora_B nor of modules_to_save",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_who_wrote_it(tmp_path, name):
    stored = tensors_of(factors(0)) | {name: np.ones((2, 2), np.float32)}
    folder = written(tmp_path / "a", stored)
    message = rf"'{re.escape(name)}' is .*{REFUSED[name]}"
    with pytest.raises(ConfigError, match=message):
        open_adapter(str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no adapter_config\.json\. .*"):
        open_adapter(str(folder))


@pytest.mark.parametrize(
    "name", [n for n in REFUSED if n.startswith(("lora_unet", "unet", "model.layers", "layers."))]
)
def test_a_file_of_another_writer_is_no_model_and_no_adapter(tmp_path, name):
    path = tmp_path / "x.safetensors"
    others = {name.replace("down", "up").replace("lora_a", "lora_b"): np.ones(2, np.float32)}
    alpha = {"lora_unet_down.alpha": np.ones(1, np.float32)} if "lora_unet" in name else {}
    tiny.write(path, {name: np.ones(2, np.float32)} | others | alpha)
    folder = base(tmp_path / "base")
    with pytest.raises(CheckpointError, match=f"(?s){REFUSED[name]}"):
        open_adapted(f"{folder}+{path}")
    with pytest.raises(MismatchError, match=f"holds the factors of an adapter.*{REFUSED[name]}"):
        run_merge(MergeConfig(models=(str(path), str(path)), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    "name", ["lora_embedding_A", "lora_magnitude_vector", "lora_B.bias", "trainable_tokens_delta"]
)
def test_a_part_of_peft_without_its_config_is_told_to_be_named_with_it(tmp_path, name):
    stored = {f"{PREFIX}m.q.{name}": np.ones((2, 2), np.float32)}
    path = tiny.write(tmp_path / "x.safetensors", stored)
    with pytest.raises(CheckpointError, match=r"written by PEFT.*adapter_config\.json, after"):
        open_adapter(str(path))


def test_factors_of_peft_given_as_a_file_are_no_model(tmp_path):
    path = tiny.write(tmp_path / "renamed.safetensors", tensors_of(factors(0)))
    with pytest.raises(MismatchError, match=r"factors are not merged\s+one by one.*BASE\+FOLDER"):
        run_merge(MergeConfig(models=(str(path), str(path)), out=str(tmp_path / "out")))
    with pytest.raises(CheckpointError, match=r"the adapter_config\.json that PEFT wrote"):
        open_adapter(str(path))


def test_a_model_that_was_saved_with_its_adapter_unfolded_is_no_model(tmp_path):
    stored = tensors_of(factors(0)) | {f"{PREFIX}m.q.base_layer.weight": np.ones((6, 4))}
    path = tiny.write(tmp_path / "model.safetensors", stored)
    with pytest.raises(MismatchError, match=r"PeftModel that was saved whole.*merge_and_unload"):
        run_merge(MergeConfig(models=(str(path), str(path)), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type=IA3.*merge_and_unload"),
        ({"peft_type": "PROMPT_TUNING"}, r"virtual tokens.*nothing to merge"),
        ({"alora_invocation_tokens": [1]}, r"depends on the input"),
    ],
)
def test_the_way_out_fits_the_method_of_peft(tmp_path, config, message):
    with pytest.raises(ConfigError, match=message):
        open_adapter(str(written(tmp_path / "a", tensors_of(factors(0)), **config)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, r"MLX.*mlx_lm\.fuse"),
        ({"config": "seq_bn", "hidden_size": 768}, r"AdapterHub"),
    ],
)
def test_configs_of_other_libraries_are_named(tmp_path, config, message):
    folder = written(tmp_path / "a", tensors_of(factors(0)))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        open_adapter(str(folder))
    (folder / "adapter_config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is a Git LFS pointer"):
        open_adapter(str(folder))


def test_an_adapter_without_its_tensors_is_told_what_there_is_instead(tmp_path):
    for name, message in (
        ("adapter_model.bin", "bmerge convert"),
        ("adapter_model.safetensors.incomplete", "did not finish"),
        ("README.md", "Save it again"),
    ):
        folder = written(tmp_path / name, tensors_of(factors(0)))
        (folder / "adapter_model.safetensors").rename(folder / name)
        with pytest.raises(CheckpointError, match=message):
            open_adapter(str(folder))
    folder = written(tmp_path / "mlx", {"q_proj.lora_a": np.ones((2, 2), np.float32)})
    (folder / "adapter_model.safetensors").rename(folder / "adapters.safetensors")
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors: .*MLX"):
        open_adapter(str(folder))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0,), r"ZeRO-3.*zero_to_fp32\.py"), ((8,), "FSDP.*FULL_STATE_DICT"), ((0, 4), "rank 0")],
)
@pytest.mark.parametrize("side", "AB")
def test_factors_that_are_empty_or_flat_are_refused_with_the_true_cause(
    tmp_path, shape, message, side
):
    stored = tensors_of(factors(0))
    stored[f"{PREFIX}m.q.lora_{side}.weight"] = np.ones(shape, np.float32)
    with pytest.raises(CheckpointError, match=rf"'.*lora_{side}\.weight' (is|has).*{message}"):
        open_adapter(str(written(tmp_path / "a", stored)))


def test_a_whole_tensor_that_zero_3_left_empty_is_refused_with_the_true_cause(tmp_path):
    empty = {f"{PREFIX}model.embed_tokens.weight": np.ones(0, np.float32)}
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' has the shape \[0\].*ZeRO-3"):
        open_adapter(str(written(tmp_path / "a", tensors_of(factors(0)) | empty)))


def test_a_base_that_is_quantised_or_names_its_modules_otherwise_is_told_so(tmp_path):
    shapes = {f"model.language_model.layers.{i}.q_proj.weight": (6, 4) for i in range(2)}
    tiny.write(tmp_path / "vlm/model.safetensors", tiny.arrays(0, shapes))
    layers = {"text.tower.layers.0.q_proj": (6, 4), "t.layers.1.q_proj": (6, 4)}
    adapter(tmp_path / "a", factors(0, layers=layers), target_modules=["q_proj"])
    with pytest.raises(MismatchError, match=r"other module names.*vision-language") as error:
        open_adapted(f"{tmp_path / 'vlm'}+{tmp_path / 'a'}")
    assert "trained on another model" not in str(error.value)
    # A base of bitsandbytes: the shape of its packed weights is no sign of another model.
    quantised = {"m.q.weight": torch.zeros(12, 1, dtype=torch.uint8)}
    (tmp_path / "4bit").mkdir()
    save_file(quantised | {"m.q.weight.absmax": torch.ones(1)}, tmp_path / "4bit/model.safetensors")
    with pytest.raises(MismatchError, match=r"is quantised.*model\.dequantize\(\)"):
        open_adapted(f"{tmp_path / '4bit'}+{tmp_path / 'a'}")


def test_an_adapted_head_of_a_tied_base_is_told(tmp_path):
    made = factors(0, layers={"lm_head": (6, 4), "m.q": (6, 4)})
    adapter(tmp_path / "a", made, target_modules=["lm_head", "q"])
    with pytest.raises(MismatchError, match="ties its head to the embedding"):
        open_adapted(f"{base(tmp_path / 'base')}+{tmp_path / 'a'}")


def test_an_adapted_head_of_more_rows_than_the_base_has_is_told(tmp_path):
    tiny.write(tmp_path / "base/model.safetensors", tiny.arrays(0, {"lm_head.weight": (6, 4)}))
    made = factors(0, layers={"lm_head": (8, 4)})
    adapter(tmp_path / "a", made, target_modules=["lm_head"])
    with pytest.raises(MismatchError, match=r"resized before training.*the base of 8 rows"):
        open_adapted(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
