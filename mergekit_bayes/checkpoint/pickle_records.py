"""Read the records in a pickle of Python objects, without making the objects.

`torch.distributed.checkpoint` writes what its shards hold as a pickle of dataclasses, and reads it
with `pickle.load`, which runs whatever the file names. Here nothing that is named is ever looked
up: an object is the name of its class, the arguments that it was made with, and its attributes.
The steps are those of protocol 4.
"""

from collections.abc import Mapping
from typing import Any

from mergekit_bayes.checkpoint.pickle_steps import PickleReader
from mergekit_bayes.checkpoint.pickled import PickleError


class PickledObject:
    """An object as a pickle describes it; two of them are equal only if they are one.

    Attributes:
        name: Full name of its class, or of the function that makes it.
        arguments: What it is made with.
        attributes: What it is given afterwards, mostly a dict; None where it is given nothing.
    """

    def __init__(self, name: str, arguments: tuple[object, ...]) -> None:
        """An object without attributes yet."""
        self.name = name
        self.arguments = arguments
        self.attributes: object = None

    def get(self, attribute: str) -> Any:
        """One of its attributes; None where it has no such attribute."""
        return self.attributes.get(attribute) if isinstance(self.attributes, Mapping) else None


class _Name(str):
    """The full name of a class or function."""


def read_records(data: bytes) -> object:
    """The value that a pickle describes, with its objects as `PickledObject`.

    Raises:
        PickleError: It is broken, or holds other steps than those of plain objects.
    """
    return _RecordReader().read(data)


class _RecordReader(PickleReader):
    """The stack machine of a pickle of objects."""

    most_steps = 50_000_000  # a shard of a tensor takes about 50
    newest = 5
    content = "no record"

    def name(self, name: str) -> None:
        """Name a class or function."""
        self.push(_Name(name))

    def name_from_stack(self, _: object) -> None:
        """Name a class or function by the two topmost texts."""
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("holds a broken pickle (a name is no text)")
        self.push(_Name(f"{module}.{name}"))

    def call(self, _: object) -> None:
        """Describe what a class or function would make."""
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Name) or not isinstance(arguments, tuple):
            raise PickleError("holds a broken pickle (it calls what is no function)")
        self.push(PickledObject(str(function), arguments))

    def build(self, _: object) -> None:
        """Give the topmost object its attributes."""
        state, target = self.pop(), self.pop()
        if not isinstance(target, PickledObject):
            raise PickleError("holds a broken pickle (attributes without an object)")
        target.attributes = state
        self.push(target)

    def fill(self, items: list[object]) -> None:
        """Put names and values, in turn, into the topmost dict."""
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("holds a broken pickle (items without a dict)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int | float | PickledObject | None):
                raise PickleError(f"holds a dict with a name of type {type(key).__name__}")
            target[key] = value
        self.push(target)

    def memoize(self, _: object) -> None:
        """Remember the topmost value under the next number."""
        self.put(len(self._memo))


_RecordReader.steps = {
    **PickleReader.steps,
    "FRAME": lambda reader, arg: None,
    "SHORT_BINUNICODE": PickleReader.push,
    "BINUNICODE8": PickleReader.push,
    "STACK_GLOBAL": _RecordReader.name_from_stack,
    "MEMOIZE": _RecordReader.memoize,
    "NEWOBJ": _RecordReader.call,
    "REDUCE": _RecordReader.call,
    "BUILD": _RecordReader.build,
}
