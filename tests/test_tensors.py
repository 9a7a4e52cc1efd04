"""The safetensors reader and writer against the format's own library, and against broken files."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from mergekit_bayes.checkpoint.codec import (
    decode,
    encode,
    is_bad_precision,
    overflowed,
    read_tensor,
)
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.sink import SafetensorsSink
from mergekit_bayes.checkpoint.specs import TensorSpec
from mergekit_bayes.errors import CheckpointError
from tests import tiny


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [
        ("F64", torch.float64),
        ("F32", torch.float32),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
    ],
)
def test_we_read_what_the_library_writes(tmp_path, dtype, torch_dtype):
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(torch_dtype)
    save_torch({"w": values}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    with SafetensorsSource([tmp_path / "m.safetensors"]) as source:
        assert source.specs == {"w": TensorSpec(dtype, (7, 3))}
        np.testing.assert_array_equal(read_tensor(source, "w"), values.to(torch.float64).numpy())


def test_the_library_reads_what_we_write(tmp_path):
    tensors = tiny.arrays(0)
    path = tiny.write(tmp_path / "m.safetensors", tensors, metadata={"format": "pt", "note": "ä"})
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(value, tensors[name])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_bf16_rounds_as_torch_does(values):
    x = np.asarray(values, np.float32)
    ours = decode(np.frombuffer(encode(x, "BF16"), np.uint8), "BF16")
    np.testing.assert_array_equal(ours, torch.from_numpy(x).to(torch.bfloat16).float().numpy())


F8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@pytest.mark.parametrize("dtype", F8)
def test_all_codes_of_float8_are_read_as_torch_does_and_written_back(dtype):
    codes = np.arange(256, dtype=np.uint8)
    ours = decode(codes, dtype)
    np.testing.assert_array_equal(ours, torch.from_numpy(codes).view(F8[dtype]).float().numpy())
    again = np.frombuffer(encode(ours, dtype), np.uint8)
    finite = np.isfinite(ours)
    np.testing.assert_array_equal(again[finite], codes[finite])
    assert overflowed(encode(ours, dtype), dtype) == np.count_nonzero(~finite)


@pytest.mark.parametrize("dtype", F8)
def test_float8_rounds_as_torch_does(dtype):
    """Random bits, ties between neighbours, and the floats beside each tie; beyond the largest,
    torch clips.
    """
    rng = np.random.default_rng(0)
    values = decode(np.arange(128, dtype=np.uint8), dtype)
    values = values[np.isfinite(values)]
    ties = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    ties = np.concatenate(
        [ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))]
    )
    spread = np.float32(10.0) ** rng.uniform(-7, 5, 500_000).astype(np.float32)
    patterns = rng.integers(0, 1 << 32, 500_000, np.uint32).view(np.float32)
    x = np.concatenate([values, ties, spread, patterns[np.isfinite(patterns)]])
    x = np.concatenate([x, -x])
    # The tie above the largest rounds down where that one is even (E4M3), else to infinity (E5M2).
    largest = values[-1]
    tie = largest + (values[-1] - values[-2]) / 2
    inside = np.abs(x) <= tie if dtype == "F8_E4M3" else np.abs(x) < tie
    assert 200_000 < np.count_nonzero(inside) < len(x)
    codes = encode(x, dtype)
    theirs = torch.from_numpy(x[inside]).to(F8[dtype]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.frombuffer(codes, np.uint8)[inside], theirs)
    np.testing.assert_array_equal(
        np.isfinite(decode(np.frombuffer(codes, np.uint8), dtype)), inside
    )
    assert overflowed(codes, dtype) == np.count_nonzero(~inside)


def test_float8_is_rounded_once():
    """1.0625 lies between 1.0 and 1.125 of E4M3; a detour over F16 would make a tie of what is just
    above it.
    """
    above = np.asarray([1.0625 + 2**-20], np.float32)
    assert decode(np.frombuffer(encode(above, "F8_E4M3"), np.uint8), "F8_E4M3") == [1.125]
    assert decode(
        np.frombuffer(encode(above.astype(np.float16), "F8_E4M3"), np.uint8), "F8_E4M3"
    ) == [1.0]


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [
        ("F8_E4M3", 448.0),
        ("F8_E5M2", 57344.0),
        ("F16", 65504.0),
        ("BF16", 3.3895314e38),
        ("F32", 3.4e38),
    ],
)
def test_what_overflows_a_dtype_is_counted(dtype, largest):
    good = np.asarray([0.0, -0.0, largest, -largest, 1e-30], np.float32)
    assert overflowed(encode(good, dtype), dtype) == 0
    bad = np.asarray([np.nan, np.inf, -np.inf, 1.0], np.float32)
    assert overflowed(encode(bad, dtype), dtype) == 3
    if dtype != "F32":
        beyond = np.asarray([1.1 * largest if largest < 1e38 else 3.4e38, -1.0], np.float32)
        assert overflowed(encode(beyond, dtype), dtype) == 1


def test_the_header_may_be_completed_after_the_data(tmp_path):
    path = tmp_path / "m.safetensors"
    sink = SafetensorsSink(path, {"w": TensorSpec("F32", (2,))}, {"hash": "0" * 64})
    sink.write_bytes("w", 0, encode(np.asarray([1.0, 2.0]), "F32"))
    sink.metadata = {"hash": "f" * 64}
    sink.close()
    with SafetensorsSource([path]) as source:
        assert source.metadata == {"hash": "f" * 64}
    sink = SafetensorsSink(tmp_path / "n.safetensors", {}, {})
    sink.metadata = {"too": "long"}
    with pytest.raises(ValueError, match="grew"):
        sink.close()
    sink.abandon()


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "too few"),
        (struct.pack("<Q", 1 << 40) + b"{}", "says its header has"),
        (struct.pack("<Q", 2) + b"[]", "not JSON"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
        (struct.pack("<Q", 18) + b'{"__metadata__":5}', "__metadata__"),
        (struct.pack("<Q", 2) + b"{}more", "after its last tensor"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource([path])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": entry([4], 0, 16)}, b"\0" * 8, "truncated"),
        ({"w": entry([4], 0, 12)}, b"\0" * 16, "offsets"),
        ({"w": entry([4], -16, 0)}, b"\0" * 16, "offsets"),
        ({"w": entry([2], 0, 8), "v": entry([2], 4, 12)}, b"\0" * 12, "overlaps"),
        ({"w": entry([2], 4, 12)}, b"\0" * 12, "unused"),
        ({"w": entry([2], 0, 8, "F7")}, b"\0" * 8, "unknown dtype"),
        ({"w": {"dtype": "F32"}}, b"", "is not dtype, shape"),
        ({"w": entry([-1, -2], 0, 8)}, b"\0" * 8, "offsets"),
        ({"w": entry([2.7], 0, 8)}, b"\0" * 8, "is not dtype, shape"),
    ],
)
def test_a_header_that_lies_is_refused_with_file_and_tensor(tmp_path, header, data, message):
    path = raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsSource([path])
    assert str(path) in str(caught.value)
    assert "'w'" in str(caught.value) or "'v'" in str(caught.value)


def test_headers_of_any_length_and_order_are_read(tmp_path):
    header = {"b": entry([1], 4, 8), "a": entry([1], 0, 4)}
    text = json.dumps(header).encode() + b" " * 3  # data then starts at an odd offset
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1.5, 2.5))
    with SafetensorsSource([path]) as source:
        assert read_tensor(source, "a") == [1.5]
        assert read_tensor(source, "b") == [2.5]


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in "xy":
        save_file({"w": np.zeros(2, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="two shards"):
        SafetensorsSource([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path):
    path = tiny.write(tmp_path / "m.safetensors", {"w": np.zeros((64, 64), np.float32)})
    with SafetensorsSource([path]) as source:
        with path.open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(CheckpointError, match="'w'"):
            read_tensor(source, "w")


def test_every_nan_stays_one_in_bfloat16():
    nans = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32).view(
        np.float32
    )
    assert np.isnan(decode(np.frombuffer(encode(nans, "BF16"), np.uint8), "BF16")).all()


def test_a_precision_is_finite_and_not_negative():
    values = np.asarray([0.0, -0.0, 1e-45, 3e38, -1e-45, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(is_bad_precision(values), [False] * 4 + [True] * 4)
