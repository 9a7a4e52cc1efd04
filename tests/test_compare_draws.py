"""What a comparison says of draws: models without them, and advice that can be followed."""

import json
from types import SimpleNamespace

import pytest

from mergekit_bayes.compare.draws import draw_notes
from mergekit_bayes.compare.markdown import as_markdown
from mergekit_bayes.compare.run import run_compare
from mergekit_bayes.compare.settings import CompareConfig
from mergekit_bayes.compare.wording import columns_of
from mergekit_bayes.errors import NoDrawsError, PrecisionError
from mergekit_bayes.evaluate.report import SampledReport
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.models.load import load_model
from mergekit_bayes.models.sampling import SamplingReport
from tests import tiny_models


def test_a_model_without_draws_is_compared_at_its_mean(tmp_path):
    drawn, plain, other = (
        tiny_models.tiny_bert(tmp_path / name, seed=seed)
        for seed, name in enumerate(("drawn", "plain", "other"))
    )
    tiny_models.give_posterior(drawn)
    rows = tmp_path / "rows.jsonl"
    texts = ("the cat sat", "a dull film", "dog", "a bird saw a tree")
    rows.write_text(
        "".join(json.dumps({"text": t, "label": i % 2}) + "\n" for i, t in enumerate(texts))
    )

    def compare(*models):
        config = CompareConfig(models=tuple(map(str, models)), classify={"a": str(rows)}, samples=2)
        return run_compare(config, quiet=True)

    report = compare(drawn, plain)
    first, second = (one.report for one in report.evaluations)
    assert first.sampled is not None
    assert second.sampled is None
    assert any("drawn from a posterior of plain" in finding for finding in report.findings)
    changes = {d.measure: d.change.value for d in report.differences}
    before, after = first.sampled.classification["a"], second.classification["a"]
    over = changes["nats an example, over samples"]
    assert over == pytest.approx(after.nll.value - before.nll.value)
    shown = {c.measure: c.values for c in columns_of(report.evaluations)}
    for measure in ("nats an example", "Brier score", "ECE"):
        assert shown[measure]["plain"] is not None
        assert shown[f"{measure}, over samples"]["plain"] is None
        assert shown[f"{measure}, over samples"]["drawn"] is not None
    page = as_markdown(report)
    assert "drawn: 2 samples of" in page
    assert "drawn from a posterior of plain" in page
    with pytest.raises(NoDrawsError, match="plain"):
        compare(plain, other)
    wrong = tiny_models.tiny_bert(tmp_path / "wrong", seed=4)
    tiny_models.give_posterior(wrong)
    changed = load_model(str(wrong)).model
    changed.classifier.bias.data.add_(1.0)
    changed.save_pretrained(wrong)
    with pytest.raises(PrecisionError, match="other weights"):  # which is no reason to go on
        compare(drawn, wrong)


def notes_of(**draws):
    """What is said of draws, of a report in which nothing was measured."""
    report = {"samples": 2, "seed": 0, "temperature": 1.0, "prior": 5.0, "given": False}
    report |= {"estimator": "ggn", "ess": 1e6, "observations": 1e3, "parameters": 9, "held": 0}
    report |= {"sigma_over_rms": 0.001, "largest_sigma": 1.0}
    sampled = SampledReport(draws=SamplingReport(**report | draws))
    return list(draw_notes(SimpleNamespace(sampled=sampled, classification={})))


def test_the_advice_on_draws_can_be_followed():
    (once,) = notes_of()
    assert "--posterior-temperature 1000 counts each once" in once
    assert notes_of(temperature=1000.0, sigma_over_rms=0.03) == []
    # To count each once would draw far off, which the other advice is against.
    (narrow,) = notes_of(sigma_over_rms=0.1)
    assert "--" not in narrow
    assert "3.2 of the RMS" in narrow
    far, wide = notes_of(sigma_over_rms=3.0)
    assert "--" not in far
    assert "--prior 5e+02 or --posterior-temperature 0.01" in wide
    assert notes_of(recorded=True, sigma_over_rms=0.26) == []


@pytest.mark.parametrize(
    ("confidence", "worse", "told"), [(0.7, True, 1), (0.9, True, 0), (0.7, False, 0)]
)
def test_averaging_an_unsure_model_is_advised_against(confidence, worse, told):
    def interval(value, low, high):
        return Interval(value=value, low=low, high=high)

    change = interval(0.05, 0.02, 0.08) if worse else interval(0.05, -0.02, 0.12)
    at_mean = SimpleNamespace(confidence=confidence, accuracy=interval(0.8, 0.75, 0.85))
    draws = SimpleNamespace(recorded=True, ess=None, observations=None, sigma_over_rms=0.2)
    sampled = SimpleNamespace(draws=draws, classification_change={"a": SimpleNamespace(nll=change)})
    report = SimpleNamespace(sampled=sampled, classification={"a": at_mean})
    notes = list(draw_notes(report))
    assert len(notes) == told
    assert all("predict at the mean" in note for note in notes)
