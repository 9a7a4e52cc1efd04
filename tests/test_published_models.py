"""The configs and tokenizers of the models that transformers knows are within our limits."""

import json

import pytest
import torch
import transformers
from transformers.models.auto import modeling_auto

from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.models import limits
from mergekit_bayes.models.limits import bounded_build, stored_in
from mergekit_bayes.models.pretrained import load_config

DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SAMPLE = [
    "BertForMaskedLM",
    "DeepseekV3ForCausalLM",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MT5ForSequenceClassification",  # its table of tokens is stored once and built three times
    "Mamba2ForCausalLM",
    "RobertaForSequenceClassification",
]


def architectures():
    """The classes of language models and classifiers in transformers."""
    names = set()
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for value in table.values():
            names |= {value} if isinstance(value, str) else set(value)
    return sorted(names)


def build(name):
    """A model of this class by its default config, without memory."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class())


def save_headers(model, folder):
    """The files of a model, whose tensors are holes: what is tied is stored once."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    header, end, seen = {}, 0, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            begin, end = end, end + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


def check(model, folder):
    """Our limits take the config and the building of the model."""
    save_headers(model, folder)
    config = load_config(folder)
    with bounded_build(folder, stored_in(folder), is_packed=False), torch.device("meta"):
        type(model)(config)


@pytest.mark.parametrize("name", SAMPLE)
def test_the_default_model_of_an_architecture_is_within_the_limits(tmp_path, name):
    check(build(name), tmp_path)


@pytest.mark.slow
def test_the_default_models_of_all_architectures_are_within_the_limits(tmp_path):
    built, refused = 0, []
    for name in architectures():
        try:
            model = build(name)
        except Exception:  # some defaults build nothing, some need another library
            continue
        folder = tmp_path / name
        folder.mkdir()
        try:
            check(model, folder)
        except CheckpointError as error:
            refused.append(str(error))
        built += 1
        (folder / "model.safetensors").unlink()
    assert not refused
    assert built > 250


def test_a_long_list_of_tokens_is_read_for_a_model_that_has_them(tmp_path, monkeypatch):
    """The limit of memory grows with the rows of the model, up to another one."""
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=2000, n_embd=2, n_head=1, n_layer=1)
    )
    model.save_pretrained(tmp_path)
    tokens = {"model": {"vocab": {f"t{i}": i for i in range(2000)}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    monkeypatch.setattr(limits, "MEMORY", 1 << 18)
    limits.check_documents(tmp_path)
    monkeypatch.setattr(limits, "_VOCABULARY", 1 << 18)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read \(it may take"):
        limits.check_documents(tmp_path)
