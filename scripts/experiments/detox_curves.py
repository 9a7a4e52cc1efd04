"""What the curves of the experiment on removal pay at equal toxic share, resampled.

All of a condition is resampled together (crossed: Owen, The pigeonhole bootstrap, Annals of Applied
Statistics 2007): seeds, prompts and documents each with replacement, the same ones for all methods.
A curve is the mean over seeds of what each seed measures. With three seeds the intervals are still
too narrow, so that the tables give every seed's own number, too.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detox_jobs import LASTS, seconds_of
from detox_methods import Method, all_methods
from detox_world import SCORERS, TEXTS, World

from mergekit_bayes.detox.reading import read_curve
from mergekit_bayes.metrics.base import Interval, interval
from mergekit_bayes.records import FloatArray

ENOUGH = 0.95  # share of resamples that must reach a level before an interval is given
KL = "kl"


@dataclass
class Curve:
    """A method at all looks and seeds.

    Attributes:
        method: The method; None for the base.
        seeds: The seeds that are complete.
        looks: Its looks by seed, as they were stored; the base comes first.
        lasts: What was measured of the chosen look, by seed.
        made: Mean CPU seconds up to each look, with fine-tunes and precisions; 0 for the base.
    """

    method: Method
    seeds: tuple[int, ...]
    looks: dict[int, list[dict[str, Any]]]
    lasts: dict[int, dict[str, Any]] = field(default_factory=dict)
    made: tuple[float, ...] = ()


class Resampled:
    """The curves of a condition, and what they are under each resample.

    Arrays have a row for the estimate and one for each resample.
    """

    def __init__(self, world: World, condition: str, curves: dict[str, Curve]) -> None:
        self.world, self.condition, self.curves = world, condition, curves
        self.resamples = world.size.resamples
        draw = np.random.default_rng(0)
        self._seeds = {s: i for i, s in enumerate(world.size.seeds)}
        self._seed_weights = _weights(draw, len(self._seeds), self.resamples)
        self._weights: dict[tuple[str, int], FloatArray] = {}

    def _of_rows(self, text: str, rows: int) -> FloatArray:
        """(1 + resamples, rows): how often each prompt or document is drawn."""
        key = (text, rows)
        if key not in self._weights:
            number = ["prompts", *TEXTS, "removed", KL].index(text)
            draw = np.random.default_rng([1, number if text != KL else 1])  # as the related text
            self._weights[key] = _weights(draw, rows, self.resamples)
        return self._weights[key]

    def shares(self, name: str, scorer: str, seed: int | None = None) -> FloatArray:
        """(1 + resamples, points): the toxic share, the base first."""
        of_seed = {s: self.share_of(s, name, scorer) for s in self.curves[name].seeds}
        return of_seed[seed] if seed is not None else self._mean(name, of_seed)

    def share_of(self, seed: int, name: str, scorer: str) -> FloatArray:
        """The same of one seed."""
        looks = self.curves[name].looks[seed]
        return self.shares_of([look["test"]["shares"][scorer] for look in looks])

    def shares_of(self, prompts: list[list[float]]) -> FloatArray:
        """(1 + resamples, points): means of the shares of prompts."""
        values = np.asarray(prompts, np.float64).T
        weights = self._of_rows("prompts", len(values))
        return np.asarray(weights @ values / weights.sum(1, keepdims=True))

    def losses(self, name: str, text: str, seed: int | None = None) -> FloatArray:
        """(1 + resamples, points): nats a token, the base first."""
        curve, of_seed = self.curves[name], {}
        for s in curve.seeds if seed is None else (seed,):
            looks = curve.looks[s]
            nats = np.array([look[text]["nats"] for look in looks]).T
            tokens = np.array(looks[0][text]["tokens"], np.float64)
            weights = self._of_rows(text, len(tokens))
            of_seed[s] = (weights @ nats) / (weights @ tokens)[:, None]
        return of_seed[seed] if seed is not None else self._mean(name, of_seed)

    def _mean(self, name: str, of_seed: dict[int, FloatArray]) -> FloatArray:
        """The mean over the seeds of each resample.

        A curve of fewer seeds than the others is the mean over those; no seed is drawn then.
        """
        seeds = self.curves[name].seeds
        stack = np.stack([of_seed[s] for s in seeds])
        if len(seeds) < len(self._seeds):
            return np.asarray(stack.mean(0))
        weights = self._seed_weights[:, [self._seeds[s] for s in seeds]]
        return np.einsum("rs,srp->rp", weights / weights.sum(1, keepdims=True), stack)

    def read(
        self,
        name: str,
        cost: FloatArray,
        fraction: float,
        scorer: str | None = None,
        seed: int | None = None,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """What a curve costs where it reaches this fraction of the base's toxic share.

        Returns:
            (1 + resamples,) each: the cost above the base, the bound of the interpolation's error,
            and the look.
        """
        shares = self.shares(name, scorer or SCORERS[self.condition][0], seed)
        with np.errstate(divide="ignore", invalid="ignore"):
            along = shares / shares[:, :1]
        curve = self.curves[name]
        looks = np.array([0.0, *curve.method.looks_of(self.world)])
        usable = np.isfinite(along).all(1)
        if not usable[0]:
            nothing = np.full(len(along), np.nan)
            return nothing, nothing, nothing
        along[~usable] = along[0]
        return tuple(read_curve(looks, along, cost, fraction, rising=False))

    def paid(self, name: str, text: str, fraction: float, scorer: str | None = None) -> FloatArray:
        """(1 + resamples,): nats a token paid on a text; NaN where the level is not reached."""
        return self.read(name, self.losses(name, text), fraction, scorer)[0]

    def paid_interval(
        self, name: str, text: str, fraction: float, scorer: str | None = None
    ) -> Interval | None:
        """The same with its interval, which holds the interpolation's error."""
        paid, grid, _ = self.read(name, self.losses(name, text), fraction, scorer)
        return as_interval(paid, grid)

    def chosen(self, name: str, text: str) -> FloatArray:
        """(1 + resamples,): nats a token that the look chosen on valid pays on a text."""
        curve, of_seed = self.curves[name], {}
        looks = curve.method.looks_of(self.world)
        for seed in curve.seeds:
            losses = self.losses(name, text, seed)
            at = 1 + looks.index(curve.lasts[seed]["look"])
            of_seed[seed] = losses[:, at : at + 1] - losses[:, :1]
        return self._mean(name, of_seed)[:, 0]

    def kept(self, name: str, what: str) -> dict[str, FloatArray] | None:
        """How much of a removal is left, `(base - afterwards) / (base - before)`.

        Args:
            name: The method.
            what: `bits` or `relearnt`.

        Returns:
            (1 + resamples,) each: `base`, `before`, `after` and `kept`.
        """
        curve, scorer = self.curves[name], SCORERS[self.condition][0]
        if not curve.lasts or set(curve.lasts) != set(curve.seeds):
            return None
        looks = curve.method.looks_of(self.world)
        of_seed = {}
        for seed in curve.seeds:
            at = 1 + looks.index(curve.lasts[seed]["look"])
            rows = [curve.looks[seed][i]["test"]["shares"][scorer] for i in (0, at)]
            of_seed[seed] = self.shares_of([*rows, curve.lasts[seed][what]["shares"][scorer]])
        base, before, after = self._mean(name, of_seed).T
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = (base - after) / (base - before)
        return {"base": base, "before": before, "after": after, "kept": kept}


def read_curves(world: World, condition: str) -> dict[str, Curve]:
    """All curves of a condition that are complete for a seed at least, from the work folder."""
    result = {}
    for method in all_methods(world):
        looks: dict[int, list[dict[str, Any]]] = {}
        kept: dict[int, dict[str, Any]] = {}
        for seed in method.seeds(world, condition):
            folder = world.looks(method.name, condition, seed)
            files = [world.looks("base", condition, seed) / "0.json"]
            files += [folder / f"{look:g}.json" for look in method.looks_of(world)]
            if not all(file.exists() for file in files):
                continue
            looks[seed] = [json.loads(file.read_text()) for file in files]
            if (folder / LASTS).exists():
                kept[seed] = json.loads((folder / LASTS).read_text())
        if looks:
            seeds = tuple(looks)
            before = np.mean([_before(world, method, condition, s) for s in seeds])
            made = np.mean([[x["seconds"] for x in looks[s][1:]] for s in seeds], axis=0)
            result[method.name] = Curve(
                method, seeds, looks, kept, (0.0, *(float(m + before) for m in made))
            )
    return result


def _before(world: World, method: Method, condition: str, seed: int) -> float:
    """CPU seconds of the fine-tunes and the precision that a method needs."""
    jobs = [f"tuned-{text}-{condition}-{seed}" for text in method.tuned]
    if method.weighs:
        jobs.append(world.start(seed, proper=method.proper).name)
    return sum(seconds_of(world, job) for job in jobs)


def _weights(draw: np.random.Generator, count: int, resamples: int) -> FloatArray:
    """(1 + resamples, count): ones, then how often each is drawn with replacement."""
    drawn = draw.multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn]).astype(np.float64)


def as_interval(values: FloatArray, grid: FloatArray | None = None) -> Interval | None:
    """The estimate with its percentile interval; None where there is no estimate."""
    if not np.isfinite(values[0]):
        return None
    finite = np.isfinite(values[1:])
    if finite.sum() < ENOUGH * len(finite):
        return Interval(value=float(values[0]))
    found = interval(float(values[0]), values[1:][finite], len(finite))
    if grid is None or found.low is None or found.high is None:
        return found
    wider = max(float(grid[0]), float(np.mean(grid[1:][finite])))
    return Interval(value=found.value, low=found.low - wider, high=found.high + wider)
