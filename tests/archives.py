"""Archives of `torch.save` made by hand, sound or not."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from mergekit_bayes.convert import run_convert
from mergekit_bayes.errors import CheckpointError


class Call:
    """What a pickle calls when it is loaded."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Stored(tuple):
    """A storage as a pickle names it: `torch.FloatStorage`, key, location, count of numbers."""


def storage(kind=torch.FloatStorage, key="0", count=4):
    return Stored(("storage", kind, key, "cpu", count))


def tensor(stored, shape, stride, offset=0, **metadata):
    more = (metadata,) if metadata else ()
    rebuild = torch._utils._rebuild_tensor_v2
    return Call(rebuild, stored, offset, shape, stride, False, Call(OrderedDict), *more)


FOUR = struct.pack("<4f", 1, 2, 3, 4)
FLOATS, HOOKS = storage(), Call(OrderedDict)
SOUND = {"w": tensor(FLOATS, (2, 2), (2, 1))}


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return tuple(value) if type(value) is Stored else None


def pickled(content):
    file = io.BytesIO()
    _Pickler(file, 2).dump(content)
    return file.getvalue()


def archive(path, content, storages, **members):
    """Write an archive; `content` is its pickle, or what it holds."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", content if isinstance(content, bytes) else pickled(content))
        for key, data in storages.items():
            file.writestr(f"m/data/{key}", data)
        for name, data in {"version": b"3\n", **members}.items():
            file.writestr(f"m/{name}", data)
    return path


def again(path, method=zipfile.ZIP_STORED, rename=lambda name: name, only=""):
    """The same archive, written by Python; compressed or under other names, if wanted."""
    with zipfile.ZipFile(path) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in members.items():
            how = method if name.endswith(only) else zipfile.ZIP_STORED
            new.writestr(rename(name), data, how)


def patch(path, at, form, *values):
    """Overwrite numbers in a file."""
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at if at >= 0 else len(data) + at, *values)
    path.write_bytes(data)


def header_of(path, ending):
    """Where the own header of a member begins, and where its entry in the directory."""
    with zipfile.ZipFile(path) as file:
        info = next(i for i in file.infolist() if i.filename.endswith(ending))
    data = path.read_bytes()
    return info.header_offset, data.rindex(info.filename.encode()) - 46


@contextmanager
def without_checksums():
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def bits(tensor):
    """Dtype, shape and bytes."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    data = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def converted(path):
    """What a conversion stores, with its ties; the message where it is refused."""
    out = path.with_suffix(".safetensors")
    try:
        report = run_convert(str(path), out)
    except CheckpointError as error:
        return str(error)
    tensors = {name: bits(value) for name, value in load_file(out).items()}
    out.unlink()
    return tensors | {name: tensors[other] for name, other in report.tied.items()}


def loaded(path):
    """What torch.load reads, or its error."""
    try:
        content = torch.load(Path(path), weights_only=True, map_location="cpu", mmap=False)
        return {name: bits(value) for name, value in content.items()}
    except Exception as error:
        return error
