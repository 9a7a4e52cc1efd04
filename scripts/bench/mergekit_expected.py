"""What a recipe of mergekit's should give, restated in float64 from the recipe and the models.

Reads a recipe by itself: stages, slices, settings of sources, slices, models and recipes with
their gradients and filters, adapters, and vocabularies. See `mergekit_rules` for the methods.
"""

import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from mergekit_rules import RULES, Array, Inputs, Mask, Restated
from safetensors.torch import load_file

LAYER = re.compile(r"(.*\blayers\.)(\d+)(\..*)")
EXPERT = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
MODULES = {"text_decoder": "language_model.", "vision_tower": "vision_tower."}
MODULES |= {"multi_modal_projector": "multi_modal_projector."}  # of models that have parts
UNITS = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}
WITHOUT_BASE = ("linear", "karcher", "passthrough")  # a base is a model like any other
HEADS = ("embed_tokens.weight", "lm_head.weight")


class Tensor(NamedTuple):
    """One tensor of the output.

    Attributes:
        method: The method that merges it.
        inputs: What it is made of.
        tokens: Of an embedding or a head with a vocabulary of its own: its rows' tokens.
    """

    method: str
    inputs: Inputs
    tokens: list[str | None] | None = None

    def with_unit(self, unit: float) -> "Tensor":
        """The same, as a program makes it that works with another rounding."""
        return self._replace(inputs=self.inputs._replace(unit=unit))

    def merged(self, kept: list[Mask] | None = None) -> Restated:
        """The tensor in float64, with what a method kept that drops entries at random."""
        return RULES[self.method](self.inputs._replace(kept=kept))


def load(folder: Path, stacked: bool = True) -> dict[str, torch.Tensor]:
    """All tensors of a model; the experts of a mixture stacked, as mergekit merges them."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    if not stacked:
        return tensors
    experts: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
    for name in list(tensors):
        if found := EXPERT.fullmatch(name):
            experts.setdefault(found[1], {})[int(found[2]), found[3]] = tensors.pop(name)
        elif name.endswith(".block_sparse_moe.gate.weight"):
            tensors[name.replace("block_sparse_moe", "mlp")] = tensors.pop(name)
    for layer, parts in experts.items():
        count = max(i for i, _ in parts) + 1
        both = [torch.cat([parts[i, "w1"], parts[i, "w3"]]) for i in range(count)]
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        down = [parts[i, "w2"] for i in range(count)]
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack(down)
    return tensors


def vocabulary(folder: Path) -> dict[str, int]:
    """The token numbers of a model's tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {t["content"]: t["id"] for t in content["added_tokens"]}
    return dict(content["model"]["vocab"]) | added


class Models:
    """The models of a folder, by the names that a recipe gives them.

    Args:
        folder: Where relative paths start.
        stacked: Whether the experts of a mixture are one tensor.
    """

    def __init__(self, folder: Path, stacked: bool = True) -> None:
        self.folder = folder
        self.stacked = stacked
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Add the output of a stage."""
        self._tensors[name] = tensors

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All tensors of one model, with its adapter added."""
        if name not in self._tensors:
            model, _, adapter = name.partition("+")
            tensors = load(self.folder / model, self.stacked)
            if adapter:
                tensors = tensors | _adapted(tensors, self.folder / adapter)
            self._tensors[name] = tensors
        return self._tensors[name]

    def path(self, name: str) -> Path:
        """The folder of one model."""
        return self.folder / name.partition("+")[0]


def _adapted(tensors: Mapping[str, torch.Tensor], adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors to which a LoRA adapter adds alpha / r B A, rounded to their dtype."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    result = {}
    for name, a in factors.items():
        if ".lora_A." in name:
            b = factors[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            change = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
            result[target] = (tensors[target].double() + change).to(tensors[target].dtype)
    return result


def documents(recipe: Path) -> list[dict[str, Any]]:
    """The documents of a recipe."""
    return list(yaml.safe_load_all(recipe.read_text()))


def expected(
    recipe: Path, folder: Path, tokens: Callable[[], list[str | None]], stacked: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a recipe's output, with their names.

    Args:
        recipe: The file. Stages that have a name come before those that use them.
        folder: Where its paths start.
        tokens: Gives the tokens of the output, a row each, if the recipe chooses a tokenizer;
            None stands for a row without a token.
        stacked: Whether the experts of a mixture are merged as one tensor.
    """
    models = Models(folder, stacked)
    *stages, last = documents(recipe)
    for stage in stages:
        dtype = getattr(torch, stage.get("out_dtype") or stage["dtype"])
        made = {
            n: torch.from_numpy(t.merged()[0]).to(dtype) for n, t in _merged(stage, models, tokens)
        }
        models.add(stage["name"], made)
    yield from _merged(last, models, tokens)


class Place(NamedTuple):
    """Where a tensor of the output comes from.

    Attributes:
        output: Its name.
        part: The slice.
        sources: The slice's sources, the base among them.
        names: The tensor's name in each source.
        at: How far into the slice it lies, 0 to 1.
    """

    output: str
    part: dict[str, Any]
    sources: list[dict[str, Any]]
    names: list[str]
    at: float


def _places(recipe: dict[str, Any], models: Models) -> Iterator[Place]:
    """All tensors of the output, module by module and slice by slice."""
    for module, definition in recipe.get("modules", {"default": recipe}).items():
        parts = definition.get("slices") or [{"sources": definition["models"]}]
        prefix, written = MODULES.get(module, ""), 0
        for number, part in enumerate(parts):
            is_ends = number == 0, number == len(parts) - 1
            written += yield from _slice(recipe, models, part, prefix, written, is_ends)


def _slice(
    recipe: dict[str, Any],
    models: Models,
    part: dict[str, Any],
    prefix: str,
    written: int,
    is_ends: tuple[bool, bool],
) -> Generator[Place, None, int]:
    """The tensors of one slice, and how many layers it has.

    Args:
        recipe: The recipe.
        models: Its models.
        part: The slice.
        prefix: Of the names of the module's tensors.
        written: How many layers came before.
        is_ends: Whether it is the first, and the last: these have what lies outside layers.
    """
    sources = list(part["sources"])
    base = recipe.get("base_model")
    if base and base not in [s["model"] for s in sources]:
        sources.append({"model": base})
    names = [n for n in models.tensors(sources[0]["model"]) if n.startswith(prefix)]
    layers: dict[str, int] = {}
    for name in names:
        if found := LAYER.fullmatch(name):
            layers[found[1]] = max(layers.get(found[1], 0), int(found[2]) + 1)
    start, stop = 0, 0
    for name in names:
        found = LAYER.fullmatch(name)
        if found is None:
            if is_ends[0 if name.endswith(HEADS[0]) else 1]:
                yield Place(name, part, sources, [name] * len(sources), 0.0)
            continue
        start, stop = sources[0].get("layer_range", (0, layers[found[1]]))
        if start <= int(found[2]) < stop:
            step = int(found[2]) - start
            starts = [s.get("layer_range", (0,))[0] for s in sources]
            its = [f"{found[1]}{first + step}{found[3]}" for first in starts]
            at = step / (stop - start - 1) if stop - start > 1 else 0.0
            yield Place(f"{found[1]}{written + step}{found[3]}", part, sources, its, at)
    return stop - start


def _value(value: Any, name: str, at: float) -> Any:
    """What a setting says of one tensor; None if none of its filters matches."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for choice in value:
            pattern = choice.get("filter")
            if pattern in (None, "*") or pattern in name:
                return _value(choice["value"], name, at)
        return None
    if isinstance(value, list):
        return float(np.interp(at * (len(value) - 1), np.arange(len(value)), value))
    return value


def _settings(recipe: dict[str, Any], place: Place, tasks: list[int]) -> dict[str, Any]:
    """The settings that hold for one tensor: a list of one for each task where sources differ."""
    levels = [
        (place.sources[i].get("parameters", {}), place.part.get("parameters", {})) for i in tasks
    ]
    shared = recipe.get("parameters", {})
    result: dict[str, Any] = {}
    for key in {k for pair in levels for level in pair for k in level} | set(shared):
        values = []
        for pair in levels:
            found = [
                _value(level[key], place.output, place.at)
                for level in (*pair, shared)
                if key in level
            ]
            values.append(next((v for v in found if v is not None), None))
        given = [v for v in values if v is not None]
        if len(given) == len(values):
            result[key] = values
        elif given:
            raise ValueError(f"{place.output}: {key} is not given for every model")
    booleans = {k: v[0] for k, v in result.items() if isinstance(v[0], bool)}
    return result | booleans


def _merged(
    recipe: dict[str, Any], models: Models, tokens: Callable[[], list[str | None]]
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of one stage."""
    method = recipe["merge_method"]
    base = None if method in WITHOUT_BASE else recipe.get("base_model")
    chooses = "tokenizer" in recipe or "tokenizer_source" in recipe
    for place in _places(recipe, models):
        sources = [s["model"] for s in place.sources]
        stored = [models.tensors(s)[n] for s, n in zip(sources, place.names, strict=True)]
        dtype = getattr(torch, recipe["dtype"]) if "dtype" in recipe else _common(stored)
        arrays = [t.to(dtype).double().numpy() for t in stored]
        rows = None
        if chooses and place.output.endswith(HEADS):
            rows = tokens()
            arrays = _rows(recipe, models, sources, arrays, rows)
        tasks = [i for i, s in enumerate(sources) if s != base]
        settings = _settings(recipe, place, tasks)
        unit = UNITS[str(dtype).removeprefix("torch.")]
        own = arrays[sources.index(base)] if base in sources else None
        yield (
            place.output,
            Tensor(method, Inputs(own, [arrays[i] for i in tasks], settings, unit), rows),
        )


def _common(tensors: list[torch.Tensor]) -> torch.dtype:
    """The dtype to which tensors are promoted."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _rows(
    recipe: dict[str, Any],
    models: Models,
    sources: list[str],
    arrays: list[Array],
    tokens: list[str | None],
) -> list[Array]:
    """Each model's embedding with the rows of the output's tokens."""
    numbers = [vocabulary(models.path(s)) for s in sources]
    base = recipe.get("base_model")
    choices = (recipe.get("tokenizer") or {}).get("tokens") or {}
    result = [np.zeros((len(tokens), arrays[0].shape[1])) for _ in sources]
    known_rows = [i for i, token in enumerate(tokens) if token is not None]
    for row in known_rows:
        token = tokens[row]
        own = [
            a[n[token]] if token in n and n[token] < len(a) else None
            for n, a in zip(numbers, arrays, strict=True)
        ]
        choice = choices.get(token)
        known = [v for v in own if v is not None]
        if choice is not None and "source" in choice:
            fallback = _chosen(choice["source"], token, sources, numbers, arrays)
        elif base in sources and own[sources.index(base)] is not None:
            fallback = own[sources.index(base)]
        else:
            fallback = sum(known) / len(known) if known else np.zeros(arrays[0].shape[1])
        is_forced = choice is not None and choice.get("force", False)
        for values, value in zip(result, own, strict=True):
            values[row] = fallback if value is None or is_forced else value
    for values in result:  # padding
        values[len(known_rows) :] = values[known_rows].mean(axis=0)
    return result


def _chosen(
    source: Any,
    token: str,
    sources: list[str],
    numbers: list[dict[str, int]],
    arrays: list[Array],
) -> Array:
    """The embedding that a recipe names for a token."""
    if isinstance(source, str):
        source = {"kind": "model_token", "model": source, "token": token}
    if source["kind"] == "zero":
        return np.zeros(arrays[0].shape[1])
    at = sources.index(source["model"])
    number = source.get("token_id", numbers[at].get(source.get("token", token)))
    return arrays[at][number]
