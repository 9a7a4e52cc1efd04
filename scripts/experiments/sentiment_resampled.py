"""The losses of the experiment on addition under a crossed bootstrap of rows and seeds.

Every resample draws seeds with replacement, and the rows of each task, the same for all models, so
that differences are paired. A model of one seed alone is resampled over rows only.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from sentiment_columns import COLUMNS, UNTUNED, Column
from sentiment_corrected import CORRECTIONS
from sentiment_looks import Look, Name, Place, counts, load, look_file, nll
from sentiment_mixed import MIXED
from sentiment_world import World
from sentiment_written import looks_at_written

from mergekit_bayes.metrics.base import Interval, interval
from mergekit_bayes.records import FloatArray

POINTS = ("untuned", "tuned", "matched")
REFERENCES = ("base", "specialists", "joint")


class Resampled:
    """What was measured of a world, and what it is under each resample.

    Arrays have a row for the estimate and one for each resample.

    Args:
        world: The experiment.
        columns: All its ways of merging.
    """

    def __init__(self, world: World, columns: Sequence[Column] = COLUMNS) -> None:
        self.world = world
        self.columns = {column.name: column for column in columns}
        self.looks: dict[Name, dict[int, Look]] = {}
        self.scales: dict[Name, dict[int, float]] = {}
        for name, seed, look in _references(world):
            self.looks.setdefault(name, {})[seed] = look
        for name, seed, look in looks_at_written(world, (*CORRECTIONS, *MIXED)):
            self.looks.setdefault(name, {})[seed] = look
        for name, seed, scale, look in _points(world, columns):
            self.looks.setdefault(name, {})[seed] = look
            self.scales.setdefault(name, {})[seed] = scale
        draw = np.random.default_rng(0)
        self._seed_weights = _weights(draw, len(world.size.seeds), world.size.resamples)
        self._means: dict[tuple[Name, tuple[int, ...]], FloatArray] = {}

    @cached_property
    def _rows(self) -> dict[str, FloatArray]:
        """(1 + resamples, rows) of each task: how often each row is drawn."""
        found = {}
        for i, task in enumerate(self.world.size.tasks):
            count = len(self.world.rows(task, "test")[0])
            draw = np.random.default_rng([1, i])
            found[task] = _weights(draw, count, self.world.size.resamples)
        return found

    def seeds(self, *names: Name) -> tuple[int, ...]:
        """The seeds that all of these were measured in."""
        return tuple(s for s in self.world.size.seeds if all(s in self.looks[n] for n in names))

    def losses(self, name: Name, seeds: Sequence[int]) -> FloatArray:
        """(1 + resamples,): nats an observation, the mean over tasks and these seeds."""
        key = (name, tuple(seeds))
        if key not in self._means:
            stack = []
            for seed in seeds:
                look, tasks = self.looks[name][seed], []
                for task, weights in self._rows.items():
                    tasks.append(weights @ nll(look, task) / (weights @ counts(look, task)))
                stack.append(np.mean(tasks, axis=0))
            columns = [self.world.size.seeds.index(seed) for seed in seeds]
            drawn = self._seed_weights[:, columns]
            total = drawn.sum(1, keepdims=True)
            drawn = np.where(total > 0, drawn / np.maximum(total, 1), 1 / len(columns))
            self._means[key] = np.einsum("rs,sr->r", drawn, np.array(stack))
        return self._means[key]

    def difference(self, one: Name, other: Name) -> Interval | None:
        """Nats an observation, `one` minus `other`, over the seeds of both; None without any."""
        if one not in self.looks or other not in self.looks or not self.seeds(one, other):
            return None
        seeds = self.seeds(one, other)
        return as_interval(self.losses(one, seeds) - self.losses(other, seeds))

    def share(self, name: Name, start: Name, bound: Name) -> Interval | None:
        """How much of the way from `start` to `bound` the losses of `name` have gone."""
        names = (name, start, bound)
        if any(n not in self.looks for n in names) or not self.seeds(*names):
            return None
        one, first, last = (self.losses(n, self.seeds(*names)) for n in names)
        return as_interval((first - one) / (first - last))

    def scores(self, name: Name, task: str, seeds: Sequence[int] | None = None) -> dict[str, float]:
        """The scores on a task, means over these seeds, by default over all."""
        looks = self.looks[name]
        found = [self.world.scores(looks[s], task) for s in (seeds or looks)]
        return {score: float(np.mean([one[score] for one in found])) for score in found[0]}

    def averages(self, name: Name) -> dict[str, float]:
        """The means over tasks."""
        of_tasks = [self.scores(name, task) for task in self.world.size.tasks]
        return {score: float(np.mean([t[score] for t in of_tasks])) for score in of_tasks[0]}

    def least_kept(self, name: Name) -> float:
        """The least accuracy on a task, as a share of its specialists' of the same seeds."""
        own = Name("specialists")
        seeds = self.seeds(name, own)
        return min(
            self.scores(name, task, seeds)["accuracy"] / self.scores(own, task, seeds)["accuracy"]
            for task in self.world.size.tasks
        )

    def seconds(self, column: Column, point: str) -> float:
        """CPU seconds of fine-tunes, precisions, a merge, and for a tuned one its looks."""
        totals = []
        for seed in self.looks[Name(column.name, point)]:
            place = Place.of(self.world, column, seed)
            steps = {step.key: step for step in column.steps(self.world, seed)}
            for step in list(steps.values()):  # what a permuted precision was made of
                steps |= {
                    n.key: n for n in step.needs if n.name.startswith(("precision", "moments"))
                }
            total = sum(step.seconds for step in steps.values())
            total += float(load(place.test(UNTUNED))["forming"])
            if point == "tuned" and column.is_tuned:
                looks = [load(place.valid(scale)) for scale in column.looks]
                total += sum(float(look["seconds"] + look["forming"]) for look in looks)
            totals.append(total)
        return float(np.mean(totals))


def _references(world: World) -> Iterator[tuple[Name, int, Look]]:
    """The looks at the base, the specialists and joint training that are there."""
    for seed in world.size.seeds:
        for name in ("base", "joint"):
            if (file := look_file(world, name, seed)).exists():
                yield Name(name), seed, load(file)
        files = [look_file(world, task, seed) for task in world.size.tasks]
        if all(file.exists() for file in files):
            whole: dict[str, Any] = {}
            for file in files:
                whole |= load(file)
            yield Name("specialists"), seed, whole


def _points(world: World, columns: Sequence[Column]) -> Iterator[tuple[Name, int, float, Look]]:
    """The looks at the test rows that are there, with their scales."""
    for column in columns:
        for seed in column.seeds(world):
            place = Place.of(world, column, seed)
            scales = {"untuned": UNTUNED, "tuned": place.tuned(column) if column.is_tuned else None}
            for point, scale in (scales | {"matched": place.matching() or None}).items():
                if scale is not None and place.test(scale).exists():
                    yield Name(column.name, point), seed, scale, load(place.test(scale))


def _weights(draw: np.random.Generator, count: int, resamples: int) -> FloatArray:
    """(1 + resamples, count): ones, then how often each is drawn with replacement."""
    drawn = draw.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.float64)


def as_interval(values: FloatArray) -> Interval:
    """The estimate with the percentile interval of its resamples."""
    return interval(float(values[0]), values[1:], len(values) - 1)
