"""Models and precisions in every stored form, written by torch, and merges of them in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_ENDING,
    checkpoint_files,
    precision_path,
    write_index,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.posterior import PosteriorInfo, identify, open_posterior, save_posterior
from tests import tiny
from tests.reference.merging import natural_sum
from tests.tiny_models import tiny_bert, tiny_gpt2

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
SHAPES = {
    "wte.weight": (7, 4),
    "h.0.attn.weight": (4, 5),
    "h.0.ln.bias": (4,),
    "h.0.scalar": (),
    "h.0.conv": (3, 2, 2),
}
POOLED = {
    "entry": lambda s: s,
    "row": lambda s: (
        s.mean(axis=tuple(range(1, s.ndim)), keepdims=True, dtype=np.float32) if s.ndim > 1 else s
    ),
    "tensor": lambda s: np.full((1,) * s.ndim, s.mean(), np.float32),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(path, tensors, dtype="F32", metadata=None):
    """A checkpoint as torch writes it, or in a file that ends in `.posterior` precisions."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = tiny.names_in(path, tensors)
    stored = {
        n: torch.as_tensor(np.asarray(t)).to(TORCH[dtype]).contiguous() for n, t in tensors.items()
    }
    save_file(stored, str(path), metadata or {"format": "pt"})


def load(path):
    """A checkpoint's tensors as torch reads them, in float64."""
    path = Path(path)
    files = [path] if path.suffix == POSTERIOR_ENDING else checkpoint_files(path)
    return {
        n.removeprefix("precision:"): t.to(torch.float64).numpy()
        for file in files
        for n, t in load_file(str(file)).items()
    }


def model(
    name,
    seed,
    *,
    dtype="F32",
    pool="entry",
    kept="F32",
    spread=1.0,
    mean=None,
    precision=None,
    **info,
):
    """`name.safetensors` with a precision of any shape and dtype beside it.

    Returns both as they are stored, in float64.
    """
    mean = tiny.arrays(seed, SHAPES, spread) if mean is None else mean
    precision = tiny.precisions(seed, SHAPES) if precision is None else precision
    path = Path(f"{name}.safetensors")
    save(path, mean, dtype)
    source = SafetensorsSource([path])
    known = {"estimator": "ggn", "unit": "token", "observations": 100.0, "ess": 100.0} | info
    metadata = PosteriorInfo(mean=identify(source), **known).to_metadata()
    source.close()
    save(precision_path(path), {n: POOLED[pool](p) for n, p in precision.items()}, kept, metadata)
    return load(path), load(precision_path(path))


def merge(*models, **settings):
    settings = {
        "base": "base",
        "weights": "precision",
        "out": "x.safetensors",
        "force": True,
    } | settings
    paths = {
        ref: f"{ref}.safetensors"
        for ref in (*models, settings["base"])
        if ref and Path(f"{ref}.safetensors").exists()
    }
    settings["base"] = paths.get(settings["base"], settings["base"])
    return run_merge(MergeConfig(models=tuple(paths.get(m, m) for m in models), **settings))


def matching(base, tasks, scales):
    """Gradient matching in float64, in natural parameters: mean and precision by tensor."""
    found = {}
    for name, m0 in base[0].items():
        s0 = np.broadcast_to(base[1][name], m0.shape) + DELTA_0
        each = [(s0 + np.broadcast_to(s[name], m0.shape), m[name]) for m, s in tasks]
        found[name] = natural_sum((s0, m0), each, scales)
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Base and two tasks with posteriors of a tied GPT-2, a Qwen2 with its own head and a BERT."""
    root = tmp_path_factory.mktemp("world")
    tiny_gpt2(root / "gpt2-base", width=8, layers=1, context=16)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(root / "qwen-base")
    (root / "qwen-base" / "chat_template.jinja").write_text("{{ messages }}")
    tiny_bert(root / "bert-base")
    for kind in ("gpt2", "qwen", "bert"):
        base = root / f"{kind}-base"
        known = open_posterior(str(base), with_precision=False)
        shapes = {n: s.shape for n, s in known.mean.specs.items()}
        known.close()
        for seed, name in enumerate(("base", "a", "b")):
            folder = root / f"{kind}-{name}"
            if name != "base":
                loaded = CLASSES[kind].from_pretrained(base)
                torch.manual_seed(seed)
                with torch.no_grad():
                    for parameter in loaded.parameters():
                        parameter += 0.05 * torch.randn_like(parameter)
                loaded.save_pretrained(folder)
            source = SafetensorsSource(checkpoint_files(folder))
            info = PosteriorInfo(
                estimator="ggn", unit="token", observations=100, ess=100, mean=identify(source)
            )
            source.close()
            save_posterior(folder, tiny.precisions(seed, shapes), info)
    return root


CLASSES = {
    "gpt2": transformers.GPT2LMHeadModel,
    "qwen": transformers.Qwen2ForCausalLM,
    "bert": transformers.BertForSequenceClassification,
}


def opened(folder):
    return load(folder), load(Path(folder) / "posterior" / "precision.posterior")


def close(found, expected, rtol=2e-5, atol=2e-6, what=""):
    assert set(found) == set(expected)
    for name, values in expected.items():
        shown = np.broadcast_to(found[name], np.shape(values))
        np.testing.assert_allclose(shown, values, rtol=rtol, atol=atol, err_msg=f"{what} {name}")


def expect(base, tasks, scales, shapes=None):
    """Merged mean and precision, by matching in float64."""
    both = matching(base, tasks, scales)
    return {n: m for n, (m, _) in both.items()}, {n: s for n, (_, s) in both.items()}


AT = ("h.0.attn.weight", (2, 3))  # flat index 13


def spoiled(arrays, value, at=AT):
    arrays = {n: a.copy() for n, a in arrays.items()}
    arrays[at[0]][at[1]] = value
    return arrays


def shard(folder, tensors, parts, dtype="F32", stem="model"):
    """A sharded checkpoint: `parts` are lists of names."""
    files = {
        f"{stem}-{i + 1:05d}-of-{len(parts):05d}.safetensors": list(part)
        for i, part in enumerate(parts)
    }
    for file, part in files.items():
        save(Path(folder) / file, {n: tensors[n] for n in part}, dtype)
    write_index(Path(folder), stem, files, sum(4 * np.size(t) for t in tensors.values()))
