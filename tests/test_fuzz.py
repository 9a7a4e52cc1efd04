"""Broken files: thousands of mutated headers and cut files end in one message each, or open
properly.
"""

import json
import os
import random
import struct
import time
import tracemalloc

import pytest
import safetensors

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import MERGEABLE, MemorySource, TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import PosteriorInfo, identify
from scripts.fuzzing.mutations import cut, flipped, rewritten, spliced, wrong_length
from tests import tiny


def seeds(folder):
    """Good files: every dtype, a scalar, empty tensors, metadata, and a precision file's own
    header.
    """
    specs = {
        "w": TensorSpec("F32", (3, 4)),
        "b": TensorSpec("BF16", (5,)),
        "scalar": TensorSpec("F16", ()),
        "mask": TensorSpec("BOOL", (2, 2)),
        "empty": TensorSpec("F32", (0, 7)),
        "ids": TensorSpec("I64", (3,)),
        "f8": TensorSpec("F8_E5M2", (6,)),
        "名": TensorSpec("F64", (2,)),
    }
    info = PosteriorInfo(estimator="ggn", mean=identify(MemorySource(tiny.arrays(0))))
    for i, (tensors, metadata) in enumerate(
        (
            (specs, {"format": "pt", "note": "ä\n"}),
            ({"w": specs["w"]}, info.to_metadata()),
            ({}, {}),
        )
    ):
        sink = SafetensorsSink(folder / f"seed{i}", tensors, metadata)
        for name, spec in tensors.items():
            sink.write_bytes(name, 0, memoryview(bytes(i % 2 for i in range(spec.nbytes))))
        sink.close()
        yield (folder / f"seed{i}").read_bytes()


def outcome(path):
    """What opening and reading all of it comes to: None, or the one message."""
    try:
        source = SafetensorsSource([path])
    except CheckpointError as error:
        message = str(error)
        assert str(path) in message
        assert message.isprintable()  # one line, no escape sequences, no half characters
        assert len(message) < 1000 + len(str(path))
        return message
    try:
        assert sum(spec.nbytes for spec in source.specs.values()) < path.stat().st_size
        for name, spec in source.specs.items():
            if spec.dtype in MERGEABLE:
                assert read_tensor(source, name).shape == spec.shape
        assert len(identity(source, full=True)) == 64
    finally:
        source.close()
    return None


@pytest.mark.parametrize(
    ("mutate", "count"),
    [
        (cut, 1000),
        (flipped, 2000),
        (spliced, 1000),
        (wrong_length, 60),
        (rewritten, 2000),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_mutated_file_ends_in_one_message_or_opens_as_the_format_says(tmp_path, mutate, count):
    """What we open, the format's own library opens too, with the same names, dtypes and shapes."""
    rng, path, good = random.Random(0), tmp_path / "m.safetensors", list(seeds(tmp_path))
    refused = 0
    for _ in range(count):
        data = mutate(rng.choice(good), rng)
        path.write_bytes(data)
        message = outcome(path)
        refused += message is not None
        if message is None:
            theirs = {
                name: (t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(data)
            }
            source = SafetensorsSource([path])
            assert {n: tuple(s) for n, s in source.specs.items()} == theirs
            source.close()
    assert refused > 0.4 * count


def test_every_prefix_of_a_file_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    data = next(seeds(tmp_path))
    for size in range(len(data)):
        path.write_bytes(data[:size])
        assert outcome(path) is not None, size
    path.write_bytes(data)
    assert outcome(path) is None


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, start=0, stop=8, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        {"w": entry([1 << 62, 1 << 62])},
        {"w": entry([1 << 62, 1 << 62], 0, (1 << 63) - 1)},
        {"w": entry([1 << 40], 0, 1 << 42)},
        {"w": entry([0, 1 << 62, 1 << 62], 0, 0)},
        {"w": entry([(1 << 62) + 1] * 50_000)},
        {"w": entry([10**4000] * 50)},
        {"w": entry([2], (1 << 63) - 9, (1 << 63) - 1)},
        b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"w":' + b"9" * 100_000 + b"}",
        b'{"w":"' + b"\\ud800" * 20_000 + b'"}',
        {"x" * 100_000: entry([3])},
        {"w": entry([2], dtype="y" * 100_000)},
    ],
    ids=range(12),
)
def test_a_header_that_claims_much_costs_no_more_than_its_own_bytes(tmp_path, header):
    path = file_of(tmp_path / "m.safetensors", header, b"\0" * 8)
    began = time.process_time()
    tracemalloc.start()
    message = outcome(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message is not None
    assert peak < 24 * path.stat().st_size + (1 << 20)  # what the JSON module makes of the bytes
    assert time.process_time() - began < 2


def test_a_length_beyond_the_file_allocates_nothing(tmp_path):
    path = tmp_path / "m.safetensors"
    with path.open("wb") as file:  # sparse
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(80_000_000)
    tracemalloc.start()
    assert "says its header has 90000000 bytes" in outcome(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": entry([True, 2])}, "in whole numbers"),
        ({"w": entry([2.0])}, "in whole numbers"),
        ({"w": entry({})}, "in whole numbers"),
        ({"w": entry("2")}, "in whole numbers"),
        ({"w": ["F32", [2], [0, 8]]}, "in whole numbers"),
        ({"w": entry([2], dtype=["F32"])}, "in whole numbers"),
        ({"w": entry([1] * 65, 0, 4)}, "no tensor can have"),
        (b'{"w":1,"w":2}', "names 'w' twice"),
        (
            b'{"w":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}',
            "names 'dtype' twice",
        ),
        (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "NaN"),
        (b'{"w":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,8]}}', "-Infinity"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "surrogate"),
        (b'{"\xed\xa0\x80":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "UTF-8"),
        ('{"w":0}'.encode("utf-16"), "UTF-8"),
        (b'{"w":' + b"[" * 5000 + b"]" * 5000 + b"}", "nested"),
        ({"__metadata__": ["format", "pt"]}, "__metadata__"),
        ({"__metadata__": {"format": 1}}, "__metadata__"),
    ],
)
def test_what_a_header_may_not_say_is_named(tmp_path, header, message):
    path = file_of(tmp_path / "m.safetensors", header, b"\0" * 8)
    assert message in outcome(path)


def test_a_directory_and_a_pipe_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name, message in (
        ("pipe", "is not a file"),
        ("folder", "is not a file"),
        ("loop", "cannot be opened"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SafetensorsSource([tmp_path / f"{name}.safetensors"])
