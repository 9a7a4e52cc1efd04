"""Packed documents have the loss and the gradient that they have in rows of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from mergekit_bayes.errors import ConfigError
from mergekit_bayes.finetune import FinetuneConfig
from mergekit_bayes.finetune.run import run_finetune
from mergekit_bayes.models.encode import IGNORED, Collate, observations
from mergekit_bayes.models.examples import read_examples
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.packing import pack_documents, refuse_leaks
from tests.chats import chats
from tests.finetuning import texts
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=[(m, a) for m in MODELS for a in ("sdpa", "eager")], ids="-".join)
def loaded(request, tmp_path):
    name, attention = request.param
    loaded = load_model(str(MODELS[name](tmp_path / name)))
    loaded.model.set_attn_implementation(attention)
    return loaded


def documents(count=9, seed=0):
    """Documents of 2 to 20 tokens, some of which are not scored."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = rng.integers(4, 20, rng.integers(2, 21)).tolist()
        labels = [token if rng.random() < 0.7 else IGNORED for token in ids]
        made.append({"input_ids": ids, "labels": [*labels[:-1], ids[-1]]})
    return made


def summed(model, examples):
    """Loss summed over the scored tokens, and its gradient."""
    model.zero_grad()
    batch = Collate(2)(examples)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_packed_documents_have_the_loss_and_gradient_of_unpacked_ones(loaded):
    apart = documents()
    packed = pack_documents(apart, 32)
    assert len(packed) < len(apart)
    assert observations(packed, "causal-lm") == observations(apart, "causal-lm")
    loss, gradient = summed(loaded.model, packed)
    expected, expected_gradient = summed(loaded.model, apart)
    assert loss == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)
    for module in loaded.model.modules():
        if isinstance(module, torch.nn.Dropout):  # as of an adapter, which is in training mode
            module.p = 0.5
    loaded.model.train()
    refuse_leaks(loaded)
    assert loaded.model.training


def test_a_model_that_lets_documents_see_each_other_is_refused(loaded):
    """Where a mask hides the position ids from transformers, or they are not looked at."""
    forward = loaded.model.forward

    def masked(**inputs):
        return forward(attention_mask=torch.ones_like(inputs["input_ids"]), **inputs)

    def blind(position_ids, **inputs):
        return forward(**inputs)

    def shifted(position_ids, **inputs):  # kept apart, and not started again
        steps = torch.arange(position_ids.shape[1])
        gap = 2 * (steps >= 6) * (position_ids.shape[1] > 6)
        return forward(position_ids=(steps + gap)[None], **inputs)

    for leaky in (masked, blind):
        loaded.model.forward = leaky
        with pytest.raises(ConfigError, match=r"pack: documents: .*depend on the one before it"):
            refuse_leaks(loaded)
    if loaded.model.config.model_type == "gpt2":  # the other looks at differences of positions
        loaded.model.forward = shifted
        with pytest.raises(ConfigError, match="positions do not start again"):
            refuse_leaks(loaded)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_architecture_that_numbers_tokens_itself_is_refused(attention):
    """OPT counts positions by the attention mask, whatever position ids say."""
    config = transformers.OPTConfig(
        vocab_size=20,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    model = transformers.OPTForCausalLM._from_config(config, attn_implementation=attention)
    with pytest.raises(ConfigError, match="does not keep packed documents apart"):
        refuse_leaks(Loaded(model, range(20), "causal-lm", Path("opt")))


@pytest.mark.parametrize("length", [20, 21, 64, 1000])
def test_packing_loses_no_document_and_exceeds_no_length(length):
    apart = documents(40)
    packed = pack_documents(apart, length)
    found = []
    for row in packed:
        assert len(row["input_ids"]) <= length
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            assert row["labels"][start] == IGNORED
            found.append((row["input_ids"][start:end], row["labels"][start + 1 : end]))
    assert sorted(found) == sorted((e["input_ids"], e["labels"][1:]) for e in apart)
    total = sum(len(e["input_ids"]) for e in apart)
    assert len(packed) <= 1 + 1.5 * total / length


def test_pack_says_how(tmp_path):
    given = {"model": "m", "data": "d", "output": "o"}
    with pytest.raises(ConfigError, match=r"pack: true is no longer accepted. Write joined"):
        FinetuneConfig(**given, pack=True)
    assert FinetuneConfig(**given).pack is False
    data = texts(tmp_path / "t.jsonl")
    labelled = FinetuneConfig(
        model=str(tiny_bert(tmp_path / "b")),
        data=data,
        output=str(tmp_path / "o"),
        pack="documents",
    )
    with pytest.raises(ConfigError, match="pack is for language models"):
        run_finetune(labelled, quiet=True)
    llama = load_model(str(tiny_llama(tmp_path / "m")))
    paths = [data, chats(tmp_path / "c.jsonl", 3)]
    with pytest.raises(ConfigError, match=r"pack: joined .*c\.jsonl' holds conversations"):
        read_examples(paths, llama, pack=True)
