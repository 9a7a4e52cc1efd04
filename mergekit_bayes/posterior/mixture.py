"""A mixture of posteriors: several runs of one task as one posterior of it.

    q(theta) = sum_k pi_k N(theta; m_k, S_k^-1)

It is a folder of ordinary models, each with its posterior. The component of the largest weight is
that of the folder itself, which any program loads as a plain model:

    M/model.safetensors, M/posterior/   the component of the largest weight, with its side files
    M/posterior_mixture.json            the weight of every component, and whose mean it is
    M/mixture/1/, M/mixture/2/, ...     the others, each under its number

The record names no path: places follow from the weights.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from mergekit_bayes.checkpoint.side_files import MIXTURE
from mergekit_bayes.documents import read_record
from mergekit_bayes.errors import CheckpointError, MismatchError
from mergekit_bayes.posterior.edits import Identity
from mergekit_bayes.posterior.posterior import Posterior, open_posterior
from mergekit_bayes.records import Frozen

MOST_COMPONENTS = 64
_FOLDER = "mixture"
_WAY_OUT = "Mix its runs again, or remove the file to use the folder as a plain model."


class Component(Frozen):
    """One component of a mixture, as the record keeps it.

    Attributes:
        label: The run as it was named.
        weight: pi_k, up to a common factor.
        mean: Identity of its weights.
    """

    label: str
    weight: Annotated[float, Field(ge=1e-9, le=1e9)]
    mean: Identity


class Mixture(Frozen):
    """The record of a mixture, `posterior_mixture.json`.

    Attributes:
        format: Version of the record.
        components: In the order in which they were named.
    """

    format: Literal[1] = 1
    components: Annotated[tuple[Component, ...], Field(min_length=1, max_length=MOST_COMPONENTS)]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weights, which sum to one."""
        total = sum(component.weight for component in self.components)
        return tuple(component.weight / total for component in self.components)

    @property
    def runs(self) -> tuple[str, ...]:
        """What each component is called: its label, with its number where a label repeats."""
        labels = [component.label for component in self.components]
        return tuple(
            label if labels.count(label) == 1 else f"{label} ({number})"
            for number, label in enumerate(labels, 1)
        )

    @property
    def plain(self) -> int:
        """The component that is the folder's plain model: the first of the largest weight."""
        weights = [component.weight for component in self.components]
        return weights.index(max(weights))

    def place(self, folder: Path, number: int) -> Path:
        """The folder of a component.

        Args:
            folder: That of the mixture.
            number: Of the component, from 0 on.
        """
        return folder if number == self.plain else folder / _FOLDER / str(number + 1)


class OpenComponent(NamedTuple):
    """A component, opened, its weight, and what it is called; the weights sum to one."""

    posterior: Posterior
    weight: float
    run: str


def read_mixture(folder: Path) -> Mixture | None:
    """The record of the mixture in a folder; None if it holds none.

    Raises:
        CheckpointError: The record cannot be read.
    """
    file = folder / MIXTURE
    return read_record(Mixture, file, _WAY_OUT) if os.path.lexists(file) else None


def open_components(
    mixture: Mixture, plain: Posterior, stack: ExitStack
) -> tuple[OpenComponent, ...]:
    """Open the components of a mixture, in the order of its record. Reads headers and hashes.

    Args:
        mixture: The record.
        plain: The plain model of its folder, opened, which is one of the components.
        stack: Closes the others.

    Raises:
        CheckpointError: A component is missing, or cannot be read.
        MismatchError: One has other weights than the record says.
        PrecisionError: The record of a precision cannot be read.
    """
    opened = []
    for number, (weight, run) in enumerate(zip(mixture.weights, mixture.runs, strict=True)):
        place = mixture.place(plain.path, number)
        posterior = plain
        if number != mixture.plain:
            if not place.is_dir():
                raise CheckpointError(
                    f"{plain.path / MIXTURE}: names {len(mixture.components)} components, and "
                    f"'{place}' is not there. Copy the whole folder. {_WAY_OUT}"
                )
            posterior = stack.enter_context(open_posterior(str(place)))
        if posterior.identity != mixture.components[number].mean.blocks:
            raise MismatchError(
                f"'{place}' has other weights than component {number + 1} of "
                f"{plain.path / MIXTURE}. {_WAY_OUT}"
            )
        opened.append(OpenComponent(posterior, weight, run))
    return tuple(opened)
