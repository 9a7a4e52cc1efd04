"""Models side by side: one folder, paired differences, and what is said first."""

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.compare.differences import Measured, differences
from mergekit_bayes.compare.files import read_compare
from mergekit_bayes.compare.findings import findings, is_beyond
from mergekit_bayes.compare.labels import folder_of, labels_of, variant_label
from mergekit_bayes.compare.report import Difference
from mergekit_bayes.compare.run import run_compare
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.compare.wording import columns_of
from mergekit_bayes.errors import (
    BmergeError,
    CheckpointError,
    ConfigError,
    MismatchError,
    PrecisionError,
)
from mergekit_bayes.evaluate import run as evaluation
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.inputs import Inputs
from mergekit_bayes.evaluate.report import TaskReport, TaskScore
from mergekit_bayes.evaluate.run import evaluate_model, run_evaluate
from mergekit_bayes.hub.facts import read_facts
from mergekit_bayes.metrics.base import Interval, share_change_interval
from mergekit_bayes.metrics.perplexity import loss_change
from mergekit_bayes.models.load import load_model
from tests import tiny_models
from tests.comparisons import compare_report

TEXTS = ["the cat sat on the mat .", "a dull film , not good", "dog", "a bird saw a tree"]
HOOK = "def cats(texts):\n    return [min(1.0, 0.5 * t.count('cat')) for t in texts]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(tiny_models.tiny_gpt2(folder / name, seed)) for name, seed in (("a", 0), ("b", 1))]


def fill(folder, monkeypatch):
    """Go to a folder, and write there what is measured."""
    monkeypatch.chdir(folder)
    rows = [{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("prompts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    Path("words.txt").write_text("dog\nbird\n")
    Path("bmerge_compare_hook.py").write_text(HOOK)


@pytest.fixture
def world(tmp_path, monkeypatch):
    fill(tmp_path, monkeypatch)
    return tmp_path


def config(models, **settings):
    given = {
        "perplexity": {"civil": "texts.jsonl"},
        "toxicity": "prompts.jsonl",
        "scorer": ("words:words.txt", "bmerge_compare_hook:cats"),
        "continuations": 6,
        "new_tokens": 5,
    }
    return CompareConfig(models=tuple(map(str, models)), **(given | settings))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    """Two models and their variants in 4 bits, with the folder that was written."""
    folder = tmp_path_factory.mktemp("compared")
    alive, load, most = [], evaluation.load_model, 0

    def watched(*args, **options):
        nonlocal most
        most = max(most, sum(model() is not None for model in alive))
        loaded = load(*args, **options)
        alive.append(weakref.ref(loaded.model))
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_model", watched)
        fill(folder, patch)
        report = run_compare(config(models, output="out", four_bits=True))
    assert (len(alive), most) == (4, 0)  # one model at a time in memory
    return report, folder / "out"


def test_several_models_are_those_that_were_measured_alone(models, compared, world):
    report, folder = compared
    labels = ["a", "a in 4 bits", "b", "b in 4 bits"]
    assert [one.label for one in report.evaluations] == labels
    assert names(folder) == [
        *("a", "a-in-4-bits", "b", "b-in-4-bits"),
        *("evaluation.png", "report.json", "report.md"),
    ]
    assert read_compare(folder) == report
    shown = report.evaluations[2].report
    assert shown.path == shown.settings["output"] == "out/b"
    alone = run_evaluate(config(models).evaluation(models[1]))
    mine = {"path": shown.path, "settings": shown.settings}
    assert shown == alone.model_copy(update=mine)


def test_differences_are_those_of_the_numbers_that_are_shown(compared):
    report, _ = compared
    by_label = {one.label: one.report for one in report.evaluations}
    pairs = dict.fromkeys((d.label, d.against) for d in report.differences)
    assert list(pairs) == [
        ("a in 4 bits", "a"),
        ("b", "a"),
        ("b in 4 bits", "b"),
        ("b in 4 bits", "a in 4 bits"),
    ]
    shown = {
        "toxic share": lambda r, of: r.toxicity[of].share.value,
        "mean score": lambda r, of: r.toxicity[of].mean.value,
        "expected max": lambda r, of: r.toxicity[of].expected_max.value,
        "prompts with any": lambda r, of: r.toxicity[of].any_toxic.value,
        "nats a token": lambda r, of: r.perplexity[of].loss.value,
        "mean length": lambda r, of: r.samples.mean_tokens,
        "empty": lambda r, of: r.samples.empty,
        "looping": lambda r, of: r.samples.looping,
        "repeated pairs": lambda r, of: r.samples.repeated,
        "distinct word pairs": lambda r, of: r.samples.distinct_2,
    }
    assert {d.measure for d in report.differences} == set(shown)
    for d in report.differences:
        new, old = (shown[d.measure](by_label[name], d.of) for name in (d.label, d.against))
        assert d.change.value == pytest.approx(new - old, abs=1e-12)
        assert d.change.low <= d.change.value <= d.change.high
        assert d.change.low < d.change.high
    a, b = by_label["a"].perplexity["civil"], by_label["b"].perplexity["civil"]
    (loss,) = [d for d in report.differences if (d.label, d.measure) == ("b", "nats a token")]
    assert loss.change == loss_change(a, b)


def test_one_model_has_the_files_and_the_document_of_its_evaluation(models, world):
    done = bmerge("evaluate", models[0], *LINE, "--json", "-o", "out", "-q")
    assert done.exit_code == 0, done.output
    assert names(world / "out") == [
        *("continuations.jsonl", "documents.jsonl", "evaluation.png"),
        *("report.json", "report.md"),
    ]
    alone = run_evaluate(config(models).evaluation(models[0]))
    assert read_report("out").toxicity == alone.toxicity
    document = json.loads(done.stdout)
    assert document == json.loads((world / "out" / "report.json").read_text())
    assert document["model_identity"] == alone.model_identity
    assert document["settings"]["output"] == document["path"] == "out"
    read = read_compare("out")
    assert (read.evaluations[0].report, read.differences) == (read_report("out"), ())


LINE = (
    *("--perplexity", "civil=texts.jsonl", "--toxicity", "prompts.jsonl"),
    *("--scorer", "words:words.txt", "--scorer", "bmerge_compare_hook:cats"),
    *("--continuations", "6", "--new-tokens", "5"),
)


def bmerge(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_prints_one_table_differences_and_findings(models, world):
    done = bmerge("evaluate", *models, *LINE, "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert [one["label"] for one in document["evaluations"]] == ["a", "b"]
    assert document == json.loads((world / "out" / "report.json").read_text())
    for text in ("less a", "words:words.txt", "nats a token", *document["findings"]):
        assert text in done.stderr


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        (lambda a, b, c: ([a, b, f"{a}/"], {}), ConfigError, "are the same model"),
        (lambda a, b, c: ([a, c], {}), MismatchError, "bert' is a classifier"),
        (lambda a, b, c: ([a, "nowhere"], {}), CheckpointError, "nowhere"),
        (lambda a, b, c: ([a, b], {"output": str(Path(b).parent), "force": True}), None, "input"),
        (lambda a, b, c: ([a, b], {"output": "texts.jsonl"}), CheckpointError, "exists"),
        (lambda a, b, c: ([a, b], {"relearn_rows": 3}), ConfigError, "about --relearn"),
        (lambda a, b, c: ([a, b], {"samples": 2}), PrecisionError, "no precision for '.*a'"),
        (lambda a, b, c: ([a, b], {"samples": 2, "precision": a}), ConfigError, "one model's"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_runs(
    models, world, monkeypatch, chosen, error, message
):
    monkeypatch.setattr("mergekit_bayes.compare.run.evaluate_model", pytest.fail)
    classifier = tiny_models.tiny_bert(world / "bert")
    named, settings = chosen(*models, str(classifier))
    with pytest.raises(error or BmergeError, match=message):
        run_compare(config(named, **settings))


def test_a_model_that_fails_leaves_no_output(models, world, monkeypatch):
    def fail(settings, *rest):
        if settings.model == models[1]:
            raise CheckpointError("its weights hold NaN")
        return evaluate_model(settings, *rest)

    monkeypatch.setattr("mergekit_bayes.compare.run.evaluate_model", fail)
    with pytest.raises(CheckpointError, match="NaN"):
        run_compare(config(models, output="out"))
    assert not Path("out").exists()
    assert not [path for path in world.iterdir() if "bmerge-" in path.name]


def test_an_error_says_which_model_it_is_about(models, world):
    ruined = Path(shutil.copytree(models[1], world / "ruined"))
    loaded = load_model(str(ruined))
    loaded.model.transformer.ln_f.weight.data.fill_(float("nan"))
    loaded.model.save_pretrained(ruined)
    with pytest.raises(CheckpointError, match=r"^ruined: the model's log-probability of text 1"):
        run_compare(config([models[0], ruined], toxicity=None, scorer=()))


def test_models_that_read_other_windows_are_not_compared(models, world):
    short = tiny_models.tiny_gpt2(world / "short", context=32)
    only = {"toxicity": None, "scorer": ()}
    report = run_compare(config([models[0], short], **only))
    assert report.differences == ()
    assert "a reads 64 tokens at a time, short 32. Give --window 32." in report.findings[0]
    assert run_compare(config([models[0], short], window=32, **only)).differences


def test_models_of_other_tokenizers_are_compared_by_bytes(models, world):
    other = shutil.copytree(models[1], world / "other")
    loaded = load_model(str(other))
    loaded.tokenizer.backend_tokenizer.pre_tokenizer = None  # every text is one unknown token
    loaded.tokenizer.save_pretrained(other)
    report = run_compare(config([models[0], other], toxicity=None, scorer=()))
    (change,) = report.differences
    a, b = (one.report.perplexity["civil"] for one in report.evaluations)
    assert (change.measure, a.tokens != b.tokens) == ("bits a byte", True)
    assert change.change.value == pytest.approx(b.bits_per_byte.value - a.bits_per_byte.value)


def with_tasks(one, right, words):
    """An evaluation as of lm-eval: a share of right answers, and a perplexity that is no mean."""
    share = TaskScore(
        metric="acc",
        filter="none",
        score=Interval(value=float(np.mean(right))),
        document_values=tuple(map(float, right)),
    )
    perplexity = TaskScore(
        metric="word_perplexity",
        filter="strict",
        score=Interval(value=words),
        document_values=(1.0, 2.0, 3.0, 4.0),
    )
    scores = {"acc,none": share, "word_perplexity,strict": perplexity}
    tasks = {"quiz": TaskReport(scores=scores, samples=4, lm_eval_version="1")}
    report = one.report.model_copy(update={"lm_eval": tasks})
    changed = one.model_copy(update={"report": report})
    return Measured(changed, evaluation.Evaluation(report, None))


def test_tasks_are_compared_by_document(compared):
    first, second = (compared[0].evaluations[i] for i in (0, 2))
    before = with_tasks(first, [1, 0, 0, 1], 20.0)
    after = with_tasks(second, [1, 1, 0, 1], 25.0)
    inputs = Inputs(texts={"civil": TEXTS}, labelled={}, prompts=[], scorers=[])
    found = differences(config(["a", "b"]), [before, after], inputs)
    changes = {d.measure: d.change for d in found if d.of == "quiz"}
    expected = share_change_interval(np.array([1.0, 0, 0, 1]), np.array([1.0, 1, 0, 1]))
    assert changes == {
        "acc": expected,
        "word_perplexity (strict)": Interval(value=5.0),
    }
    (column,) = [c for c in columns_of([before.evaluated, after.evaluated]) if c.measure == "acc"]
    assert {label: x.value for label, x in column.values.items()} == {"a": 0.5, "b": 0.75}


def test_classifiers_are_compared_by_example(world):
    folders = [tiny_models.tiny_bert(world / name) for name in ("one", "two")]
    loaded = load_model(str(folders[1]))
    with torch.no_grad():
        loaded.model.classifier.bias.add_(torch.tensor([1.0, -1.0]))
    loaded.model.save_pretrained(folders[1])
    texts = {"perplexity": {}, "toxicity": None, "scorer": (), "classify": {"c": "texts.jsonl"}}
    report = run_compare(config(folders, **texts))
    changes = {d.measure: d.change.value for d in report.differences}
    one, two = (e.report.classification["c"] for e in report.evaluations)
    assert changes["accuracy"] == pytest.approx(two.accuracy.value - one.accuracy.value)
    assert changes["nats an example"] == pytest.approx(two.nll.value - one.nll.value)
    assert changes["Brier score"] == pytest.approx(two.brier.value - one.brier.value)


def test_the_card_reads_the_evaluation_of_its_weights_from_a_comparison(models, compared, world):
    folder = Path(shutil.copytree(models[1], world / "model"))
    shutil.copytree(compared[1], folder / "evaluation")
    facts = read_facts(folder, "org/model", posterior=False, only_posterior=False)
    (found,) = facts.evaluations
    assert (found["model"], found["variant"], facts.notes) == (models[1], "as it is", ())
    shutil.copytree(compared[1] / "b-in-4-bits", folder / "variant")
    facts = read_facts(folder, "org/model", posterior=False, only_posterior=False)
    assert facts.evaluations == (found,)
    assert "variant/report.json evaluates other weights" in facts.notes[0]


def test_names_are_the_shortest_that_differ():
    assert labels_of(["runs/a/model", "runs/b/model", "base"]) == ["a/model", "b/model", "base"]
    assert labels_of(["org/x@v1", "org/x@v2"]) == ["x@v1", "x@v2"]
    long = "m" * 60
    assert labels_of([f"{long}-one", f"{long}-two"])[1].endswith("-two")
    assert len(labels_of([long])[0]) <= 48
    tricky = labels_of(["x/A", "x/a", "x/report.json", "x/a b", "x/a-b", "/"])
    folders = {folder_of(label).casefold() for label in tricky}
    assert len(folders) == 6
    assert not folders & {"report.json", "report.md", "evaluation.png", ""}
    assert variant_label("b", "in 4 bits", ["b", "b-in-4-bits"]) == "b in 4 bits (2)"
    with pytest.raises(ConfigError, match="are the same model"):
        labels_of(["/x/a", "/x/../x/a"])


def scored(share, other, of=("s", "t"), low=0.01):
    """Changes of the toxic share by two scorers, with intervals of this half-width."""
    return [
        Difference(
            label="b",
            against="a",
            measure="toxic share",
            of=scorer,
            change=Interval(value=value, low=value - low, high=value + low),
        )
        for scorer, value in zip(of, (share, other), strict=True)
    ]


@pytest.mark.parametrize(
    ("share", "other", "first"),
    [
        (-0.03, 0.02, "Scorers disagree about which model is less toxic: by the toxic share, b is"),
        (-0.03, 0.005, "Scorers disagree about the direction: by the toxic share, b is less toxic"),
        (0.03, -0.005, "Scorers disagree about the direction: by the toxic share, b is more toxic"),
        (-0.03, -0.02, "b against a: lower in toxic share by s (-3 points, 95 % -4 to -2) and"),
        (-0.003, 0.005, "b against a: no difference beyond its interval in toxic share by s or"),
        (0.03, -0.0, "b against a: higher in toxic share by s"),
    ],
)
def test_a_disagreement_of_scorers_comes_first(share, other, first):
    changes = scored(share, other)
    evaluations = compare_report(2, 1).evaluations
    found = findings(evaluations, changes, changes)
    assert found[0].startswith(first)
    assert ("disagree" in first) == any("disagree" in finding for finding in found)


def test_models_are_judged_by_each_other_and_not_by_the_first_alone():
    """b and c both differ from a in one direction, but from each other in two."""
    evaluations = compare_report(3, 1).evaluations
    of_pairs = [d.model_copy(update={"label": "c", "against": "b"}) for d in scored(-0.05, 0.05)]
    found = findings(evaluations, scored(-0.05, -0.04), of_pairs)
    assert "c is less toxic than b for s" in found[0]


def test_every_two_models_are_compared_by_their_scorers(models, world, monkeypatch):
    """Not only with the first: two of the others may be what scorers disagree about."""
    given = []

    def spy(evaluations, changes, of_pairs, *rest):
        given.extend(dict.fromkeys((d.label, d.against) for d in of_pairs))
        return findings(evaluations, changes, of_pairs)

    monkeypatch.setattr("mergekit_bayes.compare.run.findings", spy)
    third = shutil.copytree(models[1], world / "third")
    report = run_compare(config([*models, third], perplexity={}))
    assert given == [("b", "a"), ("third", "a"), ("third", "b")]
    assert len({(d.label, d.against) for d in report.differences}) == 2
    assert "b and third hold the same weights." in report.findings


def test_what_has_no_interval_is_beyond_none():
    assert not is_beyond(Interval(value=1.0))
    assert not is_beyond(Interval(value=np.nan, low=np.nan, high=np.nan))
    assert is_beyond(Interval(value=1.0, low=0.5, high=2.0))
