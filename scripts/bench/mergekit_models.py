"""Tiny models for the comparison with mergekit: families, precisions, tokenizers and an adapter.

Each family has a folder for each dtype, such as `llama-float32`, with a `base` and the fine-tunes
`a`, `b` and `c`. All weights are random with fixed seeds, so that two runs compare the same.
"""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

DTYPES = ("float32", "bfloat16")
TASKS = ("a", "b", "c")
WORDS = [f"{c}{v}" for c in "bcdfghjklmnpr" for v in "aeiou"][:60]
VOCABULARY = len(WORDS) + 4
UNCHANGED = 0.3  # share of a fine-tune's entries that are the base's
CHANGE = 0.3  # standard deviation of the other entries' change over that of the tensor
RANK = 4  # of the adapter
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}

VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "head_dim": 8,
}

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(_config("LlamaConfig", num_hidden_layers=6)),
    "mistral": lambda: transformers.MistralForCausalLM(_config("MistralConfig")),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(_config("Qwen2Config", tied=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(_config("Qwen3Config", head_dim=16)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        _config("Gemma3TextConfig", tied=True, head_dim=16)
    ),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        _config("MixtralConfig", num_local_experts=4)
    ),
    "phi3": lambda: transformers.Phi3ForCausalLM(_config("Phi3Config")),
    "phi": lambda: transformers.PhiForCausalLM(_config("PhiConfig", num_key_value_heads=4)),
    "mistral3": lambda: transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=_config("MistralConfig", head_dim=8),
            vision_config=transformers.PixtralVisionConfig(**VISION),
        )
    ),
}


def _config(name: str, tied: bool = False, **sizes: int) -> Any:
    return getattr(transformers, name)(**SIZES | sizes | {"tie_word_embeddings": tied})


def make(work: Path, folders: set[str]) -> None:
    """Make those of the named folders that `work` has not yet, and what they are made from."""
    if any(folder not in FAMILY_FOLDERS for folder in folders):
        folders = folders | {"llama-float32", "llama-bfloat16"}
    for folder in sorted(folders & set(FAMILY_FOLDERS)):
        family, _, dtype = folder.partition("-")
        _when_missing(work / folder, _family, FAMILIES[family], dtype)
    for folder in sorted(folders & set(OTHERS)):
        _when_missing(work / folder, OTHERS[folder], work)


def _when_missing(folder: Path, write: Callable[..., None], *about: Any) -> None:
    """Write a folder that appears when it is complete."""
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial, *about)
    partial.rename(folder)


def _family(folder: Path, model: Callable[[], Any], dtype: str) -> None:
    """Write a base, all of whose tensors are random, and its fine-tunes."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model().to(getattr(torch, dtype))
        made.save_pretrained(folder / "base")
    file = folder / "base" / "model.safetensors"
    base = load_file(file)
    rng = np.random.default_rng(1)
    for name, tensor in base.items():
        # Norms are ones and biases zeros in a fresh model, of which no rule would be tested.
        noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape), np.float32))
        base[name] = (tensor.float() + 0.05 * noise).to(tensor.dtype)
    save_file(base, file, {"format": "pt"})
    write_tokenizer(folder / "base")
    for seed, task in enumerate(TASKS, 2):
        write_tuned(folder / task, folder / "base", seed)


def write_tuned(folder: Path, base: Path, seed: int) -> None:
    """Write a fine-tune: the base plus seeded changes of a part of the entries of each tensor."""
    shutil.copytree(base, folder)
    rng = np.random.default_rng(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        change = rng.standard_normal(shape, np.float32)
        change *= rng.random(shape) >= UNCHANGED
        change *= CHANGE * float(tensor.float().std())
        tensors[name] = (tensor.float() + torch.from_numpy(change)).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_tokenizer(folder: Path, added: tuple[str, ...] = (), template: str = TEMPLATE) -> None:
    """Write a tokenizer of whole words, with some tokens added."""
    words = {t: i for i, t in enumerate(["<s>", "</s>", "<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    inner.add_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    fast.chat_template = template
    fast.save_pretrained(folder)


def _with_tokens(folder: Path, work: Path) -> None:
    """Models whose vocabularies differ: two have tokens of their own, and one rows without one."""
    llama = work / "llama-float32"
    shutil.copytree(llama / "base", folder / "base")
    added = {"a": ("<|shared|>", "<|a|>"), "b": ("<|b|>", "<|shared|>", "<|b2|>"), "padded": ()}
    for seed, (name, tokens) in enumerate(added.items(), 20):
        write_tuned(folder / name, llama / "base", seed)
        rows = VOCABULARY + (len(tokens) or 8)
        _resize(folder / name, rows, seed)
        write_tokenizer(folder / name, tokens, TEMPLATE.replace("<s>", f"<s>{name} "))


def _mixed(folder: Path, work: Path) -> None:
    """Models in different dtypes."""
    for name, dtype in (("base", "float32"), ("a", "float32"), ("b", "bfloat16")):
        shutil.copytree(work / f"llama-{dtype}" / name, folder / name)


def _resize(folder: Path, rows: int, seed: int) -> None:
    """Give embeddings and head more rows, which are random."""
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(seed)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = tensors[name]
        new = rng.standard_normal((rows - len(old), old.shape[1]), np.float32) * 0.05
        tensors[name] = torch.cat([old, torch.from_numpy(new).to(old.dtype)])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}, indent=2))


def _with_adapter(folder: Path, work: Path) -> None:
    """A base, a fine-tune, and a LoRA adapter of the base."""
    import peft

    for name in ("base", "a"):
        shutil.copytree(work / "llama-float32" / name, folder / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj", "down_proj"],
        base_model_name_or_path="./base",
    )
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "adapter")


FAMILY_FOLDERS = tuple(f"{family}-{dtype}" for family in FAMILIES for dtype in DTYPES)
OTHERS: dict[str, Callable[[Path, Path], None]] = {
    "llama-mixed": _mixed,
    "tokens-float32": _with_tokens,
    "adapter-float32": _with_adapter,
}
