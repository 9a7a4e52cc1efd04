"""lm-eval's tasks in an evaluation: its numbers, with intervals, and no code without trust."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes import ranks
from mergekit_bayes.compare.files import read_compare
from mergekit_bayes.compare.run import run_compare
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError, MismatchError
from mergekit_bayes.evaluate import EvaluateConfig, read_report, run_evaluate
from mergekit_bayes.evaluate.task_code import refuse_code
from mergekit_bayes.hub.card import model_card
from mergekit_bayes.hub.front_matter import split_card
from mergekit_bayes.metrics.paired import paired_change
from mergekit_bayes.models.load import load_model
from tests import tiny_models
from tests.two_ranks import found_by_two

lm_eval = pytest.importorskip("lm_eval", reason="a test dependency")
evaluator = pytest.importorskip("lm_eval.evaluator")
lm_eval_model = pytest.importorskip("mergekit_bayes.evaluate.lm_eval_model")
DATA = """dataset_path: json
dataset_kwargs: {{data_files: {{train: {path}, validation: {path}}}}}
training_split: train
validation_split: validation
"""
TASKS = {
    "tiny_choice": """task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["cat", "dog", "mat"]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
""",
    "tiny_rolling": """task: tiny_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "tiny_sampled": """task: tiny_sampled
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {do_sample: true, temperature: 1.0, max_gen_toks: 4, until: []}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_models.tiny_gpt2(folder / "lm")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(tiny_models.WORDS, size=n)) for n in range(3, 23)]
    rows = [{"text": text, "label": int(rng.integers(3))} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        text = task + DATA.format(path=folder / "rows.jsonl")
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


def config(world, **options):
    given = {"lm_eval": ("tiny_choice,tiny_rolling", "tiny_sampled"), "lm_eval_shots": 2}
    folders = {"model": str(world / "lm"), "lm_eval_include": str(world / "tasks")}
    return EvaluateConfig(**(folders | given | options))


@pytest.fixture(scope="module")
def report(world):
    return run_evaluate(config(world, output=str(world / "out")))


def by_lm_eval(world, **options):
    """What lm-eval's own function gives for the tasks that draw nothing by torch."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_model(str(world / "lm"))
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1),
        tasks=["tiny_choice", "tiny_rolling"],
        task_manager=TaskManager(include_path=str(world / "tasks"), include_defaults=False),
        num_fewshot=2,
        fewshot_random_seed=0,
        bootstrap_iters=100,
        **options,
    )


def test_the_numbers_are_those_of_lm_eval_itself(world, report):
    expected = by_lm_eval(world)["results"]
    assert set(report.lm_eval) == set(TASKS)
    for task, metric in (("tiny_choice", "acc"), ("tiny_rolling", "word_perplexity")):
        score = report.lm_eval[task].scores[f"{metric},none"]
        assert score.score.value == pytest.approx(expected[task][f"{metric},none"], rel=1e-5)
    choice = report.lm_eval["tiny_choice"]
    assert (choice.samples, choice.shots, choice.task_version) == (20, 2, "2.0")
    assert choice.lm_eval_version == lm_eval.__version__
    acc = choice.scores["acc,none"]
    assert acc.higher_is_better
    assert 0 < acc.score.value < 1
    assert acc.score.value == pytest.approx(np.mean(acc.document_values))
    assert 0 < acc.score.low < acc.score.value < acc.score.high < 1
    rolling = report.lm_eval["tiny_rolling"].scores["word_perplexity,none"]
    assert not rolling.higher_is_better
    assert rolling.document_values == ()


def test_a_share_without_a_hit_has_an_interval(report):
    """lm-eval's standard error is 0 there."""
    score = report.lm_eval["tiny_sampled"].scores["exact_match,none"].score
    assert score.value == 0
    assert score.high == pytest.approx(0.161, abs=1e-3)  # Wilson's, 0 of 20


def test_the_files_give_the_report_back(world, report):
    assert read_report(world / "out") == report
    rows = [json.loads(line) for line in (world / "out" / "lm_eval.jsonl").open()]
    assert {row["task"] for row in rows} == {"tiny_choice", "tiny_sampled"}
    assert rows[3] == {
        "task": "tiny_choice",
        "metric": "acc,none",
        "document": 3,
        "value": report.lm_eval["tiny_choice"].scores["acc,none"].document_values[3],
    }


def test_models_side_by_side_are_compared_by_document(world, report, tmp_path):
    other = str(tiny_models.tiny_gpt2(tmp_path / "other", seed=1))
    own = {"lm_eval": ("tiny_choice", "tiny_rolling"), "lm_eval_shots": 2}
    both = CompareConfig(
        models=(str(world / "lm"), other),
        lm_eval_include=str(world / "tasks"),
        output=str(tmp_path / "out"),
        **own,
    )
    found = run_compare(both)
    assert read_compare(tmp_path / "out") == found
    one, two = (e.report.lm_eval["tiny_choice"].scores["acc,none"] for e in found.evaluations)
    assert one == report.lm_eval["tiny_choice"].scores["acc,none"]
    assert one.document_values != two.document_values
    change, *others = found.differences
    assert (change.measure, change.of) == ("acc", "tiny_choice")
    before, after = (np.array(score.document_values)[:, None] for score in (one, two))
    assert change.change == paired_change(before, after)
    # The nats of a document are no mean, so that a perplexity's change has no interval.
    assert others
    for other in others:
        assert (other.of, other.change.low) == ("tiny_rolling", None)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "tiny_rolling" in page
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 0


@pytest.fixture
def drawn(monkeypatch):
    """What tasks sample, block for block."""
    answers = []
    answer = lm_eval_model.HFLM.generate_until

    def keep(self, *args, **options):
        answers.append(answer(self, *args, **options))
        return answers[-1]

    monkeypatch.setattr(lm_eval_model.HFLM, "generate_until", keep)
    return answers


def test_the_seed_decides_what_is_drawn_and_no_generator_is_left_moved(world, drawn):
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    for seed in (0, 0, 1):
        run_evaluate(config(world, lm_eval=("tiny_sampled",), seed=seed))
        assert torch.equal(torch.get_rng_state(), states[1])
    assert drawn[0] == drawn[1] != drawn[2]
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[2]


def test_a_block_is_drawn_alike_whoever_works_on_the_others(world, drawn, monkeypatch):
    """As with several ranks, of which each works on some blocks only."""
    monkeypatch.setattr(lm_eval_model, "_BATCHES", 1)
    own = config(world, lm_eval=("tiny_sampled",))
    run_evaluate(own)
    forward = drawn[:]
    assert len(forward) == 3
    drawn.clear()
    reverse = lambda items, work: [work(item) for item in reversed(items)][::-1]  # noqa: E731
    monkeypatch.setattr(lm_eval_model, "spread", reverse)
    run_evaluate(own)
    assert drawn == forward[::-1]


def test_numbers_that_are_none_are_compared_in_no_pairs(world, tmp_path, monkeypatch):
    """A line of JSON has no place for NaN, and a report without a number has no picture."""

    def numbers(metric):
        def evaluate(**_):
            task = {"acc,none": metric, "acc_stderr,none": float("nan"), "sample_len": 2}
            rows = [{"doc_id": i, "filter": "none", "metrics": ["acc"]} for i in range(2)]
            samples = [
                row | {"acc": value} for row, value in zip(rows, (1.0, float("nan")), strict=True)
            ]
            return {
                "results": {"tiny_choice": task},
                "higher_is_better": {},
                "samples": {"tiny_choice": samples},
                "n-shot": {},
                "versions": {},
            }

        return evaluate

    monkeypatch.setattr(evaluator, "evaluate", numbers(float("nan")))
    one = config(world, lm_eval=("tiny_choice",), output=str(tmp_path / "out"))
    report = run_evaluate(one)
    score = report.lm_eval["tiny_choice"].scores["acc,none"]
    assert (score.score.low, score.document_values) == (None, ())
    assert np.isnan(
        read_report(tmp_path / "out").lm_eval["tiny_choice"].scores["acc,none"].score.value
    )
    monkeypatch.setattr(evaluator, "evaluate", numbers("bypass"))
    with pytest.raises(CheckpointError, match="gives no number for its tasks \\(tiny_choice\\)"):
        run_evaluate(config(world, lm_eval=("tiny_choice",)))


def test_tasks_run_on_one_rank_and_tell_the_others_what_they_ask(world, report, monkeypatch):
    """Other ranks get plain values, without the documents of the tasks."""
    told = []

    def lead(work, job):
        def together(asked):
            told.append(asked.kind)
            job(pickle.loads(pickle.dumps(asked)))

        return work(together)

    monkeypatch.setattr("mergekit_bayes.evaluate.lm_eval.lead", lead)
    assert run_evaluate(config(world)).lm_eval == report.lm_eval
    assert sorted(told) == ["generate_until", "loglikelihood", "loglikelihood_rolling"]


def test_blocks_of_requests_do_not_change_the_numbers(world, report, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "_BATCHES", 1)
    told = []
    small = run_evaluate(
        config(world, lm_eval=("tiny_rolling",), batch_size=3),
        progress=lambda *step: told.append(step),
    )
    key = "word_perplexity,none"
    a, b = (r.lm_eval["tiny_rolling"].scores[key].score.value for r in (small, report))
    assert a == pytest.approx(b, rel=1e-5)
    assert [step for step in told if step[0] == "lm-eval"] == [
        ("lm-eval", min(done, 20), 20) for done in range(3, 22, 3)
    ]


def test_the_card_lists_the_scores(world, report, tmp_path):
    folder = tiny_models.tiny_gpt2(tmp_path / "lm")
    run_evaluate(config(world, model=str(folder), output=str(folder / "evaluation")))
    fields, _ = split_card(model_card(folder))
    results = [r for entry in fields["model-index"] for r in entry["results"]]
    (found,) = (r for r in results if r["dataset"]["name"] == "tiny_choice")
    (metric,) = found["metrics"]
    value = report.lm_eval["tiny_choice"].scores["acc,none"].score.value
    assert (metric["type"], metric["value"]) == ("acc", pytest.approx(value))
    assert metric["name"] == f"acc (2 shots, lm-eval {lm_eval.__version__}, task version 2.0)"


def test_the_command_prints_a_table_and_nothing_of_lm_eval(world):
    line = ["evaluate", str(world / "lm"), "--lm-eval", ",".join(TASKS)]
    options = ["--lm-eval-include", str(world / "tasks"), "--lm-eval-limit", "7", "--json"]
    result = CliRunner().invoke(app, [*line, *options])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["lm_eval"]["tiny_choice"]["samples"] == 7
    title, head, *rows = result.stderr.strip().splitlines()
    assert title.startswith(f"tasks of lm-eval {lm_eval.__version__}")
    assert head.split()[:4] == ["task", "metric", "score", "better"]
    assert [row.split()[:2] for row in rows] == [
        ["tiny_choice", "acc"],
        ["tiny_rolling", "word_perplexity"],
        ["tiny_sampled", "exact_match"],
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lm_eval": ()}, ConfigError, "--lm-eval-include is about --lm-eval"),
        (
            {"lm_eval": (), "lm_eval_include": None, "lm_eval_shots": None},
            ConfigError,
            "nothing to",
        ),
        ({"lm_eval": (",",)}, ConfigError, "names no task"),
        ({"lm_eval_include": "nowhere"}, ConfigError, "'nowhere' is no folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world, options, error, message):
    with pytest.raises(error, match=message):
        run_evaluate(config(world, **options))


def test_a_classifier_is_refused(world, tmp_path):
    folder = tiny_models.tiny_bert(tmp_path / "bert")
    with pytest.raises(MismatchError, match="is a classifier; lm-eval's tasks need"):
        run_evaluate(config(world, model=str(folder), lm_eval=("tiny_choice",)))


def test_without_lm_eval_the_message_names_the_extra(world, monkeypatch):
    monkeypatch.setattr("mergekit_bayes.evaluate.lm_eval.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'mergekit-bayes\[lm-eval\]'"):
        run_evaluate(config(world))


def test_an_unknown_task_is_told_with_a_near_name(world, monkeypatch):
    """lm-eval's own index takes seconds, so that it is left out here."""
    from lm_eval import tasks

    own = tasks.TaskManager
    monkeypatch.setattr(
        tasks, "TaskManager", lambda **options: own(**options | {"include_defaults": False})
    )
    with pytest.raises(ConfigError, match=r"has no task 'tiny_choise'.*did you mean 'tiny_choice'"):
        run_evaluate(config(world, lm_eval=("tiny_choise",)))
    everything = run_evaluate(config(world, lm_eval=("tiny_[cr]*",), lm_eval_limit=2))
    assert set(everything.lm_eval) == {"tiny_choice", "tiny_rolling"}


def test_a_task_whose_data_are_on_the_hub_is_one_message_offline(world, tmp_path):
    (tmp_path / "far.yaml").write_text(
        TASKS["tiny_choice"].replace("tiny_choice", "far")
        + "dataset_path: someone/nothing\nvalidation_split: validation\n"
    )
    with pytest.raises(
        CheckpointError, match=r"cannot load the task 'far'.*run once where the Hub"
    ):
        run_evaluate(config(world, lm_eval=("far",), lm_eval_include=str(tmp_path)))


MARKED = "import pathlib\npathlib.Path({mark!r}).touch()\ndef text(doc):\n    return doc['text']\n"
CODE = {
    "function": ("doc_to_text: !function own.text", "not plain YAML"),
    "verbatim": ("doc_to_text: !<!function> own.text", "not plain YAML"),
    "included": ("include: hidden.txt", "not plain YAML"),
    "metric": ("metric_list: [{metric: ./own.py}]", "none of lm-eval's own"),
    "template": (
        """doc_to_text: "{{ cycler.__init__.__globals__.os.system('touch MARK') }}{{text}}\"""",
        "cannot load",
    ),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_of_an_own_task_runs_only_where_it_is_trusted(world, tmp_path, kind):
    mark, (line, message) = tmp_path / "mark", CODE[kind]
    (tmp_path / "own.py").write_text(MARKED.format(mark=str(mark)))
    (tmp_path / "hidden.txt").write_text("doc_to_text: !function own.text\n")
    kept = [
        row
        for row in TASKS["tiny_choice"].splitlines()
        if row.partition(":")[0]
        not in (line.partition(":")[0], "doc_to_text" if kind == "included" else "")
    ]
    task = "\n".join([*kept, line.replace("MARK", str(mark)), ""])
    (tmp_path / "own.yaml").write_text(task + DATA.format(path=world / "rows.jsonl"))
    own = config(world, lm_eval=("tiny_choice",), lm_eval_include=str(tmp_path), lm_eval_limit=2)
    with pytest.raises(BmergeError, match=message):
        run_evaluate(own)
    assert not mark.exists()
    if kind != "metric":  # which `evaluate` would have to load
        run_evaluate(own.model_copy(update={"trust_remote_code": True}))
        assert mark.exists()


def test_plain_tasks_are_no_code(world):
    refuse_code(world / "tasks")


def child(folder):
    """The evaluation of one of two ranks, and what this rank did for it."""
    torch.distributed.init_process_group("gloo")
    did = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_model, "_BATCHES", 1)
        for place, name in (
            (evaluator, "evaluate"),
            (lm_eval_model.HFLM, "generate_until"),
        ):
            patch.setattr(place, name, noted(getattr(place, name), did))
        report = run_evaluate(config(folder))
    found = {"world": ranks.world(), "report": report.model_dump_json(), "did": did}
    every = [None, None]
    torch.distributed.all_gather_object(every, found)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(every))
    torch.distributed.destroy_process_group()


def noted(function, did):
    def call(*args, **options):
        did.append(function.__name__)
        return function(*args, **options)

    return call


@pytest.mark.slow
def test_two_processes_give_what_one_does(world, monkeypatch):
    found = found_by_two("tests.test_lm_eval", world)
    two = [json.loads(rank["report"]) for rank in found]
    monkeypatch.setattr(lm_eval_model, "_BATCHES", 1)
    one = json.loads(run_evaluate(config(world)).model_dump_json())
    assert [report["lm_eval"] for report in two] == [one["lm_eval"]] * 2
    # Three blocks of texts to write; the tasks themselves run once.
    assert [rank["did"].count("evaluate") for rank in found] == [1, 0]
    assert [rank["did"].count("generate_until") for rank in found] == [2, 1]
