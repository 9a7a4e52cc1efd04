"""Compares what bmerge and mergekit make of a recipe, tensor by tensor, and judges it.

Distances are in roundings: of a tensor whose entries, and those of the tensors it is made of, are
at most s in size, one rounding is 2^-24 s in float32, 2^-8 s in bfloat16 and 2^-11 s in float16,
for the coarsest dtype that the recipe works in or writes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit_expected import UNITS, Tensor, documents, expected, load, vocabulary
from mergekit_random import Explained, Share, explain
from mergekit_recipes import Recipe
from mergekit_rules import RANDOM, Array

FLOAT32 = 16  # roundings that a sum over a tensor may be off in float32
COARSE = 2  # in 16 bits: one step of the last place of the largest entry
OTHER_NUMBERS = "other token numbers"  # mergekit numbers added tokens anew in each run
DEVIATIONS = 4.5  # of a number of kept entries
CONFIG = ("architectures", "model_type", "num_hidden_layers", "hidden_size", "vocab_size")
CONFIG += ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "layer_types")

Tensors = dict[str, torch.Tensor]


def compare(recipe: Recipe, folder: Path, ours: Path | None, theirs: Path | None) -> dict[str, Any]:
    """The distances between both outputs, and of each from the restatement in float64.

    Args:
        recipe: The recipe.
        folder: Where its paths start.
        ours: What bmerge wrote; None if it wrote nothing.
        theirs: What mergekit wrote; None if it wrote nothing.
    """
    outputs = {name: path for name, path in (("ours", ours), ("mergekit", theirs)) if path}
    result = _Distances(_coarsest(documents(recipe.file)[-1]))
    if recipe.experts == "apart":
        for side, path in outputs.items():
            _add_all(result, recipe, folder, {side: path}, stacked=side == "mergekit")
    else:
        _add_all(result, recipe, folder, outputs, stacked=True)
    record = result.record()
    if ours and theirs:
        record["files"] = _differing_files(ours, theirs)
    return record


def _add_all(
    result: "_Distances", recipe: Recipe, folder: Path, outputs: dict[str, Path], stacked: bool
) -> None:
    """Add all tensors of some outputs to the distances."""
    sides = {side: (path, load(path, stacked)) for side, path in outputs.items()}
    reference, its = sides.get("mergekit") or sides["ours"]
    names = set()
    try:
        for name, tensor in expected(
            recipe.file, folder, lambda: row_tokens(reference, its), stacked
        ):
            names.add(name)
            arrays = {s: _in_order(path, t, name, tensor) for s, (path, t) in sides.items()}
            result.add(name, tensor, {s: a for s, a in arrays.items() if a is not None})
    except ValueError as error:
        result.wrong.append(str(error))
    for side, (_, tensors) in sides.items():
        if missing := sorted(names - set(tensors)):
            result.wrong.append(f"{side} lacks {len(missing)} tensors, such as {missing[0]}")
        if extra := sorted(set(tensors) - names):
            result.wrong.append(f"{side} has {len(extra)} more tensors, such as {extra[0]}")


def row_tokens(folder: Path, tensors: Tensors) -> list[str | None]:
    """The tokens of an embedding's rows; None for a row without one."""
    rows = next(len(t) for n, t in tensors.items() if n.endswith("embed_tokens.weight"))
    result: list[str | None] = [None] * rows
    for token, number in vocabulary(folder).items():
        if number < rows:
            result[number] = token
    return result


def _in_order(path: Path, tensors: Tensors, name: str, tensor: Tensor) -> Array | None:
    """One output's tensor; rows of tokens in the order of the restatement."""
    if name not in tensors:
        return None
    values: Array = tensors[name].double().numpy()
    if tensor.tokens is None:
        return values
    numbers = vocabulary(path)
    known = [t for t in tensor.tokens if t is not None]
    if any(numbers.get(t, len(values)) >= len(values) for t in known):
        return None
    rows = [numbers[t] for t in known]
    return np.concatenate([values[rows], np.delete(values, rows, axis=0)])


def _coarsest(recipe: dict[str, Any]) -> float:
    """The larger relative rounding of the dtypes that a recipe names; 0 if it names none."""
    return max(UNITS.get(recipe.get(key, ""), 0.0) for key in ("dtype", "out_dtype"))


class _Distances:
    """Gathers distances over the tensors of an output."""

    def __init__(self, unit: float) -> None:
        self.unit = unit
        self.between = (0.0, 0.0, "")  # largest: roundings, absolute, tensor
        self.far: dict[str, float] = {}  # largest of each side from float64, in roundings
        self.squares: dict[str, list[float]] = {}
        self.unsure = 0
        self.otherwise = 0  # of the unsure entries, those in which both differ
        self.unexplained = 0
        self.shares: dict[str, Share] = {}
        self.wrong: list[str] = []

    def add(self, name: str, tensor: Tensor, outputs: dict[str, Array]) -> None:
        """Add one tensor."""
        x = tensor.inputs
        sizes = [np.abs(t).max() for t in (*x.models, *([] if x.base is None else [x.base]))]
        self.unit = max(self.unit, x.unit)
        if tensor.method in RANDOM:
            self._add_random(tensor, outputs, max(sizes))
            return
        value, unsure = tensor.merged()
        # bmerge works in float32 whatever the models' dtype: less is unsure there.
        sure = {"mergekit": ~unsure, "ours": ~tensor.with_unit(UNITS["float32"]).merged()[1]}
        shapes = {side: o.shape for side, o in outputs.items() if o.shape != value.shape}
        if shapes:
            self.wrong.append(f"{name} has shape {shapes}, expected {value.shape}")
            return
        scale = max(*sizes, np.abs(value).max())
        self.unsure += int(unsure.sum())
        for side, output in outputs.items():
            self._add_far(side, (output - value)[sure[side]] / scale)
        if len(outputs) == 2:
            distance = np.abs(outputs["ours"] - outputs["mergekit"])
            self.otherwise += int(np.sum((distance / scale > COARSE * self.unit) & unsure))
            most = float(np.max(distance[~unsure], initial=0.0))
            self.between = max(self.between, (most / scale / self.unit, most, name))

    def _add_far(self, side: str, relative: Array) -> None:
        far = np.abs(relative) / self.unit
        self.far[side] = max(self.far.get(side, 0.0), float(np.max(far, initial=0.0)))
        self.squares.setdefault(side, []).append(float(np.mean(far**2)) if far.size else 0.0)

    def _add_random(self, tensor: Tensor, outputs: dict[str, Array], scale: float) -> None:
        for side, output in outputs.items():
            draws: Explained | None = explain(tensor, output)
            if draws is None:
                self.unexplained += 1
                continue
            self._add_far(side, (output - draws.value) / max(scale, np.abs(output).max()))
            self.shares[side] = self.shares.get(side, Share()).add(draws)

    def record(self) -> dict[str, Any]:
        """What goes into the table."""
        roundings, absolute, name = self.between
        return {
            "unit": self.unit,
            "between": {"roundings": roundings, "absolute": absolute, "tensor": name},
            "far": self.far,
            "rms": {side: float(np.mean(s)) ** 0.5 for side, s in self.squares.items()},
            "unsure": self.unsure,
            "otherwise": self.otherwise,
            "unexplained": self.unexplained,
            "shares": {s: [*share, share.deviations] for s, share in self.shares.items()},
            "wrong": self.wrong,
        }


def verdict(record: dict[str, Any]) -> str:
    """What the distances say; starts with "differs" if something is wrong."""
    if record["wrong"]:
        return f"differs: {record['wrong'][0]}"
    bound = FLOAT32 if record["unit"] < 2.0**-20 else COARSE
    far = record["far"]
    if record["shares"]:
        for side, (*_, deviations) in record["shares"].items():
            if abs(deviations) > DEVIATIONS:
                return f"differs: {side} keeps {deviations:+.1f} standard deviations too many"
        sides = [s for s in far if far[s] > bound]
        return f"differs: {', '.join(sides)} not explained by any draws" if sides else "same rule"
    if len(far) < 2:
        ((side, distance),) = far.items()
        return f"{side} {'as' if distance <= bound else 'differs: not as'} restated"
    rms = record["rms"]
    if bound == COARSE:
        first, second = (rms[s] for s in ("ours", "mergekit"))
        which = "bmerge" if first < second else "mergekit"
        closer = "" if first == second else f", {which} closer to float64"
    else:
        closer = ""
    if not record["between"]["tensor"]:
        wrong = [s for s in far if far[s] > bound]
        return f"differs: {', '.join(wrong)} not as restated" if wrong else "both as restated"
    if record["between"]["roundings"] <= bound and far["ours"] <= bound:
        return "same" + closer
    if far["ours"] <= bound < far["mergekit"]:
        return f"mergekit is off{closer}"
    return f"differs: {record['between']['tensor']}"


def _differing_files(ours: Path, theirs: Path) -> list[str]:
    """Which settings of the written models differ, beside their tensors."""
    result = []
    configs = [json.loads((path / "config.json").read_text()) for path in (ours, theirs)]
    for key in CONFIG:
        mine, other = (config.get(key) for config in configs)
        if mine != other:
            result.append(f"config.json: {key} is {mine}, mergekit's {other}")
    dtypes = [c.get("dtype") or c.get("torch_dtype") for c in configs]
    if dtypes[0] != dtypes[1]:
        result.append(f"config.json: dtype is {dtypes[0]}, mergekit's {dtypes[1]}")
    words = [vocabulary(p) if (p / "tokenizer.json").exists() else None for p in (ours, theirs)]
    if words[0] != words[1]:
        same = words[0] is not None and words[1] is not None and set(words[0]) == set(words[1])
        result.append("tokenizer.json: " + (OTHER_NUMBERS if same else "other tokens"))
    texts = [_text(path / "chat_template.jinja") for path in (ours, theirs)]
    if texts[0] != texts[1]:
        result.append("chat_template.jinja differs")
    return result


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
