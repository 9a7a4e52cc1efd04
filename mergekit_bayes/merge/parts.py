"""A part of a merge: one of several processes or machines."""

import os
from typing import NamedTuple

from mergekit_bayes.errors import ConfigError

# Rank and world size as set by torchrun and accelerate launch, srun, Open MPI and MPICH.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)


class Part(NamedTuple):
    """One of several parts of a plan.

    Attributes:
        number: Which part, counted from 1.
        of: How many parts there are.
    """

    number: int
    of: int

    def takes(self, position: float) -> bool:
        """Whether a unit at this place of the whole merge, in [0, 1), is in the part."""
        return int(position * self.of) == self.number - 1


def parse_part(text: str) -> Part:
    """The part that `I/N` names.

    Raises:
        ConfigError: Not 1 <= I <= N.
    """
    index, separator, of = text.partition("/")
    if not (separator and index.isdecimal() and of.isdecimal() and 1 <= int(index) <= int(of)):
        raise ConfigError(f"--shard {text}: expected I/N with 1 <= I <= N, such as 1/4.")
    return Part(int(index), int(of))


def part_of_launcher() -> Part | None:
    """This process's part if a launcher started several, else None."""
    for rank, size in _LAUNCHERS:
        if os.environ.get(rank, "").isdecimal() and os.environ.get(size, "").isdecimal():
            if int(os.environ[size]) > 1:
                return Part(int(os.environ[rank]) + 1, int(os.environ[size]))
            return None
    return None
