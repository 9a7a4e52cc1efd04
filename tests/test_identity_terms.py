"""Bias by identity terms: the same civil sentences for all groups."""

import itertools

import pytest

from mergekit_bayes.evaluate.inputs import Inputs
from mergekit_bayes.evaluate.report import ScorerInfo
from mergekit_bayes.evaluate.scorers import Scorer
from mergekit_bayes.metrics.identity_terms import NEUTRAL, SENTENCES, TERMS, measure_bias


def biased(texts):
    """High for two groups, and in one sentence for a neutral noun."""

    def score(text):
        if "Roma" in text:
            return 0.8
        if "lesbian" in text and "bus" in text:
            return 0.6
        return 0.3 if text == "I am a baker." else 0.1

    return [score(text) for text in texts]


def test_the_groups_whose_mere_name_raises_scores_are_found():
    found = measure_bias(biased, threshold=0.5)
    groups = found.groups
    assert groups["a Roma person"].mean == pytest.approx(0.8)
    assert groups["a Roma person"].false_alarms == 1
    assert groups["a lesbian person"].false_alarms == 1 / len(SENTENCES)
    assert groups["a woman"].mean == pytest.approx(0.1)
    assert found.furthest[:2] == ("a Roma person", "a lesbian person")
    assert found.spread == pytest.approx(0.7)
    assert found.neutral.mean == pytest.approx(0.1 + 0.2 / len(SENTENCES) / len(NEUTRAL))
    assert found.neutral_spread == pytest.approx(0.2 / len(SENTENCES))
    assert found.neutral.false_alarms == 0


def test_a_group_far_below_the_neutral_nouns_is_far_out_too():
    found = measure_bias(lambda texts: [0.0 if "woman" in t else 0.5 for t in texts])
    assert found.furthest[0] == "a woman"
    assert found.spread == 0.5


def test_it_takes_some_hundreds_of_distinct_sentences():
    texts = []
    found = measure_bias(lambda t: texts.extend(t) or [0.0] * len(t))
    assert found.sentences == len(texts) == len(set(texts))
    assert 200 <= len(texts) <= 400
    assert all(t[0].isupper() and t.endswith(".") and "{" not in t for t in texts)
    terms = [*itertools.chain(*TERMS.values()), *NEUTRAL]
    assert all(term.startswith(("a ", "an ")) for term in terms)
    assert len(found.groups) == len(terms) - len(NEUTRAL)


def test_bias_is_measured_once_for_all_models_and_of_classifiers_only():
    calls = []

    def score(texts):
        calls.append(len(texts))
        return [0.4] * len(texts)

    def scorer(kind, threshold=None):
        info = ScorerInfo(kind=kind, fingerprint=None, threshold=threshold)
        return Scorer(f"{kind}{threshold}", score, info)

    scorers = [scorer("model"), scorer("model", 0.3), scorer("words"), scorer("function")]
    inputs = Inputs(texts={}, labelled={}, prompts=[], scorers=scorers, threshold=0.5)
    assert calls == []
    assert inputs.bias is inputs.bias
    assert len(calls) == 2
    alarms = {name: found.neutral.false_alarms for name, found in inputs.bias.items()}
    assert alarms == {"modelNone": 0, "model0.3": 1}
