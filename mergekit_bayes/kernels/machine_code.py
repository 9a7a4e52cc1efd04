"""Compiled functions kept as machine code, which later processes run without numba.

Importing numba and reading its own cache costs 0.4 CPU seconds, more than a pass over half a
billion entries. What is kept is the object code of one function for one layout of its arguments,
behind an entry that takes them from one buffer, 8 bytes each, as numba flattens them:

    array    nothing, nothing, size, bytes of an entry, data, shape, strides
    tuple    its items
    number   itself, as int64, uint64, float32 or float64

A function that needs more than this of Python or numba is not kept.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mergekit_bayes.code_cache import code_folder
from mergekit_bayes.documents import DocumentError, read_bytes, read_text

Code: TypeAlias = Callable[[list[Any]], None]  # called with the values of `flatten`

_ENTRY = "bmerge_entry"
_LARGEST = 16 << 20  # bytes of kept code; those of 24 models have less than 1 MB
_DIGEST = hashlib.sha256().digest_size
# Of the reference counts of arrays, which these functions only lend: it is never reached.
_NEVER_CALLED = "NRT_MemInfo_call_dtor"
# By struct's code of an argument: what LLVM calls its type.
_TYPES = {"P": "ptr", "q": "i64", "Q": "i64", "f4x": "float", "d": "double"}
_engines: list[Any] = []  # own the code that was loaded


class Name(NamedTuple):
    """What tells a function from all others.

    Attributes:
        identity: Which function it is. Code of an earlier version is replaced.
        version: What it was made from: sources and constants.
    """

    identity: str
    version: str


class Constant:
    """An argument that is the same in many calls, and is flattened once.

    Args:
        value: The argument.

    Attributes:
        value: The argument.
        codes: Its part of the layout; None where it has none.
        values: Its values in that order.
    """

    __slots__ = ("codes", "value", "values")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.codes: list[str] | None = []
        self.values: list[Any] = []
        try:
            _flatten(value, self.codes, self.values)
        except TypeError:  # of another kind: numba may know it
            self.codes = None


def flatten(arguments: tuple[Any, ...]) -> tuple[str, list[Any]]:
    """The layout of the arguments of a compiled function, and their values in its order.

    Args:
        arguments: Numbers, arrays, tuples of them, and `Constant`s.

    Raises:
        TypeError: An argument is of another kind, or an array that is not contiguous.
    """
    codes: list[str] = []
    values: list[Any] = []
    _flatten(arguments, codes, values)
    return "".join(codes), values


def find(name: Name, layout: str) -> Code | None:
    """The kept code of a function for a layout of arguments; None if there is none.

    Args:
        name: The function.
        layout: As `flatten` gives it.
    """
    file = _file_of(name, layout)
    try:
        content = read_bytes(file, _LARGEST) if file is not None else b""
    except (OSError, DocumentError):
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    if not code or _digest(name, code) != digest:
        return None  # of another version, cut, or of a failing disk: compiled again
    return _loaded(code, layout)


def keep(name: Name, layout: str, kernel: Any) -> None:
    """Keep the code of a function that numba has just compiled, where it can be kept.

    Args:
        name: The function.
        layout: The layout of the arguments that it was compiled for.
        kernel: numba's dispatcher.
    """
    file, code = _file_of(name, layout), None
    if file is not None:
        with suppress(Exception):  # numba's and LLVM's: what cannot be kept is compiled again
            code = _object_code(kernel, layout)
    if file is None or code is None:
        return
    with suppress(OSError):
        handle, partial = tempfile.mkstemp(dir=file.parent)
        try:
            with open(handle, "wb") as stream:
                stream.write(_digest(name, code) + code)
            os.replace(partial, file)  # another process sees all of it or nothing
        except OSError:
            os.unlink(partial)


def _flatten(value: Any, codes: list[str], values: list[Any]) -> None:
    if isinstance(value, Constant):
        if value.codes is None:
            raise TypeError("a constant that has no layout")
        codes += value.codes
        values += value.values
    elif isinstance(value, tuple):
        codes.append("(")
        for item in value:
            _flatten(item, codes, values)
        codes.append(")")
    elif isinstance(value, np.ndarray):
        if not value.flags.carray:
            raise TypeError("an array that is not contiguous, aligned and writeable")
        codes.append(f"[{value.dtype.str}{value.ndim}]")
        data = value.__array_interface__["data"][0]
        values += (0, 0, value.size, value.itemsize, data, *value.shape, *value.strides)
    elif isinstance(value, np.float32):
        codes.append("f")
        values.append(value)
    elif isinstance(value, float):  # numpy's float64, too
        codes.append("d")
        values.append(value)
    elif isinstance(value, np.uint64):
        codes.append("Q")
        values.append(value)
    elif isinstance(value, int | np.int64) and not isinstance(value, bool):
        codes.append("q")
        values.append(value)
    else:
        raise TypeError(f"an argument of type {type(value).__name__}")


def _codes(layout: str) -> list[str]:
    """The codes of `struct` for the values of a layout."""
    codes: list[str] = []
    rest = layout
    while rest:
        mark = rest[0]
        if mark == "[":
            array, _, rest = rest[1:].partition("]")
            codes += ["P", "P", "q", "q", "P", *("q" * (2 * int(array[-1])))]
            continue
        if mark not in "()":
            codes.append("f4x" if mark == "f" else mark)
        rest = rest[1:]
    return codes


def _file_of(name: Name, layout: str) -> Path | None:
    """Where the code of a function is kept for this processor; None where none may be."""
    folder = code_folder(Path(__file__))
    if folder is None or find_spec("llvmlite") is None:
        return None
    digest = hashlib.sha256("\0".join((name.identity, layout, *_processor())).encode())
    return folder / f"{digest.hexdigest()[:40]}.code"


def _digest(name: Name, code: bytes) -> bytes:
    """The hash of code and of all that it was made from and by."""
    return hashlib.sha256("\0".join((name.version, *_compilers(), "")).encode() + code).digest()


@cache
def _processor() -> tuple[str, ...]:
    import llvmlite.binding

    return (
        llvmlite.binding.get_process_triple(),
        llvmlite.binding.get_host_cpu_name(),
        llvmlite.binding.get_host_cpu_features().flatten(),
    )


@cache
def _compilers() -> tuple[str, ...]:
    """The versions of what makes code, numba's without importing it."""
    import llvmlite

    numba = find_spec("numba")
    origin = Path(numba.origin) if numba is not None and numba.origin is not None else None
    file = origin.parent / "_version.py" if origin is not None else None
    version = read_text(file) if file is not None and file.exists() else str(origin)
    itself = hashlib.sha256(read_bytes(Path(__file__))).hexdigest()
    return version, llvmlite.__version__, itself


@cache
def _machine() -> Any:
    import llvmlite.binding

    llvmlite.binding.initialize_native_target()
    llvmlite.binding.initialize_native_asmprinter()
    target = llvmlite.binding.Target.from_triple(llvmlite.binding.get_process_triple())
    return target.create_target_machine(
        opt=3,
        cpu=llvmlite.binding.get_host_cpu_name(),
        features=llvmlite.binding.get_host_cpu_features().flatten(),
        codemodel="jitdefault",
        jit=True,
    )


def _object_code(kernel: Any, layout: str) -> bytes | None:
    """The object code of a function and its entry; None if it needs more than is there later."""
    import llvmlite.binding
    from numba import njit

    (signature,) = list(kernel.overloads)[-1:]
    if kernel.stats.cache_hits:  # numba keeps no source of what it loads
        options = {k: v for k, v in kernel.targetoptions.items() if k != "nopython"}
        again = njit(**options)(kernel.py_func)
        again.compile(signature)
        kernel = again
    symbol = kernel.overloads[signature].fndesc.llvm_func_name
    module = llvmlite.binding.parse_assembly(kernel.inspect_llvm(signature))
    types = [_TYPES[code] for code in _codes(layout)]
    taken = [str(argument.type) for argument in module.get_function(symbol).arguments]
    if taken != ["ptr", "ptr", *types]:
        return None
    module.link_in(llvmlite.binding.parse_assembly(_entry(symbol, types)))
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration and value.name != _ENTRY:
            value.linkage = "internal"
    passes = llvmlite.binding.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    tuning = llvmlite.binding.create_pipeline_tuning_options()
    passes.run(module, llvmlite.binding.create_pass_builder(_machine(), tuning))
    needed = {f.name for f in module.functions if f.is_declaration}
    needed |= {v.name for v in module.global_variables if v.is_declaration}
    if any(not name.startswith("llvm.") for name in needed - {_NEVER_CALLED}):
        return None
    code: bytes = _machine().emit_object(module)
    return code


def _entry(symbol: str, types: list[str]) -> str:
    """LLVM's text of a function that reads the arguments of another from a buffer."""
    lines = [f"declare i32 @{symbol}({', '.join(['ptr', 'ptr', *types])})"]
    lines += [
        f"define i32 @{_ENTRY}(ptr %buffer) {{",
        "%result = alloca ptr",
        "%raised = alloca ptr",
    ]
    for i, kind in enumerate(types):
        lines.append(f"%at{i} = getelementptr i8, ptr %buffer, i64 {8 * i}")
        lines.append(f"%value{i} = load {kind}, ptr %at{i}")
    given = ", ".join(
        ["ptr %result", "ptr %raised", *(f"{kind} %value{i}" for i, kind in enumerate(types))]
    )
    lines += [f"%status = call i32 @{symbol}({given})", "ret i32 %status", "}"]
    return "\n".join(lines)


def _loaded(code: bytes, layout: str) -> Code:
    """Code that was kept, in memory."""
    import llvmlite.binding

    engine = llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(""), _machine())
    if llvmlite.binding.address_of_symbol(_NEVER_CALLED) is None:
        abort = ctypes.cast(ctypes.CDLL(None).abort, ctypes.c_void_p).value
        llvmlite.binding.add_symbol(_NEVER_CALLED, abort)
    engine.add_object_file(llvmlite.binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    entry = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_char_p)(engine.get_function_address(_ENTRY))
    packed = Struct("=" + "".join(_codes(layout)).replace("P", "Q")).pack

    def act(values: list[Any]) -> None:
        if entry(packed(*values)):
            raise RuntimeError("a compiled pass failed")

    return act
