"""Tiny transformers models as ordinary folders, made in code."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = [
    *("the", "a", "cat", "dog", "bird", "sat", "ran", "saw", "on", "mat", "tree", "good", "bad"),
    *("nice", "film", "was", "very", "and", "not", "fun", "dull", ".", ","),
]


def tokenizer(special="<s>"):
    """A word-level tokenizer; BOS, EOS, padding and unknown tokens first."""
    vocabulary = {t: i for i, t in enumerate([special, "</s>", "<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return inner


def tiny_gpt2(folder, seed=0, context=64, width=16, layers=2):
    """A random GPT-2 with its tokenizer in `folder`."""
    folder = Path(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(fast),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.1,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def tiny_bert(folder, labels=2, seed=0, problem_type=None, names=None):
    """A random BERT classifier with its tokenizer in `folder`."""
    folder = Path(folder)
    inner = tokenizer("[CLS]")
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A </s>", special_tokens=[("[CLS]", 0), ("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        cls_token="[CLS]",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    torch.manual_seed(seed)
    names = names or [f"LABEL_{i}" for i in range(labels)]
    config = transformers.BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=2,
        initializer_range=0.2,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
        problem_type=problem_type,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
