"""Mixtures of runs: how they are stored, and what a merge makes of them."""

import json
import re
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import mix
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.configs import load_config
from mergekit_bayes.errors import (
    BmergeError,
    CheckpointError,
    ConfigError,
    MismatchError,
    PrecisionError,
)
from mergekit_bayes.gaussian import DELTA_0
from mergekit_bayes.hub import make_card, plan_push
from mergekit_bayes.inspect import run_inspect
from mergekit_bayes.merge import MergeConfig, predict_merges, run_merge
from mergekit_bayes.mix import MixConfig, run_mix
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import open_posterior, save_posterior
from mergekit_bayes.posterior.edits import Edit, Identity
from mergekit_bayes.posterior.factors import Matrices
from mergekit_bayes.preview.forming import Plans
from mergekit_bayes.stream.chunks import Reader
from mergekit_bayes.stream.first_pass import FirstPass
from mergekit_bayes.stream.mixtures import settled
from tests import tiny
from tests.interrupted import contents, interrupt
from tests.reference import mixtures as reference

SPREAD = 0.2  # of the weights: small enough for responsibilities between 0 and 1
BY_PRECISION = {"base": "base", "weights": "precision"}


def model(name, mean, precision, **record):
    tiny.posterior(f"{name}/model.safetensors", mean, precision, **record)
    tiny.into_folder(name)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Folders `base`, `a`, `b`, `c` with precisions near 1, and their arrays."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for i, name in enumerate(("base", "a", "b", "c")):
        found[name] = tiny.arrays(i, spread=SPREAD), tiny.precisions(i, low=0.8, high=1.2)
        model(name, *found[name])
    return found


def mixed(*runs, out="m", **settings):
    return run_mix(MixConfig(runs=runs, out=out, **settings))


def merge(*models, out="out", **settings):
    return run_merge(MergeConfig(models=models, out=out, **BY_PRECISION, **settings))


def tensors(folder):
    return tiny.read(folder), tiny.read_precision(folder)


def twin(world, names, tensor, scales, rounds):
    """The twin's rounds for a tensor; names are runs or lists of (weight, run)."""
    m0, h0 = (np.float64(part[tensor]) for part in world["base"])
    base = m0, h0 + DELTA_0

    def component(weight, name):
        mean, likelihood = (np.float64(part[tensor]) for part in world[name])
        return weight, mean, base[1] + likelihood

    tasks = [[component(*c) for c in ([(1.0, n)] if isinstance(n, str) else n)] for n in names]
    return base, tasks, reference.iterated(base, tasks, scales, rounds)


def iterations(models, most, **settings):
    """The product's merged means and shares of a mixture after each number of rounds."""
    with plan_merge(MergeConfig(models=models, out="no", **BY_PRECISION, **settings)) as plan:
        reader = Reader(plan)
        first = FirstPass(plan, lambda: reader, map, fused=False)
        measured = {step.name: first.measure(step) for step in plan.steps}
        return [
            {
                step.name: settled(
                    plan, step, measured[step.name], lambda: reader, map, rounds=rounds
                ).step
                for step in plan.steps
            }
            for rounds in range(most)
        ]


def test_a_mixture_of_one_run_merges_as_the_run_bit_for_bit(world):
    assert mixed("a", out="m").notes == ("a mixture of one run merges as that run does",)
    merge("a", "c", out="single", scale=(0.7, -0.3))
    merge("m", "c", out="of_one", scale=(0.7, -0.3))
    for file in ("model.safetensors", "posterior/precision.index.json"):
        assert Path("single", file).read_bytes() == Path("of_one", file).read_bytes()
    for left, right in zip(tensors("single"), tensors("of_one"), strict=True):
        assert all(left[n].tobytes() == right[n].tobytes() for n in tiny.SHAPES)


def test_a_mixture_merges_as_the_twin_does_in_float64(world):
    mixed("a", "b", out="m", weights=(1, 2))
    merge("c", "m", scale=(0.4, 0.8))
    means, precisions = tensors("out")
    for name in tiny.SHAPES:
        parts = [(1 / 3, "a"), (2 / 3, "b")]
        *_, found = twin(world, ["c", parts], name, (0.4, 0.8), 10)
        mean, precision, (_, shares) = found[-1]
        assert all(0.01 < r < 0.99 for r in shares)
        np.testing.assert_allclose(means[name], mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(precisions[name], precision, rtol=1e-5)


def test_every_round_is_that_of_the_twin_and_none_lowers_the_objective(world):
    mixed("a", "b", "c", out="m", weights=(1, 2, 1))
    parts = [(0.25, "a"), (0.5, "b"), (0.25, "c")]
    rose = 0
    for name in tiny.SHAPES:
        base, tasks, found = twin(world, [parts], name, (1.5,), 5)
        heights = []
        for rounds, steps in enumerate(iterations(("m",), 6, scale=(1.5,))):
            shares = np.array([task.scale for task in steps[name].tasks]) / 1.5
            assert abs(shares.sum() - 1) < 1e-12
            np.testing.assert_allclose(shares, found[rounds][2][0], rtol=1e-6)
            theta, _ = reference.merged(base, tasks, (1.5,), [shares])
            heights.append(reference.objective(theta, base, tasks, (1.5,)))
        assert all(b >= a - 1e-9 for a, b in pairwise(heights))
        rose += heights[-1] > heights[0] + 1e-6
    assert rose


FRAMES = [
    {},
    {"pool": "row"},
    {"shrink": "row:0.3", "counts": "recorded"},
    {"anchor": "0.5", "scale": (0.7, -0.4)},
    {"dtype": "BF16"},
    {"only": "attn", "scale": (2.0, "m:attn=0.5")},
]


@pytest.mark.parametrize("frame", FRAMES, ids=str)
def test_equal_components_merge_as_one_of_them(world, frame):
    shutil.copytree("a", "again")
    notes = mixed("a", "again", out="m", weights=(1, 3)).notes
    assert notes == ("'a' and 'again' hold the same weights",)
    one = dict(frame)
    if "only" in one:
        one["scale"] = (2.0, "a:attn=0.5")
    merge("a", "c", out="single", **one)
    merge("m", "c", out="of_two", **frame)
    for left, right in zip(tensors("single"), tensors("of_two"), strict=True):
        for name in tiny.SHAPES:
            rtol = 0.01 if "dtype" in frame else 1e-5
            np.testing.assert_allclose(left[name], right[name], rtol=rtol, atol=1e-6)


def test_a_mixture_takes_the_nearer_mode_and_an_average_takes_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one = np.ones(8, np.float32)
    for name, at in {"base": 0.0, "left": -2.0, "right": 2.0, "other": 1.5}.items():
        model(name, {"w": at * one}, {"w": (0.01 if name == "base" else 10.0) * one})
    mixed("left", "right", out="m")
    steps = iterations(("m", "other"), 2)
    assert [round(task.scale, 6) for task in steps[1]["w"].tasks] == [0.0, 1.0, 1.0]
    merge("m", "other", out="of_modes")
    merge("left", "right", "other", out="of_average", scale=(0.5, 0.5, 1.0))
    assert tiny.read("of_modes")["w"] == pytest.approx(np.full(8, 1.75), abs=0.01)
    assert tiny.read("of_average")["w"] == pytest.approx(np.full(8, 0.75), abs=0.01)


def test_a_merge_of_a_mixture_merges_again_and_its_recipe_makes_it_again(world):
    mixed("a", "b", out="m")
    report = merge("m", out="first", observations={"m": "2x"})
    assert [m.ref for m in report.models] == ["base", "m: a", "m: b"]
    assert [m.mixture for m in report.models] == [None, "m", "m"]
    assert [term.label for term in run_inspect("first").precision.info.terms] == ["m: a", "m: b"]
    assert any("the share of each is found in each tensor" in note for note in report.notes)
    assert [m.count for m in report.models[1:]] == [200, 200]
    assert report.summary == (
        "'base' plus the change of 1 model, of which 1 is a mixture (scale 1), "
        "weighted by precision"
    )
    steps = iterations(("m",), 11, observations={"m": "2x"})[-1]
    entries = {name: step.spec.size for name, step in steps.items()}
    for model, position in zip(report.models[1:], (0, 1), strict=True):
        share = sum(n * steps[name].tasks[position].scale for name, n in entries.items())
        assert model.share == pytest.approx(share / sum(entries.values()), rel=1e-5)
    recipe = load_config(MergeConfig, Path("first/merge_recipe.yaml"))
    assert recipe.models == ("m",)
    assert list(recipe.identities) == ["base", "m: a", "m: b"]
    run_merge(recipe.model_copy(update={"out": "again"}))
    assert tiny.read("again")["wte.weight"].tobytes() == tiny.read("first")["wte.weight"].tobytes()
    merge("first", "c", out="second", observations={"first": "0.5x"})
    Path("m/mixture/2/model.safetensors").write_bytes(Path("c/model.safetensors").read_bytes())
    with pytest.raises(MismatchError, match="other weights than component 2"):
        run_merge(recipe.model_copy(update={"out": "changed"}))


def test_rules_by_tensor_hold_for_all_components(world):
    mixed("a", "b", out="m", weights=(1, 3))
    with plan_merge(
        MergeConfig(models=("c", "m"), out="no", scale=("m:bias=0.5",), **BY_PRECISION)
    ) as plan:
        scales = {step.name: [task.scale for task in step.tasks] for step in plan.steps}
    assert scales["h.0.ln.bias"] == [1.0, 0.125, 0.375]
    assert scales["wte.weight"] == [1.0, 0.25, 0.75]


def test_a_component_that_left_a_tensor_alone_has_the_bases_posterior_there(world):
    """Its precision file may lack the tensor then, and it keeps the merge at the base."""
    mean, precision = (dict(part) for part in world["b"])
    mean["h.0.ln.bias"] = world["base"][0]["h.0.ln.bias"]
    del precision["h.0.ln.bias"]
    model("frozen", mean, precision)
    mixed("a", "frozen", out="m")
    step = iterations(("m",), 4)[-1]["h.0.ln.bias"]
    m0, h0 = (np.float64(part["h.0.ln.bias"]) for part in world["base"])
    m1, h1 = (np.float64(part["h.0.ln.bias"]) for part in world["a"])
    tasks = [[(0.5, m1, h0 + h1), (0.5, m0, h0)]]
    *_, (_, _, shares) = reference.iterated((m0, h0), tasks, (1.0,), 3)
    assert [task.scale for task in step.tasks] == pytest.approx([shares[0][0], 0.0], rel=1e-5)


def test_a_removal_undoes_no_term_of_a_component_whose_share_moves(world):
    """The share of `ab` goes from a half to zero in most tensors, and `a` was never added there."""
    for name, factor in {"base": 0.01, "c": 1000.0}.items():
        mean, precision = world[name]
        shutil.rmtree(name)
        model(name, mean, {n: p * np.float32(factor) for n, p in precision.items()})
    merge("a", "b", out="ab")
    mixed("ab", "c", out="m")
    report = merge("m", "a", scale=(1.0, -0.5))
    assert report.guard == MergeConfig(models=("m",)).guard
    assert not any("undoes a term" in note for note in report.notes)
    assert report.largest_multiplier < 10
    by_name = merge("ab", "c", "a", scale=(0.5, 0.5, -0.5), out="by_name")
    assert by_name.guard < report.guard


def test_a_bad_entry_has_the_bases_posterior_in_the_responsibilities_too(world):
    name, (mean, precision) = "h.0.ln.bias", world["b"]
    mean[name][1] = np.nan
    model("bad", mean, precision)
    mixed("a", "bad", out="m")
    with pytest.raises(CheckpointError, match="is nan at flat index 1"):
        merge("m")
    report = merge("m", on_bad="base")
    assert [m.mended for m in report.models[1:]] == [0, 1]
    step = iterations(("m",), 4, on_bad="base")[-1][name]
    mean[name][1] = world["base"][0][name][1]
    precision[name][1] = 0  # what the run's data add to the base's
    *_, found = twin(world, [[(0.5, "a"), (0.5, "b")]], name, (1.0,), 3)
    shares = found[-1][2][0]
    assert [task.scale for task in step.tasks] == pytest.approx(shares, rel=1e-6)
    np.testing.assert_allclose(tensors("out")[0][name], found[-1][0], rtol=1e-3, atol=1e-4)


def test_components_from_one_start_add_it_once_together(world):
    """Beside the start itself, or another run from it, it is added twice."""
    with open_posterior("c") as start:
        identity = Identity(blocks=start.precision_identity)
    edit = Edit(rows=(), steps=1, base=100, start_precision=identity)
    for name in ("a", "b"):
        save_posterior(Path(name), world[name][1], tiny.info(name, edits=(edit,)), force=True)
    mixed("a", "b", out="m")
    words = "each holds the precision of one start"
    assert not any(words in note for note in merge("m", out="one").notes)
    for other in ("c", "b"):
        notes = merge("m", other, out=f"with_{other}").notes
        named = [note.removesuffix(note.partition(": each")[2]) for note in notes if words in note]
        assert named == [f"'m: a', '{other}': each"]


def test_a_reported_share_is_the_mean_responsibility_where_the_mixture_counts(world):
    """Also of a component that left tensors alone, and where another mixture goes on."""
    mean, precision = dict(world["base"][0]), {}
    for part, of_run in zip((mean, precision), world["b"], strict=True):
        part["wte.weight"] = of_run["wte.weight"]
    model("frozen", mean, precision)
    mixed("a", "frozen", out="m")
    mixed("b", "c", out="n")
    report = merge("m", "n", scale=("m:attn=0",))
    shares = [m.share for m in report.models[1:]]
    assert sum(shares[:2]) == pytest.approx(1, abs=1e-5)
    assert sum(shares[2:]) == pytest.approx(1, abs=1e-5)
    parts, others = [(0.5, "a"), (0.5, "frozen")], [(0.5, "b"), (0.5, "c")]
    world["frozen"] = mean, {n: np.zeros_like(mean[n]) for n in mean} | precision
    expected, entries = np.zeros(4), np.zeros(4)
    for name, values in mean.items():
        counts = "attn" not in name
        *_, found = twin(world, [parts, others], name, (float(counts), 1.0), 10)
        mine, its = found[-1][2]
        expected += values.size * np.array([*(counts * np.array(mine)), *its])
        entries += values.size * np.array([counts, counts, 1, 1])
    np.testing.assert_allclose(shares, expected / entries, rtol=1e-4)
    nowhere = merge("m", "c", scale=(0.0, 1.0), out="nowhere").models[1]
    assert (nowhere.ref, nowhere.share) == ("m: a", None)


def test_other_rules_take_the_plain_model_and_say_so(world):
    mixed("a", "b", out="m", weights=(1, 2))
    report = run_merge(MergeConfig(models=("m", "c"), base="base", out="plain"))
    run_merge(MergeConfig(models=("b", "c"), base="base", out="single"))
    assert tiny.read("plain")["wte.weight"].tobytes() == tiny.read("single")["wte.weight"].tobytes()
    assert any("only its plain model counts here, the run 'b'" in note for note in report.notes)
    report = run_merge(MergeConfig(models=("c",), base="m", weights="precision", out="on_it"))
    assert any("only its plain model counts here, the run 'b'" in note for note in report.notes)


def test_side_files_of_a_mixture_are_those_of_its_plain_model(world):
    for name in ("a", "b"):
        Path(name, "config.json").write_text("{}")
        Path(name, "generation_config.json").write_text(json.dumps({"max_length": ord(name)}))
    mixed("a", "b", out="m", weights=(1, 3))
    merge("c", "m", out="first", side_files="m")
    assert json.loads(Path("first/generation_config.json").read_text())["max_length"] == ord("b")
    merge("m", "c", out="chosen")
    for made in ("first", "chosen"):
        recipe = load_config(MergeConfig, Path(made, "merge_recipe.yaml"))
        run_merge(recipe.model_copy(update={"out": f"{made}_again"}))
        for file in ("generation_config.json", "model.safetensors"):
            assert Path(made, file).read_bytes() == Path(f"{made}_again", file).read_bytes()


def test_the_output_of_a_merge_is_no_mixture(world):
    Path("a/config.json").write_text("{}")
    mixed("a", out="m")
    merge("m", "c", side_files="m")
    assert not Path("out/posterior_mixture.json").exists()


REFUSED = {
    "removed": (partial(merge, "m", scale=(-1.0,)), "what is removed from a base is one posterior"),
    "removed by a rule": (partial(merge, "m", scale=("m:bias=-1",)), "is one posterior"),
    "precision": (partial(merge, "m", isotropic={"m": 2.0}), "--isotropic m=...: it is a mixture"),
    "mixed again": (partial(mixed, "m", "c", out="n"), "'m' is a mixture itself"),
    "weights": (partial(mixed, "a", "b", out="n", weights=(1,)), "1 given for 2 runs"),
    "zero": (partial(mixed, "a", "b", out="n", weights=(1, 0)), "--weights 0: expected a number"),
    "nan": (partial(mixed, "a", out="n", weights=(float("nan"),)), "--weights nan"),
    "file": (partial(mixed, "a/model.safetensors", out="n"), "is a single file"),
    "in place": (partial(mixed, "a", "b", out="a", force=True), "would replace 'a', an input"),
    "twice": (partial(mixed, "a", "./a", out="n"), "'a' and './a' are one run"),
    "into a run": (partial(mixed, "a", "b", out="b/sub"), "'b/sub' lies in 'b', an input"),
    "to a file": (partial(mixed, "a", "b", out="n.safetensors"), "a mixture is a folder"),
    "there": (partial(mixed, "a", "b", out="c"), "'c' exists"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(world, case):
    mixed("a", "b", out="m")
    before = contents()
    act, message = REFUSED[case]
    with pytest.raises(BmergeError) as caught:
        act()
    assert message in str(caught.value)
    assert contents() == before


def test_runs_of_other_models_and_without_precision_are_refused(world):
    shapes = {**tiny.SHAPES, "wte.weight": (8, 4)}
    model("wide", tiny.arrays(0, shapes), tiny.precisions(0, shapes))
    with pytest.raises(MismatchError, match=r"'wte.weight' is \[7, 4\] in 'a' and \[8, 4\]"):
        mixed("a", "wide")
    for name, activation in (("a", "gelu"), ("b", "relu")):
        Path(name, "config.json").write_text(json.dumps({"hidden_act": activation}))
    with pytest.raises(MismatchError, match="hidden_act"):
        mixed("a", "b")
    tiny.write("bare/model.safetensors", world["a"][0])
    with pytest.raises(PrecisionError, match="no precision for 'bare'"):
        mixed("c", "bare")
    Path("c/model.safetensors").write_bytes(Path("bare/model.safetensors").read_bytes())
    with pytest.raises(PrecisionError, match="'c' was taken at other weights"):
        mixed("c")
    assert not Path("m").exists()


BAD_RECORDS = {
    "no json": "{",
    "no list": '{"format": 1, "components": 3}',
    "empty": '{"format": 1, "components": []}',
    "a later format": '{"format": 2, "components": []}',
    "a path": {"folder": "../c"},
    "negative": {"weight": -1.0},
    "infinite": {"weight": 1e300},
    "text": {"weight": "much"},
    "another mean": {"mean": {"blocks": "0" * 64}},
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_nothing_in_a_record_is_believed(world, case):
    mixed("a", "b", out="m")
    content, file = BAD_RECORDS[case], Path("m/posterior_mixture.json")
    if isinstance(content, dict):
        record = json.loads(file.read_text())
        record["components"][1] |= content
        content = json.dumps(record)
    file.write_text(content)
    with pytest.raises(
        (CheckpointError, MismatchError), match=r"posterior_mixture\.json"
    ) as caught:
        merge("m")
    assert str(caught.value).endswith("or remove the file to use the folder as a plain model.")
    assert not Path("out").exists()


def test_precision_matrices_are_refused(world):
    for i, name in enumerate(("base", "a", "b")):
        mean, precision = world[name]
        blocks = np.eye(5, dtype=np.float32)[None] * (i + 1)
        model(f"{name}2", mean, {**precision, "h.0.attn.weight": Matrices(blocks)})
    with pytest.raises(PrecisionError, match=r"'h.0.attn.weight'.*Mix runs with other precisions"):
        mixed("a2", "b2", out="m")
    mixed("a", "b", out="m")
    for name, place in (("a2", "m"), ("b2", "m/mixture/2")):
        shutil.copytree(f"{name}/posterior", f"{place}/posterior", dirs_exist_ok=True)
    with pytest.raises(MismatchError, match=r"'h.0.attn.weight' has a precision of matr.*'m: a'"):
        run_merge(MergeConfig(models=("m",), base="base2", weights="precision"))


def test_a_run_that_changes_meanwhile_is_not_mixed(world, monkeypatch):
    def copied(source, target):
        Path(target).write_bytes(source.read_bytes())
        Path("b/model.safetensors").write_bytes(Path("c/model.safetensors").read_bytes())

    monkeypatch.setattr(mix.shutil, "copyfile", copied)
    with pytest.raises(ChangedError, match=r"b/model\.safetensors"):
        mixed("a", "b", out="m")
    assert not Path("m").exists()


def test_a_merge_that_was_stopped_does_not_go_on_with_other_weights(world, monkeypatch):
    mixed("a", "b", out="m")
    config = MergeConfig(models=("m", "c"), out="out", posterior=False, **BY_PRECISION)
    interrupt(monkeypatch, config, 2)
    record = Path("m/posterior_mixture.json")
    record.write_text(record.read_text().replace('"weight": 1.0', '"weight": 2.0', 1))
    with pytest.raises(CheckpointError, match=r"out\.partial"):
        run_merge(config)


def test_a_missing_component_is_named(world):
    mixed("a", "b", out="m")
    Path("m/mixture/2").rename("elsewhere")
    with pytest.raises(CheckpointError, match="'m/mixture/2' is not there"):
        merge("m")


def test_inspect_shows_the_runs_of_a_mixture(world):
    mixed("a", "b", out="m", weights=(1, 3))
    report = run_inspect("m")
    assert [(run.label, run.weight, run.path) for run in report.mixture] == [
        ("a", 0.25, "m/mixture/1"),
        ("b", 0.75, "m"),
    ]
    assert report.identity == run_inspect("b").identity
    assert "mixture" not in run_inspect("m/mixture/1").model_dump()
    done = CliRunner().invoke(app, ["inspect", "m"])
    assert "a mixture, of which the plain model is shown below" in done.stderr
    assert "m/mixture/1" in done.stderr


def lose_the_folder():
    shutil.rmtree("m/mixture/2")


def replace_the_weights():
    shutil.copy("c/model.safetensors", "m/mixture/2/model.safetensors")


def replace_the_plain_weights():
    shutil.copy("c/model.safetensors", "m/model.safetensors")


def lose_the_posterior():
    shutil.rmtree("m/mixture/2/posterior")


def cut_the_weights():
    Path("m/mixture/2/model.safetensors").write_bytes(b"cut")


FAULTS = {
    lose_the_folder: "the run 'b' of this mixture: its folder is missing",
    replace_the_weights: "the run 'b' of this mixture: its weights are others than the record",
    replace_the_plain_weights: "the run 'a' of this mixture: its weights are others",
    lose_the_posterior: "the run 'b' of this mixture: its precision is missing",
    cut_the_weights: "the run 'b' of this mixture: it cannot be read: m/mixture/2/model",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_inspect_says_what_of_a_mixture_is_not_there(world, fault):
    mixed("a", "b", out="m")
    assert not any("of this mixture" in note for note in run_inspect("m").notes)
    fault()
    notes = [note for note in run_inspect("m").notes if "of this mixture" in note]
    assert [note[: len(FAULTS[fault])] for note in notes] == [FAULTS[fault]]


def test_the_card_of_a_merge_names_mixture_and_runs(world):
    for name in ("base", "a", "b", "c"):
        Path("runs", name).parent.mkdir(exist_ok=True)
        shutil.move(name, f"runs/{name}")
    mixed("runs/a", "runs/b", out="runs/m", weights=(1, 3))
    report = run_merge(
        MergeConfig(
            models=("runs/m", "runs/c"), base="runs/base", weights="precision", out="merged"
        )
    )
    card = make_card(Path("merged"))
    assert "merged 2 models on a base by `gradient_matching`" in card.text
    rows = [re.split(r" *\| *", line)[1:5] for line in card.text.splitlines() if "| task |" in line]
    shares = [f"{model.share:.1%}" for model in report.models[1:3]]
    assert rows == [
        ["`m: a` (local)", "task", "1 together", shares[0]],
        ["`m: b` (local)", "task", "1 together", shares[1]],
        ["`c` (local)", "task", "1", ""],
    ]
    assert "The share of each is found in each tensor" in card.text
    assert "  'm: b': " in card.text.partition("identities:")[2]
    assert "runs/" not in card.text
    assert "mixture/2" not in card.text
    assert "side_files: m/mixture/1" in card.text
    assert "take " not in card.text  # the runs' shares are those of this merge
    assert any(note.startswith("base, m, c are local folders") for note in card.notes)


def test_a_mixture_is_not_pushed(world):
    for name in ("a", "b"):
        Path(name, "config.json").write_text('{"model_type": "gpt2"}')
    mixed("a", "b", out="m")
    with pytest.raises(ConfigError, match="'m' is a mixture, which a repository of one model"):
        plan_push(Path("m"), "org/m")
    Path("m/posterior_mixture.json").unlink()
    assert plan_push(Path("m"), "org/m").files


def test_the_command_mixes_and_says_where(world):
    done = CliRunner().invoke(app, ["mix", "a", "-o", "alone"])
    assert "note: a mixture of one run merges as that run does" in done.stderr
    done = CliRunner().invoke(app, ["mix", "a", "b", "-o", "m", "--weights", "1,3"])
    assert (done.exit_code, done.stdout.strip()) == (0, "m")
    assert "plain model" in done.stderr
    done = CliRunner().invoke(app, ["merge", "m", "c", "--base", "base", "--weights", "precision"])
    assert done.exit_code == 0
    assert "of its mixture" in done.stderr
    assert run_inspect("merged").precision.info.merge.uneven


def test_an_interrupted_mix_leaves_nothing(world, monkeypatch):
    before = contents()
    copied = []

    def stopped(source, target):
        if copied:
            raise KeyboardInterrupt
        copied.append(target)
        Path(target).write_bytes(source.read_bytes())

    monkeypatch.setattr(mix.shutil, "copyfile", stopped)
    with pytest.raises(KeyboardInterrupt):
        mixed("a", "b", out="m")
    assert contents() == before


def test_an_interrupted_merge_of_a_mixture_goes_on_to_the_same_bytes(world, monkeypatch):
    mixed("a", "b", out="m")
    config = MergeConfig(models=("m", "c"), out="out", **BY_PRECISION)
    run_merge(config)
    whole = {name: data for name, data in contents("out").items() if not name.endswith("json")}
    report = json.loads(Path("out/merge_report.json").read_text())
    shutil.rmtree("out")
    interrupt(monkeypatch, config, 2)
    assert not Path("out").exists()
    assert run_merge(config).models[1].share == report["models"][1]["share"] > 0
    assert {name: contents("out")[name] for name in whole} == whole


def test_many_sets_of_scales_refuse_a_mixture(world):
    mixed("a", "b", out="m")
    config = MergeConfig(models=("m", "c"), **BY_PRECISION)
    with pytest.raises(ConfigError, match="--predict: 'm: a' is a run of a mixture"):
        predict_merges(config, [(1.0,)])
    with (
        Plans(config, Path("out")) as plans,
        pytest.raises(ConfigError, match="bmerge preview: 'm: a' is a run"),
    ):
        plans.at((1.0, 1.0))
