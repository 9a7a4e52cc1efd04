"""`--predict` says of many merges at once what the report of each would say, and writes nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.errors import CheckpointError, ConfigError, PrecisionError
from mergekit_bayes.merge import MergeConfig, predict_merges, run_merge
from mergekit_bayes.posterior import Anchor
from mergekit_bayes.posterior.stored import Matrices
from mergekit_bayes.stream import units
from tests import interrupted, three_models, tiny
from tests.reference import increase as twin
from tests.reference import methods as rules

world = three_models.world
inputs = interrupted.inputs
MODELS = {"models": ("a.safetensors", "b.safetensors"), "base": "base.safetensors"}
SETS = [(1.0, 1.0), (0.3, 0.3), (0.5, -0.2), (-0.7, 1.0), (0.2, 2.0)]


def config(**settings):
    return MergeConfig(**{"weights": "precision", **MODELS, **settings})


def report(scale, **settings):
    return run_merge(config(scale=scale, out="x.safetensors", force=True, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shrink": "row:0.3", "counts": "recorded"},
        {"pool": "row", "guard": 0.9},
        {"dtype": "BF16", "method": "fisher_negation"},
        {"base": None, "method": "fisher"},
    ],
    ids=str,
)
def test_it_says_what_the_report_of_each_merge_says(world, settings):
    sets = SETS if settings.get("base", "base") else [(1.0, 1.0), (0.3, 2.0)]
    found = predict_merges(config(**settings), sets)
    assert [one.scale for one in found.sets] == sets
    for one in found.sets:
        merged = report(one.scale, **settings)
        assert (one.predicted, one.guard) == (merged.predicted, merged.guard)
        assert len(one.predicted) == 2 + (found.base is not None)
        assert all(p.nats for p in one.predicted)


def test_units_chunks_threads_and_kernels_do_not_matter(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT", 500)
    monkeypatch.chdir(tmp_path)
    settings = interrupted.config(inputs)
    whole = predict_merges(settings, SETS)
    assert predict_merges(settings, SETS, threads=3) == whole
    for other in (
        predict_merges(settings, SETS, chunk=37, fused=False),
        predict_merges(settings, SETS, fused=True),
    ):
        for one, same in zip(whole.sets, other.sets, strict=True):
            for p, q in zip(one.predicted, same.predicted, strict=True):
                assert q.nats == pytest.approx(p.nats, rel=2e-5)
                assert (q.distance or 0) == pytest.approx(p.distance or 0, rel=2e-5)


def test_a_model_of_scale_zero_is_predicted_too(world):
    """What the merge of the others costs it: its report, which does not read it, cannot say."""
    (one,) = predict_merges(config(), [(1.0, 0.0)]).sets
    report((1.0, 0.0))
    merged, base = tiny.read("x.safetensors"), world["base"][0]
    of_a, of_b = one.predicted[1:]
    mean, precision = world["b"]
    expected = sum(twin.increase(merged, mean, base, precision, 100.0).values())
    assert of_b.nats == pytest.approx(expected, rel=2e-5)
    assert of_a.nats == pytest.approx(0, abs=1e-12)
    (nothing,) = predict_merges(config(), [(0.0,)]).sets
    assert [p.distance for p in nothing.predicted] == [None, 1.0, 1.0]
    assert all(p.trusted for p in nothing.predicted[1:])


def test_rules_for_some_tensors_hold_in_every_set(world):
    rule = "b.safetensors:attn=0.25"
    found = predict_merges(config(scale=(9.0, rule)), SETS[:2])
    assert found.rules == (rule,)
    for one in found.sets:
        assert one.predicted == report((*one.scale, rule)).predicted


def test_an_undo_has_its_own_guard(world):
    report((1.0, 1.0))
    for ending in ("safetensors", "posterior"):
        Path(f"x.{ending}").rename(f"ab.{ending}")
    settings = {"models": ("ab.safetensors", "b.safetensors")}
    found = predict_merges(config(**settings), [(1.0, -1.0), (1.0, -1.5)])
    assert [one.guard for one in found.sets] == [1e-6, 0.2]
    for one in found.sets:
        assert one.predicted == report(one.scale, **settings).predicted


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "average"])
def test_methods_that_read_no_precision_are_predicted_by_those_that_are_stored(world, name):
    base, arrays = world["base"][0], [world[n][0] for n in "ab"]
    scales = (0.4, 0.6)
    with_base = name != "average"
    settings = {"weights": "uniform", "method": name, "base": MODELS["base"] * with_base or None}
    (one,) = predict_merges(config(**settings), [scales]).sets
    problem = rules.Problem(
        base, arrays, scales, {}, [], 0.2, {"density": 0.2, "scope": "model"}, []
    )
    merged = rules.TWINS[name](problem)
    for found in one.predicted:
        mean, precision = world[found.ref.removesuffix(".safetensors")]
        expected = sum(twin.increase(merged, mean, base, precision, 100.0).values())
        assert found.nats == pytest.approx(expected, rel=1e-4)


def covariance(rng, width):
    inputs = rng.normal(size=(2 * width, width))
    return np.float32(inputs.T @ inputs / width)


@pytest.mark.parametrize("pull", [0.0, 3.0])
def test_layers_with_precision_matrices_are_predicted_by_them(tmp_path, monkeypatch, pull):
    monkeypatch.chdir(tmp_path)
    shapes, world = {"h.0.attn.weight": (5, 6), "h.0.ln.bias": (4,)}, {}
    for i, name in enumerate(("base", "a", "b")):
        precision = tiny.precisions(i, shapes)
        blocks = np.stack([covariance(np.random.default_rng([i, k]), 3) for k in range(2)])
        precision["h.0.attn.weight"] = Matrices(blocks)
        anchor = Anchor(kind="base", precision=pull) if name == "a" else Anchor()
        mean = tiny.arrays(i, shapes)
        tiny.posterior(f"{name}.safetensors", mean, precision, anchor=anchor)
        precision["h.0.attn.weight"] = np.float64(blocks)
        world[name] = mean, precision
    base = world["base"][0]
    for one in predict_merges(config(), SETS).sets:
        assert one.predicted == report(one.scale).predicted
        merged = tiny.read("x.safetensors")
        for found in one.predicted:
            name = found.ref.removesuffix(".safetensors")
            mean, precision = world[name]
            expected = 0.0
            for n, blocks in precision.items():
                g = twin.gradient(mean[n], base[n], pull * (name == "a"))
                if n == "h.0.ln.bias":
                    expected += twin.loss(merged[n], mean[n], blocks, g)
                    continue
                d = np.float64(merged[n]) - mean[n]
                halves = zip(np.split(d, 2, axis=1), blocks, strict=True)
                expected += sum(np.trace(x @ h @ x.T) for x, h in halves) / 2 + np.sum(g * d)
            assert found.nats == pytest.approx(expected / 100, rel=1e-4)


def test_the_inputs_are_read_once_and_nothing_is_left(world, monkeypatch):
    read = []
    real = SafetensorsSource.read_bytes

    def counted(self, name, *rest):
        read.append(name)
        return real(self, name, *rest)

    monkeypatch.setattr(SafetensorsSource, "read_bytes", counted)
    before = interrupted.contents()
    counts = []
    for sets in (SETS[:1], SETS):
        read.clear()
        predict_merges(config(out="new.safetensors"), sets)
        counts.append(len(read))
    assert counts[0] == counts[1] > 0
    assert interrupted.contents() == before


def test_bad_entries_are_refused_or_replaced_as_in_a_merge(world):
    mean, precision = world["a"]
    bad = {n: m.copy() for n, m in mean.items()}
    bad["wte.weight"][2, 1] = np.nan
    tiny.posterior("bad.safetensors", bad, precision)
    settings = {"models": ("bad.safetensors", "b.safetensors")}
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: 'wte.weight' is nan"):
        predict_merges(config(**settings), SETS)
    found = predict_merges(config(**settings, on_bad="base"), SETS)
    for one in found.sets:
        assert one.predicted == report(one.scale, **settings, on_bad="base").predicted


@pytest.mark.parametrize(
    ("settings", "sets", "said"),
    [
        ({}, [], "give a set"),
        ({}, [(1.0, 2.0, 3.0)], "--predict 1,2,3: 3 scales for 2 models"),
        ({}, [(1.0,), (float("nan"),)], "--predict nan: --scale"),
        ({"base": None}, [(1.0, -1.0)], "--predict 1,-1: a negative scale"),
        ({"weights": "uniform", "method": "dare_ties"}, [(1.0,)], "draws at random"),
        ({"weights": "uniform", "method": "tsv_m"}, [(1.0,)], "merges whole matrices"),
        ({"weights": "uniform", "method": "model_stock"}, [(1.0,)], "merges whole tensors"),
    ],
    ids=str,
)
def test_sets_that_no_merge_takes_are_refused(world, settings, sets, said):
    with pytest.raises(ConfigError, match=said):
        predict_merges(config(**settings), sets)


def test_a_method_that_reads_no_precision_takes_one_by_name_for_its_prediction(world):
    ties = {"weights": "uniform", "method": "ties"}
    expected = predict_merges(config(**ties), SETS[:1])
    Path("b.posterior").rename("other.posterior")
    ties |= {"precision": {"b.safetensors": "other.posterior"}}
    assert predict_merges(config(**ties), SETS[:1]).sets == expected.sets
    with pytest.raises(ConfigError, match=r"ties reads none: drop it"):
        report(1.0, **ties)
    with pytest.raises(ConfigError, match=r"--precision c=\.\.\.: no such model"):
        predict_merges(config(**(ties | {"precision": {"c": "x"}})), SETS[:1])


def test_a_model_without_a_precision_is_refused(world):
    Path("a.posterior").unlink()
    with pytest.raises(PrecisionError, match=r"no precision for 'a\.safetensors'"):
        predict_merges(config(weights="uniform"), [(1.0,)])


def test_the_command_prints_a_table_and_a_document(world):
    line = ["merge", "a.safetensors", "b.safetensors", "--base", "base.safetensors"]
    line += ["--weights", "precision", "--predict", "-0.5,1", "--predict", "0.3"]
    before = interrupted.contents()
    done = CliRunner().invoke(app, [*line, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [one["scale"] for one in document["sets"]] == [[-0.5, 1.0], [0.3, 0.3]]
    first, second = done.stderr.splitlines()[2:4]
    assert first.startswith("-0.5, 1")
    assert first.count("?") == 2  # both models are farther from it than from the base
    assert second.startswith("0.3, 0.3")
    assert "?" not in second
    assert "not to be trusted" in done.stderr
    assert interrupted.contents() == before
    for more, said in (
        (["--scale", "1"], "Drop --scale 1."),
        (["--dry-run"], "Drop --dry-run."),
        (["-o", "x"], "Drop -o."),
        (["--shard", "1/2"], "Drop --shard."),
        (["--predict", "x"], "'x' is not a number"),
    ):
        refused = CliRunner().invoke(app, [*line, *more])
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_a_recipe_is_predicted_by_other_scales(world):
    merged = report((0.3, 0.3))
    done = CliRunner().invoke(app, ["merge", "x.merge_recipe.yaml", "--predict", "0.3", "--json"])
    (one,) = json.loads(done.stdout)["sets"]
    assert one["predicted"] == [p.model_dump(mode="json") for p in merged.predicted]


def test_the_report_of_a_merge_is_told_in_a_line(world):
    line = ["merge", "a.safetensors", "--base", "base.safetensors", "--weights", "precision"]
    done = CliRunner().invoke(app, [*line, "--scale", "-0.5", "-o", "x.safetensors"])
    assert "predicted increase of the loss, nats a token: 'base.safetensors' +" in done.stderr
    assert "not to be trusted for 'a.safetensors'" in done.stderr
