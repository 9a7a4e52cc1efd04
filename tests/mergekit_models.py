"""Tiny models in folders, and merges of them by recipes of mergekit through the command line."""

import json
import textwrap
from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from bmerge_cli.main import app
from tests import tiny

WIDTH, INNER, ROWS = 4, 6, 8


def shapes_of(layers=3, rows=ROWS):
    """The tensors of a model by name, and their shapes."""
    shapes = {"model.embed_tokens.weight": (rows, WIDTH)}
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
    return shapes | {"model.norm.weight": (WIDTH,), "lm_head.weight": (rows, WIDTH)}


def folder(name, seed, layers=3, *, dtype="F32", spread=1.0, tensors=None, **config):
    """A model in a folder, with a config; its tensors."""
    shapes = shapes_of(layers)
    tensors = tiny.arrays(seed, shapes, spread) if tensors is None else tensors
    tiny.write(Path(name) / "model.safetensors", tensors, dtype)
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_hidden_layers": layers,
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
    }
    (Path(name) / "config.json").write_text(json.dumps(content | config))
    return tensors


def models(*names, layers=3, base=None, **settings):
    """Models of seeds 0, 1, ...; with a base the others lie near it."""
    found = {}
    for i, name in sorted(enumerate(names), key=lambda pair: pair[1] != base):
        tensors = tiny.arrays(i, shapes_of(layers), 1.0 if base in (None, name) else 0.1)
        if base not in (None, name):
            tensors = {n: found[base][n] + change for n, change in tensors.items()}
        found[name] = folder(name, i, layers, tensors=tensors, **settings)
    return found


def run(*args):
    """`bmerge merge`."""
    return CliRunner().invoke(app, ["merge", *map(str, args)])


def merge(text, *flags, out="out"):
    """The tensors of the merge by a recipe."""
    Path("recipe.yml").write_text(textwrap.dedent(text))
    done = run("recipe.yml", "-o", out, "--force", *flags)
    assert done.exit_code == 0, done.stderr
    return tiny.read(out)


def refused(text, *flags):
    """The one message by which a recipe is refused."""
    Path("recipe.yml").write_text(textwrap.dedent(text))
    done = run("recipe.yml", "-o", "refused", *flags)
    assert done.exit_code == 2, done.stdout + done.stderr
    assert not Path("refused").exists()
    message = done.stderr.strip()
    assert "Traceback" not in message
    return " ".join(message.split())


def close(found, expected, places=1e-6):
    """That two sets of tensors are the same up to float32 rounding."""
    assert list(found) == list(expected) or set(found) == set(expected)
    for name, tensor in expected.items():
        wanted = np.asarray(tensor, np.float64)
        scale = max(1.0, float(np.abs(wanted).max(initial=0)))
        difference = np.abs(np.asarray(found[name], np.float64) - wanted)
        assert difference.max(initial=0) <= places * scale, name
