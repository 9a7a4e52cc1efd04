"""Tiny transformers models as ordinary folders, made in code."""

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.places import checkpoint_names
from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, save_posterior

PRIOR = 40.0  # precision of the prior in a posterior of `give_posterior`

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


def tiny_mixtral(folder, tied=False):
    """A layer of four experts, which a file holds one by one and memory holds stacked."""
    tiny_gpt2(folder)
    config = transformers.MixtralConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(folder)
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


def give_posterior(folder, loaded=None, *, prior=PRIOR, seed=0, stored_prior=None, only=None):
    """Store a posterior with random curvature for all parameters, as `finetune` would."""
    loaded = loaded or load_model(str(folder))
    rng = np.random.default_rng(seed)
    named = checkpoint_names(
        loaded.model, {n: p.detach() for n, p in loaded.model.named_parameters()}
    )
    with SafetensorsSource(checkpoint_files(folder)) as source:
        precision = {
            n: (np.exp(rng.uniform(0, 6, tuple(t.shape))) + prior).astype(np.float32)
            for n, t in sorted(named.items())
            if n in source.specs and (only is None or only in n)
        }
        info = PosteriorInfo(
            estimator="ggn",
            unit="example",
            observations=100,
            ess=100,
            mean=identify(source),
            prior=stored_prior or (Prior(kind="isotropic", precision=prior) if prior else Prior()),
        )
    save_posterior(folder, precision, info, force=True)
    return precision


# As most chat models write a turn: a header, the text and a token for its end.
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The same, with the assistant's turns marked.
MARKED_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}"
    "{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tiny_llama(folder, template=CHAT, context=64, seed=0):
    """A random Llama of two layers with a chat template."""
    folder = Path(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer(),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    fast.chat_template = template
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
