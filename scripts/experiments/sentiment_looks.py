"""Looks at the merges of a column: formed in one loaded model, measured, and chosen.

A merge is formed as `bmerge preview` forms it, with the bits of `bmerge merge`. What was measured
is a file, so that a run that was stopped goes on with the next look.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sentiment_columns import UNTUNED, Column
from sentiment_world import Step, World

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.replacing import replacing
from mergekit_bayes.checkpoint.scratch import Scratch
from mergekit_bayes.models.load import Loaded, load_model
from mergekit_bayes.models.quiet import quiet_libraries
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.preview.forming import Former, Plans
from mergekit_bayes.preview.skeleton import write_skeleton
from mergekit_bayes.records import FloatArray

VERSION = 1  # of what a look holds
CLOSE = 5e-3  # relative error of a matched distance
FARTHEST = 64.0  # the largest scale at which a distance is looked for
STEPS = 40  # towards it, at most

Tensors = dict[str, torch.Tensor]
Look = Mapping[str, Any]


class Name(NamedTuple):
    """What was measured.

    Attributes:
        column: Its name, or that of a reference or a correction.
        point: `untuned`, `tuned` or `matched`; of a reference or a correction, `untuned`.
    """

    column: str
    point: str = "untuned"


class Target(NamedTuple):
    """What one seed's merges are compared with.

    Attributes:
        base: The base's parameters.
        specialists: Those of each task's model by AdamW.
        curvatures: Root-GGN of each, for one observation.
    """

    base: Tensors
    specialists: Mapping[str, Tensors]
    curvatures: Mapping[str, Tensors]

    @classmethod
    def of(cls, world: World, seed: int) -> "Target":
        """Read one seed's."""
        specialists, curvatures = {}, {}
        for task in world.size.tasks:
            model = world.tuned(task, seed)
            step = world.precision(model, task, "ggn", seed).done()
            specialists[task] = parameters(opened(model.model))
            curvatures[task] = per_observation(model.model, step.precision)
        return cls(parameters(opened(world.base(seed).model)), specialists, curvatures)

    def distance(self, merge: Tensors) -> float:
        """Of a merge from the base, in weights."""
        return (
            sum(float((merge[n] - t).double().square().sum()) for n, t in self.base.items()) ** 0.5
        )

    def predicted(self, merge: Tensors) -> dict[str, tuple[float, float]]:
        """`d' H d / 2` in nats an observation of each task, for the merge and for the base."""
        return {
            task: (
                _energy(merge, model, self.curvatures[task]),
                _energy(self.base, model, self.curvatures[task]),
            )
            for task, model in self.specialists.items()
        }


def _energy(one: Tensors, other: Tensors, curvature: Tensors) -> float:
    return sum(
        float(((one[n] - other[n]).square() * h).sum(dtype=torch.float64)) / 2
        for n, h in curvature.items()
    )


def opened(folder: Path) -> Loaded:
    """A model of the experiment."""
    with quiet_libraries(bars=False):
        return load_model(str(folder))


def parameters(loaded: Loaded) -> Tensors:
    """The parameters of a model in memory, by name."""
    return {name: p.detach() for name, p in loaded.model.named_parameters()}


def per_observation(model: Path, precision: Path) -> Tensors:
    """The tensors of a precision, for one observation."""
    with open_posterior(str(model), precision=str(precision)) as posterior:
        source, info = posterior.precision, posterior.info
        assert source is not None
        assert info is not None
        assert info.observations is not None
        count = float(info.observations)
        return {n: torch.from_numpy(read_tensor(source, n) / count) for n in source.specs}


def measure(world: World, loaded: Loaded, part: str, tasks: tuple[str, ...]) -> dict[str, Any]:
    """What the world measures of each row of the tasks, and the CPU seconds that it took."""
    begun = time.process_time()
    found: dict[str, Any] = {}
    for task in tasks:
        found |= world.measure(loaded, task, part)
    return found | {"seconds": time.process_time() - begun}


def look_at(
    world: World, folder: Path, file: Path, target: Target | None, tasks: tuple[str, ...]
) -> None:
    """Measure a model on test rows, once."""
    if not file.exists():
        loaded = opened(folder)
        found = measure(world, loaded, "test", tasks)
        if target is not None:
            found |= facts(target, parameters(loaded))
        save(file, found)


def file_of(world: World, step: Step) -> Path:
    """Where the look of a written model on test rows lies."""
    return world.work / "looks" / f"{step.name}-{step.key}-{world.held_out.key}.npz"


def facts(target: Target, merge: Tensors) -> dict[str, Any]:
    """Distance and predictions of a merge, as they are stored."""
    predicted = target.predicted(merge)
    return {"distance": target.distance(merge)} | {
        f"predicted {task}": np.array(pair) for task, pair in predicted.items()
    }


def look_file(world: World, name: str, seed: int) -> Path:
    """The look at the test rows of `base`, of a task's specialist, or of `joint`."""
    step = world.base(seed) if name == "base" else world.tuned(name, seed)
    return file_of(world, step)


def save(file: Path, content: Mapping[str, Any]) -> None:
    """Write arrays to a file that appears when it is complete."""
    with replacing(file, force=True) as unfinished, unfinished.open("wb") as out:
        np.savez(out, **content)


def load(file: Path) -> dict[str, Any]:
    """Read such a file."""
    with np.load(file) as content:
        return {name: content[name] for name in content.files}


def nll(look: Look, task: str) -> FloatArray:
    """(rows,): nats of each row."""
    if (known := look.get(f"nats {task}")) is not None:
        return np.asarray(known, dtype=np.float64)
    log_p, labels = look[f"logp {task}"], look[f"labels {task}"]
    result: FloatArray = -log_p[np.arange(len(labels)), labels]
    return result


def counts(look: Look, task: str) -> FloatArray:
    """(rows,): observations of each row: the tokens of a text, or one label."""
    return np.asarray(look.get(f"tokens {task}", np.ones(len(nll(look, task)))), dtype=np.float64)


def mean_nll(look: Look, task: str) -> float:
    """Nats an observation."""
    return float(nll(look, task).sum() / counts(look, task).sum())


class Place(NamedTuple):
    """Where the looks of a column and a seed lie."""

    folder: Path

    @classmethod
    def of(cls, world: World, column: Column, seed: int) -> "Place":
        """By the hash of everything that decides them."""
        size = world.size
        content = {
            "version": VERSION,
            "made": [s.key for s in (world.base(seed), *column.steps(world, seed))],
            "column": [column.method, dict(column.settings), column.constant, column.with_base],
            "measured": [world.held_out.key, size.tokens],
        }
        text = json.dumps(content, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cls(world.work / "looks" / f"{column.name}-{seed}-{key}")

    def valid(self, scale: float) -> Path:
        """A look on validation rows."""
        return self.folder / f"valid-{scale:.6g}.npz"

    def test(self, scale: float) -> Path:
        """A look on test rows."""
        return self.folder / f"test-{scale:.6g}.npz"

    @property
    def errors(self) -> Path:
        """What the untuned merge misses of each task's gradient."""
        return self.folder / "errors.npz"

    @property
    def matched(self) -> Path:
        """The scale at a distance: `[distance, scale]`, scale 0 where there is none."""
        return self.folder / "matched.json"

    def matching(self) -> float:
        """That scale; 0 where there is none, or it was not looked for."""
        return float(json.loads(self.matched.read_text())[1]) if self.matched.exists() else 0.0

    def tuned(self, column: Column) -> float | None:
        """The scale that validation rows choose; None before all were looked at."""
        if not column.is_tuned:
            return UNTUNED if self.test(UNTUNED).exists() else None
        if not all(self.valid(scale).exists() for scale in column.looks):
            return None
        means = {scale: _mean(load(self.valid(scale))) for scale in column.looks}
        return min(means, key=means.__getitem__)


def _mean(look: Look) -> float:
    tasks = [n.partition(" ")[2] for n in look if n.startswith(("logp ", "nats "))]
    return float(np.mean([mean_nll(look, task) for task in tasks]))


class Looker:
    """Makes the looks of one column and seed that are not there.

    Args:
        world: The experiment.
        column: The way of merging.
        seed: Of the models.
        target: What they are compared with.
    """

    def __init__(self, world: World, column: Column, seed: int, target: Target) -> None:
        self._world, self._column, self._seed, self._target = world, column, seed, target
        self._place, self._stack = Place.of(world, column, seed), ExitStack()

    def untuned(self) -> None:
        """Look at the untuned merge."""
        with self._stack:
            self._test(UNTUNED)

    def tune(self) -> float:
        """Look at the merge that validation rows choose.

        Returns:
            Its distance from the base.
        """
        place, column = self._place, self._column
        with self._stack:
            for scale in column.looks if column.is_tuned else ():
                if not place.valid(scale).exists():
                    forming = self._form(scale)
                    found = measure(self._world, self._loaded, "valid", self._world.size.tasks)
                    save(place.valid(scale), found | {"forming": forming})
            tuned = place.tuned(column)
            assert tuned is not None
            self._test(tuned)
        return float(load(place.test(tuned))["distance"])

    def miss(self, errors: Callable[[Loaded], Mapping[str, Any]]) -> None:
        """Keep what the untuned merge misses."""
        with self._stack:
            if not self._place.errors.exists():
                self._form(UNTUNED)
                save(self._place.errors, errors(self._loaded))

    def match(self, distance: float) -> None:
        """Look at the merge at a distance from the base, where there is one."""
        with self._stack:
            scale = self._matched(distance)
            if scale:
                self._test(scale)

    def _test(self, scale: float) -> None:
        if self._place.test(scale).exists():
            return
        found = {"forming": self._form(scale)}
        found |= measure(self._world, self._loaded, "test", self._world.size.tasks)
        save(self._place.test(scale), found | facts(self._target, parameters(self._loaded)))

    def _matched(self, distance: float) -> float:
        """The scale at a distance from the base; 0 where there is none."""
        if self._place.matched.exists():
            known, scale = json.loads(self._place.matched.read_text())
            if known == distance:
                return float(scale)

        def beyond(scale: float) -> float:
            self._form(scale)
            return self._target.distance(parameters(self._loaded)) / distance - 1

        found = float(f"{root(beyond):.6g}")
        _write(self._place.matched, [distance, found])
        return found

    def _form(self, scale: float) -> float:
        """Form a merge in the model, and return its CPU seconds; the first one reads, too."""
        former, vector = self._former, (scale,) * len(self._world.size.tasks)
        begun = time.process_time()
        former.form(self._plans.at(vector))
        return time.process_time() - begun

    @cached_property
    def _plans(self) -> Plans:
        for step in (self._world.base(self._seed), *self._column.steps(self._world, self._seed)):
            step.done()
        self._scratch = self._stack.enter_context(Scratch(self._world.work, "forming-"))
        config = self._column.config(self._world, self._seed, UNTUNED)
        return self._stack.enter_context(Plans(config, self._scratch.new / "model"))

    @cached_property
    def _loaded(self) -> Loaded:
        like = self._plans.at((UNTUNED,) * len(self._world.size.tasks))
        write_skeleton(like, self._scratch.new / "unformed")
        return opened(self._scratch.new / "unformed")

    @cached_property
    def _former(self) -> Former:
        like = self._plans.at((UNTUNED,) * len(self._world.size.tasks))
        former = Former(self._loaded.model, like, len(self._column.looks), threads=1)
        return self._stack.enter_context(former)


def root(beyond: Callable[[float], float]) -> float:
    """Where a rising function of the scale, -1 at 0, is 0: by false position (Illinois).

    Returns:
        The scale; 0 where the function is below 0 up to `FARTHEST`.
    """
    low, at_low, high = 0.0, -1.0, UNTUNED
    while (at_high := beyond(high)) < -CLOSE:
        low, at_low, high = high, at_high, 2 * high
        if high > FARTHEST:
            return 0.0
    found, at, side = high, at_high, 0  # which end was moved last
    for _ in range(STEPS):
        if abs(at) < CLOSE:
            break
        found = (low * at_high - high * at_low) / (at_high - at_low)
        at = beyond(found)
        if at < 0:
            low, at_low, at_high = found, at, at_high / (2 if side < 0 else 1)
        else:
            high, at_high, at_low = found, at, at_low / (2 if side > 0 else 1)
        side = -1 if at < 0 else 1
    return found


def _write(file: Path, content: Any) -> None:
    with replacing(file, force=True) as unfinished:
        unfinished.write_text(json.dumps(content))
