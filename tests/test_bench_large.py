"""The benchmark of 70 B: strata cover every tensor, projections add up, and nothing is left."""

import importlib
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.plan import MergeConfig, plan_merge
from mergekit_bayes.stream.units import units_of

BENCH = Path(__file__).parent.parent / "scripts" / "bench"
TINY = 0.002


@pytest.fixture(scope="module")
def large():
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module("large")
    sys.path.remove(str(BENCH))
    for name in ("large", "large_models", "machine", "merge", "merge_models", "merge_rows"):
        sys.modules.pop(name, None)


@pytest.fixture
def models(large, tmp_path):
    with large.Models(tmp_path, large.SHAPES[TINY], 0) as models:
        yield models


@pytest.fixture
def plan(models, tmp_path):
    base, *tasks = map(str, models.paths)
    with plan_merge(MergeConfig(models=tasks, base=base, out=str(tmp_path / "out"))) as plan:
        yield plan


def test_a_run_prints_all_strata_and_leaves_nothing(large, tmp_path, monkeypatch, capsys):
    line = ["large.py", "--size", str(TINY), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)
    assert large.main() == 0
    printed = capsys.readouterr().out
    for kind in ("embedding", "attention", "MLP", "norms", "head", "**all**"):
        for method in ("task arithmetic", "gradient matching"):
            (line,) = [
                line
                for line in printed.splitlines()
                if line.startswith(f"| {kind} ") and f"| {method} |" in line
            ]
            assert "nan" not in line
    assert "part 3 of 4" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("by", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_nothing_is_left_by_a_run_that_is_stopped(large, tmp_path, monkeypatch, by, error):
    def stopped(*_):
        (folder,) = tmp_path.iterdir()
        assert list(folder.rglob("*.safetensors"))
        os.kill(os.getpid(), by)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(large, "dry_runs", lambda *_: "")
    monkeypatch.setattr(large.Tenth, "measure", stopped)
    monkeypatch.setattr(sys, "argv", ["large.py", "--size", str(TINY), "--work", str(tmp_path)])
    with pytest.raises(error):
        large.main()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(tmp_path.iterdir())


def test_strata_hold_every_unit_once(large, plan):
    strata = large.strata(plan)
    assert set(strata) == set(large.KINDS)
    assert all(strata.values())
    assert sorted(u.id for units in strata.values() for u in units) == [
        u.id for u in units_of(plan)
    ]
    names = {kind: {plan.steps[u.step].name for u in strata[kind]} for kind in strata}
    assert names["embedding"] == {"model.embed_tokens.weight"}
    assert names["head"] == {"lm_head.weight"}
    assert "model.norm.weight" in names["norms"]


@pytest.mark.parametrize(("number", "share"), [(3, 0.1), (161, 0.1), (13_440, 0.1), (40, 1.0)])
def test_a_sample_has_its_share_and_no_unit_twice(large, number, share):
    batches = large.batches_of(range(number), share, random.Random(0))
    drawn = [unit for batch in batches for unit in batch]
    assert len(drawn) == len(set(drawn)) == min(number, max(4, math.ceil(share * number)))
    assert max(map(len, batches)) <= 16
    assert len(batches) >= min(number, 4)


def test_projections_add_up(large):
    # Exactly proportional costs: the whole is known, without an error.
    assert large.projected([10, 20, 30], [1.0, 2.0, 3.0], 600) == (60.0, 0.0)
    # All of a stratum is no sample: what was measured is the cost.
    assert large.projected([10, 20], [1.0, 5.0], 30) == (6.0, 0.0)
    one = large.Sample(600, 6, [10, 20, 30], {"job": [large.Cost(c, 2 * c) for c in (1, 2, 3)]})
    assert large.projections({"a": one, "b": one}, "job", "wall") == (240.0, 0.0)


def test_the_interval_holds_the_whole_in_19_of_20_samples(large):
    rng = np.random.default_rng(0)
    costs = rng.gamma(9.0, 1 / 9, 2000)
    inside = 0
    for _ in range(400):
        drawn = rng.choice(costs, 40, replace=False)
        whole, error = large.projected([1] * 40, list(drawn), 2000)
        inside += abs(whole - costs.sum()) < 1.96 * error
    assert 0.91 < inside / 400 < 0.98


def test_what_is_filled_takes_room_and_is_given_back(large, models, tmp_path):
    """Nothing but what is merged at the moment lies on the disk."""
    (file,) = models.paths[0].glob("*.safetensors")
    before = file.stat().st_blocks
    size = file.stat().st_size
    name = "lm_head.weight"
    models.fill([large.Part(name, 1000, 300_000)])
    assert file.stat().st_blocks > before
    with SafetensorsSource([file]) as source:
        data = memoryview(bytearray(source.specs[name].nbytes))
        source.read_bytes(name, 0, data)
        entries = np.frombuffer(data, np.uint16)
        assert np.count_nonzero(entries[1000:300_000]) > 290_000
        assert not entries[300_000:].any()
        models.empty()
        source.read_bytes(name, 0, data)
        assert not np.frombuffer(data, np.uint16).any()
    assert file.stat().st_blocks <= before
    assert file.stat().st_size == size


@pytest.mark.parametrize("differs", [False, True])
def test_parts_that_differ_are_refused_and_nothing_is_left(large, tmp_path, monkeypatch, differs):
    def run(row):
        is_part = "--shard" in row.command
        seen.append(row.command[row.command.index("--shard") + 1] if is_part else "whole")
        out = Path(row.command[row.command.index("-o") + 1])
        if not is_part:  # the third call without a part is the join
            out.mkdir()
            content = "other" if differs and seen.count("whole") == 3 else "same"
            (out / "model.safetensors").write_text(content)
        return SimpleNamespace(cpu=1.0, wall=2.0, anonymous=3.0)

    seen: list[str] = []
    monkeypatch.setattr(large, "run", run)
    work = tmp_path / "work"
    work.mkdir()
    if differs:
        with pytest.raises(SystemExit, match=r"differ in model\.safetensors"):
            large.parts(tmp_path, work)
    else:
        assert "longest part and join: 4.00 s. All 1 files" in large.parts(tmp_path, work)
    assert seen == ["whole", "whole", "1/4", "2/4", "3/4", "4/4", "whole"]
    assert not list(work.iterdir())


def test_a_small_disk_is_refused(large, tmp_path):
    with pytest.raises(SystemExit, match="are to be kept free"):
        large.refuse_small_disk(tmp_path, 10**18)


def test_shards_are_those_of_70_b(large):
    files = importlib.import_module("large_models").shards(large.SHAPES[70])
    assert len(files) == 30
    assert sum(spec.size for file in files for spec in file.values()) == 70_553_706_496
    assert max(sum(spec.nbytes for spec in file.values()) for file in files) <= 5e9


def test_a_dry_run_of_a_part_says_its_share(models, plan, tmp_path):
    base, a, b = map(str, models.paths)
    line = ["merge", a, b, "--base", base, "-o", str(tmp_path / "out"), "--dry-run"]
    entries = 0
    for number in (1, 2, 3):
        done = CliRunner().invoke(app, [*line, "--shard", f"{number}/3", "--json"])
        assert done.exit_code == 0, done.output
        share = json.loads(done.stdout)["part"]
        assert share["all_units"] == len(units_of(plan))
        entries += share["entries"]
    assert entries == sum(step.spec.size for step in plan.steps)
    refused = CliRunner().invoke(app, [*line, "--shard", "4/3"])
    assert refused.exit_code != 0
    assert not (tmp_path / "out").exists()
