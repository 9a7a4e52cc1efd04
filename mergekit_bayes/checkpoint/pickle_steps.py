"""Read what a pickle of tensors says, without loading it.

A pickle is a program, and whoever loads it runs it. Here its steps are followed by an interpreter
that knows the values of a state dict and nothing else: texts, numbers, tuples, lists, dicts, and
the descriptions of storages and tensors in `pickled`. The steps are those of protocol 2, in which
`torch.save` writes.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mergekit_bayes.checkpoint.pickled import PickleError, Storage, call, named, storage
from mergekit_bayes.errors import shown

LARGEST = 16 << 20  # bytes; a checkpoint of 10,000 tensors takes about 2 MB
_NEWEST = 3  # protocol; of its steps, tensors need none that 2 does not have
_MOST_STEPS = 2_000_000  # a tensor takes 30


def read_pickle(data: bytes) -> object:
    """The value that a pickle describes, with its tensors as `PickledTensor` or `OtherTensor`.

    Args:
        data: The pickle, of at most `LARGEST` bytes.

    Raises:
        ForeignError: It names something that is no part of a tensor.
        PickleError: It is broken, or describes what no plain tensor has.
    """
    reader = _Reader()
    for opcode, argument in _steps(data):
        if opcode == "STOP":
            return reader.pop()
        step = _STEPS.get(opcode)
        if step is None:
            raise PickleError(f"holds a pickle with the step {opcode}, which no tensor has")
        step(reader, argument)
    raise PickleError("holds a pickle without an end")


def _steps(data: bytes) -> Iterator[tuple[str, Any]]:
    """The steps of a pickle, by name, and their arguments."""
    steps = pickletools.genops(data)
    for _ in range(_MOST_STEPS):
        try:
            opcode, argument, _ = next(steps)
        except StopIteration:
            return
        except ValueError as error:  # the step is unknown or cut
            raise PickleError(f"holds a broken pickle ({str(error)[:100]})") from None
        yield opcode.name, argument
    raise PickleError(f"holds a pickle of more than {_MOST_STEPS:,} steps")


class _Reader:
    """The stack machine of a pickle."""

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        """Take the topmost value."""
        if not self._stack:
            raise PickleError("holds a broken pickle (a value is missing)")
        return self._stack.pop()

    def push(self, value: object) -> None:
        """Put a value on the stack."""
        self._stack.append(value)

    def begin(self, protocol: int) -> None:
        """Refuse protocols whose steps are other ones, and which torch.load refuses too."""
        if protocol > _NEWEST:
            raise PickleError(f"holds a pickle of protocol {protocol}, where 2 is what is read")

    def mark(self, _: object) -> None:
        """Begin a sequence of values."""
        self._marked.append(self._stack)
        self._stack = []

    def pop_marked(self) -> list[object]:
        """Take the values since the last mark."""
        if not self._marked:
            raise PickleError("holds a broken pickle (a mark is missing)")
        values, self._stack = self._stack, self._marked.pop()
        return values

    def put(self, index: int) -> None:
        """Remember the topmost value."""
        value = self.pop()
        self.push(value)
        self._memo[index] = value

    def get(self, index: int) -> None:
        """Recall a value."""
        if index not in self._memo:
            raise PickleError("holds a broken pickle (it recalls what it did not store)")
        self.push(self._memo[index])

    def pack(self, count: int) -> None:
        """Make a tuple of the topmost values."""
        if len(self._stack) < count:
            raise PickleError("holds a broken pickle (a value is missing)")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def fill(self, items: list[object]) -> None:
        """Put names and values, in turn, into the topmost dict."""
        target = self.pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("holds a broken pickle (items without a dict)")
        for name, value in zip(items[::2], items[1::2], strict=True):
            # Of a tuple, the hash alone may take for ever.
            if not isinstance(name, str | int | float | None):
                raise PickleError(f"holds a dict with a name of type {type(name).__name__}")
            target[name] = value
        self.push(target)

    def extend(self, items: list[object]) -> None:
        """Append values to the topmost list."""
        target = self.pop()
        if type(target) is not list:
            raise PickleError("holds a broken pickle (items without a list)")
        target.extend(items)
        self.push(target)

    def name(self, name: str) -> None:
        """Name a function or class, of those that make tensors."""
        self.push(named(name))

    def build(self, _: object) -> None:
        """Give the topmost value its attributes: those of an ordered dict, which say nothing."""
        self.pop()
        target = self.pop()
        if not isinstance(target, OrderedDict):
            raise PickleError("holds a value with attributes beside tensors")
        self.push(target)

    def call(self, _: object) -> None:
        """Make what a function would make."""
        arguments, function = self.pop(), self.pop()
        self.push(call(function, arguments))

    def load(self, _: object) -> None:
        """Name a storage."""
        found = storage(self.pop())
        if self._storages.setdefault(found.key, found) != found:
            raise PickleError(f"describes its storage {shown(found.key)} in two ways")
        self.push(found)


_STEPS: Mapping[str, Callable[[_Reader, Any], None]] = {
    "PROTO": _Reader.begin,
    "MARK": _Reader.mark,
    "NONE": _Reader.push,
    "NEWTRUE": lambda reader, arg: reader.push(True),
    "NEWFALSE": lambda reader, arg: reader.push(False),
    "BININT": _Reader.push,
    "BININT1": _Reader.push,
    "BININT2": _Reader.push,
    "LONG1": _Reader.push,
    "BINFLOAT": _Reader.push,
    "BINUNICODE": _Reader.push,
    "EMPTY_TUPLE": lambda reader, arg: reader.push(()),
    "EMPTY_LIST": lambda reader, arg: reader.push([]),
    "EMPTY_DICT": lambda reader, arg: reader.push({}),
    "TUPLE": lambda reader, arg: reader.push(tuple(reader.pop_marked())),
    "TUPLE1": lambda reader, arg: reader.pack(1),
    "TUPLE2": lambda reader, arg: reader.pack(2),
    "TUPLE3": lambda reader, arg: reader.pack(3),
    "APPEND": lambda reader, arg: reader.extend([reader.pop()]),
    "APPENDS": lambda reader, arg: reader.extend(reader.pop_marked()),
    "SETITEM": lambda reader, arg: reader.fill([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, arg: reader.fill(reader.pop_marked()),
    "BINPUT": _Reader.put,
    "LONG_BINPUT": _Reader.put,
    "BINGET": _Reader.get,
    "LONG_BINGET": _Reader.get,
    "GLOBAL": lambda reader, arg: reader.name(arg.replace(" ", ".")),
    "REDUCE": _Reader.call,
    "BUILD": _Reader.build,
    "BINPERSID": _Reader.load,
}
