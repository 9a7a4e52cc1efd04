"""A preview: merges formed in place have the bits of written ones, and are measured alike."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.configs import parse_config
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate import EvaluateConfig, run_evaluate
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.load import load_model
from mergekit_bayes.plan.rescale import rescaled, with_scales
from mergekit_bayes.preview import PreviewConfig, read_preview, run_preview
from mergekit_bayes.preview.forming import Former, Plans
from mergekit_bayes.preview.skeleton import write_skeleton
from mergekit_bayes.recipes import read_recipe
from tests import previews


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return previews.world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """The world's folders by short names in a new folder."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["preview", *words])


def merge_of(**settings):
    return parse_config(MergeConfig, read_recipe(Path(previews.recipe("r.yaml", **settings))), "")


def formed(config, vectors, dtype="float32", vectors_in_all=1):
    """The parameters of each merge, formed after each other in one model."""
    result = []
    with Plans(config, Path("nowhere")) as plans:
        like = plans.at((1.0,) * len(config.models))
        write_skeleton(like, Path("skeleton"))
        loaded = load_model("skeleton", dtype=dtype)
        with Former(loaded.model, like, vectors_in_all) as former:
            for scales in vectors:
                former.form(plans.at(scales))
                result.append({n: p.clone() for n, p in loaded.model.named_parameters()})
    return result


def check_bits(config, vectors, dtype="float32", **options):
    """Each merge in place equals the model that is loaded from the written one."""
    for number, (scales, parameters) in enumerate(
        zip(vectors, formed(config, vectors, dtype, **options), strict=True)
    ):
        out = f"written-{number}"
        run_merge(with_scales(config, scales).model_copy(update={"out": out, "posterior": False}))
        written = dict(load_model(out, dtype=dtype).model.named_parameters())
        assert written.keys() == parameters.keys()
        for name, tensor in parameters.items():
            assert tensor.dtype == written[name].dtype
            assert torch.equal(tensor, written[name]), (scales, name)


VECTORS = [(1.0, 1.0), (0.3, -0.7), (0.0, 1.2), (-0.5, 0.0), (0.3, 1.7), (0.3, -0.2)]


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "precision"},
        {"method": "task_arithmetic", "dtype": "BF16"},
        {"method": "ties", "param": {"density": 0.5}},
        {"method": "multislerp", "param": {"normalize_weights": 0}},
        pytest.param({"weights": "precision", "shrink": "row:0.3"}, marks=pytest.mark.slow),
        pytest.param(
            {"weights": "precision", "only": "h\\.1", "scale": ["b:mlp=0.4"], "anchor": "none"},
            marks=pytest.mark.slow,
        ),
        pytest.param({"weights": "precision", "pool": "tensor"}, marks=pytest.mark.slow),
        pytest.param({"method": "dare_ties", "dtype": "F16"}, marks=pytest.mark.slow),
        pytest.param({"method": "ties", "param": {"scope": "tensor"}}, marks=pytest.mark.slow),
    ],
)
def test_a_merge_in_place_has_the_bits_of_the_written_one(here, settings):
    check_bits(merge_of(**settings), VECTORS[: 3 if "param" in settings else None])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_the_parameters_have_the_dtype_of_the_loaded_model(here, dtype):
    check_bits(merge_of(weights="precision", dtype="BF16"), VECTORS, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"weights": "precision"}, {}, {"method": "fisher"}])
def test_averages_in_place_have_the_bits_of_written_ones(here, settings):
    shares = [(1.0, 1.0), (0.25, 0.75), (0.0, 1.0), (1.0, 0.0)]
    check_bits(merge_of(base=None, **settings), shares)


@pytest.mark.slow
def test_the_compiled_pass_gives_the_same_bits(here):
    check_bits(merge_of(weights="precision"), VECTORS, vectors_in_all=1 << 20)


def test_a_rescaled_plan_refuses_other_signs(here):
    with Plans(merge_of(), Path("nowhere")) as plans:
        plan = plans.at((1.0, 0.5))
        assert [t.scale for t in rescaled(plan, (0.2, 2.0)).steps[0].tasks] == [0.2, 2.0]
        with pytest.raises(ConfigError, match=r"cannot have \[1.0, -1.0\]"):
            rescaled(plan, (1.0, -1.0))


def test_a_preview_is_the_evaluation_of_the_merge_that_it_recommends(here):
    previews.recipe("r.yaml", weights="precision", scale=[0.5, 0.5])
    texts = ("--data", "cats=cats.csv", "--data", "films=films.csv")
    done = run("r.yaml", *texts, "--grid", "0,1.5", "--scales", "2,0.1", "--json", "-o", "out")
    assert done.exit_code == 0, done.stderr
    report = read_preview("out")
    assert json.loads(done.stdout) == json.loads(Path("out/preview.json").read_text())
    scales = [point.scales for point in report.points]
    assert scales[:2] == [(0.5, 0.5), (2.0, 0.1)]
    assert scales[2:] == [(0.0, 0.5), (1.5, 0.5), (0.5, 0.0), (0.5, 1.5)]
    assert sorted(os.listdir("out")) == ["chosen.yaml", "preview.json", "preview.png", "report.md"]

    assert run_merge_of("out/chosen.yaml", "-o", "m").exit_code == 0
    assert Path("m/posterior/precision.posterior").exists()  # as the recipe has it
    evaluated = run_evaluate(
        EvaluateConfig(model="m", perplexity={"cats": "cats.csv", "films": "films.csv"})
    )
    best = report.best
    assert best.loss == {n: p.loss.value for n, p in evaluated.perplexity.items()}
    assert best.mean == min(point.mean for point in report.points)
    assert len({point.mean for point in report.points}) == len(report.points)
    assert report.observations == {n: p.tokens for n, p in evaluated.perplexity.items()}
    assert "Name others by --test" in done.stderr
    again = run("r.yaml", *texts, "-o", "out")
    assert again.exit_code == 2
    assert "'out' exists" in again.stderr


@pytest.mark.slow
def test_texts_that_decide_nothing_are_measured_in_pairs(here):
    previews.recipe("r.yaml", weights="precision", scale=[0.5, 0.5])
    words = ("--data", "cats=cats.csv", "--test", "new=films.csv", "--scales", "2,0.1")
    done = run("r.yaml", *words, "--scales", "0.2,2", "-o", "out")
    assert done.exit_code == 0, done.stderr
    report = read_preview("out")
    assert list(report.best.loss) == ["cats"]
    both = run_preview(
        PreviewConfig(
            recipe="r.yaml", data={"x": "films.csv"}, output="both", scales=[report.best.scales]
        )
    )
    own, best = both.points
    assert report.held_out["new"].value == pytest.approx(best.loss["x"] - own.loss["x"], abs=1e-12)
    assert report.held_out["new"].low < report.held_out["new"].value < report.held_out["new"].high
    assert "On new, which decided nothing" in done.stderr


def test_a_method_that_reads_no_precision_takes_one_by_name_to_predict_first(here):
    named = {"precision": {"b": str(Path("b/posterior/precision.posterior").resolve())}}
    previews.recipe("r.yaml", method="ties", **named)
    done = run("r.yaml", "--data", "x=cats.csv", "--predict-first", "1", "-o", "out")
    assert done.exit_code == 0, done.stderr
    assert read_preview("out").best.predicted is not None
    assert read_recipe(Path("out/chosen.yaml"))["precision"] == {}
    refused = run("r.yaml", "--data", "x=cats.csv", "-o", "other")
    assert "ties reads none: drop it" in refused.stderr


def run_merge_of(*words):
    return CliRunner().invoke(app, ["merge", *words])
