"""The curves of a removal: which settings each method takes, and whom it is compared with."""

import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.configs import parse_config
from mergekit_bayes.detox.analysis import rivals
from mergekit_bayes.detox.candidates import Made, merge_command, merge_config, point_of
from mergekit_bayes.detox.picture import make_figure
from mergekit_bayes.detox.settings import (
    KINDS,
    DetoxConfig,
    Method,
    curves,
    finetune_config,
    needs_precision,
)
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.evaluate.report import EvaluateReport
from mergekit_bayes.merge import run_merge
from tests import tiny
from tests.detox_pictures import picture_report

ALL: list[Method] = [method for method, kind in KINDS.items() if kind.unit == "scale"]


def config(**given):
    return parse_config(
        DetoxConfig,
        {"base": "base", "output": "o", "toxic": {"data": "t"}, "evaluate": {}, "scales": [1]}
        | given,
        "detox",
    )


def test_a_list_of_guards_gives_a_curve_each_to_the_methods_that_have_one():
    found = curves(config(methods=ALL, guard=[0.2, 1], base_count=[1, 3]))
    labels = [c.label for c in found]
    assert len(labels) == len(set(labels)) == 1 + 4 + 4 + 1
    assert labels[0] == "task arithmetic"
    assert labels[1:3] == [f"gradient matching, base 1x, guard {g}" for g in ("0.2", "1")]
    assert [c.guard for c in found[1:5]] == [0.2, 1, 0.2, 1]
    assert found[-1] == ("Fisher negation", "fisher_negation", None, None, None)


def test_a_label_names_no_setting_that_does_not_vary():
    assert [c.label for c in curves(config(methods=ALL, guard=[0.5, 0.5]))] == [
        KINDS[method].name for method in ALL
    ]
    assert curves(config(guard=0.5))[1].guard == 0.5


@pytest.mark.parametrize("guard", [0, 1.5, [0.2, -1], []])
def test_a_guard_is_a_share(guard):
    with pytest.raises(ConfigError, match="guard"):
        config(guard=guard)


def test_gradient_matching_meets_every_other_method_and_the_control_of_its_own_guard():
    compared = curves(config(methods=ALL, guard=[0.2, 1]))
    against = {c.label: [r.label for r in rivals(c, compared)] for c in compared}
    for guard in ("0.2", "1"):
        assert against.pop(f"gradient matching, guard {guard}") == [
            "task arithmetic",
            f"control, guard {guard}",
            "Fisher negation",
        ]
    assert not any(against.values())
    without = curves(config(methods=["gradient_matching", "control"]))
    assert [r.method for r in rivals(without[0], without)] == ["control"]


def test_fisher_negation_needs_the_precision_that_the_base_has():
    only = config(methods="fisher_negation", finetune={"posterior": "none"})
    assert needs_precision(only)
    with pytest.raises(ConfigError, match="does not compare with the base's precision"):
        finetune_config(only, "toxic")
    assert not needs_precision(config(methods="task_arithmetic"))


@pytest.fixture
def posteriors(tmp_path, monkeypatch):
    """A base without a precision of its own, that precision elsewhere, and a task."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "toxic")):
        precision = tiny.precisions(seed, low=1e-3)
        tiny.posterior(f"{name}.safetensors", tiny.arrays(seed), precision, observations=9 + seed)
    Path("base.posterior").rename("precision.safetensors")
    return config(base="base.safetensors", methods=ALL, guard=[0.2, 1], base_count=2)


def test_every_candidate_is_the_merge_that_its_command_says(posteriors):
    found, made = set(), Made(Path("toxic.safetensors"), "precision.safetensors")
    for i, curve in enumerate(curves(posteriors)):
        merge = merge_config(posteriors, curve, 0.5, made)
        one, other = f"{i}.safetensors", f"{i}-again.safetensors"
        report = run_merge(merge.model_copy(update={"out": one}))
        command = merge_command(merge)
        words = shlex.split(command)
        assert ("--guard" in words) == (curve.guard is not None)
        assert ("--precision" in words) == KINDS[curve.method].weighs
        done = CliRunner().invoke(app, [*words[1:], "-o", other])
        assert done.exit_code == 0, done.output
        assert ("guard" in done.output) == (curve.guard is not None)
        assert Path(one).read_bytes() == Path(other).read_bytes()
        found.add(Path(one).read_bytes())
        assert report.precision_path is None
        evaluation = EvaluateReport.model_construct(toxicity={}, perplexity={}, samples=None)
        point = point_of(evaluation, 0.5, command, merged=report)
        assert (point.guarded_share is None) == (curve.guard is None)
        assert (point.largest_multiplier is None) == (curve.guard is None)
        assert (point.precision_ratio is not None) == KINDS[curve.method].weighs
    assert len(found) == len(curves(posteriors))


def test_every_method_has_its_own_line_in_the_picture():
    report = picture_report(1, 1, held_out=False)
    (points,) = report.curves.values()
    drawn = report.model_copy(update={"curves": {kind.name: points for kind in KINDS.values()}})
    lines = make_figure(drawn).axes[0].get_lines()[: len(KINDS)]
    assert [line.get_label() for line in lines] == [kind.name for kind in KINDS.values()]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(KINDS)
