"""How near a precision made without data comes to root-GGN on real held-out text.

    python scripts/experiments/without_data.py -o runs/without-data
    python scripts/experiments/without_data.py -o runs/without-data --sizes 2.1M --removal

Bases of real text as in the experiment on removal (detox_world.py) are trained at several sizes.
Each gets a reference, root-GGN on one half of a held-out text of the same kinds, and precisions by
every estimator on the other half, by root-GGN on other text, on text that it writes, and on uniform
tokens. The second root-GGN, of other rows and seed, is what any of them could reach. Precisions are
compared per observation. With `--removal` each is the base's precision of a removal; the fine-tune
has one of the same estimator on its own text. Whatever lies in the work folder is used as it is.
"""

import argparse
import json
import random
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detox_measure import read_test
from detox_world import (
    CONTEXT,
    DATA,
    SIZES,
    World,
    finetune,
    train_bases,
    write_start,
    write_texts,
    write_tokenizer,
)
from numpy.typing import NDArray

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.correlation import rank_correlation
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig
from mergekit_bayes.precision.run import run_precision
from scripts.train_tiny_lm import read_texts

WIDTHS = {"0.3M": 48, "2.1M": 192, "8M": 416}
REFERENCE = "root-GGN, held-out text"
CONTROL = f"{REFERENCE}, one number a tensor"
CEILING = "root-GGN, other held-out rows and seed"
TUNED = "removed-trained"
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
RISE = 0.2  # nats a token on held-out removed text, at which removals are compared

Tensors = dict[str, NDArray[np.float64]]


class Kind(NamedTuple):
    """A way to make a precision.

    Attributes:
        label: In tables.
        settings: Of `bmerge precision`, whose `data` is the name of a text.
        estimator: Its estimator.
    """

    label: str
    settings: Mapping[str, Any]
    estimator: str = "ggn"


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


def make_precision(world: World, model: Path, kind: Kind, rows: int, out: Path) -> Path:
    """A precision, unless it is there."""
    if not out.exists():
        settings = dict(kind.settings)
        if "data" in settings:
            settings["data"] = world.rows(settings["data"])
        run_precision(
            PrecisionConfig.model_validate(
                {"model": str(model), "output": str(out), "estimator": kind.estimator}
                | {"examples": rows, "max_length": CONTEXT}
                | settings
            ),
            quiet=True,
        )
    return out


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


def losses(world: World, folder: Path) -> dict[str, float]:
    """Nats a token on clean comments, yelp sentences and the removed text, all held out."""
    with quiet_libraries(bars=False):
        loaded = load_model(str(folder))
    found = {}
    for name in ("related", "yelp", TUNED):
        report = read_test(world, loaded, name)
        found[name] = sum(report.document_nats) / sum(report.document_tokens)
    return found


def subtract(
    world: World, seed: int, precisions: Mapping[str, str] | None, pool: str | None = None
) -> dict[str, float] | None:
    """What a removal costs at a rise of `RISE` on the removed text, in nats a token.

    Args:
        world: The experiment.
        seed: Of the base.
        precisions: Of the fine-tune and the base; None is task arithmetic.
        pool: Of the merge.

    Returns:
        The rises on clean comments and yelp sentences, between two scales on straight lines; None
        where no scale reaches the rise.
    """
    base, tuned = str(world.base(seed)), str(world.tuned(TUNED, seed))
    settings: dict[str, Any] = {"weights": "uniform"}
    if precisions is not None:
        settings = {
            "weights": "precision",
            "precision": precisions,
            "shrink": "0.3",
            "observations": {base: "3x"},
            "pool": pool,
        }
    curve = [losses(world, world.base(seed))]
    with tempfile.TemporaryDirectory(dir=world.work) as place:
        for scale in SCALES:
            out = Path(place) / str(scale)
            run_merge(
                MergeConfig.model_validate(
                    {"models": (tuned,), "base": base, "scale": (-scale,), "out": str(out)}
                    | {"posterior": False}
                    | settings
                )
            )
            curve.append(losses(world, out))
            if curve[-1][TUNED] - curve[0][TUNED] >= RISE:
                break
        else:
            return None
    rises = [look[TUNED] - curve[0][TUNED] for look in curve]
    return {
        name: float(
            np.interp(RISE, rises[-2:], [look[name] - curve[0][name] for look in curve[-2:]])
        )
        for name in ("related", "yelp")
    }


def remove(world: World, seed: int, made: Sequence[Made], rows: int) -> dict[str, Any]:
    """A removal with each precision of the base, and by task arithmetic."""
    if not world.tuned(TUNED, seed).exists():
        if not world.start(seed).exists():
            write_start(world, seed, proper=False)
        finetune(world, TUNED, seed)
    tuned = world.tuned(TUNED, seed)
    found: dict[str, Any] = {"task arithmetic": subtract(world, seed, None)}
    for kind, precision in made:
        own = Kind("", {"data": TUNED, "seed": 0}, kind.estimator)
        out = precision.parent / f"tuned-{kind.estimator}"
        make_precision(world, tuned, own, rows, out)
        precisions = {str(tuned): str(out), str(world.base(seed)): str(precision)}
        if kind.label == REFERENCE:
            found[CONTROL] = subtract(world, seed, precisions, "tensor")
        found[kind.label] = subtract(world, seed, precisions)
        print(kind.label, found[kind.label], file=sys.stderr, flush=True)
    return found


def measure(world: World, seed: int, rows: int, *, removal: bool) -> Path:
    """All numbers of one base, in a file that an earlier run may have written."""
    model = make_base(world, seed)
    folder = world.work / f"precisions-{seed}"
    folder.mkdir(exist_ok=True)
    made = [
        (kind, make_precision(world, model, kind, rows, folder / str(i)))
        for i, kind in enumerate(kinds(rows))
    ]
    compared, removed = folder / "compared.json", folder / "removed.json"
    if not compared.exists():
        reference = per_observation(model, made[0][1])
        found = {}
        for kind, precision in made[1:]:
            found[kind.label] = compare(per_observation(model, precision), reference)
            print(kind.label, found[kind.label], file=sys.stderr, flush=True)
        compared.write_text(json.dumps(found, indent=1) + "\n")
    if removal and not removed.exists():
        removed.write_text(json.dumps(remove(world, seed, made, rows), indent=1) + "\n")
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
    lines = [f"| {size}, precision | clean comments | yelp sentences |", "| --- | --- | --- |"]
    for label in found[0]:
        cells = [
            " / ".join(_paid(row[label] and row[label][name]) for row in found)
            for name in ("related", "yelp")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the sizes and seeds of the command line and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/without-data"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(WIDTHS), default=list(WIDTHS)[:2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--removal", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    for name in chosen.sizes:
        world = World(chosen.out / name, replace(SIZES["small"], width=WIDTHS[name]))
        world.work.mkdir(parents=True, exist_ok=True)
        folders = [
            measure(world, seed, chosen.rows, removal=chosen.removal) for seed in chosen.seeds
        ]
        print(table(folders, name))
        if chosen.removal:
            print(removal_table(folders, name))


if __name__ == "__main__":
    main()
