"""Adapters extracted from many architectures: PEFT finds each module, and applies each change."""

import shutil
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.extract import ExtractConfig, run_extract

ROWS = torch.tensor([[4, 5, 6, 7, 8]])
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SMALL | {"num_key_value_heads": 1}
WIDE = GROUPED | {"head_dim": 8}
OLD = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
DEPTH = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32}
# The class, and the settings of a tiny one. Positions and relative tables of OPT and DeBERTa are
# looked up in ways of their own; experts, heads and blocks of Mixtral and GPT-NeoX have other names
# in memory than in files.
MODELS = {
    "OPTForCausalLM": {"ffn_dim": 32, "vocab_size": 40, "hidden_size": 16}
    | DEPTH
    | {"word_embed_proj_dim": 16},
    "MixtralForCausalLM": GROUPED | {"num_local_experts": 4},
    "GPTNeoXForCausalLM": SMALL,
    "DebertaV2ForSequenceClassification": SMALL
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "GPTNeoForCausalLM": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 32,
    },
    "GPTJForCausalLM": OLD | {"rotary_dim": 4},
    "BloomForCausalLM": {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "FalconForCausalLM": {"vocab_size": 40, "hidden_size": 16, **DEPTH},
    "MistralForCausalLM": GROUPED,
    "Phi3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": WIDE,
    "Qwen3ForCausalLM": WIDE,
    "GptOssForCausalLM": WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "MambaForCausalLM": {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": 40,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    },
    "RobertaForSequenceClassification": SMALL,
    "DistilBertForSequenceClassification": {
        "vocab_size": 40,
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": 32,
        "max_position_embeddings": 32,
    },
    "ElectraForSequenceClassification": SMALL | {"embedding_size": 8},
    "AlbertForSequenceClassification": SMALL | {"embedding_size": 8},
    "GPT2ForSequenceClassification": OLD | {"pad_token_id": 0},
    "BertForMaskedLM": SMALL,
    "BertForQuestionAnswering": SMALL,
    "BertForTokenClassification": SMALL,
    "BertModel": SMALL,
}


def make(root, name, settings):
    """A random base, and a tuned model whose matrices differ by products of rank 2."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    base = kind(kind.config_class(**settings))
    with torch.no_grad():
        for values in base.parameters():
            if values.dim() > 1:
                values.normal_(std=0.3)
    base.tie_weights()
    base.save_pretrained(root / "base")
    tuned = kind.from_pretrained(root / "base")
    with torch.no_grad():
        for values in tuned.parameters():
            if values.dim() == 2:
                rows, columns = values.shape
                values += 0.05 * torch.randn(rows, 2) @ torch.randn(2, columns)
            else:
                values += 0.05 * torch.randn_like(values)
    tuned.tie_weights()
    tuned.save_pretrained(root / "tuned")
    return kind


@torch.no_grad()
def output(model):
    words = {"decoder_input_ids": ROWS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=ROWS, **words)[0]


def as_reported(root, kind, report):
    """The model that the report describes: the base's tensors where the adapter leaves them out."""
    base, tuned = (load_file(root / name / "model.safetensors") for name in ("base", "tuned"))
    left_out = {name for name, other in report.others.items() if not other.stored}
    (root / "mixed").mkdir(exist_ok=True)
    mixed = {name: (base if name in left_out else tuned)[name] for name in base}
    save_file(mixed, root / "mixed" / "model.safetensors", {"format": "pt"})
    shutil.copy(root / "base" / "config.json", root / "mixed")
    return kind.from_pretrained(root / "mixed")


FLAGS = {"tables": {"embeddings": True}, "rest": {"rest": True}}
QUICK = {
    ("OPTForCausalLM", "tables"),
    ("DebertaV2ForSequenceClassification", "rest"),
    ("MixtralForCausalLM", "rest"),
}
CASES = [
    pytest.param(name, flags, marks=() if (name, flags) in QUICK else pytest.mark.slow)
    for name in MODELS
    for flags in FLAGS
]


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_peft_makes_the_model_that_the_report_describes(tmp_path, name, flags):
    kind = make(tmp_path, name, MODELS[name])
    refs = {"model": str(tmp_path / "tuned"), "base": str(tmp_path / "base")}
    report = run_extract(ExtractConfig(**refs, out=str(tmp_path / "out"), **FLAGS[flags]))
    base = kind.from_pretrained(tmp_path / "base")
    before = {key: values.clone() for key, values in base.state_dict().items()}
    unchanged = output(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    assert all("lm_head" in message for message in missing)
    assert bool(missing) == any("ensure_weight_tying" in note for note in report.notes)
    expected = output(as_reported(tmp_path, kind, report))
    torch.testing.assert_close(output(model), expected, atol=1e-4, rtol=1e-4)
    assert (expected - unchanged).abs().max() > 1e-2
    if any("delete_adapter" in note for note in report.notes):
        model.delete_adapter("default")
    after = model.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
