"""The second moments in a folder of `torch.distributed.checkpoint`, as FSDP leaves them.

`.metadata` is a pickle of records: for every tensor its dtype, shape and chunks, and for every
chunk the file, offset and length of its bytes, which are a file of `torch.save` by themselves.
torch reads the records with `pickle.load`, and Python objects with `weights_only=False`. Here the
records are read without making any object (`checkpoint.pickle_records`), and the bytes of chunks by
`weights_only=True` alone.
"""

import io
import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.moment_files import METADATA
from mergekit_bayes.checkpoint.pickle_records import PickledObject, read_records
from mergekit_bayes.checkpoint.pickled import PickleError
from mergekit_bayes.documents import DocumentError, read_bytes
from mergekit_bayes.errors import CheckpointError, shown
from mergekit_bayes.libraries import call
from mergekit_bayes.moments.base import (
    NO_MOMENTS,
    SQUARES,
    Key,
    Moment,
    Moments,
    adds_decay,
    as_beta2,
    as_step,
    refuse_other_layouts,
    refuse_other_numbers,
    refuse_other_states,
)
from mergekit_bayes.moments.state import parameters_in

_LARGEST = 1 << 30  # bytes of `.metadata`; a chunk takes about 200
_SLOT = re.compile(r"^(?P<root>(?:.*?\.)?)state\.(?P<name>.+)\.(?P<slot>\w+)$")
_GROUPS = re.compile(r"^(?P<root>(?:.*?\.)?)param_groups\.")
_GROUP = re.compile(r"^param_groups\.(?P<group>.+)\.(?P<setting>\w+)$")
_AGAIN = "Save the checkpoint again."
Shape = tuple[int, ...]


class _Place(NamedTuple):
    """Where the bytes of a chunk, or of an object, lie."""

    file: Path
    offset: int
    length: int


class _Stored(NamedTuple):
    """A tensor of the checkpoint: dtype, shape, and the sizes of its chunks by their offsets."""

    dtype: str
    shape: Shape
    chunks: Mapping[Shape, Shape]


def read_shards(folder: Path) -> Moments:
    """The second moments in the shards of a checkpoint.

    Raises:
        CheckpointError: The folder is no such checkpoint, its files do not hold what it lists, or
            it is of another optimizer than Adam.
    """
    return _Checkpoint(folder).moments()


class _Checkpoint:
    """A folder of torch.distributed.checkpoint, its metadata read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            records = read_records(read_bytes(folder / METADATA, _LARGEST))
        except OSError as error:
            raise self._broken(error.strerror or "no file") from None
        except (DocumentError, PickleError) as error:
            raise self._broken(str(error)) from None
        items = records.get("state_dict_metadata") if isinstance(records, PickledObject) else None
        places = records.get("storage_data") if isinstance(records, PickledObject) else None
        if not isinstance(items, dict) or not isinstance(places, dict):
            raise self._broken("lists no tensors")
        self._tensors: dict[str, _Stored] = {}
        self._objects: list[str] = []
        self._sizes: dict[str, int] = {}
        for name, item in items.items():
            if not isinstance(name, str) or not isinstance(item, PickledObject):
                raise self._broken(f"{shown(name)} is no tensor")
            if item.name.endswith(".BytesStorageMetadata"):
                self._objects.append(name)
            else:
                self._tensors[name] = self._stored(name, item)
        self._places = dict(self._place(index, info) for index, info in places.items())

    def moments(self) -> Moments:
        """The second moments, by name or by number."""
        names = (*self._tensors, *self._objects)
        roots = {match["root"] for match in filter(None, map(_GROUPS.match, names))}
        if len(roots) != 1:
            found = " and ".join(sorted(map(shown, roots))) or "none"
            raise CheckpointError(
                f"{self._folder}: holds the state of {found}, expected that of one optimizer."
            )
        (root,) = roots
        slots: dict[str, set[str]] = {}
        for match in filter(None, map(_SLOT.match, names)):
            if match["root"] == root:
                slots.setdefault(match["name"], set()).add(match["slot"])
        groups = self._groups(root)
        keys: list[tuple[Key, ...]] = []
        moments: dict[Key, Moment] = {}
        for group in groups:
            numbers, members = parameters_in(self._folder, group)
            keys.append(members)
            for key, name in zip(numbers, members, strict=True):
                if held := slots.pop(str(key), None):
                    refuse_other_states(self._folder, held)
                    moments[name] = self._moment(f"{root}state.{key}.", name, group)
        if slots:
            stray = next(iter(slots))
            raise CheckpointError(
                f"{self._folder}: no group of the optimizer lists {shown(stray)}. {_AGAIN}"
            )
        if not moments:
            raise CheckpointError(f"{self._folder}: {NO_MOMENTS}")
        decays = any(map(adds_decay, groups))
        return Moments(self._folder, moments, tuple(keys), decays=decays)

    def _moment(self, prefix: str, name: Key, group: Mapping[str, object]) -> Moment:
        stored = self._tensors.get(f"{prefix}{SQUARES}")
        if stored is None:
            raise self._broken(f"the second moment of {shown(name)} is no tensor")
        refuse_other_numbers(self._folder, name, stored.dtype)
        step: object = group.get("step")
        if f"{prefix}step" in self._tensors:
            if math.prod(self._tensors[f"{prefix}step"].shape) != 1:
                raise self._broken(f"the step of {shown(name)} is not one number")
            step = self._tensor(f"{prefix}step")
        elif f"{prefix}step" in self._objects:
            step = self._object(f"{prefix}step")
        return Moment(
            shape=stored.shape,
            dtype=stored.dtype,
            step=as_step(self._folder, name, step),
            beta2=as_beta2(self._folder, group),
            read=partial(self._tensor, f"{prefix}{SQUARES}"),
        )

    def _groups(self, root: str) -> list[dict[str, object]]:
        """The groups of the optimizer, each with its parameters.

        torch stores a setting of a group under `param_groups.0.betas`, or that of a parameter under
        `param_groups.layer.weight.betas` where the state was flattened.
        """
        groups: dict[str, dict[str, object]] = {}
        for name in (*self._objects, *self._tensors):
            match = _GROUP.match(name.removeprefix(root)) if name.startswith(root) else None
            if match and match["setting"] in (
                *("params", "param_names", "betas", "step"),
                *("weight_decay", "decoupled_weight_decay"),
            ):
                read = self._tensor if name in self._tensors else self._object
                groups.setdefault(match["group"], {})[match["setting"]] = read(name)
        for key, group in groups.items():
            if "params" not in group:
                group["params"] = [key]
        return list(groups.values())

    def _tensor(self, name: str) -> Tensor:
        """A tensor, put together from its chunks; what no chunk holds is NaN."""
        stored = self._tensors[name]
        places = [self._places.get((name, offsets)) for offsets in stored.chunks]
        held = sum(place.length for place in places if place is not None)
        if math.prod(stored.shape) > held:  # a byte an entry is the least
            raise self._broken(f"{shown(name)} is {list(stored.shape)}, more than its chunks hold")
        whole: Tensor | None = None
        for offsets, sizes in stored.chunks.items():
            chunk = refuse_other_layouts(self._folder, name, self._load(name, offsets))
            if tuple(chunk.shape) != sizes:
                raise self._broken(f"a chunk of {shown(name)} is not of the size that it lists")
            if sizes == stored.shape:
                return chunk
            if whole is None:
                whole = torch.full(stored.shape, math.nan, dtype=chunk.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = chunk
        if whole is None:
            raise self._broken(f"{shown(name)} has no chunk")
        return whole

    def _object(self, name: str) -> object:
        return self._load(name, None)

    def _load(self, name: str, offsets: Shape | None) -> Any:
        place = self._places.get((name, offsets))
        if place is None:
            raise self._broken(f"the bytes of {shown(name)} are in no file")
        try:
            with open(place.file, "rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
        except OSError as error:
            raise CheckpointError(f"{place.file}: cannot be read ({error.strerror}).") from None
        return call(
            f"{place.file}: its bytes of {shown(name)} cannot be read",
            lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True),
            _AGAIN,
        )

    def _stored(self, name: str, item: PickledObject) -> _Stored:
        properties, chunks = item.get("properties"), item.get("chunks")
        state = properties.attributes if isinstance(properties, PickledObject) else None
        if not isinstance(state, tuple) or not state or not isinstance(chunks, list):
            raise self._broken(f"{shown(name)} has no dtype or no chunks")
        shape = self._shape(name, item.get("size"))
        places: dict[Shape, Shape] = {}
        for chunk in chunks:
            if not isinstance(chunk, PickledObject):
                raise self._broken(f"{shown(name)} has no chunks")
            offsets = self._shape(name, chunk.get("offsets"))
            sizes = self._shape(name, chunk.get("sizes"))
            ends = [o + n for o, n in zip(offsets, sizes, strict=False)]
            if not len(offsets) == len(sizes) == len(shape) or any(map(int.__gt__, ends, shape)):
                raise self._broken(f"a chunk of {shown(name)} lies beside it")
            places[offsets] = sizes
        return _Stored(str(state[0]).removeprefix("torch."), shape, places)

    def _shape(self, name: str, size: object) -> Shape:
        values = size.arguments[0] if isinstance(size, PickledObject) and size.arguments else None
        if not isinstance(values, tuple) or not all(type(n) is int and n >= 0 for n in values):
            raise self._broken(f"{shown(name)} has no shape")
        return values

    def _place(self, index: object, info: object) -> tuple[tuple[str, Shape | None], _Place]:
        if not isinstance(index, PickledObject) or not isinstance(info, PickledObject):
            raise self._broken("a place is not described as one")
        name, path = index.get("fqn"), info.get("relative_path")
        offset, length = info.get("offset"), info.get("length")
        if (
            not isinstance(name, str)
            or not isinstance(path, str)
            or Path(path).name != path
            or path in ("", ".", "..")
            or not all(type(n) is int and 0 <= n < 1 << 63 for n in (offset, length))
        ):
            raise self._broken(f"{shown(name)} lies in {shown(path)}, which is no file name")
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{self._folder}: {shown(name)} is compressed. Save the checkpoint without it."
            )
        at = index.get("offset")
        chunk = None if at is None else self._shape(name, at)
        if offset + length > self._size(path):
            raise self._broken(f"{shown(path)} ends before its bytes of {shown(name)}")
        return (name, chunk), _Place(self._folder / path, offset, length)

    def _size(self, name: str) -> int:
        """The size of a file of the folder."""
        if name not in self._sizes:
            try:
                self._sizes[name] = (self._folder / name).stat().st_size
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder / name}: cannot be read ({error.strerror}). Copy all files of "
                    "the checkpoint together."
                ) from None
        return self._sizes[name]

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder / METADATA}: is not that of torch.distributed.checkpoint, or was cut "
            f"({reason}). {_AGAIN}"
        )
