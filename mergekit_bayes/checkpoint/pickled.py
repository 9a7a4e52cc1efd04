"""The values in a pickle of tensors, and what the functions that it names would make of them.

A tensor is only its dtype, shape and place in the archive, so that what is claimed costs nothing
until it has been compared with the bytes that are there.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeGuard

from mergekit_bayes.checkpoint.specs import ITEM_SIZE
from mergekit_bayes.errors import shown

_MOST_DIMENSIONS = 64  # as in a safetensors header
_TOO_LARGE = 1 << 63

# The dtypes as the format calls them. `complex128` it cannot hold.
_STORAGES = {
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.QInt8Storage": "qint8",
    "torch.QUInt8Storage": "quint8",
    "torch.QInt32Storage": "qint32",
    "torch.storage.UntypedStorage": "untyped",
}
_DTYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint64": "U64",
    "torch.uint32": "U32",
    "torch.uint16": "U16",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
    "torch.complex64": "C64",
    "torch.float8_e4m3fnuz": "float8_e4m3fnuz",
    "torch.float8_e5m2fnuz": "float8_e5m2fnuz",
    "torch.complex128": "complex128",
    "torch.complex32": "complex32",
}
_ITEM_SIZE = ITEM_SIZE | {
    "untyped": 1,
    "qint8": 1,
    "quint8": 1,
    "qint32": 4,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "complex128": 16,
    "complex32": 4,
}
_SIGNED = ("F64", "F32", "F16", "BF16", "C64")  # what may be stored with its signs turned
# What makes tensors that are more, or less, than rows of numbers; and what such tensors are.
_OTHERS = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantised",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "without data (on the meta device)",
}
# What is named on the way to them, and only there.
_NAMED = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
    "torch.per_channel_affine_float_qparams",
)
# What else an attribute of a tensor may hold, where torch.load reads it with `weights_only`.
_ATTRIBUTES = (
    "torch.device",
    "_codecs.encode",  # of bytes
    "__builtin__.set",
    "__builtin__.complex",
    "builtins.set",
    "builtins.complex",
)


class PickleError(Exception):
    """The pickle is not of plain tensors; the text is a predicate of the file."""


class ForeignError(PickleError):
    """The pickle names something that is no part of a tensor; the text is the name."""


class Storage(NamedTuple):
    """A member of the archive that holds the numbers of one or more tensors.

    Attributes:
        key: The member's name within `data/`.
        dtype: What it was saved as.
        size: Its number of bytes.
    """

    key: str
    dtype: str
    size: int


class PickledTensor(NamedTuple):
    """A tensor as the pickle describes it; equal ones are the same view of the same bytes.

    Attributes:
        storage: Where its numbers are.
        dtype: As safetensors calls it.
        offset: Its first element, counted in elements.
        shape: Its shape.
        stride: Elements from one index to the next, by dimension.
        is_conjugate: Whether the imaginary parts are to be negated.
        is_negative: Whether all numbers are to be negated.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    is_conjugate: bool = False
    is_negative: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether its bytes lie together, in the order in which safetensors stores them."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != expected:
                return False
            expected *= size
        return not (self.is_conjugate or self.is_negative)


class OtherTensor(NamedTuple):
    """A tensor that is not plain.

    Attributes:
        kind: What it is instead, to follow "is".
        is_broken: Whether there can be no such tensor.
    """

    kind: str
    is_broken: bool = False


class Named(NamedTuple):
    """A function, class or dtype that a pickle may name.

    Attributes:
        name: Its full name.
    """

    name: str


def named(name: str) -> Named:
    """What a pickle names.

    Raises:
        ForeignError: It is no part of a tensor.
    """
    if not any(
        name in known for known in (_MAKERS, _STORAGES, _DTYPES, _OTHERS, _NAMED, _ATTRIBUTES)
    ):
        raise ForeignError(name)
    return Named(name)


def storage(description: object) -> Storage:
    """The storage of a description in a pickle.

    Raises:
        PickleError: It describes none.
    """
    match description:
        case ("storage", Named(kind), str(key), str(), count) if kind in _STORAGES and _is_count(
            count
        ):
            dtype = _STORAGES[kind]
            return Storage(key, dtype, count * _ITEM_SIZE[dtype])
        case _:
            raise PickleError("holds a broken pickle (a storage is not described as one)")


def call(function: object, arguments: object) -> object:
    """What a function would make.

    Raises:
        PickleError: It is none of those that may be named.
    """
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise PickleError("holds a broken pickle (it calls what is no function)")
    if function.name in _OTHERS:
        return OtherTensor(_OTHERS[function.name])
    if function.name in _ATTRIBUTES:
        return function  # in place of the value, which says nothing of a tensor's numbers
    maker = _MAKERS.get(function.name)
    made = None if maker is None else maker(*arguments)
    if made is None:
        return OtherTensor(f"made by {function.name} of other values than a tensor has", True)
    return made


def _ordered_dict(*arguments: object) -> object:
    return None if arguments else OrderedDict()


def _size(*arguments: object) -> object:
    return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], tuple) else None


def _layout(*arguments: object) -> object:
    return OtherTensor("a layout") if len(arguments) == 1 else None


def _tensor(*arguments: object) -> object:
    """Of a storage with a dtype."""
    match arguments:
        case (Storage() as storage, offset, shape, stride, bool(), _, *metadata) if (
            len(metadata) < 2
        ):
            return _view(storage, storage.dtype, offset, shape, stride, *metadata)
        case _:
            return None


def _typed_tensor(*arguments: object) -> object:
    """Of a dtype that has no storage of its own."""
    match arguments:
        case (
            Storage() as storage,
            offset,
            shape,
            stride,
            bool(),
            _,
            Named(dtype),
            *metadata,
        ) if dtype in _DTYPES and len(metadata) < 2:
            return _view(storage, _DTYPES[dtype], offset, shape, stride, *metadata)
        case _:
            return None


def _parameter(*arguments: object) -> object:
    """A tensor that is trained, perhaps with attributes, which say nothing of its numbers."""
    match arguments:
        case (PickledTensor() | OtherTensor() as tensor, bool(), _) | (
            PickledTensor() | OtherTensor() as tensor,
            bool(),
            _,
            _,
        ):
            return tensor
        case _:
            return None


def _with_attributes(*arguments: object) -> object:
    """A tensor to which Python's attributes were added."""
    match arguments:
        case (Named(name) as function, Named(kind), tuple(rest), _) if (
            kind in _NAMED[:2] and name != "torch._tensor._rebuild_from_type_v2"
        ):
            return call(function, rest)
        case _:
            return None


def _of_another_device(*arguments: object) -> object:
    """A tensor of a device that saves a copy of it on the CPU, such as a TPU."""
    match arguments:
        case (PickledTensor(dtype=stored) as tensor, Named(dtype), str(), bool()) if (
            _DTYPES.get(dtype) == stored
        ):
            return tensor
        case _:
            return None


def _view(
    storage: Storage,
    dtype: str,
    offset: object,
    shape: object,
    stride: object,
    metadata: object = None,
) -> object:
    """A tensor within its storage; None where there is no such tensor."""
    if not (
        _is_count(offset)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride) <= _MOST_DIMENSIONS
        and all(_is_count(n) for n in (*shape, *stride))
        and isinstance(metadata, dict | None)
    ):
        return None
    item, bits = _ITEM_SIZE[dtype], metadata or {}
    entries, last = 1, offset
    for size, step in zip(shape, stride, strict=True):
        entries *= max(size, 1)
        last += (size - 1) * step
        if entries * item >= _TOO_LARGE:
            return OtherTensor(f"of the shape {shown(shape)}, which no tensor can have", True)
    if 0 not in shape and (last + 1) * item > storage.size:
        return OtherTensor(
            f"of the shape {shown(shape)} with strides {shown(stride)} from element {offset} on, "
            f"which goes beyond the {storage.size:,} bytes of its storage",
            True,
        )
    if not set(bits) <= {"conj", "neg"} or not all(isinstance(v, bool) for v in bits.values()):
        return None
    if (bits.get("conj") and dtype != "C64") or (bits.get("neg") and dtype not in _SIGNED):
        return None
    return PickledTensor(
        storage, dtype, offset, shape, stride, bits.get("conj", False), bits.get("neg", False)
    )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _TOO_LARGE


_MAKERS: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
    "torch.serialization._get_layout": _layout,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _of_another_device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}
