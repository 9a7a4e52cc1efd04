"""The models of a merge: the base, the tasks, and how each one's precision counts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.specs import Closing
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.posterior import Posterior, PosteriorInfo


class TaskAnchor(NamedTuple):
    """What a task's training was anchored to, in the units of its counted precision.

    Attributes:
        precision: P, the precision of a quadratic pull to the base, 1/weight^2. None is the
            published choice P = S0, under which re-basing leaves the mean where it is.
        decay: d, the precision of a pull to zero, 1/weight^2.
    """

    precision: float | None = None
    decay: float = 0.0


@dataclass(frozen=True)
class Weighing:
    """How a likelihood precision follows from a stored one.

        H = gain * (S - contained)

    Shrinkage is added afterwards.

    Attributes:
        gain: The count used, over the count by which S is scaled.
        contained: The scalar prior inside S, on S's own scale, 1/weight^2.
        prior: The same prior in units of one full data set; it is added back and never counted.
        contains_base: For a merge, the gain at which S contains the H of the base; None for S that
            does not contain the base.
        reshape: Whether shrinkage applies. False for a merge, which was pooled and shrunk when it
            was made.
        count: Observations that H stands for after counting; None if unknown.
        anchor: What the training was anchored to.
        inner: For `BASE+ADAPTER`, the gain of the factors' precision, which the precision of their
            product includes already.
    """

    gain: float = 1.0
    contained: float = 0.0
    prior: float = 0.0
    contains_base: float | None = None
    reshape: bool = True
    count: float | None = None
    anchor: TaskAnchor = field(default_factory=TaskAnchor)
    inner: float = 1.0


@dataclass(frozen=True, eq=False)
class Input:
    """One model of a merge. Two inputs are equal only if they are the same object.

    Attributes:
        posterior: The opened model.
        scale: The task's scale, dimensionless; 0 for the base, which is not scaled.
        weighing: How its precision counts.
        mixture: For a component of a mixture, the number of that among the models as named; None
            for a model of its own.
        weight: The component's weight in its mixture.
        mixed_in: The mixture of a component, as the user gave it: its plain model.
        run: What the record of the mixture calls the component.
    """

    posterior: Posterior
    scale: float
    weighing: Weighing = field(default_factory=Weighing)
    mixture: int | None = None
    weight: float = 1.0
    mixed_in: Posterior | None = None
    run: str = ""

    @property
    def ref(self) -> str:
        """The path or Hub id, as the user gave it; for a component `MIXTURE: RUN`."""
        return self.posterior.ref if self.mixed_in is None else f"{self.mixed_in.ref}: {self.run}"

    @property
    def pinned(self) -> str:
        """The same, with the commit of what is on the Hub."""
        if self.mixed_in is None:
            return self.posterior.pinned
        return f"{self.mixed_in.pinned}: {self.run}"

    @property
    def precision_info(self) -> PosteriorInfo | None:
        """The record of the model's precision."""
        return precision_info(self.posterior)

    @property
    def recorded_pull(self) -> TaskAnchor:
        """What its record says that training pulled towards, counted as its precision is.

        Zero where it records no quadratic pull. The pull on an adapter's factors is none on the
        weights.
        """
        info, gain = self.posterior.info, self.weighing.gain
        pull = None if info is None or info.merge is not None else info.anchor
        if pull is None or pull.kind == "none" or not pull.precision:
            return TaskAnchor(0.0)
        strength = gain * pull.precision
        return TaskAnchor(0.0, strength) if pull.kind == "zero" else TaskAnchor(strength)


@dataclass(frozen=True)
class Inputs(Closing):
    """All models of a merge. Iterating gives the base, if any, and then the tasks.

    Attributes:
        base: What the tasks were fine-tuned from; None for an average.
        tasks: In the order of the command line; at least one.
    """

    base: Input | None
    tasks: tuple[Input, ...]

    def __iter__(self) -> Iterator[Input]:
        if self.base is not None:
            yield self.base
        yield from self.tasks

    def __len__(self) -> int:
        return len(self.tasks) + (self.base is not None)

    @property
    def donor(self) -> Input:
        """The input whose names, shapes and shards the output has: the base or the first task."""
        return self.tasks[0] if self.base is None else self.base

    @property
    def files(self) -> dict[Path, Stamp]:
        """All files of tensors that are read, as they were when opened."""
        files: dict[Path, Stamp] = {}
        for model in self:
            for file, stamp in model.posterior.inputs.items():
                files.setdefault(file, stamp)  # the first, where two models share a file
        return files

    @property
    def folders(self) -> list[Path]:
        """The folders of all models, each once; of BASE+ADAPTER both."""
        opened = [p for model in self for p in (model.posterior, *model.posterior.parts)]
        return list(dict.fromkeys(p.path for p in opened if p.path.is_dir()))

    def close(self) -> None:
        """Close the files of all models."""
        for model in self:
            model.posterior.close()


def precision_info(model: Posterior) -> PosteriorInfo | None:
    """The record of a model's precision; that of `BASE+ADAPTER` is the adapter's."""
    if model.parts and model.precision is not None:
        return model.parts[-1].info
    return model.info
