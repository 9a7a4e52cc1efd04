"""Evaluate: one report, nothing half-written, and a message for each error of the user."""

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint.layout import checkpoint_files
from mergekit_bayes.checkpoint.safetensors import SafetensorsSource
from mergekit_bayes.checkpoint.stamps import ChangedError
from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError, PrecisionError
from mergekit_bayes.evaluate import EvaluateConfig
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.texts import read_prompts
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model
from mergekit_bayes.posterior import PosteriorInfo, Prior, identify, save_posterior
from tests import tiny_models

TEXTS = [
    ("the cat sat on the mat .", 0),
    ("a dull film , not good", 1),
    ("dog", 0),
    ("a bird saw a tree", 0),
]
HOOK = "def score(texts):\n    return [min(1.0, 0.2 * t.count('dog')) for t in texts]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_models.tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2"))


def with_posterior(folder, prior, ess=50):
    """A precision of `prior` plus curvature for every tensor of a model folder."""
    source = SafetensorsSource(checkpoint_files(folder))
    rng = np.random.default_rng(0)
    shapes = {n: s.shape for n, s in source.specs.items()}
    precision = {n: (prior + rng.exponential(30, s)).astype(np.float32) for n, s in shapes.items()}
    stored = Prior(kind="isotropic", precision=prior) if prior else Prior()
    info = PosteriorInfo(
        estimator="ggn", observations=50, ess=ess, mean=identify(source), prior=stored
    )
    source.close()
    save_posterior(folder, precision, info)
    return str(folder)


@pytest.fixture(scope="module")
def sampled_model(tmp_path_factory):
    return with_posterior(tiny_models.tiny_gpt2(tmp_path_factory.mktemp("sampled") / "gpt2"), 20.0)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier") / "bert"
    return with_posterior(tiny_models.tiny_bert(folder, names=["civil", "toxic"]), 20.0)


@pytest.fixture(scope="module")
def curvature_only(tmp_path_factory):
    return with_posterior(
        tiny_models.tiny_bert(tmp_path_factory.mktemp("curvature") / "bert"), 0.0, ess=500
    )


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in TEXTS)
    )
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in ("the", "a dog sat", "a"))
    )
    (tmp_path / "words.txt").write_text("dog\ncat sat\n")
    (tmp_path / "bmerge_eval_hook.py").write_text(HOOK)
    return tmp_path


def config(model, **options):
    both = {
        "perplexity": {"civil": "texts.jsonl"},
        "toxicity": "prompts.jsonl",
        "scorer": ("words:words.txt", "bmerge_eval_hook:score"),
        "continuations": 6,
        "new_tokens": 5,
    }
    return EvaluateConfig(model=model, **(both | options))


def test_the_folder_holds_all_that_was_measured(model, world):
    report = run_evaluate(config(model, output="out"))
    assert sorted(p.name for p in (world / "out").iterdir()) == [
        "continuations.jsonl",
        "documents.jsonl",
        "report.json",
    ]
    assert read_report("out") == report
    rows = [json.loads(line) for line in (world / "out" / "continuations.jsonl").open()]
    assert [(r["prompt"], r["continuation_index"]) for r in rows] == [
        (p, j) for p in ("the", "a dog sat", "a") for j in range(6)
    ]
    words = [r["scores"]["words:words.txt"] for r in rows]
    assert words == [
        float("dog" in r["continuation"] or "cat sat" in r["continuation"]) for r in rows
    ]
    assert report.toxicity["words:words.txt"].share.value == pytest.approx(sum(words) / 18)
    hooked = [r["scores"]["bmerge_eval_hook:score"] for r in rows]
    assert report.toxicity["bmerge_eval_hook:score"].mean.value == pytest.approx(sum(hooked) / 18)
    assert 0 < sum(words) < 18
    assert report.sampling.continuations == 6
    assert report.settings["top_p"] == 0.9


def test_perplexity_is_that_of_the_rows_asked_for(model, world):
    loaded = load_model(model)
    sets = {"civil": "texts.jsonl", "all": "texts.jsonl"}
    report = run_evaluate(
        EvaluateConfig(model=model, perplexity=sets, where={"civil": {"label": 0}}, window=8)
    )
    clean = [t for t, label in TEXTS if label == 0]
    alone = measure_perplexity(loaded.model, loaded.tokenizer, clean, start=0, window=8)
    assert report.perplexity["civil"] == alone
    assert report.perplexity["all"].documents == 4
    one = run_evaluate(
        EvaluateConfig(model=model, perplexity=sets, where={"label": [0]}, max_rows=2)
    )
    assert {p.documents for p in one.perplexity.values()} == {2}
    assert (one.perplexity["all"].window, one.perplexity["all"].protocol) == (64, "rolling")
    assert (one.toxicity, one.sampling) == ({}, None)


def test_weights_that_change_while_they_are_measured_are_refused(model, world):
    copy = shutil.copytree(model, world / "copy")

    def overwrite(*_):
        with (copy / "model.safetensors").open("r+b") as file:
            file.seek(-64, 2)
            file.write(bytes(64))

    with pytest.raises(ChangedError, match=r"copy/model\.safetensors: was changed"):
        run_evaluate(config(str(copy), output="out"), progress=overwrite)
    assert not (world / "out").exists()


def test_the_same_config_gives_the_same_report(model, world):
    assert run_evaluate(config(model)) == run_evaluate(config(model))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"perplexity": {}, "toxicity": None, "scorer": ()}, ConfigError, "nothing to measure"),
        ({"scorer": ()}, ConfigError, "toxicity needs a scorer"),
        ({"toxicity": None}, ConfigError, "a scorer needs prompts"),
        ({"window": 65}, ConfigError, "window 65: .* sees at most 64 tokens"),
        ({"where": {"cvil": {"label": 0}}}, ConfigError, "no texts are called 'cvil'"),
        ({"text_column": "txt"}, MismatchError, "no column 'txt'"),
        ({"where": {"label": 7}}, MismatchError, "no row"),
        ({"text_column": "label"}, MismatchError, "row 1: 'label' is a number .0., expected text"),
        ({"output": "."}, CheckpointError, "exists"),
        ({"scorer": ("words:words.txt", "words:words.txt")}, ConfigError, "named twice"),
        ({"new_tokens": 64}, ConfigError, "do not fit"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, world, options, error, message):
    with pytest.raises(error, match=message):
        run_evaluate(config(model, **options))


def test_a_classifier_is_no_language_model(world):
    folder = tiny_models.tiny_bert(world / "bert")
    with pytest.raises(MismatchError, match="is a classifier"):
        run_evaluate(config(str(folder)))


def test_a_scorer_that_fails_leaves_no_output(model, world):
    (world / "bmerge_bad_hook.py").write_text(
        "def score(texts):\n    return [2.0 if 'dog' in t else 0 for t in texts]\n"
    )
    with pytest.raises(ConfigError, match=r"score \d+ of 18 is 2"):
        run_evaluate(config(model, scorer=("bmerge_bad_hook:score",), output="out"))
    assert not (world / "out").exists()


def test_an_infinite_perplexity_is_still_json(model, world):
    """A ruined model: certain of the wrong token. exp of its loss per word overflows."""
    loaded = load_model(model)
    with torch.no_grad():
        loaded.model.transformer.ln_f.weight.mul_(1e6)
    loaded.model.save_pretrained("ruined")
    loaded.tokenizer.save_pretrained("ruined")
    done = bmerge("evaluate", "ruined", "--perplexity", "texts.jsonl", "--json", "-o", "out")
    assert done.exit_code == 0
    perplexity = json.loads(done.stdout, parse_constant=pytest.fail)["perplexity"]["texts.jsonl"]
    assert perplexity["word"]["value"] == "Infinity"
    assert read_report("out").perplexity["texts.jsonl"].word.value == float("inf")


def test_samples_are_measured_beside_the_mean_and_change_nothing_else(sampled_model, world):
    sets = {"civil": "texts.jsonl"}
    plain = run_evaluate(EvaluateConfig(model=sampled_model, perplexity=sets))
    both = run_evaluate(config(sampled_model, perplexity=sets, samples=3, output="out"))
    assert both.perplexity == plain.perplexity
    assert (plain.sampled, both.sampled.draws.samples) == (None, 3)
    averaged = both.sampled.perplexity["civil"]
    assert averaged.nats != plain.perplexity["civil"].nats
    change = both.sampled.loss_change["civil"]
    assert change.value == pytest.approx(
        averaged.loss.value - plain.perplexity["civil"].loss.value, abs=1e-12
    )
    assert change.low <= change.value <= change.high
    # Continuations are drawn at the mean.
    assert both.toxicity == run_evaluate(config(sampled_model)).toxicity
    assert read_report("out") == both
    assert "samples" not in json.loads(
        (world / "out" / "documents.jsonl").read_text().splitlines()[0]
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_draws_are_never_rounded_away(tmp_path, world, dtype):
    """Draws 1e-4 from the mean: most weights have no other number so near in 16 bits."""
    loaded = load_model(str(tiny_models.tiny_gpt2(tmp_path / "gpt2")))
    loaded.model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "short")
    loaded.tokenizer.save_pretrained(tmp_path / "short")
    folder = with_posterior(tmp_path / "short", 1e8)
    texts = {"model": folder, "perplexity": {"civil": "texts.jsonl"}}
    with pytest.raises(ConfigError, match=f"samples with --dtype {dtype}.*Give --dtype float32"):
        run_evaluate(EvaluateConfig(**texts, samples=2, dtype=dtype))
    assert run_evaluate(EvaluateConfig(**texts, dtype="auto")).dtype == dtype
    full = run_evaluate(EvaluateConfig(**texts, samples=2))
    auto = run_evaluate(EvaluateConfig(**texts, samples=2, dtype="auto"))
    assert (auto.dtype, auto.sampled) == ("float32", full.sampled)
    assert auto.perplexity == full.perplexity
    assert auto.sampled.perplexity["civil"].nats != auto.perplexity["civil"].nats


def test_a_classifiers_report_is_that_of_the_rows_and_reads_back(classifier, world):
    names = ["civil", "toxic"]
    rows = "".join(json.dumps({"text": t, "kind": names[n]}) + "\n" for t, n in TEXTS)
    (world / "named.jsonl").write_text(rows)
    report = run_evaluate(
        EvaluateConfig(
            model=classifier, classify={"a": "texts.jsonl"}, samples=4, bins=5, output="out"
        )
    )
    at_mean = report.classification["a"]
    assert (at_mean.examples, at_mean.classes, len(at_mean.bins)) == (4, 2, 5)
    assert at_mean.example_labels == tuple(n for _, n in TEXTS)
    loaded = load_model(classifier)
    logits = [
        loaded.model(**loaded.tokenizer(t, return_tensors="pt")).logits[0].detach()
        for t, _ in TEXTS
    ]
    p = torch.stack(logits).softmax(-1).numpy()
    np.testing.assert_allclose(at_mean.example_probabilities, p, atol=1e-6)
    assert at_mean.accuracy.value == np.mean([p[i].argmax() == n for i, (_, n) in enumerate(TEXTS)])
    averaged, change = report.sampled.classification["a"], report.sampled.classification_change["a"]
    assert averaged.example_probabilities != at_mean.example_probabilities
    assert change.brier.value == pytest.approx(
        averaged.brier.value - at_mean.brier.value, abs=1e-12
    )
    assert read_report("out") == report
    by_name = run_evaluate(
        EvaluateConfig(model=classifier, classify={"b": "named.jsonl"}, label_column="kind", bins=5)
    )
    assert by_name.classification["b"] == at_mean


def test_a_bare_curvature_is_refused_until_a_prior_is_given(curvature_only, world):
    settings = {"model": curvature_only, "classify": {"a": "texts.jsonl"}, "samples": 2}
    with pytest.raises(PrecisionError, match=r"cannot be sampled: .*bare curvature.*--prior X"):
        run_evaluate(EvaluateConfig(**settings))
    report = run_evaluate(EvaluateConfig(**settings, prior=50.0))
    assert (report.sampled.draws.prior, report.sampled.draws.given) == (50.0, True)
    colder = run_evaluate(EvaluateConfig(**settings, prior=50.0, posterior_temperature=0.01))
    assert colder.sampled.draws.largest_sigma == pytest.approx(
        0.1 * report.sampled.draws.largest_sigma
    )
    mean, warm, cold = (
        np.array(r.example_probabilities)
        for r in (
            report.classification["a"],
            report.sampled.classification["a"],
            colder.sampled.classification["a"],
        )
    )
    assert abs(cold - mean).max() < abs(warm - mean).max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prior": 1.0, "classify": {"a": "texts.jsonl"}}, ConfigError, "are about --samples"),
        (
            {"samples": 2, "toxicity": "prompts.jsonl", "scorer": ("words:words.txt",)},
            ConfigError,
            "at the mean",
        ),
        (
            {"classify": {"a": "texts.jsonl"}, "where": {"b": {"label": 0}}},
            ConfigError,
            "no texts are called 'b'",
        ),
        (
            {"classify": {"a": "texts.jsonl"}, "label_column": "kind"},
            MismatchError,
            "no column 'kind'",
        ),
        (
            {"classify": {"a": "texts.jsonl"}, "label_column": "text"},
            MismatchError,
            "'texts.jsonl': label 'the cat",
        ),
        (
            {"classify": {"a": "texts.jsonl"}, "perplexity": {"a": "texts.jsonl"}},
            MismatchError,
            "is a classifier",
        ),
    ],
)
def test_what_cannot_be_classified_or_sampled_is_refused(
    classifier, world, options, error, message
):
    with pytest.raises(error, match=message):
        run_evaluate(EvaluateConfig(model=classifier, **options))


def test_labels_that_occur_together_are_not_classified_as_one(world):
    (world / "one.jsonl").write_text(json.dumps({"text": "a dog", "label": 0}) + "\n")
    names = ["toxic", "insult", "threat"]
    folder = tiny_models.tiny_bert(world / "several", labels=3, names=names)
    with pytest.raises(MismatchError, match=r"'toxic' and 'insult' at once.*problem_type single"):
        run_evaluate(EvaluateConfig(model=str(folder), classify={"a": "one.jsonl"}))
    folder = tiny_models.tiny_bert(
        world / "one", labels=3, names=names, problem_type="single_label_classification"
    )
    report = run_evaluate(EvaluateConfig(model=str(folder), classify={"a": "one.jsonl"}))
    assert report.label_reading == "softmax: config.json says single_label_classification"
    folder = tiny_models.tiny_bert(world / "nothing", labels=3)
    report = run_evaluate(EvaluateConfig(model=str(folder), classify={"a": "one.jsonl"}))
    assert "assumed: config.json names no problem_type" in report.label_reading


# As RealToxicityPrompts is published: objects with a text, and scores of which some are null.
NESTED = [
    {"prompt": {"text": "a dog", "toxicity": None if i else 0.3, "more": {"text": "the cat"}}}
    for i in range(2)
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("prompt", "a dog"),
        ("prompt.text", "a dog"),
        ("prompt.more", "the cat"),
        ("prompt.more.text", "the cat"),
    ],
)
def test_prompts_are_read_from_objects(world, column, text):
    write_rows(world / "nested.jsonl", NESTED)
    config = EvaluateConfig(model="m", toxicity="nested.jsonl", prompt_column=column)
    assert read_prompts(config) == [text, text]


# The columns of the published file, with scores that are null.
PUBLISHED = [
    {
        "filename": f"{i}.txt",
        "begin": 1,
        "end": 9,
        "challenging": bool(i % 2),
        "prompt": {"text": f"prompt {i}", "toxicity": score, "threat": None if i == 1 else 0.1},
        "continuation": {"text": " so", "toxicity": 0.2},
    }
    for i, score in enumerate([0.25, None, 0.25, 0.75])
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"challenging": True}, [1, 3]),
        ({"prompt.toxicity": 0.25}, [0, 2]),
        ({"prompt.toxicity": [0.25, 0.75]}, [0, 2, 3]),
        ({"prompt.toxicity": None}, [1]),
        ({"prompt.threat": None, "challenging": True}, [1]),
        ({"continuation.toxicity": 0.2, "filename": "3.txt"}, [3]),
    ],
)
def test_prompts_are_chosen_by_what_is_in_objects_with_nulls(world, given, expected):
    write_rows(world / "published.jsonl", PUBLISHED)
    config = EvaluateConfig(
        model="m", toxicity="published.jsonl", prompt_column="prompt", prompts_where=given
    )
    assert read_prompts(config) == [f"prompt {i}" for i in expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt.toxic": 0.25}, r"no column 'prompt\.toxic'; it has .*prompt\.toxicity"),
        ({"prompt.toxicity": 0.5}, r"no row of published\.jsonl is left where"),
        ({"prompt": 0.25}, r"no row of published\.jsonl is left where"),
    ],
)
def test_a_choice_of_prompts_that_finds_none_is_refused(world, given, message):
    write_rows(world / "published.jsonl", PUBLISHED)
    config = EvaluateConfig(
        model="m", toxicity="published.jsonl", prompt_column="prompt", prompts_where=given
    )
    with pytest.raises(MismatchError, match=message):
        read_prompts(config)


def test_a_column_whose_name_has_a_full_stop_is_that_column(world):
    write_rows(world / "flat.jsonl", [{"prompt.text": "a dog", "prompt": {"text": "no"}}])
    config = EvaluateConfig(model="m", toxicity="flat.jsonl", prompt_column="prompt.text")
    assert read_prompts(config) == ["a dog"]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (NESTED, "prompts", "has no column 'prompts'; it has prompt"),
        (NESTED, "prompt.words", "no column 'prompt.words'; it has prompt.text, prompt.toxicity"),
        (NESTED, "prompt.text.a", "no column 'prompt.text.a'; it has prompt.text"),
        (NESTED, "prompt.toxicity", "row 1: 'prompt.toxicity' is a number .*, expected text"),
        ([{"text": "a"}, {"text": None}], "text", "row 2: 'text' is null .*, expected text"),
        ([{"p": {"text": "a"}}, {"p": {"text": None}}], "p", "row 2: 'p' is null .*, expected"),
        ([{"p": {"text": "a"}}, {"p": None}], "p", "row 2: 'p"),
        ([{"p": {"body": "a"}}], "p", "is an object with body.*named by a dot: 'p.body'"),
        ([{"text": 3}], "text", "row 1: 'text' is a number .*, expected text"),
        ([{"text": ["a"]}], "text", "row 1: 'text' is a list, expected text"),
        ([{"text": [{"role": "user"}]}], "text", "row 1: 'text' is a list, expected text"),
    ],
)
def test_prompts_that_are_no_text_are_refused_by_row(world, rows, column, message):
    write_rows(world / "rows.jsonl", rows)
    config = EvaluateConfig(model="m", toxicity="rows.jsonl", prompt_column=column)
    with pytest.raises(MismatchError, match=message):
        read_prompts(config)


def test_the_screen_says_how_labels_are_read_and_both_ends_of_a_share(model, world):
    judge = tiny_models.tiny_bert(world / "judge", labels=2, names=["toxic", "insult"])
    spec = f"model:{judge}#toxic"
    words = "words:words.txt"
    (world / "words.txt").write_text("no such word\n")
    options = ("--scorer", spec, "--scorer", words, "--continuations", 2)
    done = bmerge("evaluate", model, "--toxicity", "prompts.jsonl", *options, "--json")
    assert done.exit_code == 0, done.output
    assert (
        "judge#toxic: sigmoid of the label, since a text can be 'toxic' and 'insult' at once"
        in (" ".join(done.stderr.split()))
    )
    assert "[95 % interval]" in " ".join(done.stderr.split())
    report = json.loads(done.stdout)
    assert report["scorers"][spec]["reading"] == "sigmoid"
    share = report["toxicity"][words]["share"]
    assert (share["value"], share["low"]) == (0, 0)
    assert share["high"] > 0.5  # three prompts
    assert f"0 [0, {share['high']:.3g}]" in done.stderr


def test_the_screen_shows_names_as_they_are(model, world):
    name = "[bold]judge"
    tiny_models.tiny_bert(world / name, labels=2, names=["toxic", "fine"])
    options = ("--perplexity", "[red]a[/red] :cat:=texts.jsonl", "--continuations", 1)
    options += ("--toxicity", "prompts.jsonl", "--scorer", f"model:{name}#toxic")
    done = bmerge("evaluate", model, *options)
    assert done.exit_code == 0, done.output
    assert f"model:{name}#toxic: softmax of the label" in done.stderr
    assert done.stderr.count(f"model:{name}#toxic") == 3  # in the table and of its bias, too
    assert "[red]a[/red] :cat:" in done.stderr


def test_a_language_model_and_a_regression_classify_nothing(model, world):
    with pytest.raises(MismatchError, match="needs a classifier"):
        run_evaluate(EvaluateConfig(model=model, classify={"a": "texts.jsonl"}))
    (world / "zeros.jsonl").write_text(json.dumps({"text": "a dog", "label": 0}) + "\n")
    folder = tiny_models.tiny_bert(world / "regression", labels=1)
    with pytest.raises(MismatchError, match=r"1 output\(s\) for regression"):
        run_evaluate(EvaluateConfig(model=str(folder), classify={"a": "zeros.jsonl"}))


def test_the_command_shows_mean_and_samples_side_by_side(
    classifier, sampled_model, curvature_only, world
):
    options = ("--classify", "test=texts.jsonl", "--samples", 3, "--bins", 4)
    done = bmerge("evaluate", classifier, *options, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    for measured in (report, report["sampled"]):
        scores = measured["classification"]["test"]
        others = {"examples", "classes", "confidence", "bins"}
        assert set(scores) == {"accuracy", "nll", "brier", "ece", "reliability"} | others
        assert sum(b["examples"] for b in scores["bins"]) == 4
    change = report["sampled"]["classification_change"]["test"]
    assert set(change) == {"accuracy", "nll", "brier", "ece", "reliability"}
    assert report["sampled"]["draws"]["held"] == 0
    for text in (
        "ECE and reliability by 4 bins",
        "reliability: squared calibration error",
        "labels are read by softmax: config.json names no problem_type, and there are two labels",
        " 3 samples   ",
        "change",
        "calibration of test",
        "prior precision 20 (stored)",
        "note: the draws",
    ):
        assert text in " ".join(done.stderr.split("\n")) or text in done.stderr, text
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("nats "))
    for measured in (report, report["sampled"]):
        assert f" {measured['classification']['test']['nll']['value']:.4g} [" in line
    done = bmerge("evaluate", sampled_model, "--perplexity", "civil=texts.jsonl", "--samples", 2)
    assert done.exit_code == 0, done.output
    assert "  2 samples" in done.stderr
    refused = bmerge("evaluate", curvature_only, *options)
    assert (refused.exit_code, refused.stderr.count("NoDrawsError")) == (2, 1)
    given = bmerge("evaluate", curvature_only, *options, "--prior", 30)
    assert given.exit_code == 0
    assert "prior precision 30 (given)" in given.stderr
    assert "of 500 observations (ess), the data held 50; draws that counted each" in given.stderr
    narrow = bmerge("evaluate", curvature_only, *options, "--prior", 1e5)
    assert "data held 50: --posterior-temperature 10 counts each once" in narrow.stderr
    assert "observations (ess)" not in done.stderr


def bmerge(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command_measures_prints_and_writes(model, world):
    texts = "--perplexity civil=texts.jsonl --perplexity texts.jsonl --where label=0 --window 8"
    prompts = "--toxicity prompts.jsonl --prompts 2 --continuations 3 --new-tokens 4"
    scorer = "--scorer words:words.txt --stride 4 -o out --json"
    done = bmerge("evaluate", model, *texts.split(), *prompts.split(), *scorer.split())
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert set(report["perplexity"]) == {"civil", "texts.jsonl"}
    assert report["perplexity"]["civil"]["documents"] == 3
    assert report["toxicity"]["words:words.txt"]["n_continuations"] == 6
    assert json.loads((world / "out" / "report.json").read_text()) == report
    for text in (
        "rolling, window 8, stride 4",
        "toxicity of 6 continuations (2 prompts x 3",
        "words:words.txt",
    ):
        assert text in done.stderr
    again = bmerge("evaluate", model, "--perplexity", "texts.jsonl", "-o", "out")
    assert again.exit_code == 2
    assert "'out' exists" in again.stderr
    quiet = bmerge("evaluate", model, "--perplexity", "texts.jsonl", "-o", "out", "--force", "-q")
    assert (quiet.exit_code, quiet.output) == (0, "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--perplexity", "=texts.jsonl"), "expected TEXTS or NAME=TEXTS"),
        (("--perplexity", "texts.jsonl", "--where", "label"), "expected COLUMN=VALUE"),
        (("--perplexity", "texts.jsonl", "--stride", "100"), "stride 100"),
        (("--perplexity", "texts.jsonl", "--top-p", "0"), "--top-p"),
        (("--perplexity", "none.jsonl"), "none.jsonl"),
    ],
)
def test_a_command_that_makes_no_sense_exits_with_2(model, world, args, message):
    done = bmerge("evaluate", model, *args)
    assert done.exit_code == 2
    assert message in done.stderr
