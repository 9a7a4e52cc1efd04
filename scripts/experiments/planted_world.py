"""The models of planted_precisions.py: small ones of twelve families, trained in seconds.

Every model learns sentences of scripts/tiny_world.py from scratch, and is kept half-way and at the
end. Language models predict tokens; encoders tell the four kinds of sentences.
"""

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_world import garden, kind, kitchen, rude, write_rows
from train_tiny_lm import train_tokenizer

SENTENCES = (kind, rude, garden, kitchen)  # a classifier's labels, in order
_WIDTH, _INNER, _HEADS, _LAYERS, _LENGTH = 64, 160, 4, 2, 48


class Model(NamedTuple):
    """One model of the experiment.

    Attributes:
        family: Name of its architecture, a key of `FAMILIES`.
        seed: Seed of its start and of the order of its data.
        folder: The trained model.
        earlier: The same model half-way through its training.
    """

    family: str
    seed: int
    folder: Path
    earlier: Path


def _causal(config: type, model: type, **settings: Any) -> Callable[[int], Any]:
    def make(vocabulary: int) -> Any:
        sizes = {
            "vocab_size": vocabulary,
            "hidden_size": _WIDTH,
            "intermediate_size": _INNER,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": _HEADS,
            "max_position_embeddings": _LENGTH,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 1,
        }
        return model(config(**(sizes | settings)))

    return make


def _gpt2(vocabulary: int) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocabulary,
            n_embd=_WIDTH,
            n_layer=_LAYERS,
            n_head=_HEADS,
            n_positions=_LENGTH,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=1,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


_LABELS = {"num_labels": len(SENTENCES), "problem_type": "single_label_classification"}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# One number of key heads for each query head is the case where all four projections are square.
FAMILIES: dict[str, Callable[[int], Any]] = {
    "gpt2": _gpt2,
    "llama": _causal(
        transformers.LlamaConfig, transformers.LlamaForCausalLM, num_key_value_heads=_HEADS
    ),
    "bert": _causal(
        transformers.BertConfig,
        transformers.BertForSequenceClassification,
        **_LABELS,
        **_NO_DROPOUT,
    ),
    "qwen3": _causal(
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        num_key_value_heads=2,
        head_dim=_WIDTH // _HEADS,
        tie_word_embeddings=True,
    ),
    "mixtral": _causal(
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        num_key_value_heads=_HEADS,
        num_local_experts=4,
        sliding_window=None,
    ),
    "gpt_neox": _causal(transformers.GPTNeoXConfig, transformers.GPTNeoXForCausalLM),
    "roberta": _causal(
        transformers.RobertaConfig,
        transformers.RobertaForSequenceClassification,
        max_position_embeddings=_LENGTH + 8,
        **_LABELS,
        **_NO_DROPOUT,
    ),
    "opt": _causal(
        transformers.OPTConfig,
        transformers.OPTForCausalLM,
        ffn_dim=_INNER,
        word_embed_proj_dim=_WIDTH,
        dropout=0.0,
    ),
    "mistral": _causal(
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        num_key_value_heads=2,
        sliding_window=None,
    ),
    "olmo2": _causal(
        transformers.Olmo2Config, transformers.Olmo2ForCausalLM, num_key_value_heads=_HEADS
    ),
    "distilbert": lambda vocabulary: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=vocabulary,
            dim=_WIDTH,
            hidden_dim=_INNER,
            n_layers=_LAYERS,
            n_heads=_HEADS,
            max_position_embeddings=_LENGTH,
            pad_token_id=1,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            **_LABELS,
        )
    ),
    "electra": _causal(
        transformers.ElectraConfig,
        transformers.ElectraForSequenceClassification,
        embedding_size=_WIDTH,
        classifier_dropout=0.0,
        **_LABELS,
        **_NO_DROPOUT,
    ),
}
# The thresholds were fixed on the first, and counted on the second.
FITTING = ("gpt2", "llama", "bert", "qwen3", "mixtral", "gpt_neox", "roberta")
COUNTING = ("opt", "mistral", "olmo2", "distilbert", "electra")


def make_texts(folder: Path, *, train: int = 4000, test: int = 1500) -> list[tuple[str, int]]:
    """Write sentences that no model is trained on, and return those of the training.

    Returns:
        (text, label) by row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    rows = []
    for i in range(train + test):
        label = i % len(SENTENCES)
        rows.append((SENTENCES[label](draw.choice), label))
    held_out = rows[train:]
    write_rows(folder / "held_out.jsonl", [text for text, _ in held_out])
    write_rows(folder / "kind.jsonl", [text for text, label in held_out if label == 0])
    return rows[:train]


def make_model(
    family: str, seed: int, rows: Sequence[tuple[str, int]], folder: Path, *, steps: int = 240
) -> Model:
    """Train a model, or find it trained already.

    Args:
        family: A key of `FAMILIES`.
        seed: Of the weights and of the order.
        rows: Texts and labels.
        folder: Where models are kept.
        steps: Steps of 32 sentences, AdamW, 2e-3.
    """
    name = f"{family}-{seed}-{steps}"
    found = Model(family, seed, folder / name, folder / f"{name}-earlier")
    if found.folder.exists():  # trained by an earlier run
        return found
    texts = [text for text, _ in rows]
    tokenizer = train_tokenizer(texts, 400, words=True)
    torch.manual_seed(seed)
    model = FAMILIES[family](len(tokenizer))
    is_causal = "CausalLM" in type(model).__name__ or "LMHead" in type(model).__name__
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in range(1, steps + 1):
        chosen = draw.choices(rows, k=32)
        # A classifier sees where a text begins, as its precision does.
        encoded = tokenizer(
            [text for text, _ in chosen],
            padding=True,
            return_tensors="pt",
            truncation=True,
            max_length=_LENGTH,
        )
        encoded.pop("token_type_ids", None)
        if is_causal:
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        else:
            labels = torch.tensor([label for _, label in chosen])
        loss = model(**encoded, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in (steps // 2, steps):
            target = found.earlier if step < steps else found.folder
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
    print(f"{name}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return found
