"""An adapter on a frozen base of 8 or 4 bits: trained, stored and loaded again; where bitsandbytes
is installed.
"""

import importlib.util
import json

import pytest
import torch
import transformers

from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import open_posterior
from tests.tiny_models import tiny_gpt2

HAVE = importlib.util.find_spec("bitsandbytes") is not None
needs = pytest.mark.skipif(
    not HAVE, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
BITS = {
    8: {"load_in_8bit": True},
    4: {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float32,
    },
}


@pytest.fixture(params=BITS)
def base(request, tmp_path):
    """A llama of random weights, quantised on disk."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_gpt2(tmp_path / "plain"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(**BITS[request.param])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how
    )
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [
        {"text": t}
        for t in ("the cat sat on the mat .", "a dog ran", "good film", "the tree was dull")
    ] * 6
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path / "base"


def config(base, **changes):
    given = {
        "model": str(base),
        "data": str(base.parent / "t.jsonl"),
        "output": str(base.parent / "out"),
    }
    return FinetuneConfig(**{**given, "max_steps": 6, "ess": 1e6, **changes})


@needs
@pytest.mark.parametrize(("curvature", "posterior"), [("price", "ivon"), ("ggn", "flush")])
def test_an_adapter_on_a_quantised_base_has_its_posterior(base, curvature, posterior):
    before = {n: p.detach().clone() for n, p in load_model(str(base)).model.named_parameters()}
    run_finetune(config(base, lora={"r": 2}, curvature=curvature, posterior=posterior), quiet=True)
    stored = open_posterior(str(base.parent / "out"))
    names = set(stored.precision.specs)
    assert names == set(stored.mean.specs)
    assert len(names) == 2 * 2 * 2  # A and B of two projections of two layers
    assert all(".lora_" in n for n in names)
    assert stored.info.base is not None
    stored.close()
    loaded = load_model(str(base.parent / "out"))
    after = dict(loaded.model.named_parameters())
    assert sum(float(p.detach().abs().max()) > 0 for n, p in after.items() if ".lora_B." in n) == 4
    for name, tensor in before.items():
        found = next(p for n, p in after.items() if n.replace(".base_layer", "").endswith(name))
        assert torch.equal(found, tensor), name
    ids = torch.tensor([[0, 4, 5, 6]])
    assert bool(loaded.model(input_ids=ids).logits.isfinite().all())


@needs
def test_a_quantised_base_is_not_trained_whole(base):
    with pytest.raises(ConfigError, match=r"is quantised.*Train an adapter on it"):
        run_finetune(config(base), quiet=True)


@pytest.mark.skipif(HAVE, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_message_says_what_is_missing(tmp_path):
    tiny_gpt2(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="requires bitsandbytes"):
        load_model(str(tmp_path))
