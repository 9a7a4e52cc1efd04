"""A conversion stores the numbers that torch.load reads, or refuses the file: never other ones."""

import io
import random
import re
import zipfile
from os import mkfifo

import pytest
import torch
from safetensors import safe_open

from mergekit_bayes.convert import run_convert
from tests.archives import (
    FOUR,
    SOUND,
    Call,
    again,
    archive,
    converted,
    header_of,
    loaded,
    patch,
    without_checksums,
)

FROM_CPU = torch._utils._rebuild_device_tensor_from_cpu_tensor


def everything():
    """A state dict with everything that an archive may describe in its own way."""
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    z = torch.view_as_complex(w[:, :2].clone())
    attributed = w.clone()
    attributed.note = "x"
    parameter = torch.nn.Parameter(w.clone())
    parameter.note = 3
    noted = torch.nn.Parameter(w.clone())
    noted.notes = [torch.device("cpu"), torch.bfloat16, {1, 2}, 1j, b"x", torch.Size([2])]
    return torch.nn.Linear(2, 2).state_dict() | {
        "w": w,
        "tied": w,
        "transposed": w.t(),
        "column": w[1:, 1],
        "conjugate": z.conj(),
        "negative": z.clone().conj().imag,
        "half": w.half(),
        "bf16": w.bfloat16().t(),
        "u16": torch.arange(5).to(torch.uint16),
        "e4m3": w.to(torch.float8_e4m3fn),
        "parameter": parameter,
        "noted": noted,
        "attributed": attributed,
        "of a TPU": Call(FROM_CPU, w.clone(), torch.float32, "cpu", False),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "bool": w > 0,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Such a file, without checksums, which would find every change."""
    path = tmp_path_factory.mktemp("saved") / "m.bin"
    with without_checksums():
        torch.save(everything(), path)
    return path


def test_a_sound_archive_is_read_as_torch_reads_it(tmp_path, saved):
    path = tmp_path / "m.bin"
    path.write_bytes(saved.read_bytes())
    assert converted(path) == loaded(path)
    assert len(loaded(path)) == len(everything())
    torch.save(everything(), path)  # with checksums
    assert converted(path) == loaded(path)
    again(path)  # as Python's own writer lays it out
    assert converted(path) == loaded(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["pickle", "directory", "anywhere"])
@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 1500), marks=pytest.mark.slow)]
)
def test_a_changed_archive_never_becomes_other_numbers(tmp_path, saved, part, seeds):
    path, good = tmp_path / "m.bin", saved.read_bytes()
    with zipfile.ZipFile(saved) as file:
        directory = file.start_dir
    start = good.index(b"\x80\x02")
    span = {"pickle": (start, good.index(b".PK")), "directory": (directory, len(good))}
    first, end = span.get(part, (0, len(good)))
    results = []
    for seed in seeds:
        dice, data = random.Random(f"{part} {seed}"), bytearray(good)
        for _ in range(dice.choice((1, 1, 2))):
            at, other, size = (
                dice.randrange(first, end),
                dice.randrange(first, end),
                dice.choice("124"),
            )
            match dice.randrange(5):
                case 0:
                    data[at : at + 1] = bytes([dice.randrange(256)])
                case 1:
                    data[at : at + 1] = bytes([good[at] ^ 1 << dice.randrange(8)])
                case 2:
                    del data[at : at + int(size)]
                case 3:
                    data[at:at] = good[other : other + int(size)]
                case _:
                    data[at : at + int(size)] = good[other : other + int(size)]
        path.write_bytes(data)
        ours, theirs = converted(path), loaded(path)
        if isinstance(ours, str):
            assert str(path) in ours
            assert ours.isprintable()
            assert len(ours) < 1000
        elif isinstance(theirs, dict):
            assert ours == theirs, seed
        results.append(ours)
    refused = sum(isinstance(result, str) for result in results)
    assert 0 < refused < len(results)


def rewritten(**options):
    return lambda path: again(path, **options)


def patched(member, field, form, *values, local=True):
    """Overwrite a field of a member's own header, or of its entry in the directory."""
    return lambda path: patch(path, header_of(path, member)[not local] + field, form, *values)


def both(*changes):
    return lambda path: [change(path) for change in changes]


def resized(size):
    """Both sayings of the size of a member."""
    return both(
        patched("data/0", 20, "<LL", size, size, local=False),
        patched("data/0", 18, "<LL", size, size),
    )


def around(before=b"", after=b""):
    return lambda path: path.write_bytes(before + path.read_bytes() + after)


def overlapping(path):
    """A member within another's bytes, which both are told rightly."""
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("m/data/0", FOUR)
    archive(path, SOUND, {"0": FOUR}, more=inner.getvalue())
    start = path.read_bytes().index(b"m/more") + len("m/more")
    patch(path, header_of(path, "data/0")[1] + 42, "<L", start)


def copied(path):
    """A second member of the same name, as an appending writer leaves it."""
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("m/data/0", b"\0" * len(FOUR))


def in_other_case(path):
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("m/DATA/0", b"\0" * len(FOUR))


def piped(path):
    path.unlink()
    mkfifo(path)


DEFLATED = zipfile.ZIP_DEFLATED
CHANGES = {
    "deflated numbers": (rewritten(method=DEFLATED, only="data/0"), "compressed"),
    "deflated pickle": (rewritten(method=DEFLATED, only="data.pkl"), "compressed"),
    "bzip2": (rewritten(method=zipfile.ZIP_BZIP2), "compressed"),
    "said to be stored": (
        both(
            rewritten(method=DEFLATED, only="data/0"), patched("data/0", 10, "<H", 0, local=False)
        ),
        "compressed",
    ),
    "deflated only in its own header": (patched("data/0", 8, "<H", DEFLATED), "differs"),
    "encrypted": (
        both(patched("data/0", 6, "<H", 1), patched("data/0", 8, "<H", 1, local=False)),
        "encrypted",
    ),
    "of another size in its own header": (patched("data/0", 18, "<LL", 8, 8), "another size"),
    "smaller": (resized(8), "needs the 16 bytes"),
    "larger": (resized(40), "overlap|needs the 16 bytes|not those"),
    "behind the end": (resized(1 << 30), "lies behind"),
    "with another name in its own header": (patched("data/0", 30, "<c", b"X"), "differs"),
    "at another's place": (patched("data/0", 42, "<L", 0, local=False), "differs"),
    "overlapping": (overlapping, "overlap"),
    "a folder": (patched("data/0", 38, "<L", 16, local=False), "marked as a folder"),
    "in another part": (patched("data/0", 34, "<H", 1, local=False), "another part"),
    "changed": (
        lambda path: path.write_bytes(path.read_bytes().replace(FOUR, FOUR[::-1])),
        "CRC-32",
    ),
    "changed pickle": (
        lambda path: path.write_bytes(path.read_bytes().replace(b"X\x01\0\0\0w", b"X\x01\0\0\0v")),
        "CRC-32",
    ),
    "with bytes before it": (around(before=b"MZ"), "is not a file of torch.save"),
    "with an archive before it": (around(before=b"PK\x03\x04"), "differs|directory"),
    "with bytes behind it": (around(after=b"\0"), "more behind it"),
    "with a comment": (
        both(around(after=b"!"), lambda path: patch(path, -3, "<H", 1)),
        "comment|behind",
    ),
    "twice": (copied, "twice"),
    "twice but for case": (in_other_case, "twice"),
    "in two folders": (
        rewritten(rename=lambda n: n.replace("m/data/", "n/data/")),
        "within its folder",
    ),
    "in no folder": (rewritten(rename=lambda n: n.removeprefix("m/")), "within its folder"),
    "without numbers": (rewritten(rename=lambda n: n.replace("data/0", "data/1")), "are not there"),
    "without a pickle": (
        rewritten(rename=lambda n: n.replace("data.pkl", "x")),
        "without data.pkl",
    ),
    "big-endian": (lambda path: archive(path, SOUND, {"0": FOUR}, byteorder=b"big"), "byte order"),
    "with fewer entries than it says": (
        lambda path: patch(path, -14, "<HH", 9, 9),
        "directory|cut",
    ),
    "with more entries than it says": (lambda path: patch(path, -14, "<HH", 1, 1), "more entries"),
    "a pipe": (piped, "is not a file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_stored_plainly_is_refused_with_its_reason(tmp_path, change):
    path = archive(tmp_path / "m.bin", SOUND, {"0": FOUR})
    assert converted(path) == loaded(path)
    spoil, reason = CHANGES[change]
    spoil(path)
    message = converted(path)
    assert isinstance(message, str)
    assert path.name in message
    assert re.search(reason, message), message
    assert [p for p in tmp_path.iterdir() if p != path] == []


def test_names_that_share_memory_are_not_refused_where_a_config_unties_them(tmp_path):
    """The size of the output is limited by that of the file, but four names of one tensor fit."""
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    w = torch.ones(500, 100)
    torch.save(
        dict.fromkeys(("shared", "encoder", "decoder", "head"), w), tmp_path / "pytorch_model.bin"
    )
    report = run_convert(str(tmp_path), tmp_path / "out")
    assert (report.tensors, report.bytes, report.tied) == (4, 4 * w.nbytes, {})


@pytest.mark.slow
def test_a_storage_of_more_than_four_gigabytes(tmp_path):
    """Its sizes, and the places of what follows, are in other fields than those of small ones."""
    w = torch.zeros((1 << 32) + 8, dtype=torch.uint8)
    w[-3:] = torch.tensor([1, 2, 3])
    torch.save({"w": w, "v": torch.ones(3)}, tmp_path / "m.bin")
    run_convert(str(tmp_path / "m.bin"), tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as written:
        assert written.get_slice("w").get_shape() == [len(w)]
        assert torch.equal(written.get_slice("w")[-5:], w[-5:])
        assert torch.equal(written.get_tensor("v"), torch.ones(3))
    for file in tmp_path.iterdir():  # or they would stay for three more runs
        file.unlink()
