"""The experiment on edits in a row, at its smallest."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"


@pytest.fixture(scope="module")
def sequence():
    sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
    try:
        yield importlib.import_module("adapt_sequence")
    finally:
        for path in (SCRIPTS, SCRIPTS.parent):
            sys.path.remove(str(path))


def test_every_third_edit_removes_the_oldest_tale_that_is_there(sequence):
    plan = sequence.plan(10)
    assert [(e.kind[0], e.tale) for e in plan[:6]] == [
        ("a", 0),
        ("a", 1),
        ("r", 0),
        ("a", 2),
        ("a", 3),
        ("r", 1),
    ]
    assert plan[-1].present == (3, 4, 5, 6)
    assert plan[-1].removed == (0, 1, 2)


def test_tales_differ_and_use_the_words_of_the_world(sequence):
    first, second = (sequence.tell(number, 0, 50) for number in (0, 1))
    assert not set(first) & set(second)
    assert first == sequence.tell(0, 0, 50)
    assert len({text.split()[0] for text in first}) == 1


@pytest.mark.slow
def test_the_smallest_run_prints_a_line_for_each_edit_and_goes_on_where_it_was(
    sequence, tmp_path, capsys, monkeypatch
):
    lines = sequence.run(tmp_path, sequence.SIZES["tiny"], 0)
    out = capsys.readouterr().out
    assert [line["edit"] for line in lines] == [n for n in (1, 2, 3) for _ in sequence.WAYS]
    assert out.count(" remove 0 ") == out.count(" add 1 ") == len(sequence.WAYS)
    assert all(line["world_kl"] > 0 for line in lines)
    held, free = (
        next(x for x in lines if (x["way"], x["edit"]) == (way, 3)) for way in ("memory", "nothing")
    )
    assert held["world_kl"] < free["world_kl"]
    assert free["removed"] > 0
    # The last edit of one way again, and nothing else.
    record = tmp_path / "seed-0" / "memory" / "3.json"
    record.unlink()
    made, adapt = [], sequence.run_adapt
    monkeypatch.setattr(
        sequence, "run_adapt", lambda config, **k: made.append(config.output) or adapt(config, **k)
    )
    monkeypatch.setattr(sequence, "train", None)
    again = sequence.run(tmp_path, sequence.SIZES["tiny"], 0)
    assert made == [str(record.with_suffix(""))]
    plain = [
        [{k: v for k, v in x.items() if k != "seconds"} for x in rows] for rows in (lines, again)
    ]
    assert plain[0] == plain[1]
    assert json.loads((tmp_path / "seed-0" / "table.json").read_text()) == again
