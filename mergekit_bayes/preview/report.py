"""What a preview reports."""

import math
from typing import Any, Literal

from mergekit_bayes import __version__
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.preview.settings import Origin
from mergekit_bayes.records import Record


class Point(Record):
    """One merge and what it scored.

    Attributes:
        scales: The scale of each task, dimensionless.
        origin: Where the scales come from.
        loss: For each data set the mean loss, in nats a token or an example; infinite where the
            merge could not be measured.
        accuracy: For each data set the share of right labels; none of a language model.
        predicted: The rise of the models' losses that `--predict-first` predicts, nats an
            observation.
        trusted: Whether that prediction is for a merge nearer to every task than the base is.
        failure: Why it could not be formed or measured.
        form_seconds: What forming its parameters took.
        measure_seconds: What measuring it took.
    """

    scales: tuple[float, ...]
    origin: Origin
    loss: dict[str, float]
    accuracy: dict[str, float] = {}
    predicted: float | None = None
    trusted: bool | None = None
    failure: str | None = None
    form_seconds: float = 0.0
    measure_seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean loss over the data sets, which count alike."""
        return math.fsum(self.loss.values()) / len(self.loss)


class PreviewReport(Record):
    """Many merges of one recipe side by side.

    Attributes:
        version: Version of this package.
        settings: The config as JSON.
        summary: What the recommended merge does, in one line.
        formula: Its equation, or what it does.
        base: The base, as the recipe names it; None for an average.
        tasks: The models whose scales vary, as the recipe names them.
        unit: What one observation is: `token` or `example`.
        observations: For each data set, how many tokens or examples are scored.
        points: The merges, the recipe's own first.
        held_out: By set of texts that decided nothing, the loss of the recommended merge less that
            of the recipe's own, nats an observation, paired, with its 95 % interval.
        skipped: How many merges were predicted only, and not measured.
        pareto: Indices of the points that no other point beats on all data sets, the smallest loss
            on the first data set first.
        chosen: Index of the recommended point.
        held_bytes: Memory that the inputs took.
        seconds: Time of everything.
        path: The folder written.
    """

    version: str = __version__
    settings: dict[str, Any]
    summary: str
    formula: str
    base: str | None
    tasks: tuple[str, ...]
    unit: Literal["token", "example"]
    observations: dict[str, int]
    points: tuple[Point, ...]
    held_out: dict[str, Interval] = {}
    skipped: int = 0
    pareto: tuple[int, ...]
    chosen: int
    held_bytes: int
    seconds: float
    path: str

    @property
    def unit_of_losses(self) -> str:
        """That of a mean loss, in words."""
        return f"nats {'an' if self.unit == 'example' else 'a'} {self.unit}"

    @property
    def best(self) -> Point:
        """The recommended point."""
        return self.points[self.chosen]
