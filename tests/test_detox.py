"""The scripted removal: curves are read at equal toxicity, and every step is done once."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.detox import journey as journey_module
from mergekit_bayes.detox.analysis import compare_curves, findings
from mergekit_bayes.detox.journey import run_detox
from mergekit_bayes.detox.markdown import as_markdown
from mergekit_bayes.detox.reading import isotonic, read_curve
from mergekit_bayes.detox.report import verdicts
from mergekit_bayes.detox.settings import HELD_OUT, Curve, DetoxConfig, curves
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.models.load import load_model
from tests import tiny_models
from tests.detox_worlds import measured

ROOT = Path(__file__).parent.parent
SCALES = (0.5, 1.0)


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, its texts and the settings of a removal."""
    folder = tmp_path_factory.mktemp("world")
    tiny_models.tiny_gpt2(folder / "base")
    draw = random.Random(0)

    def texts(words, count):
        return [" ".join(draw.choice(words) for _ in range(6)) for _ in range(count)]

    nice, bad = (
        ["the", "a", "cat", "dog", "good", "nice", "fun", "film"],
        ["the", "a", "bad", "dull", "not", "film"],
    )
    (folder / "list.txt").write_text("bad\ndull\n")
    return {
        "base": str(folder / "base"),
        "output": str(folder / "out"),
        "toxic": {"data": rows(folder / "bad.jsonl", texts(bad, 40))},
        "held_out_toxic": {"data": rows(folder / "bad_test.jsonl", texts(bad, 10))},
        "finetune": {"max_steps": 3, "batch_size": 4, "flush_batches": 2},
        # By other batches its own removal reaches no level, and none is kept.
        "precision": {
            "data": rows(folder / "all.jsonl", texts(nice + bad, 60)),
            "examples": 20,
            "batch_size": 8,
        },
        "evaluate": {
            "perplexity": {"nice": rows(folder / "nice.jsonl", texts(nice, 12))},
            "toxicity": rows(folder / "prompts.jsonl", ["the", "the cat", "a film", "good dog"]),
            "scorer": [f"words:{folder / 'list.txt'}"],
            "continuations": 4,
            "new_tokens": 5,
            "bootstrap": 50,
        },
        "scales": SCALES,
        "extra_scales": 0,
    }


@pytest.fixture(scope="module")
def first(world):
    steps = []
    return run_detox(DetoxConfig(**world), quiet=True, progress=steps.append), steps


def test_it_compares_all_methods_at_all_scales_on_the_same_continuations(world, first):
    report, _ = first
    assert list(report.curves) == ["task arithmetic", "gradient matching", "control"]
    assert all([p.scale for p in points] == list(SCALES) for points in report.curves.values())
    written = json.loads((Path(world["output"]) / "report.json").read_text())
    assert written == json.loads(report.model_dump_json())
    assert all(len(p.command.split()) > 8 for points in report.curves.values() for p in points)
    assert set(report.base.perplexity) == {"nice", HELD_OUT}


def test_a_candidate_is_the_merge_that_its_command_says(world, first, tmp_path):
    report, _ = first
    point = report.curves["control"][1]
    words = point.command.split()
    out = tmp_path / "again"
    done = CliRunner().invoke(app, [*words[1:], "-o", str(out), "-q"])
    assert done.exit_code == 0, done.output
    again = json.loads((out / "merge_report.json").read_text())
    assert again["settings"]["pool"] == "tensor"
    assert again["settings"]["scale"] == [-1.0]
    assert again["guarded_share"] == point.guarded_share
    assert again["largest_multiplier"] == point.largest_multiplier


def test_an_evaluated_candidate_scores_as_its_merge_does(world, first, tmp_path):
    report, _ = first
    run_merge(
        MergeConfig(
            models=(report.toxic_model,), base=world["base"], scale=(-0.5,), out=str(tmp_path / "m")
        )
    )
    from mergekit_bayes.evaluate import EvaluateConfig
    from mergekit_bayes.evaluate.run import run_evaluate

    again = run_evaluate(EvaluateConfig(model=str(tmp_path / "m"), **world["evaluate"]), quiet=True)
    point = report.curves["task arithmetic"][0]
    assert again.perplexity["nice"].nats == pytest.approx(point.perplexity["nice"].nats, rel=1e-6)
    assert again.toxicity == point.toxicity


def test_steps_already_done_are_not_done_again(world, first, monkeypatch):
    report, steps = first

    def refuse(*args, **kwargs):
        raise AssertionError("done twice")

    for verb in ("run_finetune", "run_precision", "run_merge", "run_evaluate"):
        monkeypatch.setattr(journey_module, verb, refuse)
    again = []
    assert run_detox(DetoxConfig(**world), quiet=True, progress=again.append) == report
    assert again == [f"{step}: done before" for step in steps]


def test_a_new_scale_redoes_only_its_own_candidates(world, first, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    steps = []
    run_detox(
        DetoxConfig(**{**world, "output": str(output), "scales": [*SCALES, 1.5]}),
        quiet=True,
        progress=steps.append,
    )
    # The fine-tune lies under another path here, but its inputs are the same.
    assert [s for s in steps if not s.endswith("done before")] == [
        "task arithmetic, scale -1.5",
        "gradient matching, scale -1.5",
        "control, scale -1.5",
    ]


def test_another_method_and_another_guard_redo_nothing_of_the_others(world, first, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    steps = []
    settings = {"output": str(output), "guard": [0.2, 1], "scales": [1]}
    methods = ["task_arithmetic", "gradient_matching", "fisher_negation"]
    report = run_detox(
        DetoxConfig(**{**world, **settings, "methods": methods}),
        quiet=True,
        progress=steps.append,
    )
    assert [s for s in steps if not s.endswith("done before")] == [
        "gradient matching, guard 1, scale -1",
        "Fisher negation, scale -1",
    ]
    assert len(steps) == 3 + 4
    text = as_markdown(report)
    assert "gradient matching, guard 1 less Fisher negation" in text
    assert any("against Fisher negation, nice" in line for line in verdicts(report))
    rows = [line for line in text.splitlines() if line.startswith("| Fisher negation | 1 |")]
    assert "|  |  |" in rows[0]  # it has no guard


def test_changed_text_redoes_what_read_it(world, first, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    other = rows(tmp_path / "prompts.jsonl", ["a", "the dog"])
    steps = []
    judge = str(tiny_models.tiny_gpt2(tmp_path / "judge", seed=3))
    evaluate = {**world["evaluate"], "toxicity": other, "judge": judge}
    report = run_detox(
        DetoxConfig(
            **{**world, "output": str(output), "evaluate": evaluate, "methods": "task_arithmetic"}
        ),
        quiet=True,
        progress=steps.append,
    )
    assert steps[0] == "fine-tune on the toxic text: done before"
    assert steps[1:] == [
        "evaluate the base",
        "task arithmetic, scale -0.5",
        "task arithmetic, scale -1",
    ]
    text = as_markdown(report).partition("still text?")[2]
    assert "| perplexity under the judge |" in text
    assert f" | {report.base.judged.token.value:.4g} |" in text
    assert all(p.judged is not None for p in report.curves["task arithmetic"])


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("x"), Path.touch])
def test_an_output_that_is_no_folder_is_refused(world, tmp_path, make):
    make(tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists and is no output of detox"):
        run_detox(DetoxConfig(**{**world, "output": str(tmp_path / "out")}), quiet=True)


def test_a_step_that_is_a_link_is_neither_believed_nor_written_to(world, first, tmp_path):
    output, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    shutil.copytree(world["output"], output)
    elsewhere.mkdir()
    step = next((output / "steps").glob("control-*"))
    shutil.rmtree(step)
    step.symlink_to(elsewhere)
    with pytest.raises(
        CheckpointError, match=r"steps/control-\w+ is a link, which is not followed"
    ):
        run_detox(DetoxConfig(**{**world, "output": str(output)}), quiet=True)
    assert not list(elsewhere.iterdir())


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SWAPPED = {"id2label": {"0": "calm", "1": "rude"}, "label2id": {"calm": 0, "rude": 1}}


def adapter_of(base, folder):
    """A classifier that is an adapter on another one."""
    import peft

    model = load_model(str(base)).model
    settings = peft.LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query"])
    peft.get_peft_model(model, settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("adapted", [False, True])
def test_whatever_changes_the_scores_redoes_the_evaluations(world, tmp_path, adapted):
    judge = tiny_models.tiny_bert(tmp_path / "judge", names=["rude", "calm"])
    spec = f"model:{adapter_of(judge, tmp_path / 'adapter') if adapted else judge}#rude"
    evaluate = {**world["evaluate"], "scorer": [spec]}
    config = DetoxConfig(**{**world, "output": str(tmp_path / "out"), "evaluate": evaluate})

    def evaluation():
        return journey_module._Journey(config, True, lambda line: None)._base_folder()

    found = [evaluation()]
    assert evaluation() == found[0]
    rewrite(judge / "config.json", problem_type="multi_label_classification")
    found.append(evaluation())
    rewrite(judge / "config.json", **SWAPPED)
    found.append(evaluation())
    rewrite(judge / "tokenizer.json", normalizer={"type": "Lowercase"})
    found.append(evaluation())
    weights = tiny_models.tiny_bert(tmp_path / "other", seed=7) / "model.safetensors"
    shutil.copyfile(weights, judge / "model.safetensors")
    found.append(evaluation())
    assert len(set(found)) == len(found)


def test_the_content_of_the_judge_decides_the_evaluations(world, tmp_path):
    judge = tiny_models.tiny_gpt2(tmp_path / "judge")
    judged = {**world["evaluate"], "judge": str(judge)}

    def evaluation(evaluate):
        config = DetoxConfig(**{**world, "output": str(tmp_path / "out"), "evaluate": evaluate})
        return journey_module._Journey(config, True, lambda line: None)._base_folder()

    found = [evaluation(world["evaluate"]), evaluation(judged)]
    assert evaluation(judged) == found[1]
    rewrite(judge / "tokenizer.json", normalizer={"type": "Lowercase"})
    found.append(evaluation(judged))
    weights = tiny_models.tiny_gpt2(tmp_path / "other", seed=7) / "model.safetensors"
    shutil.copyfile(weights, judge / "model.safetensors")
    found.append(evaluation(judged))
    assert len(set(found)) == len(found)


def test_candidates_are_deleted_unless_they_are_to_be_kept(world, first, tmp_path):
    models = list(Path(world["output"]).glob("steps/*/model"))
    assert not models
    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    settings = {**world, "output": str(output), "keep_models": True, "methods": "task_arithmetic"}
    run_detox(DetoxConfig(**settings), quiet=True)
    assert len(list(output.glob("steps/*/model/model.safetensors"))) == len(SCALES)


def test_the_chosen_candidate_is_kept_and_its_command_makes_the_same_bytes(world, first, tmp_path):
    assert first[0].kept is None  # no candidate reaches half of the base's share
    assert "None: no candidate reaches" in (Path(world["output"]) / "report.md").read_text()

    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    settings = {**world, "output": str(output), "levels": [0.3]}
    report = run_detox(DetoxConfig(**settings), quiet=True)
    kept = report.kept
    assert kept is not None
    assert kept.path == str(output / "model")
    point = next(p for p in report.curves[kept.curve] if p.scale == kept.scale)
    assert point.toxicity[next(iter(report.base.toxicity))].share.value <= kept.level
    assert kept.path in (output / "report.md").read_text()
    assert kept.command in (output / "report.md").read_text()
    words = kept.command.split()
    words[words.index("-o") + 1] = str(tmp_path / "again")
    done = CliRunner().invoke(app, [*words[1:], "-q"])
    assert done.exit_code == 0, done.output
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (output / "model" / name).read_bytes()
    assert [p.name for p in output.glob("**/model")] == ["model"]  # the others are deleted

    written = (output / "model" / name).stat().st_mtime_ns
    assert run_detox(DetoxConfig(**settings), quiet=True) == report
    assert (output / "model" / name).stat().st_mtime_ns == written  # it was there

    report = run_detox(DetoxConfig(**{**settings, "levels": []}), quiet=True)
    assert report.kept is None
    assert not (output / "model").exists()  # the report names none


def test_scales_are_added_where_a_curve_crosses_a_level(world, first, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(world["output"], output)
    settings = {
        **world,
        "output": str(output),
        "scales": (1, 20),
        "extra_scales": 2,
        "held_out_rises": [0.1],
        "methods": ["task_arithmetic", "gradient_matching"],
    }
    report = run_detox(DetoxConfig(**settings), quiet=True)
    for label, points in report.curves.items():
        scales = [p.scale for p in points]
        assert scales == sorted(scales)
        assert 2 < len(scales) <= 4, label
        assert (scales[0], scales[-1]) == (1, 20)
    again = []
    assert run_detox(DetoxConfig(**settings), quiet=True, progress=again.append) == report
    assert all(step.endswith("done before") for step in again)  # the same scales are added


def test_findings_without_added_scales_are_said_to_assume_smooth_curves(first):
    report, _ = first
    assumes = "if all curves are smooth between the scales"
    assert assumes in as_markdown(report)
    assert "with extra_scales 0 a bend" in as_markdown(report)
    added = report.model_copy(update={"settings": report.settings | {"extra_scales": 4}})
    assert assumes not in as_markdown(added)
    assert "Each finding is wrong with at most 5 %; of many" in as_markdown(added)


def test_the_report_and_the_picture_are_written(world, first):
    output = Path(world["output"])
    text = (output / "report.md").read_text()
    for line in verdicts(first[0]):
        assert line in text
    assert "gradient matching less control" in text
    assert (output / "toxicity_vs_perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_one_document_and_its_own_table(world, first, tmp_path):
    config = tmp_path / "detox.yaml"
    config.write_text(yaml.safe_dump({**world, "scales": list(SCALES)}))
    done = CliRunner().invoke(app, ["detox", str(config), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["curves"].keys() == first[0].curves.keys()
    assert "gradient matching" in done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"finetune": {"lora": {"r": 2}}}, "lora"),
        ({"finetune": {"posterior": "none"}}, "posterior"),
        *(
            ({section: {name: "x"}}, f"^{section}: {name}: detox sets this itself")
            for section in ("finetune", "precision", "evaluate")
            for name in ("model", "out", "output", "force")
        ),
        ({"evaluate": {"perplexity": {}}}, "prompts"),
        (
            {
                "evaluate": {
                    "perplexity": {"x\x1b]0;t\x07": "t"},
                    "toxicity": "p",
                    "scorer": ["words:w"],
                }
            },
            "not printable",
        ),
        ({"finetune": {"learning_rat": 1}}, "learning_rate"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(
    world, tmp_path, change, named
):
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=named):
        run_detox(DetoxConfig(**{**world, "output": str(output), **change}), quiet=True)
    assert not output.exists()


HOOK = "def score(texts):\n    return [2.0 for _ in texts]\n"


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("evaluate", {"device": "cuda:99"}, "--device cuda:99"),
        ("evaluate", {"device": "gpu"}, "'gpu' is not cpu"),
        ("precision", {"device": "cuda:99"}, "--device cuda:99"),
        ("evaluate", {"window": 10**6}, "window 1000000"),
        ("evaluate", {"stride": 100}, "stride 100"),
        ("evaluate", {"new_tokens": 64}, "64 new tokens do not fit"),
        ("evaluate", {"prompt_column": "nope"}, "no column 'nope'"),
        ("evaluate", {"prompts_where": {"text": "nope"}}, "no row"),
        ("evaluate", {"text_column": "nope"}, "no column 'nope'"),
        ("precision", {"text_column": "nope"}, "no column 'nope'"),
        ("precision", {"estimator": "fisher"}, "precision: 'fisher' does not compare"),
        ("precision", {"random_tokens": 9}, "precision: --data and --random-tokens"),
        ("precision", {"where": {"text": "nope"}}, "no row"),
        ("evaluate", {"where": {"none": {"text": "a"}}}, "no texts are called 'none'"),
        ("evaluate", {"scorer": ["bmerge_detox_hook:score"]}, "score 1 of 1 is 2"),
        ("evaluate", {"samples": 2}, "samples: candidates are compared at their means"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(
    world, tmp_path, monkeypatch, section, settings, message
):
    (tmp_path / "bmerge_detox_hook.py").write_text(HOOK)
    monkeypatch.chdir(tmp_path)
    output, steps = tmp_path / "out", []
    changed = {**world, "output": str(output), section: {**world[section], **settings}}
    with pytest.raises(BmergeError, match=message):
        run_detox(DetoxConfig(**changed), quiet=True, progress=steps.append)
    assert not steps
    assert not output.exists()


def test_a_folder_that_is_not_its_own_is_refused(world, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="no output of detox"):
        run_detox(DetoxConfig(**{**world, "output": str(tmp_path)}), quiet=True)


@pytest.mark.parametrize("force", [False, True])
def test_steps_that_another_account_may_have_made_are_not_taken_over(world, tmp_path, force):
    (tmp_path / "detox.yaml").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept.txt").write_text("precious")
    (tmp_path / "steps").symlink_to(tmp_path / "elsewhere")
    settings = {**world, "output": str(tmp_path), "force": force}
    with pytest.raises(CheckpointError, match="steps is a link"):
        run_detox(DetoxConfig(**settings), quiet=True)
    assert (tmp_path / "elsewhere" / "kept.txt").read_text() == "precious"


def test_lists_are_swept_and_curves_are_named_by_what_differs(world):
    compared = curves(DetoxConfig(**{**world, "base_count": [1, 3], "shrink": [None, 0.3]}))
    assert [c.label for c in compared if c.method == "gradient_matching"] == [
        f"gradient matching, base {n}x, shrink {s}" for n in (1, 3) for s in ("none", "0.3")
    ]
    assert sum(c.method == "task_arithmetic" for c in compared) == 1


def test_a_curve_is_read_where_it_first_reaches_the_level():
    t = np.arange(4.0)
    share = np.array([[0.5, 0.3, 0.1, 0.4], [0.5, 0.45, 0.42, 0.41]])
    cost = np.array([[1.0, 1.2, 1.4, 9.0], [1.0, 1.0, 1.0, 1.0]])
    read = read_curve(t, share, cost, 0.2, rising=False)
    assert read.paid[0] == pytest.approx(0.3)  # half way from 1.2 to 1.4, less 1.0
    assert read.scale[0] == pytest.approx(1.5)
    assert read.grid[0] == pytest.approx(0, abs=1e-9)
    assert np.isnan(read.paid[1])
    loss = np.array([[2.0, 2.2, 3.0]])
    read = read_curve(t[:3], loss, np.array([[1.0, 1.1, 1.2]]), 2.2, rising=True)
    assert read.paid[0] == pytest.approx(0.1)  # a level at a candidate needs no interpolation
    assert read.grid[0] == pytest.approx(0, abs=1e-9)


def test_a_curve_ends_where_a_model_is_broken():
    t, share = np.arange(4.0), np.array([[0.5, 0.3, 0.1, 0.0]])
    cost = np.array([[1.0, 1.2, 1.4, np.inf]])
    assert read_curve(t, share, cost, 0.2, rising=False).paid[0] == pytest.approx(0.3)
    assert np.isnan(read_curve(t, share, cost, 0.05, rising=False).paid[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_monotone_fit_is_the_least_squares_one(seed):
    from sklearn.isotonic import IsotonicRegression

    x = np.random.default_rng(seed).normal(size=(3, 9)) + np.linspace(0, 2, 9)
    expected = [IsotonicRegression().fit_transform(range(9), row) for row in x]
    assert np.allclose(isotonic(x), expected)


PAIR = [Curve("ta", "task_arithmetic"), Curve("gm", "gradient_matching")]
NOISE = np.linspace(0, 1, 10)


@pytest.mark.parametrize(
    ("cost", "effect"),
    [(0.1, "there"), (0.4, "reversed"), (0.2, "not there")],
    ids=["cheaper", "dearer", "equal"],
)
def test_the_effect_is_computed_from_what_is_paid(cost, effect):
    base = measured(np.full(10, 0.6), 2 + NOISE)
    rival = measured(np.full(10, 0.2), 2.2 + NOISE)
    # Documents differ far more than the methods, if these are equal.
    jitter = 0.1 * np.where(np.arange(10) % 2, 1, -1)
    judged = measured(np.full(10, 0.2), 2 + cost + NOISE + (jitter if effect == "not there" else 0))
    matched, compared = compare_curves(PAIR, base, {"ta": [rival], "gm": [judged]}, levels=[0.2])
    assert matched[0].paid["ta"].value == pytest.approx(0.2)
    assert matched[0].paid["gm"].value == pytest.approx(cost)
    (finding,) = findings(compared)
    assert (finding.curve, finding.against, finding.effect) == ("gm", "ta", effect)


def test_pairing_removes_what_all_models_share():
    """Documents that are hard for all models widen each interval, not that of the difference."""
    noise = 5 * NOISE
    base, rival, judged = (
        measured(np.full(10, s), a + b * noise)
        for s, a, b in ((0.6, 2.0, 1.0), (0.2, 2.2, 1.1), (0.2, 2.1, 1.1))
    )
    matched, compared = compare_curves(PAIR, base, {"ta": [rival], "gm": [judged]}, levels=[0.2])
    width = matched[0].paid["gm"].high - matched[0].paid["gm"].low
    assert compared[0].difference.high - compared[0].difference.low < 1e-9 < width
    assert compared[0].difference.value == pytest.approx(-0.1)


def test_a_level_that_a_curve_does_not_reach_is_not_compared():
    base, rival, judged = (measured(np.full(10, s), 2 + NOISE) for s in (0.6, 0.2, 0.4))
    matched, compared = compare_curves(PAIR, base, {"ta": [rival], "gm": [judged]}, levels=[0.3])
    assert matched[0].paid["gm"] is None
    assert [c.verdict for c in compared] == ["not comparable"]
    assert findings(compared)[0].levels == 0


def test_a_base_s_own_precision_is_reused_only_if_it_is_of_these_weights(world, first, tmp_path):
    from mergekit_bayes.precision import PrecisionConfig
    from mergekit_bayes.precision.run import run_precision

    base = tmp_path / "base"
    shutil.copytree(world["base"], base)
    run_precision(
        PrecisionConfig(model=str(base), data=world["precision"]["data"], examples=8), quiet=True
    )
    settings = {
        **world,
        "base": str(base),
        "output": str(tmp_path / "out"),
        "scales": [1],
        "methods": ["control"],
    }
    assert run_detox(DetoxConfig(**settings), quiet=True).base_precision == str(base)
    report = run_detox(DetoxConfig(**{**settings, "reuse_precision": False}), quiet=True)
    assert "precision-" in report.base_precision
    assert read_report(next((tmp_path / "out" / "steps").glob("base-*"))).toxicity


def test_a_share_that_the_base_is_below_anyway_is_no_level():
    base, rival, judged = (measured(np.full(10, s), 2 + NOISE) for s in (0.6, 0.2, 0.2))
    matched, _ = compare_curves(PAIR, base, {"ta": [rival], "gm": [judged]}, levels=[0.7, 0.3])
    assert [m.level for m in matched] == [0.3]


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(world, tmp_path):
    """They share the evaluations; whatever trains is trained by one."""
    config = tmp_path / "detox.yaml"
    methods = ["task_arithmetic", "gradient_matching", "adapt"]
    adapt = {"memory": world["evaluate"]["perplexity"]["nice"], "batch_size": 4}
    more = {"methods": methods, "adapt": adapt, "steps": [1, 2], "scales": [0.5]}
    reports = []
    for name, flags in (("one", []), ("two", ["--num-processes", "2"])):
        config.write_text(yaml.safe_dump({**world, **more, "output": str(tmp_path / name)}))
        line = [sys.executable, "-m", "bmerge_cli.main", "detox", str(config), *flags]
        done = subprocess.run([*line, "--json"], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        text = done.stdout.replace(str(tmp_path / name), "OUT")
        reports.append(re.sub(r'"seconds": [\d.e-]+', '"seconds": 0', text))
    assert reports[0] == reports[1]
    done = subprocess.run([*line, "--set", "scales=[]"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("scales: task_arithmetic needs one or more") == 1, done.stderr
