"""What IVON's posterior is worth for predictions: accuracy, log loss, calibration, shift, time.

    OMP_NUM_THREADS=1 python scripts/experiments/calibration.py -o WORK
    OMP_NUM_THREADS=1 python scripts/experiments/calibration.py -o WORK --seeds 1 2 --only encoder

A real encoder of 22 M parameters learns two sets, from few rows and from more, by AdamW, SAM and
IVON; then a small transformer and a small language model see what takes too long there. What is
chosen is chosen on validation rows, and the tables are of test rows. Whatever was made is kept in
WORK, so that a run which was stopped goes on; two processes with other seeds may share WORK.
`--tables` prints the tables of what is there.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from calibration_report import tables
from calibration_small import SECTIONS, small_records
from calibration_world import (
    CONTROLS,
    PARTS,
    SETS,
    SIZES,
    Cell,
    World,
    flat_draws,
    opened,
    posterior_draws,
    stamp,
)

from mergekit_bayes.metrics.classification import score_classification

Make = Callable[[World, "Job", Any], dict[str, Any]]
EVERYWHERE = ("adamw", "ivon")
# In the second cell, by the first seed.
RARE = (
    "ivon, no noise",
    "adamw, a third of the rate",
    "ivon, published",
    "sam",
    "ivon, former defaults",
    "ivon, cheaper",
    "ivon, no flush",
)
# Whose draws are made as often as a user is told to.
MANY = ("ivon", "ivon, cheaper", "ivon, no flush")


class Job(NamedTuple):
    """One model of the encoder, and its predictions.

    Attributes:
        name: The set.
        cell: How much it is trained on.
        method: One of `METHODS`.
        seed: Its seed.
    """

    name: str
    cell: Cell
    method: str
    seed: int


def jobs(world: World, seeds: tuple[int, ...]) -> Iterator[Job]:
    """All models of these seeds, those on which the defaults are judged first."""
    cells, first = world.size.cells, world.size.seeds[:1]
    phases = (
        (seeds, EVERYWHERE, cells[:2]),
        ([seed for seed in seeds if seed in first], RARE, cells[1:2]),
        *((seeds, EVERYWHERE, (cell,)) for cell in cells[2:]),
    )
    for of, methods, where in phases:
        for seed in of:
            for cell in where:
                for name in SETS:
                    for method in methods:
                        yield Job(name, cell, method, seed)


def look_file(world: World, job: Job) -> Path:
    """Where the predictions of a model lie."""
    trained = world.trained(*job)
    return world.work / f"look-{trained.name}-{trained.key}.npz"


def look(world: World, job: Job) -> None:
    """Train a model, and predict all parts with it: what is not in its file yet."""
    file = look_file(world, job)
    found: dict[str, Any] = {}
    if file.exists():
        with np.load(file) as there:
            found = {name: there[name] for name in there.files}
    missing = [make for key, make in wanted(world, job) if key not in found]
    if not missing:
        return
    trained = world.trained(*job).done()
    loaded = opened(trained.model)
    for make in missing:
        found |= make(world, job, loaded)
    unfinished = file.with_suffix(".unfinished.npz")
    np.savez(unfinished, **found)
    unfinished.rename(file)
    stamp(f"{trained.name}: predicted")


def wanted(world: World, job: Job) -> Iterator[tuple[str, Make]]:
    """A key of everything that a model's file holds, and what makes it."""
    yield "mean test", at_mean
    if job.method.startswith("ivon") and job.method != "ivon, no noise":
        yield "drawn test", drawn
    if job.cell == world.size.cells[1]:
        if job.method == "adamw":
            yield "laplace test", laplace
        if job.method in EVERYWHERE:
            yield "flat test", one_sigma
        if job.method == "ivon":
            yield "permuted test", controls


def at_mean(world: World, job: Job, loaded: Any) -> dict[str, Any]:
    """Predictions at the stored weights, (1, rows, classes), and the time of the training."""
    found: dict[str, Any] = {"seconds": world.trained(*job).seconds}
    for part in PARTS:
        found[f"mean {part}"] = world.predict(loaded, job.name, part)[None]
    return found


def drawn(world: World, job: Job, loaded: Any) -> dict[str, Any]:
    """Predictions under draws from the stored posterior, (draws, rows, classes)."""
    size, found = world.size, {}
    many = size.many if job.method in MANY else size.few
    # Published settings have no prior, so that the least one is given; it changes nothing.
    prior = 1.0 if job.method == "ivon, published" else None
    with posterior_draws(loaded, world.trained(*job).model, many, prior=prior) as draws:
        found["sigma"] = draws.report.sigma_over_rms
        for k in draws:
            for part in PARTS:
                if k < size.few or part != "valid":
                    row = world.predict(loaded, job.name, part)
                    found.setdefault(f"drawn {part}", []).append(row)
    return found


def controls(world: World, job: Job, loaded: Any) -> dict[str, Any]:
    """The same as often, from posteriors that know less: what uncertainty must be better than."""
    found: dict[str, Any] = {}
    model = world.trained(*job).model
    for kind in CONTROLS:
        with posterior_draws(loaded, model, world.size.many, control=kind) as draws:
            found[f"{kind} test"] = [world.predict(loaded, job.name, "test") for _ in draws]
    return found


def laplace(world: World, job: Job, loaded: Any) -> dict[str, Any]:
    """The same under a root-GGN Laplace posterior whose prior the validation rows choose."""
    trained = world.trained(*job)
    precision = world.laplace(trained, job.name, job.seed).done().precision
    valid = {}
    for sigma in world.size.grid:
        options = {"precision": precision, "prior": sigma**-2}
        with posterior_draws(loaded, trained.model, world.size.few, **options) as draws:
            valid[sigma] = [world.predict(loaded, job.name, "valid") for _ in draws]
    best = least(world, job, valid)
    options = {"precision": precision, "prior": best**-2}
    with posterior_draws(loaded, trained.model, world.size.few, **options) as draws:
        test = [world.predict(loaded, job.name, "test") for _ in draws]
    return {"laplace sigma": best, "laplace valid": valid[best], "laplace test": test}


def one_sigma(world: World, job: Job, loaded: Any) -> dict[str, Any]:
    """The same with one deviation for all weights, which the validation rows choose."""
    valid = {}
    for sigma in world.size.grid:
        with flat_draws(loaded, world.size.few, sigma) as draws:
            valid[sigma] = [world.predict(loaded, job.name, "valid") for _ in draws]
    best = least(world, job, valid)
    with flat_draws(loaded, world.size.few, best) as draws:
        test = [world.predict(loaded, job.name, "test") for _ in draws]
    return {"flat sigma": best, "flat valid": valid[best], "flat test": test}


def least(world: World, job: Job, valid: dict[float, list[np.ndarray]]) -> float:
    """The deviation with the least log loss on the validation rows."""
    labels = world.labels(job.name, "valid").tolist()

    def nll(sigma: float) -> float:
        averaged = np.logaddexp.reduce(valid[sigma], axis=0) - np.log(len(valid[sigma]))
        return score_classification(averaged, labels, bootstrap=0).nll.value

    return min(valid, key=nll)


def main() -> None:
    """Make what is not there yet, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="WORK")
    parser.add_argument("--size", choices=list(SIZES), default="default")
    parser.add_argument("--seeds", type=int, nargs="+", help="by default those of the size")
    parser.add_argument("--only", nargs="+", choices=("encoder", *SECTIONS), metavar="SECTION")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), help="by default both")
    parser.add_argument("--tables", action="store_true", help="make nothing")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    world = World(given.output, SIZES[given.size])
    seeds = tuple(given.seeds or world.size.seeds)
    sections = given.only or ("encoder", *SECTIONS)
    if not given.tables:
        if "encoder" in sections:
            for job in jobs(world, seeds):
                if not given.sets or job.name in given.sets:
                    look(world, job)
        for section in SECTIONS:
            if section in sections:
                small_records(world.work, section, given.size, seeds)
    looks = {job: look_file(world, job) for job in jobs(world, world.size.seeds)}
    there = {job: file for job, file in looks.items() if file.exists()}
    print(tables(world, there))


if __name__ == "__main__":
    main()
