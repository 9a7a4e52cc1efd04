"""The small world: what is said in it, and that a model can be trained on it."""

import importlib
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from mergekit_bayes.evaluate.scorers import open_scorer
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in ("train_tiny_lm", "tiny_world")}
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def texts(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    scripts["tiny_world"].write_world(folder, 0)
    return folder / "texts"


def read(path):
    return [json.loads(line)["text"] for line in path.open()]


def test_no_test_sentence_is_a_training_sentence(texts):
    train = set(read(texts / "all_train.jsonl"))
    for name in ("kind", "rude", "garden", "kitchen"):
        test = read(texts / f"{name}_test.jsonl")
        assert len(test) > 100
        assert not train & set(test)
        assert set(read(texts / f"{name}_train.jsonl")) <= train


def test_one_test_text_is_of_known_words_in_a_form_that_nothing_is_trained_on(texts):
    train = read(texts / "all_train.jsonl")
    words = {word for text in train for word in text.split()}
    crossed = read(texts / "crossed_test.jsonl")
    assert len(crossed) > 200
    assert {word for text in crossed for word in text.split()} <= words
    pairs = {pair for text in train for pair in pairwise(text.split())}
    assert all(set(pairwise(text.split())) - pairs for text in crossed)


def test_the_word_list_tells_rude_sentences_from_all_others(texts):
    score = open_scorer(f"words:{texts / 'insults.txt'}").score
    assert set(score(read(texts / "rude_train.jsonl"))) == {1.0}
    for name in ("kind", "garden", "kitchen", ""):
        assert set(score(read(texts / (f"{name}_train.jsonl" if name else "prompts.jsonl")))) == {
            0.0
        }


def test_the_same_seed_writes_the_same_world(scripts, texts, tmp_path):
    scripts["tiny_world"].write_world(tmp_path, 0)
    assert all(
        f.read_bytes() == (texts / f.name).read_bytes() for f in (tmp_path / "texts").iterdir()
    )
    scripts["tiny_world"].write_world(tmp_path, 1)
    assert (tmp_path / "texts" / "kind_train.jsonl").read_bytes() != (
        texts / "kind_train.jsonl"
    ).read_bytes()


def test_a_source_names_a_file_its_rows_and_how_often_it_counts(scripts, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    read_texts = scripts["train_tiny_lm"].read_texts
    assert read_texts(str(path)) == ["a", "b"]
    assert read_texts(f"{path}?label=1") == ["a"]
    assert read_texts(f"{path}*2") == ["a", "b", "a", "b"]
    assert read_texts(f"{path}?label=0*3") == ["b", "b", "b"]


@pytest.mark.parametrize("words", [True, False])
def test_a_trained_folder_is_an_ordinary_model_that_has_learnt_something(
    scripts, texts, tmp_path, words
):
    rows = read(texts / "kind_train.jsonl")[:300]
    scripts["train_tiny_lm"].train(
        rows,
        tmp_path,
        vocabulary=400,
        words=words,
        layers=1,
        width=32,
        heads=2,
        context=32,
        steps=40,
        batch=8,
        rate=1e-2,
    )
    loaded = load_model(str(tmp_path))
    assert loaded.task == "causal-lm"
    start, window = loaded.start, loaded.context
    test = read(texts / "kind_test.jsonl")[:50]
    perplexity = measure_perplexity(
        loaded.model, loaded.tokenizer, test, start=start, window=window, bootstrap=0
    )
    assert perplexity.loss.value < 0.7 * math.log(len(loaded.tokenizer))
    text = rows[0]
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]).strip() == text
