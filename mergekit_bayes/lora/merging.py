"""Merge adapters of one base into an adapter.

    product   dW = sum_t c_t s_t B_t A_t                              weights uniform: task arithmetic
              dW = sum_t c_t S_t dW_t / sum_t c_t S_t  per entry      weights precision, S_t = 1 / (V_W + floor)
              cut to rank R by SVD
    concat    B = [c_1 s_1 B_1, ...], A = [A_1; ...]                  task arithmetic, exact, rank sum_t r_t
    factor    the factors themselves, where that means something

A pair of factors is known only up to an invertible matrix, `B A = (B R)(R^-1 A)`, so that an average of factors is in
general no average of what they do. It is where one factor is the same in all adapters (the change is then linear in the
other), and near it where all runs started from one A.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergekit_bayes import __version__
from mergekit_bayes.checkpoint import sources
from mergekit_bayes.checkpoint.codec import encode, read_tensor
from mergekit_bayes.checkpoint.names import Renaming, find_renaming
from mergekit_bayes.checkpoint.replacing import refuse_foreign, replacing
from mergekit_bayes.checkpoint.side_files import copy_side_files
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import Array, TensorSpec
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.lora.adapter import CONFIG, PREFIX, WEIGHTS, Adapter, Factors, open_adapter
from mergekit_bayes.lora.dense import VARIANCE_FLOOR, Product, change, variance
from mergekit_bayes.lora.factors import (
    AdapterMerge,
    Space,
    WeighedLayer,
    Weights,
    as_stored,
    is_linear,
    merge_factors,
)
from mergekit_bayes.lora.truncate import Truncated, truncate_dense, truncate_product
from mergekit_bayes.lora.whole import SAME, average_whole, check_whole
from mergekit_bayes.recipes import recipe_text
from mergekit_bayes.records import Config

_REPORT, _RECIPE = "merge_report.json", "merge_recipe.yaml"
_BLOCK = 1 << 22  # entries of a dense layer that are weighed at a time
_FORMULA = {
    ("product", "uniform"): "dW = sum_t c_t s_t B_t A_t, cut to rank R",
    (
        "product",
        "precision",
    ): "dW = sum_t c_t S_t s_t B_t A_t / sum_t c_t S_t, S_t = 1 / (V_W + floor), cut to rank R",
    ("concat", "uniform"): "B = [c_1 s_1 B_1, ...], A = [A_1; ...]",
    (
        "factor",
        "uniform",
    ): "shared factor: sum_t c_t of the other; one start: sum_t c_t / sum_t c_t of each",
    (
        "factor",
        "precision",
    ): "shared factor: sum_t c_t S_t / sum_t c_t S_t of the other; one start: of each",
}


class MergedLayer(Config):
    """One layer of a merged adapter.

    Attributes:
        norm: Frobenius norm of the merged change.
        error: How far what is stored is from it, relative to `norm`: what the rank cuts off
            (product), rounding (concat, shared factor), or the cross terms of averaged factors (one
            start).
        adapters: How many of the adapters hold the layer.
    """

    norm: float
    error: float
    adapters: int


class AdapterReport(Config):
    """What a merge of adapters did.

    `counts` are the observations that each adapter's precision stood for, `whole` the tensors that
    the adapters hold beside their factors and what became of them.
    """

    version: str = __version__
    path: str
    space: Space
    weights: Weights
    formula: str
    adapters: tuple[str, ...]
    scales: tuple[float, ...]
    counts: tuple[float | None, ...]
    rank: int
    largest_error: float
    layers: dict[str, MergedLayer]
    whole: dict[str, str]
    notes: tuple[str, ...]


def merge_adapters(
    adapters: Sequence[str],
    out: Path,
    *,
    scales: Sequence[float] = (1.0,),
    weights: Weights = "uniform",
    space: Space = "product",
    rank: int | None = None,
    counts: Literal["equal", "recorded"] = "equal",
    precision: Mapping[str, str] | None = None,
    identities: Mapping[str, str] | None = None,
    precision_identities: Mapping[str, str] | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> AdapterReport:
    """Merge LoRA adapters of one base into one PEFT adapter folder, layer by layer.

    Args:
        adapters: Folders or Hub ids.
        out: The folder to write; it appears whole or not at all.
        scales: One for all or one per adapter. With uniform weights they multiply changes, with
            precision weights they are shares and not negative.
        weights: `uniform` or `precision`, which needs a precision of every adapter.
        space: `product`, `concat` (exact, uniform weights only) or `factor`.
        rank: Of the result in product space; the largest of the adapters' by default. No more than
            needed is used, and the rest is zero.
        counts: `equal` takes all precisions for one number of observations, the smallest on record;
            `recorded` each for its own.
        precision: Another place for an adapter's precision, by the adapter as given.
        identities, precision_identities: What each adapter and its precision must be, as a recipe
            records it.
        seed: Of the SVD of large layers.
        force: Replace `out`.
        progress: Called with (layers done, layers in all).

    Raises:
        CheckpointError: A file that cannot be read, or an output that exists.
        ConfigError: Options that contradict each other, or a kind of adapter that is not read.
        MismatchError: Adapters of different bases or shapes, or factors that no average can be
            taken of.
        PrecisionError: A precision that is missing or of another kind.
    """
    shares = _check_options(adapters, scales, weights, space, rank)
    with ExitStack() as stack:
        opened = []
        for ref in adapters:
            place = (precision or {}).get(ref)
            opened.append(
                open_adapter(
                    ref, precision=place, with_precision=weights == "precision" or space == "factor"
                )
            )
            stack.callback(opened[-1].close)
            kept = (
                (precision_identities or {}).get(ref)
                if opened[-1].posterior.has_precision
                else None
            )
            opened[-1].posterior.check_identity((identities or {}).get(ref), kept)
        if out.suffix == ".safetensors":
            raise ConfigError(f"-o {out}: an adapter is a folder. Name one.")
        refuse_foreign(out)
        if any(out.resolve() in (p := a.posterior.path.resolve(), *p.parents) for a in opened):
            raise CheckpointError(
                f"-o {out} would overwrite an adapter that is merged. Choose another -o."
            )
        notes: list[str] = []
        _check_bases(opened, notes)
        counted = (
            _check_precisions(opened, counts) if weights == "precision" else (None,) * len(opened)
        )
        layers, whole = _match(opened)
        merge = AdapterMerge(opened, shares, counted, weights, seed)
        if space == "factor":
            merge = merge._replace(averaged=not is_linear(merge, layers, notes))
        width = _rank(space, rank, layers)
        partial = stack.enter_context(replacing(out, force=force))
        partial.mkdir()
        fates = check_whole(merge, whole)
        done = _write(merge, space, width, layers, whole, fates, partial, progress)
        _write_config(opened, layers, whole, width, partial)
        copy_side_files(opened[0].posterior.path, partial, but=CONFIG)
        report = AdapterReport(
            path=str(out),
            space=space,
            weights=weights,
            formula=_FORMULA[space, weights],
            adapters=tuple(adapters),
            scales=shares,
            counts=counted,
            rank=width,
            largest_error=max(layer.error for layer in done.values()),
            layers=done,
            whole=fates,
            notes=tuple(notes),
        )
        (partial / _REPORT).write_text(report.model_dump_json(indent=2) + "\n")
        pinned = {a.ref: a.posterior.pinned for a in opened}
        recipe = {
            "models": list(pinned.values()),
            "weights": weights,
            "scale": list(scales),
            "counts": counts,
            "precision": {
                pinned[r]: sources.pinned(place)
                for r, place in (precision or {}).items()
                if r in pinned
            },
            "space": space,
            "rank": rank,
            "identities": {a.posterior.pinned: a.posterior.identity for a in opened},
            "precision_identities": {
                a.posterior.pinned: a.posterior.precision_identity
                for a in opened
                if a.posterior.has_precision
            },
        }
        (partial / _RECIPE).write_text(recipe_text(recipe))
        return report


def _check_options(
    adapters: Sequence[str],
    scales: Sequence[float],
    weights: Weights,
    space: Space,
    rank: int | None,
) -> tuple[float, ...]:
    if not adapters:
        raise ConfigError("a merge of adapters needs at least one.")
    if len(scales) not in (1, len(adapters)):
        raise ConfigError(
            f"--scale: {len(scales)} given for {len(adapters)} adapters. Give one for all, or one "
            "each."
        )
    shares = tuple(map(float, scales)) * (len(adapters) if len(scales) == 1 else 1)
    if not all(np.isfinite(shares)):
        raise ConfigError(f"--scale: {list(shares)} must be finite.")
    if weights == "precision" and (min(shares) < 0 or not sum(shares)):
        raise ConfigError(
            "--weights precision without a base takes the scales for shares: none below zero, not "
            "all zero. To remove "
            "an adapter, fold: `bmerge merge BASE+A BASE+B --base BASE --scale 1 --scale -1`."
        )
    if space == "concat" and weights == "precision":
        raise ConfigError(
            "--space concat is exact task arithmetic and weighs no entries; use --space product."
        )
    if rank is not None and space != "product":
        raise ConfigError(
            f"--rank is for --space product; --space {space} keeps the ranks that the adapters "
            "have."
        )
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank {rank}: expected at least 1.")
    return shares


def _check_bases(adapters: Sequence[Adapter], notes: list[str]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if bool(first.config.get("fan_in_fan_out")) != bool(other.config.get("fan_in_fan_out")):
            raise MismatchError(
                f"'{first.ref}' and '{other.ref}' disagree on fan_in_fan_out in {CONFIG}: they "
                "adapt layers that are "
                "stored in different ways. Were they trained on different models?"
            )
        infos = (first.posterior.info, other.posterior.info)
        known = [info.base.blocks for info in infos if info is not None and info.base is not None]
        if len(set(known)) == 2:
            raise MismatchError(
                f"'{first.ref}' and '{other.ref}' were trained on different weights; their records "
                "say so."
            )
        names = [a.config.get("base_model_name_or_path") for a in (first, other)]
        if len(known) < 2 and names[0] != names[1]:
            notes.append(
                f"'{first.ref}' names the base '{names[0]}', '{other.ref}' '{names[1]}': taken to "
                "be the same"
            )


def _check_precisions(adapters: Sequence[Adapter], counts: str) -> tuple[float | None, ...]:
    for adapter in adapters:
        if adapter.posterior.precision is None:
            raise PrecisionError(
                f"no precision for '{adapter.ref}' (looked for "
                f"'{adapter.posterior.path / 'posterior'}'). Fine-tune it "
                "with IVON, make one with `bmerge precision`, or merge with --weights uniform."
            )
    kinds = {(i.estimator, i.unit): a.ref for a in adapters if (i := a.posterior.info) is not None}
    if len(kinds) > 1:
        (one, ref), (two, other) = list(kinds.items())[:2]
        raise PrecisionError(
            f"precisions of different kinds do not add: '{ref}' has {one[0]} per {one[1]}, "
            f"'{other}' {two[0]} per "
            f"{two[1]}. Make them alike with `bmerge precision`."
        )
    recorded = tuple(a.observations for a in adapters)
    if counts == "recorded":
        return recorded
    common = min((n for n in recorded if n), default=None)
    return tuple(common if n else None for n in recorded)


def _match(
    adapters: Sequence[Adapter],
) -> tuple[dict[str, list[WeighedLayer]], dict[str, list[tuple[int, str]]]]:
    """The layers and the whole tensors under the first adapter's names, with who holds them."""
    layers: dict[str, list[WeighedLayer]] = {}
    whole: dict[str, list[tuple[int, str]]] = {}
    for index, adapter in enumerate(adapters):
        renaming = find_renaming(adapters[0].layers, adapter.layers) if index else Renaming()
        for module, layer in adapter.layers.items():
            parts = layers.setdefault(renaming(module, adapters[0].layers), [])
            there = parts[0].layer if parts else layer
            if (there.rows, there.columns) != (layer.rows, layer.columns):
                raise MismatchError(
                    f"'{module}' changes a weight of [{layer.rows}, {layer.columns}] in "
                    f"'{adapter.ref}' but of "
                    f"[{there.rows}, {there.columns}] in '{adapters[parts[0].owner].ref}'. Were "
                    "they trained on "
                    "different models?"
                )
            parts.append(WeighedLayer(index, layer))
        for name, disk in adapter.whole.items():
            whole.setdefault(renaming(name, adapters[0].whole), []).append((index, disk))
    return layers, whole


def _rank(space: Space, rank: int | None, layers: Mapping[str, Sequence[WeighedLayer]]) -> int:
    ranks = [[part.layer.rank for part in parts] for parts in layers.values()]
    if space == "concat":
        return max(map(sum, ranks))
    return rank or max(map(max, ranks))


def _write(
    merge: AdapterMerge,
    space: Space,
    rank: int,
    layers: Mapping[str, Sequence[WeighedLayer]],
    whole: Mapping[str, Sequence[tuple[int, str]]],
    fates: Mapping[str, str],
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> dict[str, MergedLayer]:
    specs = {}
    for module, parts in layers.items():
        specs[f"{PREFIX}{module}.lora_A.weight"] = TensorSpec("F32", (rank, parts[0].layer.columns))
        specs[f"{PREFIX}{module}.lora_B.weight"] = TensorSpec("F32", (parts[0].layer.rows, rank))
    for name, holders in whole.items():
        specs[PREFIX + name] = merge.adapters[holders[0][0]].posterior.mean.specs[holders[0][1]]
    sink = SafetensorsSink(folder / WEIGHTS, specs, {"format": "pt"})
    done: dict[str, MergedLayer] = {}
    try:
        for module, parts in layers.items():
            found = _merge_layer(merge, space, rank, module, parts)
            for side, factor in zip("AB", found.factors, strict=True):
                sink.write_bytes(
                    f"{PREFIX}{module}.lora_{side}.weight", 0, encode(factor.reshape(-1), "F32")
                )
            done[module] = MergedLayer(norm=found.norm, error=found.error, adapters=len(parts))
            if progress:
                progress(len(done), len(layers))
        for name, holders in whole.items():
            if fates[name] == SAME:
                values = read_tensor(merge.adapters[holders[0][0]].posterior.mean, holders[0][1])
            else:
                values = average_whole(merge, holders)
            sink.write_bytes(
                PREFIX + name, 0, encode(values.reshape(-1), specs[PREFIX + name].dtype)
            )
        sink.close()
        return done
    finally:
        sink.abandon()


def _merge_layer(
    merge: AdapterMerge, space: Space, rank: int, module: str, parts: Sequence[WeighedLayer]
) -> Truncated:
    if space == "factor":
        return merge_factors(merge, rank, parts)
    left, right = merge.stacked(parts)
    if space == "concat":
        return as_stored(Factors(right, left), rank, left, right)
    if merge.weights == "uniform":
        return truncate_product(left, right, rank)
    return truncate_dense(_weighted(merge, parts), rank, merge.seed + zlib.crc32(module.encode()))


def _weighted(merge: AdapterMerge, parts: Sequence[WeighedLayer]) -> Array:
    """`sum c_t S_t dW_t / sum c_t S_t` over the adapters that hold the layer, (d_out, d_in),
    float32.
    """
    layer = parts[0].layer
    held = [(merge.scales[p.owner], *_products(merge, p)) for p in parts if merge.scales[p.owner]]
    merged: Array = np.zeros((layer.rows, layer.columns), np.float32)
    height = max(1, _BLOCK // max(1, layer.columns))
    for start in range(0, layer.rows if held else 0, height):
        rows = slice(start, start + height)
        total: Array = np.zeros((1, layer.columns), np.float32)
        for scale, delta, spread in held:
            strength = np.float32(scale) / (
                spread.left[:, rows].T @ spread.right + np.float32(VARIANCE_FLOOR)
            )
            merged[rows] += strength * (delta.left[:, rows].T @ delta.right)
            total = total + strength
        merged[rows] /= total
    return merged


def _products(merge: AdapterMerge, part: WeighedLayer) -> tuple[Product, Product]:
    """A layer's change and its variance."""
    adapter, layer = merge.adapters[part.owner], part.layer
    factors, variances = adapter.factors(layer), adapter.variances(layer, merge.counts[part.owner])
    if variances is None:
        raise PrecisionError(
            f"no precision for '{layer.a}' of '{adapter.ref}'. Make a full one with `bmerge "
            "precision`, or merge with "
            "--weights uniform."
        )
    return change(factors, layer.scaling), variance(factors, variances, layer.scaling)


def _write_config(
    adapters: Sequence[Adapter],
    layers: Mapping[str, Sequence[WeighedLayer]],
    whole: Mapping[str, object],
    rank: int,
    folder: Path,
) -> None:
    """The first adapter's config with the scaling in the factors: alpha = r, so s = 1."""
    config: dict[str, Any] = dict(adapters[0].config)
    config |= {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    ways = ("exclude_modules", "layers_to_transform", "layers_pattern")
    asked = {
        json.dumps(
            [
                sorted(t) if isinstance(t := a.config.get("target_modules"), list) else t,
                *(a.config.get(way) for way in ways),
            ]
        )
        for a in adapters
    }
    if len(asked) > 1:
        config |= {"target_modules": sorted(layers)} | dict.fromkeys(ways)
    saved = {module for a in adapters for module in a.config.get("modules_to_save") or ()}
    config["modules_to_save"] = sorted(saved) if whole else None
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
