"""Tiny models with adapters of every variant by PEFT, and what PEFT and the folded base compute."""

from copy import deepcopy
from functools import cache

import pytest
import torch
import transformers

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.lora import open_adapted

peft = pytest.importorskip("peft")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INPUTS = torch.arange(11)[None]
Q, QV = ["q_proj"], ["q_proj", "v_proj"]
TABLE, BOTH = ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head", "q_proj"]
TIED = {"ensure_weight_tying": True}
PATTERNS = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {r"layers\.0.*v_proj": 5, "v_proj": 9}}

MAGNITUDE = "base_model.model.m.q.lora_magnitude_vector"
Q_BIAS = "base_model.model.m.q.lora_B.bias"
VARIANTS = {
    "plain": {"target_modules": Q, "lora_alpha": 3},
    "gaussian": {"target_modules": Q, "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": Q, "init_lora_weights": "orthogonal"},
    "eva": {"target_modules": Q, "init_lora_weights": "eva"},
    "mica": {"target_modules": Q, "init_lora_weights": "mica"},
    "no init": {"target_modules": Q, "init_lora_weights": False},
    "velora": {"target_modules": Q, "velora_config": peft.tuners.lora.config.VeloraConfig()},
    "rslora": {"target_modules": Q, "use_rslora": True, "lora_alpha": 3},
    "patterns": {"target_modules": QV, **PATTERNS},
    "patterns of rslora": {"target_modules": QV, "use_rslora": True, **PATTERNS},
    "patterns of a table": {
        "target_modules": TABLE,
        "rank_pattern": {"embed_tokens": 3},
        "alpha_pattern": {"embed_tokens": 5},
        "use_rslora": True,
    },
    "lora_bias": {"target_modules": QV, "lora_bias": True, "lora_alpha": 3},
    "bias all": {"target_modules": Q, "bias": "all"},
    "bias lora_only": {"target_modules": Q, "bias": "lora_only"},
    "lora_bias and bias": {"target_modules": Q, "bias": "lora_only", "lora_bias": True},
    "dora": {"target_modules": QV, "use_dora": True, "lora_alpha": 3},
    "dora of a table": {"target_modules": TABLE, "use_dora": True},
    "dora of a head": {"target_modules": BOTH, "use_dora": True},
    "dora of a tie": {"target_modules": TABLE, "use_dora": True, **TIED},
    "dora and rslora": {"target_modules": QV, "use_dora": True, "use_rslora": True, **PATTERNS},
    "embedding": {"target_modules": TABLE},
    "embedding and head": {"target_modules": BOTH},
    "head": {"target_modules": ["lm_head"]},
    "tied by embedding": {"target_modules": TABLE, **TIED},
    "table as a parameter, tied to nothing": {
        "target_modules": Q,
        "target_parameters": [EMBEDDING],
        **TIED,
    },
    "tied by head": {"target_modules": ["lm_head", "q_proj"], **TIED},
    "whole embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    "whole tied embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"], **TIED},
    "whole tied head": {"target_modules": Q, "modules_to_save": ["lm_head"], **TIED},
    "whole both": {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": Q, "trainable_token_indices": [7, 3, 9, 1]},
    "tied tokens": {"target_modules": Q, "trainable_token_indices": [7, 3, 9, 1], **TIED},
    "tokens by module": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [10]}},
    "tokens of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [3, 2]},
    },
    "other tokens of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [3, 2], "lm_head": [5]},
    },
    "tokens of the head": {"target_modules": Q, "trainable_token_indices": {"lm_head": [0]}},
    "tokens and dora": {"target_modules": Q, "trainable_token_indices": [1], "use_dora": True},
    "pissa": {"target_modules": QV, "init_lora_weights": "pissa", "lora_alpha": 3},
    "pissa and dora": {"target_modules": Q, "init_lora_weights": "pissa", "use_dora": True},
    "olora": {"target_modules": QV, "init_lora_weights": "olora", "lora_alpha": 3},
}


def make_bases(folder):
    """Tiny models in float32: a Llama with biases, tied and not, and a GPT-2."""
    torch.manual_seed(0)
    for name, tied in (("tied", True), ("untied", False)):
        config = transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            attention_bias=True,
            tie_word_embeddings=tied,
        )
        model = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
        model.save_pretrained(folder / name)
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=16,
        n_embd=8,
        n_layer=1,
        n_head=2,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return folder


@cache
def _loaded(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def load(folder, dtype=torch.float64):
    """A model that the caller may change."""
    return deepcopy(_loaded(folder, dtype))


def logits(model):
    """What a model computes, in float64."""
    with torch.no_grad():
        return model(INPUTS).logits.double()


def trained(folder, base_folder, seed=1, **settings):
    """An adapter in `folder`, with random values in place of all that PEFT would train."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(load(base_folder, torch.float32), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def logits_of_peft(base_folder, adapter_folder, dtype):
    """What PEFT's model computes with the adapter, not folded, on a base of some dtype."""
    return logits(peft.PeftModel.from_pretrained(load(base_folder, dtype), adapter_folder).eval())


@cache
def _stored_as(base_folder, dtype):
    """A base whose file has some dtype."""
    folder = base_folder.parent / f"{base_folder.name}-{dtype}"
    load(base_folder, dtype).save_pretrained(folder)
    return folder


def logits_folded(base_folder, adapter_folder, dtype):
    """What the base computes with the tensors of BASE+ADAPTER, on a base that stores a dtype."""
    with open_adapted(f"{_stored_as(base_folder, dtype)}+{adapter_folder}") as opened:
        assert not any("PEFT ignores" in note for note in opened.mean.notes)
        tensors = {n: torch.from_numpy(read_tensor(opened.mean, n)) for n in opened.mean.specs}
    model = load(base_folder)
    if HEAD in tensors and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(tensors[HEAD].double())
    result = model.load_state_dict({n: t.double() for n, t in tensors.items()}, strict=False)
    assert not result.unexpected_keys
    return logits(model)
