"""Evaluations over several processes: a batch runs on one rank, and all get its result."""

import json
from itertools import pairwise

import pytest
import torch

from mergekit_bayes import ranks
from mergekit_bayes.errors import ConfigError
from mergekit_bayes.generation import Sampling, sample_continuations
from mergekit_bayes.metrics.classification import measure_classification
from mergekit_bayes.metrics.conditional import conditional_nats
from mergekit_bayes.metrics.perplexity import measure_perplexity
from mergekit_bayes.models.load import load_model
from tests import tiny_models
from tests.two_ranks import found_by_two

TEXTS = [f"the cat sat on the mat {'and ate ' * i}" for i in range(13)]


def test_one_process_works_through_the_items():
    assert ranks.spread([3, 1, 2], lambda x: x + 1) == [4, 2, 3]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    tiny_models.tiny_gpt2(folder / "lm")
    tiny_models.tiny_bert(folder / "judge")
    return found_by_two("tests.test_spread", folder), measured(folder)


def test_two_processes_measure_the_numbers_of_one_to_the_bit(found):
    two, one = found
    assert [result["measured"] for result in two] == [one, one]


def test_each_batch_runs_on_one_rank(found):
    first, second = (result["worked"] for result in found[0])
    assert first == [0, 2, 4]
    assert second == [1, 3]


def test_an_error_on_one_rank_is_the_same_error_on_all(found):
    assert [result["error"] for result in found[0]] == ["item 3", "item 3"]


def test_work_of_the_main_rank_alone_does_not_wait_for_the_others(found):
    assert [result["alone"] for result in found[0]] == [[0, 1, 2], [0, 1, 2]]


def measured(folder):
    """All that an evaluation measures of two models, without its intervals."""
    lm, judge = load_model(str(folder / "lm")), load_model(str(folder / "judge"))
    common = {"start": lm.start}
    samples = sample_continuations(
        lm.model,
        lm.tokenizer,
        TEXTS[:5],
        context=lm.context,
        sampling=Sampling(continuations=3, new_tokens=6),
        batch_size=4,
        **common,
    )
    perplexity = measure_perplexity(
        lm.model, lm.tokenizer, TEXTS, window=8, batch_size=2, bootstrap=0, **common
    )
    pairs = list(pairwise(TEXTS))
    judged = conditional_nats(lm.model, lm.tokenizer, pairs, window=16, batch_size=2, **common)
    classes = measure_classification(
        judge.model,
        judge.tokenizer,
        TEXTS,
        [i % 2 for i in range(len(TEXTS))],
        max_length=16,
        batch_size=3,
        bootstrap=0,
    )
    nats = (perplexity.document_nats, judged.nats, classes.example_nats)
    return [samples.texts, *map(list, nats)]


def child(folder):
    torch.distributed.init_process_group("gloo")
    worked = []
    ranks.spread([0, 1, 2, 3, 4], worked.append)
    try:
        ranks.spread([0, 1, 2, 3, 4], refuse_three)
        error = None
    except ConfigError as raised:
        error = str(raised)
    result = {
        "world": ranks.world(),
        "measured": measured(folder),
        "worked": worked,
        "error": error,
        "alone": ranks.on_main(lambda: ranks.spread([0, 1, 2], int)),
    }
    results = [None, None]
    torch.distributed.all_gather_object(results, result)
    if ranks.is_main():
        (folder / "found.json").write_text(json.dumps(results))


def refuse_three(item):
    if item == 3:
        raise ConfigError(f"item {item}")
