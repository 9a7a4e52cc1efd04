"""Broken files: thousands of mutated headers, cut files and indexes end in one message each, or
open properly.
"""

import copy
import json
import os
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import safetensors

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.checkpoint.identity import identity
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import MERGEABLE, MemorySource, TensorSpec
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.posterior import PosteriorInfo, identify, open_posterior
from tests import tiny

BIG = (
    1 << 31,
    1 << 32,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
    1 << 64,
    10**30,
    10**4000,
)
ODD = (
    *BIG,
    *(-n for n in BIG),
    -1,
    0,
    1,
    2,
    7,
    True,
    False,
    None,
    0.0,
    1.0,
    4.5,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "4",
    "F32",
    "F8_E4M3",
    "F4",
    "BOOL",
    "I64",
    "\ud800",
    "\udfff x",
    "\x00",
    "\x1b[2J",
    "\n",
    "é",
    "名",
    "__metadata__",
    [],
    {},
    [0],
    [0, 0],
    [4, 0],
    [0, 4, 8],
    [[4]],
    [{}],
    {"a": 1},
    {"dtype": "F32"},
    [1 << 62, 1 << 62],
    [1 << 62, 1 << 62, 0],
    [0, 1 << 62, 1 << 62],
    [1] * 70,
    [-1, -4],
    {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
)


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


def cut(data, rng):
    return data[: rng.randrange(len(data))]


def flipped(data, rng):
    data, edge = bytearray(data), min(len(data), rng.choice((8, 64, len(data))))
    for _ in range(rng.choice((1, 1, 2, 5))):
        data[rng.randrange(edge)] = rng.choice((rng.randrange(256), *b'"{}[]:,0-e\\'))
    return bytes(data)


def spliced(data, rng):
    a, b, c = (rng.randrange(len(data) + 1) for _ in range(3))
    return data[:a] + data[b : b + rng.randrange(40)] + data[max(a, c - rng.randrange(3)) :]


def wrong_length(data, rng):
    (length,) = struct.unpack("<Q", data[:8])
    claims = (
        0,
        1,
        length - 1,
        length + 1,
        length * 2,
        len(data),
        len(data) - 8,
        1 << 31,
        1 << 62,
        (1 << 64) - 1,
    )
    return struct.pack("<Q", max(rng.choice(claims), 0)) + data[8:]


def nodes(value, path=()):
    yield path
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield from nodes(value[key], (*path, key))


def rewritten(data, rng):
    """The header with one or two of its values, names or entries replaced, dropped or doubled."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    for _ in range(rng.choice((1, 1, 1, 2))):
        path = rng.choice(list(nodes(header)))
        if not path:
            continue
        outer = header
        for key in path[:-1]:
            outer = outer[key]
        action = rng.randrange(6)
        if action == 0:
            del outer[path[-1]]
        elif action == 1 and isinstance(outer, dict):
            outer[rng.choice([v for v in ODD if isinstance(v, str)])] = outer.pop(path[-1])
        elif action == 2 and isinstance(outer[path[-1]], int):
            outer[path[-1]] += rng.choice((-1, 1, -4, 4, 1 << 40))
        elif action == 3 and isinstance(outer, list):
            outer.insert(rng.randrange(len(outer) + 1), rng.choice(ODD))
        else:
            outer[path[-1]] = copy.deepcopy(rng.choice(ODD))
    text = json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    kind = rng.randrange(12)
    if kind == 0 and len(header) > 0:  # a name twice
        name, entry = rng.choice(list(header.items()))
        text = f"{{{json.dumps(name)}:{json.dumps(entry)},".encode() + text[1:]
    elif kind == 1:
        depth = rng.choice((10, 900, 5000))
        text = b'{"deep":' + b"[" * depth + b"]" * depth + b"," + text[1:]
    elif kind == 2:
        text = text.replace(b"0", b"9" * rng.choice((20, 400, 5000)), 1)
    elif kind == 3:
        text = rng.choice(
            (text.decode(errors="replace").encode("utf-16"), b"\xef\xbb\xbf" + text, text + b"\0")
        )
    elif kind == 4:
        text = text.replace(
            b'"w"', rng.choice((b'"\xff"', b'"\xed\xa0\x80"', b'"\\ud800"', b'"\\udc00w"'))
        )
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


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
        (rewritten, 3000),
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


INDEX = "model.safetensors.index.json"


def sharded(folder):
    """Two shards and their index, which is returned."""
    names = list(tiny.arrays(0))
    shards = {
        "model-00001-of-00002.safetensors": names[:2],
        "model-00002-of-00002.safetensors": names[2:],
    }
    for file, held in shards.items():
        tiny.write(folder / file, {n: tiny.arrays(0)[n] for n in held})
    content = {
        "metadata": {"total_size": 4},
        "weight_map": {n: file for file, held in shards.items() for n in held},
    }
    (folder / INDEX).write_text(json.dumps(content))
    return content


def test_a_mutated_index_ends_in_one_message_or_opens_all_of_the_model(tmp_path):
    rng, model = random.Random(0), tmp_path / "m"
    content = sharded(model)
    good = json.dumps(content).encode()
    odd = [
        *ODD,
        "..",
        ".",
        "/etc/passwd",
        "../m/model-00001-of-00002.safetensors",
        "a" * 300,
        "a\0b",
        INDEX,
        "sub",
        "loop.safetensors",
        "model-00001-of-00002.safetensors",
    ]
    (model / "sub").mkdir()
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    opened = 0
    for i in range(1500):
        data = good
        if i % 3 == 0:
            data = cut(good, rng)
        elif i % 3 == 1:
            data = flipped(good, rng)
        else:
            changed = copy.deepcopy(content)
            path = rng.choice([p for p in nodes(changed) if p])
            outer = changed
            for key in path[:-1]:
                outer = outer[key]
            outer[path[-1]] = rng.choice(odd)
            data = json.dumps(changed).encode()
        (model / INDEX).write_bytes(data)
        message = None
        try:
            source = SafetensorsSource(checkpoint_files(model))
        except CheckpointError as error:
            message = str(error)
        if message is None:
            assert set(source.specs) == set(tiny.SHAPES)
            source.close()
            opened += 1
        else:
            assert message.isprintable()
            assert str(model) in message
    assert 0 < opened < 700


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], "it has none"),
        ({}, "it has none"),
        ({"w": 5}, "which is no file name"),
        ({"w": "../other/model.safetensors"}, "which is no file name"),
        ({"w": "/etc/passwd"}, "which is no file name"),
        ({"w": ".."}, "which is no file name"),
        ({"w": "sub"}, "is not a file"),
        ({"w": "loop.safetensors"}, "is not there"),
        ({"w": "x" * 400}, "is not there"),
    ],
)
def test_an_index_that_names_no_shard_beside_it_is_refused(tmp_path, weight_map, message):
    tiny.write(tmp_path / "other" / "model.safetensors", {"w": np.zeros(2, np.float32)})
    folder = tmp_path / "m"
    (folder / "sub").mkdir(parents=True)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        open_posterior(str(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "it has none"),
        (b'{"weight_map":{"w":"a","w":"b"}}', "names 'w' twice"),
        (b"[" * 100_000, "nested"),
        (b"\xff", "UTF-8"),
        (b"", "Expecting value"),
    ],
)
def test_an_index_that_is_no_map_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        checkpoint_files(tmp_path)


def test_an_index_that_is_a_folder_or_a_pipe_is_refused(tmp_path):
    for name, make in (
        ("a", os.mkdir),
        ("b", os.mkfifo),
        ("c", lambda path: os.symlink(INDEX, path)),
    ):
        (tmp_path / name).mkdir()
        make(tmp_path / name / INDEX)
        with pytest.raises(CheckpointError, match="not a file"):
            checkpoint_files(tmp_path / name)


def test_a_tensor_that_its_shard_lacks_is_named_with_the_shard(tmp_path):
    content = sharded(tmp_path)
    content["weight_map"]["h.9.bias"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError,
        match=r"'h\.9\.bias' is in 'model-00002-of-00002\.safetensors'.*does not hold",
    ):
        open_posterior(str(tmp_path))


def test_a_tensor_in_another_shard_than_the_index_says_is_named_with_both(tmp_path):
    content = sharded(tmp_path)
    content["weight_map"]["wte.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"'wte\.weight' is in 'model-00002.*'model-00001-of-00002.*' does"
    ):
        open_posterior(str(tmp_path))


def test_a_tensor_that_the_index_does_not_list_is_named_with_its_shard(tmp_path):
    content = sharded(tmp_path)
    del content["weight_map"]["wte.weight"]
    (tmp_path / INDEX).write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"does not list 'wte\.weight', which 'model-00001-of-00002"
    ):
        open_posterior(str(tmp_path))


def test_a_precisions_index_is_compared_with_its_shards_too(tmp_path):
    tiny.write(tmp_path / "m" / "model.safetensors", tiny.arrays(0))
    tiny.write(
        tmp_path / "m" / "posterior" / "precision-00001-of-00001.safetensors", tiny.precisions(0)
    )
    index = tmp_path / "m" / "posterior" / "precision.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"wte.weight": "precision-00001-of-00001.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="does not list"):
        open_posterior(str(tmp_path / "m"))


def test_a_single_file_beside_an_index_is_refused_as_one_of_them_is_stale(tmp_path):
    sharded(tmp_path)
    tiny.write(tmp_path / "model.safetensors", tiny.arrays(1))
    with pytest.raises(CheckpointError, match="holds both"):
        checkpoint_files(tmp_path)
    assert checkpoint_files(tmp_path / "model.safetensors") == [tmp_path / "model.safetensors"]
