"""What a merge says of its precisions: faults, other scales, and weights that hardly differ."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.stream.worth import notes_on_precisions
from tests import tiny
from tests.curvatures import curvature
from tests.tiny_models import tiny_bert, tiny_gpt2

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
SIMILAR = "weights will hardly differ from --weights uniform"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(name, precision, seed=0, **record):
    mean = tiny.arrays(seed, {n: t.shape for n, t in precision.items()})
    tiny.posterior(f"{name}.safetensors", mean, precision, **record)
    return f"{name}.safetensors"


def times(precision, factor):
    return {name: t * np.float32(factor) for name, t in precision.items()}


def jittered(precision, size):
    rng = np.random.default_rng(1)
    return {
        n: t * np.exp(size * rng.normal(size=t.shape)).astype("f4") for n, t in precision.items()
    }


def notes(models, **settings):
    config = MergeConfig(
        models=models, out="out.safetensors", **({"weights": "precision"} | settings)
    )
    with plan_merge(config) as plan:
        return notes_on_precisions(plan)


def test_weights_that_hardly_differ_are_said_in_the_report():
    one = curvature(0)
    models = (model("a", one), model("b", jittered(one, 0.05), 1))
    report = run_merge(MergeConfig(models=models, weights="precision", out="p.safetensors"))
    (line,) = [note for note in report.notes if SIMILAR in note]
    assert line.startswith(
        "precisions of 'a.safetensors' and 'b.safetensors': rank correlation 1.00"
    )
    assert "of the variance: weights" in line
    # The deviation in the line is that of the merge: (w_a - 1/2) / (1/2), root mean square.
    run_merge(MergeConfig(models=models, out="u.safetensors", weights="uniform"))
    a, b, p, u = (tiny.read(f"{name}.safetensors") for name in ("a", "b", "p", "u"))
    names = [n for n in a if n.startswith("h.")]
    moved, apart = (
        np.concatenate([(x[n] - y[n]).ravel().astype(float) for n in names])
        for x, y in ((p, u), (a, b))
    )
    deviation = 2 * np.sqrt(np.mean((moved / apart) ** 2))
    said = float(line.rsplit("by ", 1)[1].rstrip("%)")) / 100
    assert said == pytest.approx(deviation, rel=0.1)


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (lambda one: curvature(1), {}),
        (lambda one: jittered(one, 0.3), {}),
        (lambda one: one, {"pool": "tensor"}),
        (lambda one: one, {"shrink": "0.5"}),
        (lambda one: one, {"weights": "uniform"}),
    ],
)
def test_the_line_is_left_out_where_weights_differ_or_are_not_known(change, settings):
    one = curvature(0)
    models = (model("a", one), model("b", change(one), 1))
    assert notes(models, **settings) == []


def test_on_a_base_the_tasks_weights_are_compared():
    one = curvature(0)
    tasks = (model("a", one, 1), model("b", one, 2))
    heavy, light = model("heavy", times(one, 3), 0), model("light", times(one, 0.3), 0)
    # S_t / S is (3 + 1) / (3 + 2) and (0.3 + 1) / (0.3 + 2), while uniform weights are 1.
    assert notes(tasks, base=heavy, counts="recorded") == []
    huge = model("huge", times(one, 100), 0, observations=1e4)
    (line,) = notes(tasks, base=huge, counts="recorded")
    assert SIMILAR in line
    assert line.endswith("(by 1.0%)")
    assert notes(tasks, base=light, counts="recorded") == []
    assert notes(tasks[:1], base=huge, counts="recorded") == []  # the task itself


@pytest.mark.parametrize(
    ("factor", "is_named"), [(1 / 13, True), (0.5, False), (3, False), (13, True)]
)
def test_a_scale_that_is_not_that_of_the_record_is_named(factor, is_named):
    models = (model("a", curvature(0)), model("b", times(curvature(0), factor), 1))
    found = [note for note in notes(models) if "times that of" in note]
    assert len(found) == is_named
    if is_named:
        assert (
            f"'b.safetensors' is {factor:.2g} times that of 'a.safetensors' per token" in found[0]
        )
        assert "median over entries" in found[0]
        assert found[0].endswith("or the models differ that much")


def test_a_prior_and_more_data_are_no_other_scale():
    one = curvature(0)
    more = {name: 100 * t + np.float32(500) for name, t in one.items()}
    models = (model("a", one), model("b", more, 1, observations=1e4, prior=500.0))
    assert not [note for note in notes(models) if "times that of" in note]


def test_a_doubtful_precision_is_named_and_the_merge_goes_on():
    one = curvature(0)
    constant = {name: np.full_like(t, 2) for name, t in one.items()}
    models = (model("a", one), model("b", constant, 1))
    report = run_merge(MergeConfig(models=models, weights="precision", out="p.safetensors"))
    assert [note for note in report.notes if "doubtful" in note] == [
        "the precision of 'b.safetensors' is doubtful: it hardly differs from one number a tensor"
    ]


@pytest.fixture(scope="module")
def experiment():
    """The script on planted faults and its models."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        names = ("planted_precisions", "planted_world")
        script, world = (importlib.import_module(name) for name in names)
        yield SimpleNamespace(script=script, world=world)
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("make", [tiny_gpt2, pytest.param(tiny_bert, marks=pytest.mark.slow)])
def test_planted_faults_are_found_and_good_precisions_are_not_doubted(
    experiment, make, tmp_path, monkeypatch
):
    """The experiment with untrained models and fewer rows."""
    script = experiment.script
    monkeypatch.setattr(script, "_GOOD", ((64, 4, "held_out"), (32, 1, "held_out")))
    experiment.world.make_texts(tmp_path, train=0, test=300)
    folders = [make(tmp_path / str(seed), seed=seed) for seed in range(3)]
    model = experiment.world.Model(make.__name__, 1, folders[0], folders[1])
    other = experiment.world.Model(make.__name__, 2, folders[2], folders[2])
    texts = {"rows": 64, "batch": 4, "data": tmp_path / "held_out.jsonl", "seed": 0}
    second = script.estimate(model.earlier, tmp_path / "second", **texts)
    goods = list(script.good_precisions(model, tmp_path, tmp_path))
    verdicts = [script.judge("good", model, good, second) for good in goods]
    verdicts += [
        script.judge(kind, model, faulty, second)
        for kind, faulty in script.faulty_precisions(model, other, goods[0], tmp_path, tmp_path)
    ]
    assert {v.kind for v in verdicts if v.found == "nothing"} == {"good"}, verdicts
    assert [v.found for v in verdicts if v.kind == "good"] == ["nothing"] * 2, verdicts
    assert len(verdicts) == 12
