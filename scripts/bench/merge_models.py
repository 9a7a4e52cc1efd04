"""The random checkpoints of the merge benchmark: a base and two tasks, each with a precision."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.codec import chunks, encode
from mergekit_bayes.checkpoint.layers import linear_axes
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, TensorSpec
from mergekit_bayes.posterior import PosteriorInfo, identify
from mergekit_bayes.posterior.stored import DIAGONAL, PRECISION, RIGHT, named

MODELS = ("base", "a", "b")
MATRICES = "inputs.posterior"
WIDEST = 1024  # inputs of one block of a matrix
FACTORS = "factors.posterior"
RANK = 64  # of a layer's factor, where it has more than eight times as many inputs


class Shape(NamedTuple):
    """The shape of a Qwen2 model with a tied head.

    Attributes:
        hidden: Width.
        layers: Number of layers.
        inner: Width inside a layer's MLP.
        keys: Width of keys and values.
        vocabulary: Number of tokens.
    """

    hidden: int
    layers: int
    inner: int
    keys: int
    vocabulary: int


SHAPES = {
    0.002: Shape(64, 2, 176, 16, 30_000),
    0.1: Shape(640, 12, 2560, 128, 64_000),
    0.5: Shape(896, 24, 4864, 128, 151_936),
    1.5: Shape(1536, 28, 8960, 256, 151_936),
}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors, as transformers stores them."""
    h, keys, inner = shape.hidden, shape.keys, shape.inner
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", keys), ("v", keys)):
            result[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
            result[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        result[f"{layer}self_attn.o_proj.weight"] = (h, h)
        result[f"{layer}mlp.gate_proj.weight"] = (inner, h)
        result[f"{layer}mlp.up_proj.weight"] = (inner, h)
        result[f"{layer}mlp.down_proj.weight"] = (h, inner)
        result[f"{layer}input_layernorm.weight"] = (h,)
        result[f"{layer}post_attention_layernorm.weight"] = (h,)
    return result | {"model.norm.weight": (h,)}


def make(target: Path, shape: Shape, precision: str) -> None:
    """Write a base and two tasks with random weights and precisions, as a stream.

    Args:
        target: The folder, which appears when it is complete.
        shape: Of the models.
        precision: Dtype of the precisions.
    """
    folder = target.with_name(f"{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    shapes = tensors(shape)
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.hidden // 64,
        "num_key_value_heads": max(1, shape.keys // 64),
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for seed, name in enumerate(MODELS):
        rng = np.random.default_rng(seed)
        weights = np.float32(0.02) * rng.standard_normal(1 << 20, np.float32)
        precisions = np.exp(rng.standard_normal(1 << 20, np.float32))
        (folder / name / "posterior").mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config))
        mean = folder / name / "model.safetensors"
        specs = {n: TensorSpec("BF16", s) for n, s in shapes.items()}
        _write(mean, specs, {"format": "pt"}, weights, rng)
        with SafetensorsSource([mean]) as source:
            info = PosteriorInfo(
                estimator="ggn",
                unit="token",
                observations=1000,
                ess=1000,
                mean=identify(source, full=False),
            )
        specs = {named(PRECISION, n): TensorSpec(precision, s) for n, s in shapes.items()}
        file = folder / name / "posterior" / "precision.posterior"
        _write(file, specs, info.to_metadata(), precisions, rng)
        _write_matrices(folder / name / MATRICES, shapes, info, rng)
        _write_factors(folder / name / FACTORS, shapes, info, rng)
    folder.rename(target)


def blocks_of(width: int) -> int:
    """Blocks of a layer's matrix, so that none is wider than `WIDEST`."""
    return next(k for k in range(-(-width // WIDEST), width + 1) if width % k == 0)


def _write_matrices(
    path: Path, shapes: dict[str, tuple[int, ...]], info: PosteriorInfo, rng: np.random.Generator
) -> None:
    """Write random covariances of the inputs of linear layers, and one number for all else."""
    layers = linear_axes({n: TensorSpec("BF16", s) for n, s in shapes.items()})
    specs: dict[str, TensorSpec] = {}
    for name, shape in shapes.items():
        if name not in layers:
            specs[named(PRECISION, name)] = TensorSpec("F32", tuple(1 for _ in shape))
            continue
        blocks = blocks_of(shape[1])
        size = shape[1] // blocks
        specs[named(RIGHT, name)] = TensorSpec("F32", (blocks, size, size))
    metadata = info.model_copy(update={"estimator": "inputs"}).to_metadata()
    with SafetensorsSink(path, specs, metadata) as sink:
        for name, spec in specs.items():
            size = spec.shape[-1]
            inputs = rng.standard_normal((spec.size // size**2 or 1, size, 8), np.float32)
            matrices = inputs @ inputs.swapaxes(1, 2) + np.eye(size, dtype=np.float32)
            if size == 1:
                matrices = np.ones(spec.shape, np.float32)
            sink.write_bytes(name, 0, encode(matrices.reshape(-1), "F32"))


def _write_factors(
    path: Path, shapes: dict[str, tuple[int, ...]], info: PosteriorInfo, rng: np.random.Generator
) -> None:
    """Write random diagonals and factors for linear layers, and one number for all else."""
    layers = linear_axes({n: TensorSpec("BF16", s) for n, s in shapes.items()})
    specs: dict[str, TensorSpec] = {}
    for name, shape in shapes.items():
        if name in layers:
            specs[named(DIAGONAL, name)] = TensorSpec("F32", shape[1:])
            rank = min(RANK, shape[1] // 8)
            specs[named(RIGHT, name)] = TensorSpec("F32", (rank, shape[1]))
        else:
            specs[named(PRECISION, name)] = TensorSpec("F32", tuple(1 for _ in shape))
    metadata = info.model_copy(update={"estimator": "inputs"}).to_metadata()
    with SafetensorsSink(path, specs, metadata) as sink:
        for name, spec in specs.items():
            numbers = np.ones(spec.size, np.float32)
            if name.startswith(f"{RIGHT}:"):
                numbers = rng.standard_normal(spec.size, np.float32)
            sink.write_bytes(name, 0, encode(numbers, "F32"))


def _write(
    path: Path,
    specs: dict[str, TensorSpec],
    metadata: dict[str, str],
    values: NDArray[np.float32],
    rng: np.random.Generator,
) -> None:
    """Write tensors made of `values`, rotated at random."""
    with SafetensorsSink(path, specs, metadata) as sink:
        for name, spec in specs.items():
            for start, stop in chunks(spec, len(values)):
                rotated = np.roll(values, int(rng.integers(len(values))))
                content = encode(rotated[: stop - start], spec.dtype)
                sink.write_bytes(name, start * ITEM_SIZE[spec.dtype], content)
