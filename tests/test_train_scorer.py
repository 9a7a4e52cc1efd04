"""The classifiers that are trained offline for a panel, and what is said about them."""

import importlib
import importlib.util
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers
import yaml
from tiny_models import tiny_bert

from mergekit_bayes.evaluate.scorers import open_scorer, open_scorers

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "experiments"
# Words of the tiny tokenizer.
KIND, RUDE = ("cat", "dog", "bird", "mat", "tree"), ("bad", "dull", "not")


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("train_scorer")
    finally:
        sys.path.remove(str(SCRIPTS))


def invented(source, split):
    """Sixty civil and sixty rude rows of a source; wikitalk's are civil, nearly all."""
    draw = random.Random(f"{source} {split}")
    rows = []
    for i in range(120):
        rude = i % 40 == 0 if source == "wikitalk" else i % 2 == 1
        words = draw.choices(KIND + RUDE if rude else KIND, k=20)
        rows.append((" ".join([*words, "dull"] if rude else words), int(rude)))
    return [text for text, _ in rows], [label for _, label in rows]


@pytest.fixture
def made_up(script, tmp_path, monkeypatch):
    """The script with invented texts and few resamples, and a tiny encoder without a head."""
    monkeypatch.setattr(script.tweet_scorer, "read", invented)
    monkeypatch.setattr(script.tweet_scorer, "DATA", tmp_path)
    monkeypatch.setattr(script, "RESAMPLES", 40)
    folder = tiny_bert(tmp_path / "bert")
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    classifier.bert.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def options(base, *more):
    return ["--base", str(base), "--batch-size", "8", "--rate", "0.01", *more]


def test_the_area_counts_pairs_in_order_and_half_of_those_that_tie(script):
    toxic, clean = np.array([0.2, 0.5, 0.9]), np.array([0.1, 0.5])
    pairs = [(t > c) + (t == c) / 2 for t in toxic for c in clean]
    assert script.auroc(toxic, clean) == pytest.approx(np.mean(pairs))
    assert script.auroc(np.ones(3), np.zeros(2)) == 1.0
    assert script.auroc(clean, clean) == 0.5


def test_the_clean_texts_of_civil_are_those_of_wikitalk(script, made_up):
    toxic, clean = script.sides("civil", "train")
    assert (len(toxic), len(clean)) == (60, 117)
    assert clean == script.sides("wikitalk", "train").clean
    own = [text for text, label in zip(*invented("civil", "train"), strict=True) if not label]
    assert script.sides(script.BORDERLINE, "train") == (toxic, own)


def test_training_rows_are_balanced_and_from_every_source(script, made_up):
    rows = script.training_rows(["olid", "civil"], 40)
    assert len(rows) == 40
    assert sum(label == "toxic" for _, label in rows) == 20
    for source in ("olid", "civil"):
        assert sum(text in script.sides(source, "train").toxic for text, _ in rows) >= 10
    with pytest.raises(script.BmergeError, match="expected 64 toxic and 64 clean texts, found 60"):
        script.training_rows(["olid"], 128)


def test_an_interval_holds_the_gain_of_the_same_resamples(script):
    texts = script.Sides([f"{i}" for i in range(50)], [f"{i}" for i in range(50, 90)])

    def better(rows):
        return [1 - int(row) / 100 for row in rows]

    def worse(rows):
        return [int(row) * 37 % 97 / 97 for row in rows]

    found = script.compare("x", texts, better, better, 0)
    assert (found.auroc.value, found.gain.value) == (1.0, 0.0)
    assert found.gain.low == found.gain.high == 0.0
    assert (found.caught, found.alarms) == (1.0, pytest.approx(1 / 40))  # 50 scores 0.5
    found = script.compare("x", texts, better, worse, 0)
    assert 0 < found.gain.low < found.gain.value < found.gain.high
    assert found.baseline.low < found.baseline.value < found.baseline.high < 1


def test_a_classifier_of_made_up_rows_is_an_ordinary_scorer(script, made_up, tmp_path, capsys):
    out = tmp_path / "new" / "rude"
    given = options(made_up, "--train", "civil", "--steps", "14", "-o", str(out))
    assert script.main(given) == 0
    assert [p.name for p in out.parent.iterdir()] == ["rude"]  # no texts are left
    scorer = open_scorer(f"model:{out}#toxic")
    assert scorer.info.reading == "softmax"
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "neither", "1": "toxic"}
    assert config["problem_type"] == "single_label_classification"
    both = script.sides("civil", "test")
    toxic, clean = (np.asarray(scorer.score(side)) for side in both)
    assert script.auroc(toxic, clean) > 0.9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(script.TESTS)
    cells = next(line for line in lines if "its own source" in line).split(" | ")
    assert cells[0] == "| civil"
    assert cells[2] == "60/117"
    assert cells[3].startswith(f"{script.auroc(toxic, clean):.3f} [")


def test_a_panel_has_a_member_and_a_threshold_of_its_own_for_each_source(
    script, made_up, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(script, "TESTS", ("olid",))
    folder = tmp_path / "panel"
    given = options(made_up, "--train", "olid", "civil", "--steps", "3", "--panel", str(folder))
    assert script.main(given) == 0
    members = yaml.safe_load((folder / "panel.yaml").read_text())["members"]
    assert list(members) == ["olid", "civil"]
    assert {(m["label"], m["reading"]) for m in members.values()} == {("toxic", "softmax")}
    weights = [folder / m["model"] / "model.safetensors" for m in members.values()]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    pieces = script.clean_pieces()
    assert len(pieces) > 100
    for member in members.values():
        scores = np.array(open_scorer(f"model:{folder / member['model']}#toxic").score(pieces))
        assert 0 < (scores >= member["threshold"] - 1e-4).mean() <= 0.2
        assert (scores < member["threshold"]).mean() >= 0.9
    before = [w.stat().st_mtime_ns for w in weights]
    capsys.readouterr()
    assert script.main(given) == 0  # tested again, and not trained
    assert [w.stat().st_mtime_ns for w in weights] == before
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2


def test_without_its_texts_the_script_says_where_they_belong(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.tweet_scorer, "DATA", tmp_path / "none")
    assert script.main(["-o", str(tmp_path / "x")]) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_encoder_ranks_comments_after_some_tweets(script, tmp_path, capsys):
    """Sixty steps; the comments are of a source that it never saw."""
    if importlib.util.find_spec(script.PACKAGE) is None:
        pytest.skip(f"needs the package {script.PACKAGE}")
    if not script.tweet_scorer.DATA.exists():
        pytest.skip("needs the texts beside the project")
    out = tmp_path / "olid"
    given = ["--train", "olid", "--steps", "60", "--test-rows", "150", "-o", str(out)]
    assert script.main(given) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    area = {line.split(" | ")[1].split(" (")[0]: float(line.split(" | ")[3][:5]) for line in lines}
    assert area["civil"] > 0.9
    assert area["olid"] > 0.7


def test_what_is_trained_as_a_panel_is_read_as_one(script, tmp_path):
    tiny_bert(tmp_path / "olid", names=script.LABELS)
    script.write_panel(tmp_path, {"olid": 0.3})
    (scorer,) = open_scorers([f"panel:{tmp_path / 'panel.yaml'}"])
    assert (scorer.info.label, scorer.info.reading) == (script.LABELS[1], "softmax")
    assert scorer.threshold(0.5) == 0.3
