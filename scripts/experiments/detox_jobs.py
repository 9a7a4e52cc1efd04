"""The jobs of the experiment on removal: each done once, two at a time, with its CPU seconds."""

import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import detox_scorers
import torch
import transformers
from detox_measure import lasts, mean_share, measure
from detox_methods import Method, all_methods, make_looks
from detox_world import (
    CONDITIONS,
    SCORERS,
    World,
    finetune,
    train_bases,
    write_start,
    write_texts,
    write_tokenizer,
)

from mergekit_bayes.checkpoint.replacing import replacing

LASTS = "lasts.json"


@dataclass(frozen=True)
class Job:
    """A step of the experiment.

    Attributes:
        name: Of its record of seconds.
        run: Called with the world and `arguments`.
        arguments: What it is about.
        made: It is done where all of these exist.
        needs: Names of the jobs before it.
    """

    name: str
    run: Callable[..., None]
    arguments: tuple[Any, ...]
    made: tuple[Path, ...]
    needs: tuple[str, ...] = ()

    @property
    def is_done(self) -> bool:
        """Whether all that it makes is there."""
        return all(path.exists() for path in self.made)


def jobs(world: World, only: Sequence[str] = ()) -> list[Job]:
    """All jobs, in the order in which they should be done."""
    scorers = sorted({name for names in SCORERS.values() for name in names})
    result = [
        Job("texts", write_texts, (), (world.work / "data",)),
        Job("tokenizer", write_tokenizer, (), (world.tokenizer,), ("texts",)),
        Job(
            "scorers",
            fit_scorers,
            (tuple(scorers),),
            tuple(world.work / "scorers" / f"{name}.pickle" for name in scorers),
        ),
    ]
    before = ("tokenizer", "scorers")
    methods = [m for m in all_methods(world) if not only or m.name in only]
    for seed in world.size.seeds:
        result += [
            Job(f"base-{seed}", train_bases, ("base", seed), (world.base(seed),), before),
            Job(f"oracle-{seed}", train_bases, ("oracle", seed), (world.oracle(seed),), before),
        ]
        curves = [(m, c) for c in CONDITIONS for m in methods if seed in m.seeds(world, c)]
        result += [
            Job(
                world.start(seed, proper=proper).name,
                write_start,
                (seed, proper),
                (world.start(seed, proper=proper),),
                (f"base-{seed}",),
            )
            for proper in sorted({False, *(m.proper for m, _ in curves)})
        ]
        tuned = dict.fromkeys(f"{text}-{c}" for m, c in curves for text in m.tuned)
        result += [
            Job(
                f"tuned-{text}-{seed}",
                finetune,
                (text, seed),
                (world.tuned(text, seed),),
                (f"start-{seed}",),
            )
            for text in tuned
        ]
        for c in CONDITIONS:
            file = world.looks("base", c, seed) / "0.json"
            needs = (f"start-{seed}", f"oracle-{seed}")
            result.append(Job(f"look-base-{c}-{seed}", look_at_base, (c, seed), (file,), needs))
        result += [curve_job(world, method, c, seed) for method, c in curves]
    return result


def curve_job(world: World, method: Method, condition: str, seed: int) -> Job:
    """All looks of one method, condition and seed."""
    folder = world.looks(method.name, condition, seed)
    files = [folder / f"{look:g}.json" for look in method.looks_of(world)]
    needs = [f"look-base-{condition}-{seed}"]
    needs += [world.start(seed, proper=True).name] if method.proper else []
    needs += [f"tuned-{text}-{condition}-{seed}" for text in method.tuned]
    return Job(
        f"look-{method.name}-{condition}-{seed}",
        look_at_curve,
        (method, condition, seed),
        (*files, *([folder / LASTS] if method.lasts else [])),
        tuple(needs),
    )


def fit_scorers(world: World, names: Sequence[str]) -> None:
    """Fit all scorers."""
    for name in names:
        detox_scorers.fitted(name)


def look_at_base(world: World, condition: str, seed: int) -> None:
    """Measure a base."""
    look_at(world, world.start(seed), "base", condition, seed, 0.0, 0.0)
    written(
        world.looks("base", condition, seed) / LASTS,
        lasts(world, world.start(seed), condition, seed),
    )


def look_at_curve(world: World, method: Method, condition: str, seed: int) -> None:
    """Make and measure the looks of a curve, and how long the removal of one of them lasts."""
    folder, looks = world.looks(method.name, condition, seed), method.looks_of(world)
    missing = tuple(look for look in looks if not (folder / f"{look:g}.json").exists())
    for look, model, seconds in make_looks(world, method, condition, seed, missing):
        look_at(world, model, method.name, condition, seed, look, seconds, valid=method.lasts)
    if method.lasts and not (folder / LASTS).exists():
        look = chosen_look(world, method.name, condition, seed, looks)
        ((_, model, _),) = make_looks(world, method, condition, seed, (look,))
        written(folder / LASTS, {"look": look, **lasts(world, model, condition, seed)})
    shutil.rmtree(world.models(method.name, condition, seed), ignore_errors=True)


def look_at(
    world: World,
    model: Path,
    method: str,
    condition: str,
    seed: int,
    look: float,
    made: float,
    *,
    valid: bool = True,
) -> None:
    """Measure one model."""
    begun = time.process_time()
    oracle = world.oracle(seed) if condition == "trained" else None
    result = measure(world, model, condition, oracle, valid=valid)
    result |= {"seconds": made, "measuring": time.process_time() - begun}
    written(world.looks(method, condition, seed) / f"{look:g}.json", result)


def chosen_look(
    world: World, method: str, condition: str, seed: int, looks: Sequence[float]
) -> float:
    """The first look with at most a third of the base's toxic share on validation prompts.

    Where none is as low, the lowest.
    """

    def share(name: str, look: float) -> float:
        file = world.looks(name, condition, seed) / f"{look:g}.json"
        valid = json.loads(file.read_text())["valid"]
        return mean_share(valid["shares"][SCORERS[condition][0]])

    shares = {look: share(method, look) for look in looks}
    goal = share("base", 0.0) / 3
    return next((k for k, v in shares.items() if v <= goal), min(shares, key=lambda k: shares[k]))


def written(file: Path, content: Any) -> None:
    """Write a JSON file that appears when it is complete."""
    with replacing(file, force=True) as unfinished:
        unfinished.write_text(json.dumps(content))


def carry_out(world: World, todo: Sequence[Job], workers: int) -> dict[str, str]:
    """Do what is not done yet, and tell about it.

    Returns:
        The errors of the jobs that failed; what needs them is left out.
    """
    left = [job for job in todo if not job.is_done]
    print(f"{len(todo)} jobs, {len(todo) - len(left)} done before", flush=True)
    failed: dict[str, str] = {}
    names = {job.name for job in left}
    if workers <= 1:
        start_worker(world)
        for job in left:
            if not failed.keys() & set(job.needs):
                told(job, done(world, job), failed)
            else:
                failed[job.name] = "left out"
        return failed
    running: dict[Future[Any], Job] = {}
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (world,)) as pool:
        while left or running:
            for job in [j for j in left if failed.keys() & set(j.needs)]:
                failed[job.name] = "left out"
                left.remove(job)
            ready = [j for j in left if not names & set(j.needs)]
            for job in ready[: workers - len(running)]:
                running[pool.submit(done, world, job)] = job
                left.remove(job)
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                told(job, future.result(), failed)
                names.discard(job.name)
    return failed


def told(job: Job, outcome: tuple[float, str | None], failed: dict[str, str]) -> None:
    """Print how a job went, and remember if it failed."""
    seconds, error = outcome
    clock = time.strftime("%H:%M:%S")
    if error is None:
        print(f"{clock} {job.name}: {seconds:.0f} CPU seconds", flush=True)
    else:
        print(f"{clock} {job.name} FAILED\n{error}", flush=True)
        failed[job.name] = error.strip().splitlines()[-1]


def start_worker(world: World) -> None:
    """Prepare a process."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ[detox_scorers.FOLDER] = str(world.work / "scorers")
    os.environ[detox_scorers.ROWS] = str(world.size.scorer_rows or "")


def done(world: World, job: Job) -> tuple[float, str | None]:
    """Do a job.

    Returns:
        Its CPU seconds, and the error if it failed.
    """
    begun, error = time.process_time(), None
    try:
        job.run(world, *job.arguments)
    except Exception:
        error = traceback.format_exc()
    seconds = time.process_time() - begun
    written(seconds_file(world, job.name), seconds_of(world, job.name) + seconds)
    return seconds, error


def seconds_file(world: World, name: str) -> Path:
    """Where the CPU seconds of a job are kept."""
    return world.work / "seconds" / f"{name}.json"


def seconds_of(world: World, name: str) -> float:
    """The CPU seconds of a job; 0 where it was not done here."""
    file = seconds_file(world, name)
    return float(json.loads(file.read_text())) if file.exists() else 0.0
