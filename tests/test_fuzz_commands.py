"""Files of every kind, broken at random under every command: a result or one message, in time."""

import os
import time
from pathlib import Path

import pytest

from mergekit_bayes import convert
from mergekit_bayes.errors import CheckpointError
from scripts.fuzz import Fuzzer, failures, table
from scripts.fuzzing.lines import LINES
from scripts.fuzzing.verdict import BAD
from scripts.fuzzing.world import CANARY

CASES = 120
MANY = 3000
LINE = next(line for line in LINES if line.name == "convert folder")
real = convert.run_convert


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), limit=30)  # tests share their cores


def assert_all_end_well(fuzzer, first, count):
    cases = [case for case, _ in zip(fuzzer.cases(first), range(count), strict=False)]
    assert not list(failures(cases)), table(cases)
    return cases


def test_every_command_ends_well_on_broken_files(fuzzer):
    cases = assert_all_end_well(fuzzer, 0, CASES)
    assert {c.line.split()[0] for c in cases} >= {line.words[0] for line in LINES} - {"detox"}
    assert {c.kind for c in cases} == {"done", "refused"}


@pytest.mark.slow
def test_every_command_ends_well_on_thousands_of_broken_files(fuzzer):
    assert_all_end_well(fuzzer, CASES, MANY)


def test_a_number_means_one_case(fuzzer):
    number = next(n for n in range(50) if fuzzer.drawn(n)[0].name.startswith("inspect"))
    first, again = (fuzzer.case(number) for _ in range(2))
    (drawn,) = (c for c, _ in zip(fuzzer.cases(0, "inspect"), range(1), strict=False))
    assert {(c.file, c.how, c.kind) for c in (first, again, drawn)} == {
        (first.file, first.how, first.kind)
    }


def half(out):
    Path(out).mkdir()
    Path(out, "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")


def refuse(text):
    raise CheckpointError(text)


def rewrite(file, change):
    file = Path(file)
    file.write_bytes(change(file.read_bytes()))


# What a faulty conversion might do, before (True) or after the real one, and the verdict.
FAULTS = {
    "no fault": (True, lambda ref, out: None, "done"),
    "a message": (True, lambda ref, out: refuse("no"), "refused"),
    "a bug": (True, lambda ref, out: {}["x"], "traceback"),
    "too slow": (True, lambda ref, out: time.sleep(60), "hang"),
    "a half folder and a message": (
        True,
        lambda ref, out: (half(out), refuse("no")),
        "half output",
    ),
    "a half file": (
        False,
        lambda ref, out: rewrite(f"{out}/model.safetensors", lambda b: b[:-1]),
        "half output",
    ),
    "scratch left": (False, lambda ref, out: Path("scratch").write_text("x"), "half output"),
    "other weights": (
        False,
        lambda ref, out: rewrite(f"{out}/model.safetensors", lambda b: b[:-1] + b"\xff"),
        "wrong",
    ),
    "an input changed": (
        False,
        lambda ref, out: rewrite(f"{ref}/config.json", lambda b: b + b"\n"),
        "input changed",
    ),
    "a secret copied": (False, lambda ref, out: Path(out, "x").write_text(CANARY), "canary"),
    "memory": (True, lambda ref, out: bytearray(700 << 20).count(1), "memory"),
    "a large file": (
        True,
        lambda ref, out: refuse("File too large"),  # as the system says beyond the limit of a case
        "disk",
    ),
    "a descriptor": (False, lambda ref, out: os.open(".", os.O_RDONLY), "leak"),
    "an escape": (True, lambda ref, out: os.write(2, b"\x1b[2J\n"), "terminal"),
    "two messages": (
        True,
        lambda ref, out: (os.write(2, b"CheckpointError: a\n"), refuse("b")),
        "message",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fuzzer, monkeypatch, fault):
    first, act, kind = FAULTS[fault]
    fuzzer.good(LINE)

    def faulty(ref, out, *args, **kwargs):
        if first:
            act(ref, out)
        report = real(ref, out, *args, **kwargs)
        if not first:
            act(ref, out)
        return report

    monkeypatch.setattr(convert, "run_convert", faulty)
    monkeypatch.setattr(fuzzer, "limit", 0.3 if kind == "hang" else fuzzer.limit)
    case = fuzzer.broken(LINE, "pickled/README.md", lambda hub: "not at all")
    assert (case.kind, kind in BAD) == (kind, kind not in ("done", "refused"))
