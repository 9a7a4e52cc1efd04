"""What a comparison says of draws: models without them, and advice that can be followed."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.compare.draws import draw_notes, notes_by_model
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


def labelled(folder, *texts):
    """A file of texts whose labels are 0 and 1 in turn."""
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "rows.jsonl"


def test_a_model_without_draws_is_compared_at_its_mean(tmp_path):
    drawn, plain, other = (
        tiny_models.tiny_bert(tmp_path / name, seed=seed)
        for seed, name in enumerate(("drawn", "plain", "other"))
    )
    tiny_models.give_posterior(drawn)
    rows = labelled(tmp_path, "the cat sat", "a dull film", "dog", "a bird saw a tree")

    def compare(*models):
        config = CompareConfig(models=tuple(map(str, models)), classify={"a": str(rows)}, samples=2)
        return run_compare(config, quiet=True)

    report = compare(drawn, plain)
    first, second = (one.report for one in report.evaluations)
    assert first.sampled is not None
    assert second.sampled is None
    assert "plain was not drawn, since it has no precision: " in " ".join(report.findings)
    changes = {d.measure: d.change.value for d in report.differences}
    before, after = first.sampled.classification["a"], second.classification["a"]
    over = changes["nats an example, over samples"]
    assert over == pytest.approx(after.nll.value - before.nll.value)
    shown = {c.measure: c.values for c in columns_of(report.evaluations)}
    for measure in ("nats an example", "Brier score", "ECE"):
        assert shown[measure]["plain"] is not None
        assert shown[f"{measure}, over samples"]["plain"] is None
        assert shown[f"{measure}, over samples"]["drawn"] is not None
    ((label, note),) = notes_by_model(report.evaluations)
    assert label == "drawn"
    assert "measured alone, with --prior" in note
    ((_, note),) = notes_by_model(report.evaluations[:1])
    assert "alone" not in note
    page = as_markdown(report)
    assert "drawn: the draws are" in page
    assert "drawn: 2 samples of" in page
    assert "plain was not drawn" in page
    with pytest.raises(NoDrawsError, match="plain"):
        compare(plain, other)
    wrong = tiny_models.tiny_bert(tmp_path / "wrong", seed=4)
    tiny_models.give_posterior(wrong)
    changed = load_model(str(wrong)).model
    changed.classifier.bias.data.add_(1.0)
    changed.save_pretrained(wrong)
    with pytest.raises(PrecisionError, match="other weights"):  # which is no reason to go on
        compare(drawn, wrong)


def notes_of(*, alone=True, **draws):
    """What is said of draws, of a report in which nothing was measured."""
    report = {"samples": 2, "seed": 0, "temperature": 1.0, "prior": 5.0, "given": False}
    report |= {"estimator": "ggn", "ess": 1e6, "observations": 1e3, "parameters": 9, "held": 0}
    report |= {"sigma_over_rms": 0.001, "largest_sigma": 1.0}
    sampled = SampledReport(draws=SamplingReport(**report | draws))
    return list(draw_notes(SimpleNamespace(sampled=sampled, classification={}), alone=alone))


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
    assert "; with --prior 5e+02 or more, or --posterior-temperature 0.01 they" in wide
    (followed,) = notes_of(sigma_over_rms=3.0, temperature=1000.0)
    assert "data held" not in followed
    (near,) = notes_of(sigma_over_rms=0.305, ess=None)
    assert "--prior 5.2 or more, or --posterior-temperature 0.97" in near
    assert notes_of(recorded=True, sigma_over_rms=0.26) == []
    # Options hold for all models of a comparison, of which others may be drawn well.
    assert all("measured alone, " in note for note in notes_of(alone=False))
    assert "measured alone, " in notes_of(sigma_over_rms=3.0, alone=False)[1]


@pytest.mark.parametrize(
    ("confidence", "over_samples", "low", "width", "told"),
    [
        (0.7, 0.6, 0.02, 0.2, 1),
        (0.9, 0.8, 0.02, 0.2, 0),  # surer than it is right
        (0.7, 0.6, -0.02, 0.2, 0),  # not visibly worse
        (0.7, 0.9, 0.02, 0.2, 0),  # worse for another reason
        (0.7, 0.6, 0.02, 2.0, 0),  # for the reason that is told
    ],
)
def test_averaging_an_unsure_model_is_advised_against(confidence, over_samples, low, width, told):
    def of(confidence):
        return SimpleNamespace(
            confidence=confidence, accuracy=Interval(value=0.8, low=0.75, high=0.85)
        )

    draws = {"recorded": True, "ess": None, "observations": None, "sigma_over_rms": width}
    change = SimpleNamespace(nll=Interval(value=0.05, low=low, high=0.1))
    sampled = SimpleNamespace(
        draws=SimpleNamespace(temperature=1.0, **draws),
        classification={"a": of(over_samples)},
        classification_change={"a": change},
    )
    report = SimpleNamespace(sampled=sampled, classification={"a": of(confidence)})
    assert sum("predict at the mean" in note for note in draw_notes(report)) == told


@pytest.mark.parametrize("with_plain", [False, True])
def test_variants_have_no_draws_and_are_compared_without(tmp_path, with_plain):
    models = [tiny_models.tiny_bert(tmp_path / name, seed=i) for i, name in enumerate(("a", "b"))]
    tiny_models.give_posterior(models[0])
    rows = labelled(tmp_path, "the cat sat")
    config = CompareConfig(
        models=tuple(map(str, models[: 1 + with_plain])),
        classify={"x": str(rows)},
        samples=2,
        four_bits=True,
        dtype="auto",
    )
    report = run_compare(config, quiet=True)
    assert {one.report.dtype for one in report.evaluations} == {"float32"}
    assert all(
        one.report.settings["prior"] is None and (one.report.sampled is None) == (i > 0)
        for i, one in enumerate(report.evaluations)
    )
    over = {(d.label, d.against) for d in report.differences if "over samples" in d.measure}
    assert over == ({("b", "a")} if with_plain else set())
    assert sum("was not drawn" in finding for finding in report.findings) == with_plain


def test_a_set_may_have_the_name_of_a_column(tmp_path):
    model = tiny_models.tiny_bert(tmp_path / "a")
    tiny_models.give_posterior(model)
    rows = labelled(tmp_path, "the cat sat")
    command = ["evaluate", str(model), "--classify", f"change={rows}", "--samples", "2"]
    shown = CliRunner().invoke(app, command, env={"COLUMNS": "300"}).stderr
    (head,) = (line for line in shown.splitlines() if line.startswith("measure"))
    assert head.split() == ["measure", "change", "2", "samples", "change"]
