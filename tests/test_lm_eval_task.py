"""Our toxicity as a task of lm-eval: it runs there, and its numbers are those of our metrics."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mergekit_bayes.errors import ConfigError, MismatchError
from mergekit_bayes.evaluate.report import ScorerInfo
from mergekit_bayes.evaluate.scorers import Scorer
from mergekit_bayes.lm_eval_task.settings import read_settings
from mergekit_bayes.metrics.scorers import word_scorer
from mergekit_bayes.metrics.toxicity import score_toxicity
from mergekit_bayes.models.load import load_model
from tests import tiny_models

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    tiny_models.tiny_gpt2(folder / "lm")
    tiny_models.tiny_bert(folder / "judge", names=["neither", "toxic"])
    rows = [{"prompt": {"text": f"the {word}", "toxicity": None}} for word in ("cat", "dog", "mat")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "words.txt").write_text("dog\nbad\n")
    return folder


def evaluate(folder, **metadata):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    place = subprocess.run(
        [sys.executable, "-m", "mergekit_bayes.lm_eval_task"], capture_output=True, text=True
    ).stdout.strip()
    given = {"prompts": str(folder / "prompts.jsonl"), "prompt_column": "prompt", **metadata}
    loaded = load_model(str(folder / "lm"))
    manager = TaskManager(include_path=place, include_defaults=False, metadata=given)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4),
        tasks=["bmerge_toxicity"],
        task_manager=manager,
        log_samples=True,
    )


@pytest.fixture(scope="module")
def found(folder):
    words, judge = f"words:{folder}/words.txt", f"model:{folder}/judge#toxic"
    return evaluate(folder, scorer=[words, judge], continuations=6, new_tokens=5)


def test_the_numbers_are_those_of_our_metrics_on_the_same_continuations(found):
    """Of both scorers, from the texts that lm-eval has drawn."""
    samples = found["samples"]["bmerge_toxicity"]
    texts = [sample["filtered_resps"][0] for sample in samples]
    assert [len(row) for row in texts] == [6, 6, 6]
    assert len({text for row in texts for text in row}) > 6  # sampled, not one greedy text
    scores = np.array([word_scorer(["dog", "bad"])(row) for row in texts])
    expected = score_toxicity(scores, bootstrap=0)
    results = found["results"]["bmerge_toxicity"]
    assert 0 < expected.share.value < 1
    for name, number in (
        ("mean_score", expected.mean),
        ("toxic_share", expected.share),
        ("expected_max", expected.expected_max),
        ("any_toxic", expected.any_toxic),
    ):
        assert results[f"{name}_words:words.txt,sampled"] == pytest.approx(number.value)
    spread = np.std(expected.prompt_share, ddof=1) / 3**0.5
    assert results["toxic_share_words:words.txt_stderr,sampled"] == pytest.approx(spread)
    assert 0 < results["mean_score_model:judge#toxic,sampled"] < 1
    assert found["higher_is_better"]["bmerge_toxicity"]["toxic_share_words:words.txt"] is False


def test_no_script_is_looked_for_under_the_name_of_a_number(folder, monkeypatch):
    from lm_eval.api import task

    monkeypatch.setattr(task, "get_metric", lambda *args: pytest.fail(str(args)))
    evaluate(folder, scorer=f"words:{folder}/words.txt", continuations=1, new_tokens=2)


def test_only_the_continuation_is_scored(found):
    """The prompt `the dog` holds a listed word, its continuations need not."""
    sample = found["samples"]["bmerge_toxicity"][1]
    assert sample["arguments"][0][0] == "the dog"
    scores = word_scorer(["dog", "bad"])(sample["filtered_resps"][0])
    assert sample["mean_score_words:words.txt"] == pytest.approx(np.mean(scores))
    assert np.mean(scores) < 1


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "prompts"),
        ({"prompts": "p.jsonl", "scorer": []}, "scorer"),
        ({"prompts": "p.jsonl", "scorer": "words:w", "top_p": 2}, "top_p"),
    ],
)
def test_settings_are_checked(metadata, message):
    with pytest.raises(ConfigError, match=message):
        read_settings({"pretrained": "model", **metadata})


def test_the_code_of_a_scorer_is_not_trusted_where_only_the_model_is():
    """lm-eval puts the arguments of the model into the metadata, too."""
    given = {"prompts": "p.jsonl", "scorer": "words:w", "trust_remote_code": True}
    assert not read_settings(given).scorer_trust_remote_code


def test_one_scorer_may_be_a_string():
    assert read_settings({"prompts": "p.jsonl", "scorer": "words:w"}).scorer == ("words:w",)


def test_an_empty_prompt_is_refused(folder, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(MismatchError, match="prompt 1 of 1 is empty"):
        evaluate(
            folder,
            prompts=str(tmp_path / "p.jsonl"),
            prompt_column="text",
            scorer=f"words:{folder}/words.txt",
        )


def test_a_number_is_named_without_the_folders_of_its_scorer():
    from mergekit_bayes.lm_eval_task import task

    specs = ["panel:/panels/mine.yaml/first", "panel:toxicity/hap", "model:a/b#x,y", "m.o:f"]
    scorers = [Scorer(spec, list, ScorerInfo(kind="words", fingerprint=None)) for spec in specs]
    names = ["_panel:mine.yaml/first", "_panel:toxicity/hap", "_model:b#x;y", "_m.o:f"]
    assert task._suffixes(scorers) == names
