"""Tiny models with tokenizers of every kind, for tests of vocabularies that differ."""

import json

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mergekit_bayes.posterior import open_posterior
from tests import tiny

EMBEDDING, HEAD, OTHER = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
LINEAR = "model.layers.0.up_proj"
SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = list("abcd")
WIDTH = 6


def special(token):
    return AddedToken(token, special=True, normalized=False)


def word_level(words, added=()):
    tokens = {word: i for i, word in enumerate([*SPECIAL, *words])}
    return _with(Tokenizer(models.WordLevel(tokens, unk_token="<unk>")), added)


def word_piece(pieces, added=()):
    tokens = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
    return _with(Tokenizer(models.WordPiece(tokens, unk_token="<unk>")), added)


def bpe(merges, added=(), alphabet=CHARACTERS):
    tokens = [*SPECIAL, *alphabet, *(a + b for a, b in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return _with(Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>")), added)


def unigram(pieces, added=(), scores=None):
    listed = [*SPECIAL, *pieces]
    scores = scores or [-float(i) for i in range(len(listed))]
    return _with(Tokenizer(models.Unigram(list(zip(listed, scores, strict=True)), unk_id=0)), added)


def byte_level(merges, added=()):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {t: i for i, t in enumerate([*SPECIAL, *alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _added(tokenizer, added)


def _with(tokenizer, added):
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _added(tokenizer, added)


def _added(tokenizer, added):
    tokenizer.add_special_tokens([special(token) for token in SPECIAL])
    for token in added:
        tokenizer.add_tokens([special(token) if isinstance(token, str) else token])
    return tokenizer


def ids(folder):
    """The number of each token, by transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def save(folder, tokenizer, **config):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def tensors(folder, rows, seed=0, *, head=True, width=WIDTH, dtype="F32", **config):
    """The tensors and the config of a model; every row is another one."""
    shapes = {EMBEDDING: (rows, width), OTHER: (3,), f"{LINEAR}.weight": (4, 5)}
    shapes |= {HEAD: (rows, width)} if head else {}
    (folder / "model.safetensors").unlink(missing_ok=True)
    tiny.write(folder / "model.safetensors", tiny.arrays(seed, shapes), dtype)
    content = {"model_type": "llama", "vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(content | config))


def model(folder, tokenizer, seed=0, rows=None, **settings):
    """A model's folder; `rows` may be more or fewer than there are tokens."""
    save(folder, tokenizer)
    tensors(folder, rows or tokenizer.get_vocab_size(), seed, **settings)
    return folder


def opened(*folders):
    return [open_posterior(str(folder), with_precision=False) for folder in folders]


def write_tokenizer(plan, out):
    """The output's tokenizer as files."""
    out.mkdir(exist_ok=True)
    for name, file in plan.copied.items():
        (out / name).write_bytes(file.read_bytes())
    for name, text in plan.written.items():
        (out / name).write_text(text, encoding="utf-8")
    return out


def read_in_pieces(source, name, sizes):
    """The bytes of a tensor, read in pieces of these sizes over and over."""
    total = source.specs[name].nbytes
    raw, start = np.zeros(total, np.uint8), 0
    for i in range(total + 1):
        stop = min(start + sizes[i % len(sizes)], total)
        source.read_bytes(name, start, raw.data[start:stop])
        start = stop
        if start == total:
            break
    return raw
