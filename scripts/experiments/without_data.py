"""How near a precision made without data comes to root-GGN on real held-out text.

    python scripts/experiments/without_data.py -o runs/without-data
    python scripts/experiments/without_data.py -o runs/without-data --sizes 2.1M --removal
    python scripts/experiments/without_data.py -o runs/without-data --sizes 2.1M --addition

Bases of real text as in the experiment on removal (detox_world.py) are trained at several sizes.
Each gets a reference, root-GGN on one half of a held-out text of the same kinds, and precisions by
every estimator on the other half, by root-GGN on other text, on text that it writes, and on uniform
tokens. The second root-GGN, of other rows and seed, is what any of them could reach. Precisions are
compared per observation. With `--removal` each is the base's precision of a removal; the fine-tune
has one of the same estimator on its own text. With `--addition` two fine-tunes on text that no base
has seen are added, by precisions that are made alike of all models. Whatever lies in the work
folder is used as it is.
"""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detox_world import (
    CONTEXT,
    DATA,
    SIZES,
    World,
    train_bases,
    write_texts,
    write_tokenizer,
)
from numpy.typing import NDArray
from real_merges import (
    ADDED,
    KEPT,
    TUNED,
    Documents,
    Kind,
    add,
    documents,
    make_permuted,
    make_precision,
    subtract,
    tuned_on,
    write_added,
)

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.metrics.paired import paired_ratio_change
from mergekit_bayes.posterior import open_posterior
from scripts.train_tiny_lm import read_texts

WIDTHS = {"0.3M": 48, "2.1M": 192, "8M": 416}
REFERENCE = "root-GGN, held-out text"
CONTROL = f"{REFERENCE}, one number a tensor"
CEILING = "root-GGN, other held-out rows and seed"
BASE = "base"
UNIFORM = "task arithmetic"
# Of task arithmetic alone. At the second one it is the merge with one number for all precisions.
LOWER = (0.8, 2 / (1 + len(ADDED)), 0.5, 0.4)
PERMUTED = f"{REFERENCE}, entries permuted in each tensor"

Tensors = dict[str, NDArray[np.float64]]
Made = tuple[Kind, Path]


def kinds(rows: int) -> tuple[Kind, ...]:
    """All ways, of which the first is the reference, with this number of rows each."""
    other: dict[str, Any] = {"data": "held-out-1", "seed": 1}
    return (
        Kind(REFERENCE, {"data": "held-out-0", "seed": 0}),
        Kind(CEILING, other),
        Kind("Fisher, the same rows", other, "fisher"),
        Kind("empirical Fisher, the same rows", other, "fisher-empirical"),
        Kind("IVON, the same rows", other, "ivon"),
        Kind("root-GGN, novels", {"data": "other-text", "seed": 1}),
        Kind(f"root-GGN, {rows} self-generated", {"self_generated": rows, "seed": 1}),
        Kind(f"root-GGN, {rows // 4} self-generated", {"self_generated": rows // 4, "seed": 1}),
        Kind(
            f"root-GGN, {rows * (CONTEXT - 1):,} random tokens",
            {"random_tokens": rows * (CONTEXT - 1), "seed": 1},
        ),
        Kind(
            f"root-GGN, {rows // 8 * (CONTEXT - 1):,} random tokens",
            {"random_tokens": rows // 8 * (CONTEXT - 1), "seed": 1},
        ),
    )


def world_at(folder: Path) -> World:
    """The work folder of one size, which its name says."""
    return World(folder, replace(SIZES["small"], width=WIDTHS[folder.name]))


def write_held_out(world: World) -> None:
    """Two halves of text that neither the base nor a loss of the removal has seen, and novels.

    Comments, yelp sentences and toxic comments, each about as often as the base read them.
    """
    size = world.size

    def rest(name: str, where: str, skip: int) -> list[str]:
        texts = [read_texts(f"{DATA / name}/{part}.jsonl.gz{where}") for part in ("valid", "test")]
        return texts[0] + texts[1][skip:]

    comments = rest("lm/comments", "", size.rows)
    yelp = rest("sentiment/yelp", "", size.rows)[: round(2.28 * len(comments))]
    toxic = rest("toxicity/civil", "?label=1", size.rows // 2)
    rows = comments + yelp + toxic
    random.Random(0).shuffle(rows)
    novels = read_texts(f"{DATA}/lm/novels/valid.jsonl.gz")
    texts = {"held-out-0": rows[::2], "held-out-1": rows[1::2], "other-text": novels}
    for name, chosen in texts.items():
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen)
        Path(world.rows(name)).write_text("".join(lines))


def make_base(world: World, seed: int) -> Path:
    """A base with its texts and tokenizer, unless they are there."""
    if not Path(world.rows("base")).exists():
        write_texts(world)
    if not Path(world.rows("held-out-0")).exists():
        write_held_out(world)
    if not world.tokenizer.exists():
        write_tokenizer(world)
    if not world.base(seed).exists():
        train_bases(world, "base", seed)
    return world.base(seed)


def per_observation(model: Path, precision: Path) -> Tensors:
    """The tensors of a precision, for one observation."""
    with open_posterior(str(model), precision=str(precision)) as posterior:
        source, info = posterior.precision, posterior.info
        assert source is not None
        assert info is not None
        count = info.observations
        return {n: read_tensor(source, n).astype(float) / count for n in source.specs}


def compare(one: Tensors, reference: Tensors) -> dict[str, float]:
    """Rank correlations and ratios of a precision with the reference.

    Returns:
        `rank` and `ratio` (median) over all entries; `within`, `within_least` the median and the
        least rank correlation of the tensors; `ratio_least`, `ratio_most` of the tensors' medians.
        Ratios are those of entries that both give more than zero.
    """
    ranks, ratios = [], []
    for name, tensor in one.items():
        rank = rank_correlation(tensor, reference[name])
        if rank is not None:
            ranks.append(rank)
        ratios.append(_ratios(tensor, reference[name]))
    every = [np.concatenate([t[n].ravel() for n in reference]) for t in (one, reference)]
    rank = rank_correlation(*every)
    assert rank is not None
    medians = [float(np.median(r)) for r in ratios if r.size]
    return {
        "rank": rank,
        "ratio": float(np.median(np.concatenate(ratios))),
        "within": float(np.median(ranks)),
        "within_least": min(ranks),
        "ratio_least": min(medians),
        "ratio_most": max(medians),
    }


def _ratios(one: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    both = (one > 0) & (reference > 0)
    return one[both] / reference[both]


def precisions_to_subtract(world: World, seed: int, one: Made, rows: int) -> dict[Path, Path]:
    """This precision of a base, and one of the fine-tune that is subtracted.

    That is by the same estimator on its own text, which whoever removes something has at hand.
    """
    kind, precision = one
    tuned = tuned_on(world, TUNED, seed)
    own = Kind("", {"data": TUNED, "seed": 0}, kind.estimator)
    out = precision.parent / f"tuned-{kind.estimator}"
    return {
        world.base(seed): precision,
        tuned: make_precision(world, tuned, own, rows, out),
    }


def precisions_to_add(world: World, seed: int, one: Made, rows: int) -> dict[Path, Path]:
    """This precision of a base, and those of the fine-tunes that are added, of the same kind.

    Their own training text takes the place of the base's held-out text.
    """
    kind, precision = one
    found = {world.base(seed): precision}
    write_added(world)
    for text in ADDED:
        tuned = tuned_on(world, text, seed)
        out = precision.parent / f"{text}-{precision.name}"
        found[tuned] = make_precision(world, tuned, kind.of_text(text), rows, out)
    return found


def remove(world: World, seed: int, made: Sequence[Made], rows: int) -> dict[str, Any]:
    """A removal with each precision of the base, and by task arithmetic."""
    tuned_on(world, TUNED, seed)
    found: dict[str, Any] = {UNIFORM: subtract(world, seed, None)}
    for one in made:
        precisions = precisions_to_subtract(world, seed, one, rows)
        label = one[0].label
        if label == REFERENCE:
            found[CONTROL] = subtract(world, seed, precisions, "tensor")
        found[label] = subtract(world, seed, precisions)
        print(label, found[label], file=sys.stderr, flush=True)
    return found


def add_each(world: World, seed: int, made: Sequence[Made], rows: int) -> dict[str, Documents]:
    """What is read after an addition with each precision, and with the controls."""
    write_added(world)
    for text in ADDED:
        tuned_on(world, text, seed)
    found = {
        BASE: documents(world, world.base(seed), (*ADDED, *KEPT)),
        UNIFORM: add(world, seed, None),
    }
    for scale in LOWER:
        found[f"{UNIFORM} at {scale:.2f}"] = add(world, seed, None, scale=scale)
    for one in made:
        precisions = precisions_to_add(world, seed, one, rows)
        label = one[0].label
        if label == REFERENCE:
            permuted = {
                model: make_permuted(model, place, place.with_name(f"permuted-{place.name}"))
                for model, place in precisions.items()
            }
            found[CONTROL] = add(world, seed, precisions, pool="tensor")
            found[PERMUTED] = add(world, seed, permuted)
        found[label] = add(world, seed, precisions)
        print(label, file=sys.stderr, flush=True)
    return found


def measure(world: World, seed: int, rows: int, merges: Sequence[str]) -> Path:
    """All numbers of one base, in files that an earlier run may have written."""
    model = make_base(world, seed)
    folder = world.work / f"precisions-{seed}"
    folder.mkdir(exist_ok=True)
    made = [
        (kind, make_precision(world, model, kind, rows, folder / str(i)))
        for i, kind in enumerate(kinds(rows))
    ]
    compared = folder / "compared.json"
    if not compared.exists():
        reference = per_observation(model, made[0][1])
        found = {}
        for kind, precision in made[1:]:
            found[kind.label] = compare(per_observation(model, precision), reference)
            print(kind.label, found[kind.label], file=sys.stderr, flush=True)
        compared.write_text(json.dumps(found, indent=1) + "\n")
    for name in merges:
        file = folder / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(MERGES[name](world, seed, made, rows), indent=1) + "\n")
    return folder


def _cell(values: Sequence[float], digits: str) -> str:
    """Mean of the seeds, with the least and the greatest."""
    mean, least, most = (format(float(f(values)), digits) for f in (np.mean, min, max))
    return mean if len(values) == 1 else f"{mean} [{least}, {most}]"


def _paid(nats: float | None) -> str:
    return "not reached" if nats is None else f"{nats:+.4f}"


def table(folders: Sequence[Path], size: str) -> str:
    """The comparison of one size over its seeds."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for folder in folders:
        for label, numbers in json.loads((folder / "compared.json").read_text()).items():
            found[label].append(numbers)
    lines = [
        f"| {size}, seeds: {len(folders)} | rank correlation, all entries | within a tensor, "
        "median | least | median ratio, all entries | of a tensor, least and most |",
        "| --- | --- | --- | ---: | --- | --- |",
    ]
    for label, seeds in found.items():
        column = {name: [numbers[name] for numbers in seeds] for name in seeds[0]}
        least, most = min(column["ratio_least"]), max(column["ratio_most"])
        cells = (
            _cell(column["rank"], ".3f"),
            _cell(column["within"], ".3f"),
            format(min(column["within_least"]), ".2f"),
            _cell(column["ratio"], ".2f"),
            f"{least:.2g} to {most:.2g}",
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def removal_table(folders: Sequence[Path], size: str) -> str:
    """What the removals of one size cost, seed by seed."""
    found = [json.loads((folder / "removed.json").read_text()) for folder in folders]
    lines = [f"| {size}, precision | {' | '.join(KEPT.values())} |", "| --- | --- | --- |"]
    for label in found[0]:
        cells = [
            " / ".join(_paid(row[label] and row[label][name]) for row in found) for name in KEPT
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def addition_table(folders: Sequence[Path], size: str) -> str:
    """What the additions of one size change, with 95 % intervals from resampling documents.

    The rows of the base and of task arithmetic are nats a token, the others differences from task
    arithmetic, over all seeds. The last two columns are of what was added, both texts together: how
    much less it loses than task arithmetic does on straight lines between the scales, where clean
    comments lose as much (mean, least and greatest of the seeds), and the difference from the
    reference.
    """
    found = [json.loads((folder / "added.json").read_text()) for folder in folders]

    def summed(label: str, texts: Sequence[str], count: str) -> NDArray[np.float64]:
        seeds = [[n for text in texts for n in seed[label][text][count]] for seed in found]
        return np.sum(seeds, axis=0)

    def change(label: str, other: str, texts: Sequence[str]) -> str:
        before, after = summed(other, texts, "nats"), summed(label, texts, "nats")
        sizes = summed(label, texts, "tokens")
        value = paired_ratio_change(before, after, sizes, bootstrap=1000, seed=0)
        return f"{value.value:+.4f} [{value.low:+.4f}, {value.high:+.4f}]"

    def gain(seed: Mapping[str, Documents], label: str) -> float:
        def loss(label: str, texts: Sequence[str]) -> float:
            nats, tokens = (sum(sum(seed[label][t][n]) for t in texts) for n in _COUNTS)
            return nats / tokens

        kept, both = tuple(KEPT)[:1], tuple(ADDED)
        scaled = [BASE, UNIFORM, *(f"{UNIFORM} at {scale:.2f}" for scale in LOWER)]
        curve = sorted((loss(name, kept), loss(name, both)) for name in scaled if name in seed)
        return float(np.interp(loss(label, kept), *zip(*curve, strict=True))) - loss(label, both)

    texts = (*ADDED, *KEPT)
    lines = [
        f"| {size}, seeds: {len(found)} | {' | '.join((*ADDED, *KEPT.values()))} | added, gain at "
        "equal clean comments | added, less the reference |",
        "| --- |" + " ---: |" * (len(texts) + 2),
    ]
    for label in found[0]:
        cells = [change(label, UNIFORM, [text]) for text in texts]
        if label in (BASE, UNIFORM):
            sums = {text: [summed(label, [text], n).sum() for n in _COUNTS] for text in texts}
            cells = [f"{nats / tokens:.4f}" for nats, tokens in sums.values()]
        cells += [
            ""
            if label.startswith((BASE, UNIFORM))
            else _cell([gain(s, label) for s in found], ".3f"),
            "" if label == REFERENCE else change(label, REFERENCE, tuple(ADDED)),
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


_COUNTS = ("nats", "tokens")
MERGES = {"removed": remove, "added": add_each}


def main() -> None:
    """Measure the sizes and seeds of the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/without-data"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(WIDTHS), default=list(WIDTHS)[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=1000)
    merges = {"removal": ("removed", removal_table), "addition": ("added", addition_table)}
    for flag in merges:
        parser.add_argument(f"--{flag}", action="store_true")
    chosen = parser.parse_args()
    wanted = dict(merge for flag, merge in merges.items() if getattr(chosen, flag))
    torch.set_num_threads(1)
    for name in chosen.sizes:
        world = world_at(chosen.out / name)
        world.work.mkdir(parents=True, exist_ok=True)
        folders = [measure(world, seed, chosen.rows, tuple(wanted)) for seed in chosen.seeds]
        for shown in (table, *wanted.values()):
            print(shown(folders, name))


if __name__ == "__main__":
    main()
