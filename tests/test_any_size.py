"""`bmerge precision` at any size: pooled sums, sums elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.checkpoint.codec import read_tensor
from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models import places
from mergekit_bayes.posterior import open_posterior
from mergekit_bayes.precision import PrecisionConfig, passes
from mergekit_bayes.precision.run import run_precision
from tests import tiny
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_mixtral

BENCH = Path(__file__).parent.parent / "scripts" / "bench" / "precision.py"
MODELS = {"tied head": tiny_gpt2, "classifier": tiny_bert, "experts": tiny_mixtral}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "m"
    MODELS[request.param](folder)
    rows = ["the cat sat .", "a good film", "dull tree", "dog ran on the mat", "very fun"]
    (folder.parent / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in rows))
    estimate(folder, "entries")
    return folder


def estimate(model, name, **settings):
    """A precision beside the model, and its tensors by name."""
    out, data = model.parent / f"{name}.safetensors", str(model.parent / "t.jsonl")
    config = {"model": str(model), "data": data, "output": str(out), "batch_size": 2, "prior": 0.5}
    run_precision(PrecisionConfig(**config, **settings, force=True))
    return tiny.read(out)


def test_a_pooled_precision_is_the_mean_of_the_entries_that_the_file_would_hold(model):
    entries, rows, tensors = (
        estimate(model, name, pool=pool)
        for name, pool in (("e", None), ("row", "row"), ("tensor", "tensor"))
    )
    assert set(rows) == set(tensors) == set(entries)
    for name, entry in entries.items():
        assert rows[name].shape == (*entry.shape[:1], *[1] * (entry.ndim - 1))
        assert tensors[name].shape == (1,) * entry.ndim
        by_row = entry.reshape(len(entry), -1).mean(1, dtype=np.float64)
        by_row = by_row if entry.ndim > 1 else entry
        np.testing.assert_allclose(rows[name].ravel(), by_row, rtol=1e-6)
        np.testing.assert_allclose(tensors[name].ravel(), entry.mean(dtype=np.float64), rtol=1e-6)
    with open_posterior(str(model), precision=str(model.parent / "row.safetensors")) as posterior:
        assert posterior.info.pool == "row"


def test_a_precision_of_two_vectors_a_matrix_has_the_sums_of_its_entries(model):
    """`prior` is part of both, since it is on every entry."""
    entries = estimate(model, "e")
    estimate(model, "two", pool="row-column")
    place = str(model.parent / "two.safetensors")
    with open_posterior(str(model), precision=place) as posterior:
        assert posterior.info.pool == "row-column"
        for name, spec in posterior.precision.specs.items():
            expected = entries[f"precision:{name}"]
            found = read_tensor(posterior.precision, name).astype(np.float64)
            assert posterior.precision.numbers(name) <= sum(spec.shape)
            for axes in ((0,), tuple(range(1, len(spec.shape)))):
                np.testing.assert_allclose(
                    found.sum(axes), expected.sum(axes, np.float64), rtol=2e-5
                )


def test_a_model_over_all_devices_gives_the_same_bytes(model):
    """On a machine without GPUs these are its memory."""
    estimate(model, "spread", device="auto")
    found, expected = (tiny.read(model.parent / f"{n}.safetensors") for n in ("spread", "entries"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "t", "estimator": "fisher-exact"}, "--estimator fisher-exact: 2 processes"),
        ({"data": "t", "estimator": "ivon"}, "--estimator ivon: 2 processes"),
        ({"self_generated": 9}, "--self-generated: 2 processes"),
    ],
)
def test_what_processes_with_a_part_of_the_model_cannot_do_is_refused(
    monkeypatch, settings, message
):
    config = PrecisionConfig(model="m", device="auto", **settings)
    passes.refuse_device(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        passes.refuse_device(config)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_sums_elsewhere_give_the_same_bytes(model, place):
    estimate(model, "elsewhere", sums=place)
    found, expected = (model.parent / f"{n}.safetensors" for n in ("elsewhere", "entries"))
    assert found.read_bytes() == expected.read_bytes()


def test_a_merge_reads_a_pooled_precision(tmp_path):
    a, b = tiny_gpt2(tmp_path / "a", seed=1), tiny_gpt2(tmp_path / "b", seed=2)
    (tmp_path / "t.jsonl").write_text('{"text": "the cat sat ."}\n' * 4)
    pooled = {}
    for model in (a, b):
        estimate(model, f"{model.name}.row", pool="row")
        pooled[str(model)] = str(tmp_path / f"{model.name}.row.safetensors")
    config = {"models": (str(a), str(b)), "weights": "precision"}
    run_merge(MergeConfig(**config, precision=pooled, out=str(tmp_path / "ab")))
    for model in (a, b):
        estimate(model, f"{model.name}.entry")
        pooled[str(model)] = str(tmp_path / f"{model.name}.entry.safetensors")
    run_merge(MergeConfig(**config, precision=pooled, pool="row", out=str(tmp_path / "control")))
    found, expected = tiny.read(tmp_path / "ab"), tiny.read(tmp_path / "control")
    for name, weights in expected.items():
        np.testing.assert_allclose(found[name], weights, rtol=1e-5, atol=1e-7)


def test_rows_that_memory_holds_in_another_order_are_not_pooled(model, monkeypatch):
    def turned(model, tensors):
        return {n: t.mT if t.ndim == 2 else t for n, t in tensors.items()}

    monkeypatch.setattr(places, "checkpoint_names", turned)
    with pytest.raises(MismatchError, match="another order than it has in memory"):
        estimate(model, "row", pool="row")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_the_sums_of_rows_take_no_second_copy_of_a_model_of_100_million():
    def peak(kind):
        line = [sys.executable, str(BENCH), "--parameters", "100", "--one", kind]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
        return json.loads(subprocess.check_output(line, env=env).splitlines()[-1])

    forward, row, entries = map(peak, ("forward", "row", "entries"))
    model, activations = forward["model"], forward["peak"] - forward["model"]
    assert row["peak"] <= 1.25 * model + activations
    assert entries["peak"] > 1.9 * model + activations  # with the sums of all entries


@pytest.mark.slow
@pytest.mark.parametrize("what", [[], ["--batch-sizes"]])
def test_the_benchmark_prints_its_tables(what):
    line = [sys.executable, str(BENCH), *what, "--parameters", "2", "--rows", "32"]
    printed = subprocess.check_output([*line, "--repeats", "1"], text=True)
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 2 M")]
    assert len(rows) == (6 if what else 4)
    assert all(float(row[2]) > 0 for row in rows)
    if not what:
        assert [row[-1].split()[0] in ("met", "MISSED") for row in rows] == [
            False,
            True,
            True,
            False,
        ]
