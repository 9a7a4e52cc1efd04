"""Looks at models of the experiment on addition that are written, of one scale alone."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from sentiment_looks import Look, Name, Target, file_of, load, look_at
from sentiment_world import Step, World


class Written(Protocol):
    """A way of merging whose models are written, of one scale alone."""

    @property
    def name(self) -> str:
        """Of its files."""

    def step(self, world: World, seed: int) -> Step:
        """Its model of a seed."""


def look_at_written(world: World, written: Written, seed: int, target: Target) -> None:
    """Make and measure a model that is written."""
    step = written.step(world, seed).done()
    look_at(world, step.model, file_of(world, step), target, world.size.tasks)


def looks_at_written(world: World, written: Iterable[Written]) -> Iterator[tuple[Name, int, Look]]:
    """The looks at such models that are there."""
    for one in written:
        for seed in world.size.seeds:
            file = file_of(world, one.step(world, seed))
            if file.exists():
                yield Name(one.name), seed, load(file)
