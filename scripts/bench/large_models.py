"""Models of Llama-3-70B's shapes as sparse files: headers that are whole, tensors nearly all zero.

The first entries of every tensor are random, so that no model, and no tensor, looks like another.
"""

import json
import mmap
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from merge_models import MODELS, Shape

from mergekit_bayes.checkpoint.codec import encode
from mergekit_bayes.checkpoint.layout import (
    POSTERIOR_FOLDER,
    precision_name,
    shard_name,
    write_index,
    write_precision_index,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import ITEM_SIZE, Array, Closing, TensorSpec
from mergekit_bayes.posterior import PosteriorInfo, identify
from mergekit_bayes.posterior.stored import PRECISION, named

SHAPES = {
    70: Shape(hidden=8192, layers=80, inner=28672, keys=1024, vocabulary=128_256),
    0.002: Shape(hidden=64, layers=4, inner=176, keys=16, vocabulary=5_000),
}
SHARD = 5_000_000_000  # bytes of a file of the 70 B model, at most
ITEM = ITEM_SIZE["BF16"]
RANDOM = 5 << 20  # random entries, of which each piece takes a stretch
FIRST = 2048  # entries of each tensor that are random from the beginning: a block of the disk


class Part(NamedTuple):
    """A range of entries of one tensor."""

    name: str
    start: int
    stop: int


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama model with a head of its own, as transformers stores them."""
    h, keys, inner = shape.hidden, shape.keys, shape.inner
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, h)}
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", h), ("k", keys), ("v", keys), ("o", h)):
            result[f"{layer}self_attn.{name}_proj.weight"] = (rows, h)
        result[f"{layer}mlp.gate_proj.weight"] = (inner, h)
        result[f"{layer}mlp.up_proj.weight"] = (inner, h)
        result[f"{layer}mlp.down_proj.weight"] = (h, inner)
        result[f"{layer}input_layernorm.weight"] = (h,)
        result[f"{layer}post_attention_layernorm.weight"] = (h,)
    result["model.norm.weight"] = (h,)
    return result | {"lm_head.weight": (shape.vocabulary, h)}


def kind_of(name: str) -> str:
    """The stratum of a tensor."""
    kinds = {"embed_tokens": "embedding", "self_attn": "attention", "mlp": "MLP", "norm": "norms"}
    return next((kind for part, kind in kinds.items() if part in name), "head")


def shards(shape: Shape, limit: int = SHARD) -> list[dict[str, TensorSpec]]:
    """The tensors of each file, none of which has more than `limit` bytes."""
    result: list[dict[str, TensorSpec]] = [{}]
    for name, entries in tensors(shape).items():
        spec = TensorSpec("BF16", entries)
        if result[-1] and sum(s.nbytes for s in result[-1].values()) + spec.nbytes > limit:
            result.append({})
        result[-1][name] = spec
    return result


class SparseFile:
    """A safetensors file on whose disk only the header lies, until ranges are filled.

    Args:
        path: The file, which is made.
        specs: Of its tensors.
        metadata: Of its header.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        SafetensorsSink(path, specs, metadata, sparse=True).close()
        self.size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        self._header = 8 + length
        self.sink = SafetensorsSink(path, specs, metadata, begun=True, sparse=True)
        self._is_filled = False

    def fill(self, name: str, start: int, data: memoryview) -> None:
        """Write the bytes of a tensor from its entry `start` on."""
        self.sink.write_bytes(name, start * ITEM, data)
        self._is_filled = True

    def empty(self) -> None:
        """Make zeros that take no room of all tensors."""
        if self._is_filled:
            os.truncate(self.path, self._header)
            os.truncate(self.path, self.size)
            self._is_filled = False


class Models(Closing):
    """A base and two tasks of one shape, each with a precision of one number an entry, in BF16.

    Args:
        folder: Where they are made; the caller removes it.
        shape: Of the models.
        seed: Of the random numbers.
    """

    def __init__(self, folder: Path, shape: Shape, seed: int) -> None:
        self.paths = [folder / name for name in MODELS]
        self._rng = np.random.default_rng(seed)
        # The files of each model's mean, and those of its precision, by the model's names.
        self._means: list[dict[str, SparseFile]] = []
        self._precisions: list[dict[str, SparseFile]] = []
        with ExitStack() as stack:
            self._stack = stack
            self._random_weights = self._random(folder / "weights.random", self._draw_weights)
            self._random_precisions = self._random(
                folder / "precisions.random", self._draw_precisions
            )
            files = shards(shape)
            for path in self.paths:
                self._make(path, shape, files)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def fill(self, parts: Iterable[Part]) -> None:
        """Write random numbers into these ranges of all weights and precisions."""
        for part in parts:
            for means, precisions in zip(self._means, self._precisions, strict=True):
                means[part.name].fill(part.name, part.start, self._some(self._random_weights, part))
                name, data = named(PRECISION, part.name), self._some(self._random_precisions, part)
                precisions[part.name].fill(name, part.start, data)

    def empty(self) -> None:
        """Make zeros of all that was filled, which take no room."""
        for files in (*self._means, *self._precisions):
            for file in files.values():
                file.empty()

    def _draw_weights(self) -> Array:
        return np.float32(0.02) * self._rng.standard_normal(1 << 20, np.float32)

    def _draw_precisions(self) -> Array:
        return np.exp(self._rng.standard_normal(1 << 20, np.float32))

    def _random(self, path: Path, draw: Callable[[], Array]) -> memoryview:
        """Numbers in BF16, in a file: what the merges hold is not counted together with them."""
        with path.open("wb+") as file:
            for _ in range(RANDOM >> 20):
                file.write(encode(draw(), "BF16"))
            file.flush()
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._stack.callback(mapping.close)
        view = memoryview(mapping)
        self._stack.callback(view.release)
        return view

    def _some(self, random: memoryview, part: Part) -> memoryview:
        size = part.stop - part.start
        first = int(self._rng.integers(RANDOM - size))
        return random[first * ITEM : (first + size) * ITEM]

    def _make(self, folder: Path, shape: Shape, files: Sequence[Mapping[str, TensorSpec]]) -> None:
        posterior, count = folder / POSTERIOR_FOLDER, len(files)
        posterior.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(_config(shape)))
        means = {shard_name("model", i, count): specs for i, specs in enumerate(files)}
        made: dict[str, SparseFile] = {}
        for name, specs in means.items():
            file = self._file(folder / name, specs, {"format": "pt"})
            made |= dict.fromkeys(specs, file)
            for tensor, spec in specs.items():
                part = Part(tensor, 0, min(FIRST, spec.size))
                file.fill(tensor, 0, self._some(self._random_weights, part))
        self._means.append(made)
        total = sum(spec.nbytes for specs in files for spec in specs.values())
        if count > 1:
            write_index(folder, "model", {name: list(s) for name, s in means.items()}, total)
        with SafetensorsSource([folder / name for name in means]) as source:
            mean = identify(source, full=False)
        info = PosteriorInfo(estimator="ggn", unit="token", observations=1000, ess=1000, mean=mean)
        made, stored = {}, {}
        for i, specs in enumerate(files):
            in_file = {named(PRECISION, name): spec for name, spec in specs.items()}
            path = posterior / precision_name(i, count)
            made |= dict.fromkeys(specs, self._file(path, in_file, info.to_metadata()))
            stored[path.name] = list(in_file)
        write_precision_index(posterior, stored, total)
        self._precisions.append(made)

    def _file(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
    ) -> SparseFile:
        file = SparseFile(path, specs, metadata)
        self._stack.callback(file.sink.abandon)
        return file


def _config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": max(1, shape.hidden // 128),
        "num_key_value_heads": max(1, shape.keys // 128),
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def refuse_small_disk(folder: Path, kept: int) -> None:
    """Stop where the disk has fewer than `kept` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < kept:
        raise SystemExit(f"{folder}: {free:,} bytes are free, and {kept:,} are to be kept free.")
