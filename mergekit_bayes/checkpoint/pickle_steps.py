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


def read_pickle(data: bytes) -> object:
    """The value that a pickle describes, with its tensors as `PickledTensor` or `OtherTensor`.

    Args:
        data: The pickle, of at most `LARGEST` bytes.

    Raises:
        ForeignError: It names something that is no part of a tensor.
        PickleError: It is broken, or describes what no plain tensor has.
    """
    return PickleReader().read(data)


def _steps(data: bytes, most: int) -> Iterator[tuple[str, Any]]:
    """The steps of a pickle, by name, and their arguments."""
    steps = pickletools.genops(data)
    for _ in range(most):
        try:
            opcode, argument, _ = next(steps)
        except StopIteration:
            return
        except ValueError as error:  # the step is unknown or cut
            raise PickleError(f"holds a broken pickle ({str(error)[:100]})") from None
        yield opcode.name, argument
    raise PickleError(f"holds a pickle of more than {most:,} steps")


class PickleReader:
    """The stack machine of a pickle.

    Attributes:
        steps: What each step does, by its name.
        most_steps: The most steps of a pickle that are followed.
        newest: The newest protocol that is read.
        content: What has no other steps, for messages.
    """

    steps: Mapping[str, Callable[[Any, Any], None]]
    most_steps = 2_000_000  # a tensor takes 30
    newest = 3  # of its steps, tensors need none that 2 does not have
    content = "no tensor"

    def __init__(self) -> None:
        self._stack: list[object] = []
        self._marked: list[list[object]] = []
        self._memo: dict[int, object] = {}
        self._storages: dict[str, Storage] = {}

    def read(self, data: bytes) -> object:
        """The value that a pickle describes.

        Raises:
            PickleError: It is broken, or takes a step that is not known.
        """
        for opcode, argument in _steps(data, self.most_steps):
            if opcode == "STOP":
                return self.pop()
            step = self.steps.get(opcode)
            if step is None:
                raise PickleError(
                    f"holds a pickle with the step {opcode}, which {self.content} has"
                )
            step(self, argument)
        raise PickleError("holds a pickle without an end")

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
        if protocol > self.newest:
            raise PickleError(
                f"holds a pickle of protocol {protocol}, where at most {self.newest} is read"
            )

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


PickleReader.steps = {
    "PROTO": PickleReader.begin,
    "MARK": PickleReader.mark,
    "NONE": PickleReader.push,
    "NEWTRUE": lambda reader, arg: reader.push(True),
    "NEWFALSE": lambda reader, arg: reader.push(False),
    "BININT": PickleReader.push,
    "BININT1": PickleReader.push,
    "BININT2": PickleReader.push,
    "LONG1": PickleReader.push,
    "BINFLOAT": PickleReader.push,
    "BINUNICODE": PickleReader.push,
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
    "BINPUT": PickleReader.put,
    "LONG_BINPUT": PickleReader.put,
    "BINGET": PickleReader.get,
    "LONG_BINGET": PickleReader.get,
    "GLOBAL": lambda reader, arg: reader.name(arg.replace(" ", ".")),
    "REDUCE": PickleReader.call,
    "BUILD": PickleReader.build,
    "BINPERSID": PickleReader.load,
}
