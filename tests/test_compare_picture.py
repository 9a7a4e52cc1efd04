"""The picture and the text of models side by side: nothing cut off, overlapping or broken."""

import io
import itertools

import pytest

from bmerge_cli.compare_tables import show_compare
from bmerge_cli.guarded_console import GuardedConsole
from mergekit_bayes.compare import markdown, picture, wording
from mergekit_bayes.compare.markdown import as_markdown
from mergekit_bayes.compare.picture import make_figure
from mergekit_bayes.compare.report import CompareReport, Difference
from mergekit_bayes.compare.wording import named
from mergekit_bayes.evaluate.report import TaskReport, TaskScore
from mergekit_bayes.metrics.agreement import Agreement
from mergekit_bayes.metrics.base import Interval
from mergekit_bayes.metrics.identity_terms import measure_bias
from tests.comparisons import MODELS, SCORERS, compare_report

ALL = ("as it is", "in 4 bits", "relearnt")


@pytest.mark.parametrize(
    ("models", "texts", "variants"),
    [
        (1, 1, ALL[:1]),
        (2, 2, ALL),
        (6, 4, ALL[:1]),
        pytest.param(1, 4, ALL, marks=pytest.mark.slow),
        pytest.param(6, 1, ALL[:2], marks=pytest.mark.slow),
        pytest.param(6, 4, ALL, marks=pytest.mark.slow),
    ],
)
def test_all_of_a_picture_is_in_it(models, texts, variants):
    figure = make_figure(compare_report(models, texts, 2, variants))
    figure.draw_without_rendering()
    assert len(figure.axes) == 2 + texts + 4  # scorers, texts, and what tells text from garble
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.width + 1
        assert box.y1 <= figure.bbox.height + 1
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    rows = models * len(variants)
    for axes in figure.axes:
        assert axes.get_window_extent().width > 200  # of 405 pixels
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(labels))
        assert len(axes.get_yticks()) == rows
    named = [axes for axes in figure.axes if any(t.get_text() for t in axes.get_yticklabels())]
    assert len(named) == len({round(axes.get_position().y0, 2) for axes in figure.axes})


def test_names_are_no_formulas_and_a_ruined_model_is_drawn():
    report = compare_report(2, 1)
    ruined = report.evaluations[1].report.perplexity
    name = next(iter(ruined))
    infinite = ruined[name].token.model_copy(
        update=dict.fromkeys(("value", "low", "high"), float("inf"))
    )
    ruined[name] = ruined[name].model_copy(update={"token": infinite})
    for one in report.evaluations:
        one.report.perplexity["$\\frac{$"] = one.report.perplexity.pop(name)
    figure = make_figure(report)
    figure.draw_without_rendering()
    assert "infinite" in [text.get_text() for axes in figure.axes for text in axes.texts]


def test_names_break_no_table():
    content = as_markdown(compare_report(3, 2))
    table = [line for line in content.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in table}
    assert len(table) == 2 + 2 + 2 + 5  # head, scorers, texts, quality
    assert cells == {1 + 3 + 1}  # measure, models, and the end
    assert "`precision`" in MODELS[2]
    assert "\\`precision\\`" in table[0]


def test_a_picture_of_a_hundred_tasks_is_no_larger_than_a_file_holds(monkeypatch):
    assert wording.PANELS / 4 * 2**4 * 150 < 2**16  # pixels, of panels 16 inches high
    for module in (picture, markdown):
        monkeypatch.setattr(module, "PANELS", 4)
    report = compare_report(1, 1)
    score = TaskScore(metric="acc", filter="none", score=Interval(value=0.5, low=0.4, high=0.6))
    tasks = report.evaluations[0].report.lm_eval
    for i in range(100):
        tasks[f"task_{i}"] = TaskReport(scores={"acc,none": score}, samples=9, lm_eval_version="0")
    assert len(make_figure(report).axes) == 4
    assert "The picture shows the first 4 of 107 numbers." in as_markdown(report)


def test_findings_come_first():
    report = compare_report(2, 1).model_copy(update={"findings": ("Scorers disagree | here.",)})
    lines = [line for line in as_markdown(report).splitlines() if line]
    assert lines[1] == "- Scorers disagree | here."


def with_scorers_compared(report):
    """The report, with agreement and bias of the scorers in its evaluations, and a difference."""
    pair = Agreement(
        first=SCORERS[0],
        second=SCORERS[1],
        texts=2500,
        same=Interval(value=0.8421, low=0.8123, high=0.8678),
        kappa=Interval(value=0.2612, low=0.1954, high=0.3287),
        spearman=None,
    )
    scored = {
        "agreement": (pair,),
        "bias": {SCORERS[0]: measure_bias(lambda texts: [0.25] * len(texts), threshold=0.5)},
    }
    evaluations = tuple(
        one.model_copy(update={"report": one.report.model_copy(update=scored)})
        for one in report.evaluations
    )
    change = Interval(value=-0.012345, low=-0.023456, high=-0.003456)
    first, second = (one.label for one in evaluations[:2])
    changes = [
        Difference(label=second, against=first, measure="toxic share", of=of, change=change)
        for of in SCORERS
    ]
    update = {"evaluations": evaluations, "differences": tuple(changes)}
    return CompareReport.model_validate(report.model_copy(update=update))


@pytest.mark.parametrize("width", [80, 120])
def test_no_number_loses_its_end_on_a_narrow_screen(width):
    report = with_scorers_compared(compare_report(6, 4))
    screen = GuardedConsole(file=io.StringIO(), width=width, soft_wrap=True, markup=False)
    show_compare(screen, report)
    shown = screen.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    words = "".join(shown.split())
    for number in ("8%[7.2,8.8]", "20[18.8,21.2]", "-1.23[-2.35,-0.346]points", "0.8421[0.812,"):
        assert number in words
    # One table beside another, unless a single model fills the screen.
    assert shown.count("share of looping continuations") == {80: 5, 120: 3}[width]
    assert all(len(line) <= width for line in shown.splitlines() if " % [" in line)


def test_agreement_and_bias_of_scorers_stand_beside_models():
    report = with_scorers_compared(compare_report(2, 1))
    content = as_markdown(report)
    screen = GuardedConsole(file=io.StringIO(), width=160, soft_wrap=True, markup=False)
    show_compare(screen, report)
    for shown in (content, screen.file.getvalue()):
        assert shown.count("0.2612 [0.195, 0.329]") == 2  # of each model
        assert shown.count("on civil sentences that name a group") == 1  # of the scorer


@pytest.mark.parametrize(
    ("measure", "of", "name"),
    [
        ("nats a token by judge", "/models/llama/", "nats a token by judge llama"),
        ("perplexity by judge", "org/judge", "perplexity by judge judge"),
        ("toxic share", "words:lists/words.txt", "toxic share by words:words.txt"),
        ("empty", "continuations", "share of empty continuations"),
        ("acc", "hellaswag", "acc on hellaswag"),
        ("perplexity, over samples", "civil", "perplexity over samples on civil"),
    ],
)
def test_measures_have_names(measure, of, name):
    assert named(measure, of) == name
