"""The tables of the experiment on calibration."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from calibration_world import CONTROLS

from mergekit_bayes.metrics.classification import score_classification

if TYPE_CHECKING:
    from calibration import Job
    from calibration_world import World

SCORES = ("accuracy", "nll", "ece", "reliability", "brier", "auroc")
HEADS = {"reliability": "debiased"}
# Scores on which the defaults are judged, and what they are compared with.
GOALS = (
    *(("accuracy", "adamw"), ("nll", "adamw, temperature"), ("ece", "adamw")),
    *(("shift accuracy", "adamw"), ("shift nll", "adamw, temperature"), ("shift ece", "adamw")),
)
SMALL = "small.jsonl"
_BINS = 15
Row = dict[str, float]


def averaged(log_p: np.ndarray, draws: int | None = None) -> np.ndarray:
    """Log of the mean over draws of the probabilities, (rows, classes)."""
    part = np.asarray(log_p)[:draws]
    mean: np.ndarray = np.logaddexp.reduce(part, axis=0) - math.log(len(part))
    return mean


def scores(log_p: np.ndarray, labels: np.ndarray) -> Row:
    """All scores of one prediction."""
    report = score_classification(log_p, labels.tolist(), bins=_BINS, bootstrap=0)
    found = {name: float(getattr(report, name).value) for name in SCORES[:-1]}
    # The root of the debiased squared error has the unit of the ECE; noise may make it negative.
    found["reliability"] = math.copysign(abs(found["reliability"]) ** 0.5, found["reliability"])
    return found | {"auroc": auroc_of_errors(log_p, labels)}


def auroc_of_errors(log_p: np.ndarray, labels: np.ndarray) -> float:
    """How well the confidence tells right predictions from wrong ones; 0.5 is not at all."""
    confidence, right = log_p.max(1), log_p.argmax(1) == labels
    if right.all() or not right.any():
        return math.nan
    order = np.argsort(confidence, kind="stable")
    values, starts, counts = np.unique(confidence[order], return_index=True, return_counts=True)
    ranks = (starts + (counts + 1) / 2)[np.searchsorted(values, confidence)]
    hits = int(right.sum())
    return float((ranks[right].sum() - hits * (hits + 1) / 2) / (hits * (len(right) - hits)))


def temperature(log_p: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least log loss on these rows, of 80 from 0.2 to 20."""
    grid = np.geomspace(0.2, 20, 80)
    return float(min(grid, key=lambda t: -rescaled(log_p, t)[np.arange(len(labels)), labels].sum()))


def rescaled(log_p: np.ndarray, t: float) -> np.ndarray:
    """The same at another temperature."""
    logits = log_p / t
    rescaled: np.ndarray = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return rescaled


def rows_of(world: "World", job: "Job", look: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of the table that one model gives, by name, of test rows and of the shift."""
    test, valid = world.labels(job.name, "test"), world.labels(job.name, "valid")
    shift = world.labels(job.name, "shift")
    found: dict[str, Row] = {}

    def add(name: str, of_test: np.ndarray, of_shift: np.ndarray | None = None) -> None:
        found[name] = scores(of_test, test) | {"seconds": float(look["seconds"])}
        if of_shift is not None:
            moved = scores(of_shift, shift)
            found[name] |= {f"shift {s}": moved[s] for s in ("accuracy", "nll", "ece")}

    mean = {part: averaged(look[f"mean {part}"]) for part in ("valid", "test", "shift")}
    at_mean = f"{job.method}, at the mean" if job.method.startswith("ivon") else job.method
    add(at_mean, mean["test"], mean["shift"])
    t = temperature(mean["valid"], valid)
    add(f"{at_mean}, temperature", rescaled(mean["test"], t), rescaled(mean["shift"], t))
    if "drawn test" in look:
        few = len(look["drawn valid"])
        add(
            f"{job.method}, {few} draws",
            averaged(look["drawn test"], few),
            averaged(look["drawn shift"], few),
        )
        many = len(look["drawn test"])
        if many > few:
            of_shift = look["drawn shift"]
            add(
                f"{job.method}, {many} draws",
                averaged(look["drawn test"]),
                averaged(of_shift) if len(of_shift) == many else None,
            )
        t = temperature(averaged(look["drawn valid"]), valid)
        add(
            f"{job.method}, {few} draws, temperature",
            rescaled(averaged(look["drawn test"], few), t),
        )
    for kind, words in (("laplace", "Laplace posterior"), ("flat", "one sigma")):
        if f"{kind} test" in look:
            add(f"{job.method}, {words} by search", averaged(look[f"{kind} test"]))
    for kind in CONTROLS:
        if f"{kind} test" in look:
            of_kind = look[f"{kind} test"]
            add(f"{job.method}, {len(of_kind)} draws, {kind}", averaged(of_kind))
    return found


def tables(world: "World", looks: Mapping["Job", Path]) -> str:
    """All tables of what is there: by cell, the means over them, and what was small."""
    by_cell: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    plain: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for job, file in looks.items():
        with np.load(file) as look:
            content = {name: look[name] for name in look.files}
        for name, row in rows_of(world, job, content).items():
            by_cell[job.name, str(job.cell)][name].append(row | {"seed": job.seed})
        if job.method == "adamw":
            plain[job.name, str(job.cell)].append(averaged(content["mean test"]))
    for (name, cell), members in plain.items():
        if len(members) > 1:
            together = averaged(np.stack(members))
            row = scores(together, world.labels(name, "test"))
            seconds = sum(r["seconds"] for r in by_cell[name, cell]["adamw"])
            by_cell[name, cell][f"adamw, ensemble of {len(members)}"] = [row | {"seconds": seconds}]
    judged = {str(cell) for cell in world.size.cells if cell.epochs > 1 and not cell.lora}
    text = [_means({key: found for key, found in by_cell.items() if key[1] in judged})]
    text += [_table(f"{name}, {cell}", found) for (name, cell), found in sorted(by_cell.items())]
    small = world.work / SMALL
    if small.exists():
        text += small_tables([json.loads(line) for line in small.open()])
    return "\n\n".join(text)


def _means(by_cell: Mapping[tuple[str, str], Mapping[str, list[Row]]]) -> str:
    """Means over the cells that have all rows on which the defaults are judged.

    They are those of all weights after several passes. After one pass over few rows a model is less
    sure than it is right, and averaging is of no use.
    """
    drawn = {n for found in by_cell.values() for n in found if re.fullmatch(r"ivon, \d+ draws", n)}
    if not drawn:
        return ""
    by_count = sorted(drawn, key=lambda name: int(name.split()[1]))
    at_mean = ("ivon, at the mean", "ivon, at the mean, temperature")
    wanted = ("adamw", "adamw, temperature", *at_mean, *by_count)
    cells = [
        _of_common_seeds({name: found[name] for name in wanted})
        for found in by_cell.values()
        if all(name in found for name in wanted)
    ]
    cells = [found for found in cells if found["adamw"]]
    if not cells:
        return ""
    means = {}
    for name in wanted:
        of_cells = [
            {c: float(np.nanmean([row[c] for row in found[name]])) for c in found[name][0]}
            for found in cells
        ]
        means[name] = [{c: float(np.mean([o[c] for o in of_cells])) for c in of_cells[0]}]
    models = sum(len(found[by_count[-1]]) for found in cells)
    table = _table(f"means over {len(cells)} cells of several passes", means, models)
    return f"{table}\n\n{_paired(cells, by_count[-1])}"


def _of_common_seeds(found: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of the seeds that all have, as long as some are still to be trained."""
    common = set.intersection(*({row["seed"] for row in rows} for rows in found.values()))
    return {name: [row for row in rows if row["seed"] in common] for name, rows in found.items()}


def _paired(cells: Sequence[Mapping[str, list[Row]]], drawn: str) -> str:
    """What the goals are about, as differences of models of the same cell and seed."""
    models = sum(len(found[drawn]) for found in cells)
    lines = [
        f"{drawn}, less another of the same cell and seed; {models} models:",
        "",
        "| | mean | least | greatest | lower in |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for score, other in GOALS:
        changes = [
            one[score] - another[score]
            for found in cells
            for one in found[drawn]
            for another in found[other]
            if one["seed"] == another["seed"]
        ]
        numbers = (np.mean(changes), min(changes), max(changes))
        lower = sum(change < 0 for change in changes)
        shown = " | ".join(f"{number:+.3f}" for number in numbers)
        lines.append(f"| {score}, less {other} | {shown} | {lower} of {len(changes)} |")
    return "\n".join(lines)


def _table(title: str, found: Mapping[str, list[Row]], models: int | None = None) -> str:
    """A row for each name: means over its seeds, or those of as many models."""
    columns = [*SCORES, "shift accuracy", "shift nll", "shift ece", "seconds"]
    heads = [HEADS.get(c, c) for c in columns]
    lines = [
        f"{title}:",
        "",
        f"| | {'models' if models else 'seeds'} | " + " | ".join(heads) + " |",
        "| --- " + "| ---: " * (len(columns) + 1) + "|",
    ]
    for name, rows in found.items():
        cells = [_cell([r[c] for r in rows if c in r], c) for c in columns]
        lines.append(f"| {name} | {models or len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], column: str) -> str:
    if not values:
        return ""
    digits = 0 if column == "seconds" else 3
    mean = f"{np.nanmean(values):.{digits}f}"
    if len(values) < 2 or column == "seconds":
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def small_tables(records: list[dict[str, Any]]) -> list[str]:
    """One table for each section of the small models: means over seeds, least and greatest."""
    text = []
    for section in dict.fromkeys(r["section"] for r in records):
        rows = [r for r in records if r["section"] == section]
        columns = [c for c in rows[0] if c not in ("section", "method", "seed")]
        lines = [
            f"{section}:",
            "",
            "| | seeds | " + " | ".join(columns) + " |",
            "| --- " + "| ---: " * (len(columns) + 1) + "|",
        ]
        for method in dict.fromkeys(r["method"] for r in rows):
            own = [r for r in rows if r["method"] == method]
            cells = [_cell([r[c] for r in own if r.get(c) is not None], c) for c in columns]
            lines.append(f"| {method} | {len(own)} | " + " | ".join(cells) + " |")
        text.append("\n".join(lines))
    return text
