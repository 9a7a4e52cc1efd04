"""Classification: textbook scores, intervals that cover, and averages of probabilities."""

import numpy as np
import pytest
import torch

from mergekit_bayes.errors import CheckpointError, ConfigError, MismatchError
from mergekit_bayes.metrics.classification import (
    class_probabilities,
    classification_change,
    measure_classification,
    score_classification,
)
from mergekit_bayes.models.encode import Collate, batches, encode_rows
from mergekit_bayes.models.load import load_model
from tests import tiny_models
from tests.reference.calibration import scores

TEXTS = [
    "the cat sat on the mat .",
    "a dull film , not good",
    "dog",
    "a bird saw a tree",
    "very very nice , not bad",
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_model(
        str(tiny_models.tiny_bert(tmp_path_factory.mktemp("models") / "bert", labels=3))
    )


def predictions(n, classes, seed, sharpness=2.0):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(n, classes)) * sharpness)
    return logits.log_softmax(-1).numpy(), rng.integers(classes, size=n)


def four(report):
    return [getattr(report, name).value for name in ("accuracy", "nll", "brier", "ece")]


@pytest.mark.parametrize("bins", [1, 7, 10])
@pytest.mark.parametrize("classes", [2, 5])
def test_scores_equal_their_twin(bins, classes):
    logp, labels = predictions(200, classes, seed=bins + classes)
    report = score_classification(logp, labels.tolist(), bins=bins, bootstrap=0)
    assert four(report) == pytest.approx(
        scores(np.exp(logp).tolist(), labels.tolist(), bins), abs=1e-12
    )
    assert len(report.bins) == bins


def test_the_bins_hold_all_examples_and_sum_to_the_calibration_error():
    logp, labels = predictions(300, 3, seed=1)
    report = score_classification(logp, labels.tolist(), bins=10, bootstrap=0)
    filled = [b for b in report.bins if b.examples]
    assert sum(b.examples for b in filled) == 300
    assert all(b.low <= b.confidence <= b.high for b in filled)
    assert all((b.confidence, b.accuracy) == (None, None) for b in report.bins if not b.examples)
    gap = sum(b.examples * abs(b.accuracy - b.confidence) for b in filled) / 300
    assert report.ece.value == pytest.approx(gap, abs=1e-12)
    assert report.confidence == pytest.approx(np.exp(logp).max(axis=1).mean())


def test_a_certain_and_right_model_scores_perfectly_and_sits_in_the_last_bin():
    logp = np.array([[0.0, -800.0], [-800.0, 0.0]])  # exp underflows to 0, so p is exactly 1 and 0
    report = score_classification(logp, [0, 1], bins=10)
    assert four(report) == [1, 0, 0, 0]
    assert report.bins[-1].examples == 2
    wrong = score_classification(logp, [1, 0], bins=10)
    assert four(wrong) == [0, 800, 2, 1]


def test_a_calibrated_model_has_less_calibration_error_than_an_overconfident_one():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(4000, 3)))
    p = logits.softmax(-1).numpy()
    labels = [int(rng.choice(3, p=row)) for row in p]
    honest = score_classification(np.log(p), labels, bins=10)
    bold = score_classification((3 * logits).log_softmax(-1).numpy(), labels, bins=10)
    assert honest.ece.value < 0.03 < 0.1 < bold.ece.value
    assert honest.reliability.low < 0 < honest.reliability.high < 0.01 < bold.reliability.low
    assert bold.accuracy == honest.accuracy
    change = classification_change(honest, bold)
    # Paired: the same examples are right, and of others at most one in a thousand is not.
    assert change.accuracy.value == 0
    assert -0.001 < change.accuracy.low < 0 < change.accuracy.high < 0.001
    assert change.nll.low > 0
    assert change.brier.low > 0
    assert change.reliability.low > 0


def test_the_biased_calibration_error_has_no_interval_and_zero_resamples_give_none():
    logp, labels = predictions(50, 3, seed=6)
    report = score_classification(logp, labels.tolist())
    for found in (report, classification_change(report, report)):
        assert (found.ece.low, found.ece.high) == (None, None)
        for name in ("accuracy", "nll", "brier", "reliability"):
            assert getattr(found, name).low is not None, name
    without = score_classification(logp, labels.tolist(), bootstrap=0)
    change = classification_change(without, without, bootstrap=0)
    for found in (without, change):
        for name in ("accuracy", "nll", "brier", "ece", "reliability"):
            assert getattr(found, name).low is None, name


def test_no_wrong_prediction_is_no_certainty():
    """A resample of right predictions only has none that is wrong."""
    report = score_classification(np.log(np.tile([0.9, 0.1], (30, 1))), [0] * 30)
    assert report.accuracy.value == report.accuracy.high == 1
    assert 0.85 < report.accuracy.low < 0.9  # Wilson: 1 / (1 + 1.96^2 / 30)
    sure = score_classification(np.array([[0.0, -800.0]] * 30), [0] * 30)
    assert sure.brier.value == 0
    assert sure.brier.high > 0.1


def test_intervals_of_means_have_the_width_of_their_standard_error():
    logp, labels = predictions(2000, 2, seed=3, sharpness=1.0)
    report = score_classification(logp, labels.tolist(), bootstrap=2000)
    nats = np.array(report.example_nats)
    expected = 2 * 1.96 * nats.std() / np.sqrt(2000)
    assert report.nll.high - report.nll.low == pytest.approx(expected, rel=0.08)
    assert report.nll.low < report.nll.value < report.nll.high


def test_the_paired_change_is_the_difference_and_narrower_than_the_intervals():
    logp, labels = predictions(500, 3, seed=4)
    other = torch.from_numpy(0.9 * logp).log_softmax(-1).numpy()
    a, b = score_classification(logp, labels.tolist()), score_classification(other, labels.tolist())
    change = classification_change(a, b)
    assert change.nll.value == pytest.approx(b.nll.value - a.nll.value, abs=1e-12)
    assert change.ece.value == pytest.approx(b.ece.value - a.ece.value, abs=1e-12)
    assert change.nll.high - change.nll.low < 0.3 * (a.nll.high - a.nll.low)


def test_probabilities_are_the_models_whatever_the_batch(bert):
    examples = encode_rows({"text": TEXTS}, bert)
    alone = [
        bert.model(**b).logits.double().log_softmax(-1).detach().numpy()
        for b in batches(examples, 1, Collate(2))
    ]
    for size in (1, 2, 5):
        log_p = class_probabilities(
            bert.model, bert.tokenizer, TEXTS, max_length=64, batch_size=size
        )
        np.testing.assert_allclose(log_p, np.concatenate(alone), atol=1e-6)  # float32 logits


def test_draws_average_probabilities_not_logits(bert):
    """Two draws that differ in the head's bias; the oracle averages the two softmaxes."""
    bias = bert.model.classifier.bias
    before = bias.detach().clone()
    shifts = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 4.0])]

    class Shifts:
        def __len__(self):
            return 2

        def __iter__(self):
            with torch.no_grad():
                for shift in shifts:
                    bias.copy_(before + shift)
                    yield shift
                bias.copy_(before)

    single = []
    for _ in Shifts():
        single.append(np.exp(class_probabilities(bert.model, bert.tokenizer, TEXTS, max_length=64)))
    calls = []
    log_p = class_probabilities(
        bert.model,
        bert.tokenizer,
        TEXTS,
        max_length=64,
        batch_size=2,
        draws=Shifts(),
        progress=lambda *x: calls.append(x),
    )
    np.testing.assert_allclose(np.exp(log_p), (single[0] + single[1]) / 2, rtol=1e-6)
    assert calls[-1] == (10, 10)
    labels = [0, 1, 2, 0, 1]
    report = measure_classification(
        bert.model, bert.tokenizer, TEXTS, labels, max_length=64, draws=Shifts(), bootstrap=0
    )
    assert four(report) == pytest.approx(
        scores(np.exp(log_p).tolist(), labels, 10), abs=1e-6
    )  # batches round apart


def test_what_cannot_be_scored_is_refused(bert):
    logp, labels = predictions(4, 3, seed=0)
    with pytest.raises(MismatchError, match="expected one in 0 to 2"):
        score_classification(logp, [0, 1, 2, 3])
    with pytest.raises(MismatchError, match="3 labels for 4"):
        score_classification(logp, [0, 1, 2])
    with pytest.raises(ConfigError, match="0 bins"):
        score_classification(logp, labels.tolist(), bins=0)
    with pytest.raises(ConfigError, match="no text"):
        class_probabilities(bert.model, bert.tokenizer, [], max_length=64)
    report = score_classification(logp, labels.tolist())
    with pytest.raises(MismatchError, match="not about the same"):
        classification_change(report, score_classification(logp, labels.tolist(), bins=5))
    weight = bert.model.classifier.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(CheckpointError, match="text 1 are"):
            class_probabilities(bert.model, bert.tokenizer, TEXTS, max_length=64)
    finally:
        with torch.no_grad():
            weight.copy_(before)
