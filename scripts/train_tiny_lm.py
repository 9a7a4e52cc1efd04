"""Train a small GPT-2-style language model from scratch, tokenizer included, as an ordinary folder.

    python scripts/train_tiny_lm.py TEXTS... -o DIR

TEXTS are JSONL files (`.gz` too) with a `text` column; `FILE?label=1` keeps the rows with that
value and `FILE*3` counts a file three times, as in `civil.jsonl.gz?label=1*3`. Rows are joined by
EOS and cut into blocks.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mergekit_bayes.models.rows import load_rows

BOS, PAD, UNKNOWN = "<|endoftext|>", "<pad>", "<unk>"
_SOURCE = re.compile(r"(?P<file>.+?)(\?(?P<column>\w+)=(?P<value>[^*]+))?(\*(?P<times>\d+))?")


def read_texts(source: str) -> list[str]:
    """The texts of one `FILE[?column=value][*times]`."""
    match = _SOURCE.fullmatch(source)
    assert match is not None
    where = {match["column"]: json.loads(match["value"])} if match["column"] else None
    rows = load_rows(match["file"], where=where, columns=["text"])
    return list(rows["text"]) * int(match["times"] or 1)


def train_tokenizer(
    texts: list[str], vocabulary: int, *, words: bool
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, or with `words` one token a word."""
    special = [BOS, PAD, UNKNOWN]
    if words:
        inner = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocabulary, special_tokens=special, show_progress=False
        )
    else:
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    inner.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BOS, eos_token=BOS, pad_token=PAD, unk_token=UNKNOWN
    )


def train(
    texts: list[str],
    folder: Path,
    *,
    tokenizer: transformers.PreTrainedTokenizerFast | None = None,
    vocabulary: int = 4096,
    words: bool = False,
    layers: int = 3,
    width: int = 192,
    heads: int = 4,
    context: int = 64,
    steps: int = 3500,
    batch: int = 16,
    rate: float = 1e-3,
    seed: int = 0,
) -> None:
    """Train a model (AdamW, cosine schedule), and its tokenizer unless one is given; save both."""
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, vocabulary, words=words)
    end = tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    stream = [end]
    for ids in tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]:
        stream += [*ids, end]
    tokens = torch.tensor(stream)
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=context,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))),
    )
    start, running = time.monotonic(), 0.0
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens, "
        f"{steps} steps",
        file=sys.stderr,
    )
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - context, (batch,), generator=generator)
        blocks = torch.stack([tokens[s : s + context] for s in starts])
        loss = model(input_ids=blocks, labels=blocks).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += loss.item()
        if step % max(1, steps // 10) == 0:
            mean, running = running / max(1, steps // 10), 0.0
            print(
                f"step {step}: loss {mean:.3f}, {time.monotonic() - start:.0f} s", file=sys.stderr
            )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train a model on the texts of the command line, and print its folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    for name, default in (
        ("vocabulary", 4096),
        ("layers", 3),
        ("width", 192),
        ("heads", 4),
        ("context", 64),
        ("steps", 3500),
        ("batch", 16),
        ("seed", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument(
        "--words", action="store_true", help="one token a word instead of byte-level BPE"
    )
    chosen = vars(parser.parse_args())
    folder = chosen.pop("out")
    train([t for source in chosen.pop("texts") for t in read_texts(source)], folder, **chosen)
    print(folder)


if __name__ == "__main__":
    main()
