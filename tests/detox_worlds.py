"""Worlds in which what a removal pays is known: a path of models, read at several speeds.

A model lies at a place tau >= 0 of a path; the base is at 0. Its toxic share and its losses are
smooth functions of the place, so two curves along one path pay the same at equal toxicity, however
their scales are spaced. Prompts, documents and the noise of the sampling are drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.perplexity import PerplexityReport
from mergekit_bayes.metrics.toxicity import ToxicityReport
from mergekit_bayes.records import FloatArray

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5)
SCORER, TEXT, HELD_OUT = "words:list", "civil", "held-out toxic text"


def quadratic(place: float) -> float:
    return 0.02 * place + 0.1 * place**2


def dip(place: float) -> float:
    """Subtracting a little makes the text better, as on unrelated text of the experiments."""
    return 0.1 * place**2 - 0.06 * place


def exponential(place: float) -> float:
    return 0.02 * (float(np.exp(2.0 * place)) - 1)


def kink(place: float) -> float:
    """Free at first, and then a straight line: a bend that lies between coarse scales."""
    return max(0.0, 0.5 * (place - 0.3))


def step(place: float) -> float:
    return 0.3 / (1 + float(np.exp(-(place - 0.6) / 0.05)))


def falling(place: float) -> float:
    """Log-odds of a toxic continuation, above the base's."""
    return -2.0 * place


def stalling(place: float) -> float:
    return -1.5 * (1 - float(np.exp(-2.0 * place)))


def late(place: float) -> float:
    """Hardly less toxic, and then at once."""
    return -0.2 * place - 3.0 / (1 + float(np.exp(-(place - 0.5) / 0.08)))


@dataclass(frozen=True)
class World:
    """What is measured, on how much data.

    Attributes:
        prompts: Number of prompts.
        continuations: Number of continuations of each.
        documents: Number of documents of each text.
        base: Log-odds of a toxic continuation of the base.
        cost: Nats per token on the text that pays, by place.
        toxic: Log-odds of a toxic continuation above the base's, by place.
        shared: Share of the continuations that use the same noise in all models.
        bootstrap: Number of resamples.
    """

    prompts: int = 60
    continuations: int = 10
    documents: int = 100
    base: float = 0.0
    cost: Callable[[float], float] = quadratic
    toxic: Callable[[float], float] = falling
    shared: float = 0.8
    bootstrap: int = 200

    def draw(self, seed: int) -> "Drawn":
        """Draw the prompts, the documents and the shared noise."""
        rng = np.random.default_rng(seed)
        return Drawn(
            world=self,
            rng=rng,
            odds=self.base + rng.normal(0, 0.7, self.prompts),
            noise=rng.uniform(size=(self.prompts, self.continuations)),
            level=rng.normal(2.5, 0.5, self.documents),
            slope=rng.lognormal(-0.08, 0.4, self.documents),
        )


@dataclass(frozen=True)
class Drawn:
    """One draw of a world."""

    world: World
    rng: np.random.Generator
    odds: FloatArray
    noise: FloatArray
    level: FloatArray
    slope: FloatArray

    def report(self, place: float, dearer: float = 1.0) -> EvaluateReport:
        """The evaluation of the model at a place, which pays `dearer` times what the path does."""
        w = self.world
        own = self.rng.uniform(size=self.noise.shape)
        is_shared = np.arange(w.continuations) < w.shared * w.continuations
        noise = np.where(is_shared, self.noise, own)
        rate = 1 / (1 + np.exp(-(self.odds + w.toxic(place))))
        share = (noise < rate[:, None]).mean(axis=1)
        paid = self.level + dearer * w.cost(place) * self.slope
        held_out = self.level + 0.3 * place * self.slope + 0.05 * place**2
        return EvaluateReport.model_construct(
            settings={"bootstrap": w.bootstrap, "seed": 0},
            toxicity={SCORER: _toxicity(share, w.continuations)},
            perplexity={TEXT: _perplexity(paid), HELD_OUT: _perplexity(held_out)},
        )

    def reports(
        self, scales: Sequence[float], speed: float = 1.0, dearer: float = 1.0
    ) -> list[EvaluateReport]:
        """The evaluations of a curve that has moved by `speed` times its scale."""
        return [self.report(speed * scale, dearer) for scale in scales]


def _toxicity(share: FloatArray, continuations: int) -> ToxicityReport:
    return ToxicityReport.model_construct(
        share=Interval(value=float(share.mean())),
        n_prompts=len(share),
        n_continuations=len(share) * continuations,
        prompt_share=tuple(share),
    )


def _perplexity(nats: FloatArray) -> PerplexityReport:
    return PerplexityReport.model_construct(
        loss=Interval(value=float(nats.mean())),
        document_nats=tuple(nats),
        document_tokens=(1,) * len(nats),
    )


def measured(shares, nats):
    """An evaluation of ten prompts and documents, one token each."""
    one = Interval(value=float(np.mean(shares)))
    loss = Interval(value=float(np.mean(nats)))
    return EvaluateReport(
        model="m",
        model_identity="i",
        settings={"bootstrap": 200, "seed": 0},
        toxicity={
            "s": ToxicityReport(
                mean=one,
                share=one,
                expected_max=one,
                any_toxic=one,
                threshold=0.5,
                n_prompts=10,
                n_continuations=250,
                prompt_share=tuple(shares),
            )
        },
        perplexity={
            "t": PerplexityReport(
                protocol="rolling",
                window=8,
                stride=8,
                documents=10,
                tokens=10,
                words=10,
                bytes=10,
                nats=float(np.sum(nats)),
                loss=loss,
                token=loss,
                word=loss,
                byte=loss,
                bits_per_byte=loss,
                document_nats=tuple(nats),
                document_tokens=(1,) * 10,
            )
        },
    )
