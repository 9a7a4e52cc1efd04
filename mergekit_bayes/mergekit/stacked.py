"""A checkpoint whose layers are layers of other checkpoints, by name and without a copy."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mergekit_bayes.checkpoint.specs import CheckpointSource, Closing, TensorSpec
from mergekit_bayes.checkpoint.stamps import Stamp
from mergekit_bayes.checkpoint.token_rows import stored_dtype


class Origin(NamedTuple):
    """Where a tensor comes from.

    Attributes:
        source: The checkpoint.
        name: Its name there.
    """

    source: CheckpointSource
    name: str


class StackedSource(Closing):
    """Tensors of several checkpoints under names of their own.

    The checkpoints stay their owner's: closing this source closes none of them.

    Args:
        origins: Where each tensor comes from, by its name here; at least one.
    """

    def __init__(self, origins: Mapping[str, Origin]) -> None:
        self._origins = dict(origins)
        self._specs = {name: origin.source.specs[origin.name] for name, origin in origins.items()}
        self._sources = list({id(o.source): o.source for o in origins.values()}.values())
        self.metadata: Mapping[str, str] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every tensor, by its name here."""
        return self._specs

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of all checkpoints, in their order."""
        return tuple(dict.fromkeys(file for source in self._sources for file in source.files))

    @property
    def inputs(self) -> Mapping[Path, Stamp]:
        """All files that are read, as they were when opened."""
        return {file: stamp for source in self._sources for file, stamp in source.inputs.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """None: the checkpoints' own are told once for each of them."""
        return ()

    @property
    def is_computed(self) -> bool:
        """Whether a checkpoint computes its tensors as they are read."""
        return any(source.is_computed for source in self._sources)

    def origin(self, name: str) -> Origin:
        """Where a tensor comes from."""
        return self._origins[name]

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        origin = self._origins[name]
        return origin.source.where(origin.name)

    def file_of(self, name: str) -> int:
        """Index of the file to which a tensor belongs."""
        origin = self._origins[name]
        file = origin.source.files[origin.source.file_of(origin.name)]
        return self.files.index(file)

    def read_bytes(self, name: str, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's raw bytes, starting at byte `offset`."""
        origin = self._origins[name]
        origin.source.read_bytes(origin.name, offset, out)

    def stored_dtype(self, name: str) -> str:
        """The dtype in which the file of its checkpoint has a tensor."""
        origin = self._origins[name]
        return stored_dtype(origin.source, origin.name)

    def close(self) -> None:
        """Do nothing: whoever opened the checkpoints closes them."""
