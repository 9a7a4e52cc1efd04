"""Panels of scorers: each reading is named, and each member is what it was at its first use."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import sources
from mergekit_bayes.errors import BmergeError, CheckpointError, ConfigError
from mergekit_bayes.evaluate import EvaluateConfig, panel_locks
from mergekit_bayes.evaluate.files import read_report
from mergekit_bayes.evaluate.panels import read_members
from mergekit_bayes.evaluate.refusals import refuse_settings
from mergekit_bayes.evaluate.report import Pin, ScorerInfo
from mergekit_bayes.evaluate.run import run_evaluate
from mergekit_bayes.evaluate.scorers import open_scorer, open_scorers
from tests import pushing, tiny_models
from tests.pushing import files
from tests.two_ranks import found_by_two

hub = pushing.hub
LABELS = ["toxic", "insult", "other"]
MULTI = "multi_label_classification"


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Two classifiers of exclusive labels and one of independent ones."""
    folder = tmp_path_factory.mktemp("judges")
    tiny_models.tiny_bert(folder / "a", seed=1)
    tiny_models.tiny_bert(folder / "b", seed=2)
    tiny_models.tiny_bert(folder / "multi", labels=3, names=LABELS, problem_type=MULTI, seed=3)
    return folder


@pytest.fixture
def panel(judges, tmp_path):
    """A panel's file beside its two members."""
    shutil.copytree(judges / "a", tmp_path / "a")
    shutil.copytree(judges / "multi", tmp_path / "multi")
    return write_panel(
        tmp_path / "mine.yaml",
        first={"model": "a", "label": "LABEL_1", "reading": "softmax"},
        second={"model": "multi", "label": "toxic", "reading": "sigmoid", "threshold": 0.25},
    )


def write_panel(path, **members):
    path.write_text(yaml.safe_dump({"members": members}))
    return path


def locked(panel):
    return json.loads(panel.with_suffix(".lock.json").read_text())["members"]


def test_a_panel_is_one_scorer_for_each_member(panel):
    scorers = open_scorers([f"panel:{panel}"])
    first, second = scorers
    assert [s.spec for s in scorers] == [f"panel:{panel}/first", f"panel:{panel}/second"]
    texts = ["the cat sat", "bad dull film ."]
    alone = open_scorer(f"model:{panel.parent / 'a'}#LABEL_1")
    assert first.score(texts) == alone.score(texts)
    assert (first.info.reading, second.info.reading) == ("softmax", "sigmoid")
    assert (first.threshold(0.5), second.threshold(0.5)) == (0.5, 0.25)
    (only,) = open_scorers([f"panel:{panel}/second"])
    assert (only.spec, only.info) == (second.spec, second.info)


def test_the_first_use_records_the_files_that_decide_scores(panel):
    (panel.parent / "a" / "README.md").write_text("of no effect")
    open_scorers([f"panel:{panel}/first"])
    record = locked(panel)
    assert list(record) == ["first"]
    assert record["first"]["commit"] is None
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(record["first"]["files"]) == expected
    assert all(len(value) == 64 for value in record["first"]["files"].values())
    open_scorers([f"panel:{panel}"])
    assert list(locked(panel)) == ["first", "second"]
    assert locked(panel)["first"] == record["first"]
    assert not list(panel.parent.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_content_is_refused_until_the_entry_is_removed(panel, judges, name):
    spec, lock = f"panel:{panel}/first", panel.with_suffix(".lock.json")
    open_scorers([spec])
    before = locked(panel)["first"]["files"][name]
    file = panel.parent / "a" / name
    if name == "model.safetensors":
        shutil.copy(judges / "b" / name, file)
    else:
        file.write_text(file.read_text() + "\n")
    with pytest.raises(CheckpointError) as error:
        open_scorers([spec])
    message = str(error.value)
    assert f"'{spec}' is not what it was at its first use: its {name} is not the same" in message
    assert f"Expected SHA-256 {before}, found SHA-256 " in message
    assert f"remove the entry 'first' from {lock}" in message
    content = json.loads(lock.read_text())
    del content["members"]["first"]
    lock.write_text(json.dumps(content))
    open_scorers([spec])
    assert locked(panel)["first"]["files"][name] != before


def test_a_file_that_is_new_or_gone_is_refused(panel):
    open_scorers([f"panel:{panel}"])
    (panel.parent / "a" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"its added_tokens\.json .* Expected no such file"):
        open_scorers([f"panel:{panel}"])
    (panel.parent / "a" / "added_tokens.json").unlink()
    (panel.parent / "a" / "tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"its tokenizer_config\.json .* found none"):
        open_scorers([f"panel:{panel}"])


def test_another_model_under_the_same_name_is_refused(panel):
    open_scorers([f"panel:{panel}"])
    write_panel(panel, first={"model": "multi", "label": "toxic", "reading": "sigmoid"})
    with pytest.raises(CheckpointError, match=r"names another model\. Expected a, found multi"):
        open_scorers([f"panel:{panel}"])


def test_what_is_written_to_while_it_is_loaded_is_refused(panel, monkeypatch):
    load = panel_locks.content_hash

    def then_touched(path):
        found = load(path)
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(panel_locks, "content_hash", then_touched)
    with pytest.raises(CheckpointError, match="was written to"):
        open_scorers([f"panel:{panel}/first"])


def test_a_damaged_lock_file_is_not_taken_for_none(panel):
    lock = panel.with_suffix(".lock.json")
    for content in ("", "[]", '{"members": {"first": 3}}'):
        lock.write_text(content)
        with pytest.raises(CheckpointError, match=r"mine\.lock\.json: cannot be read .*Correct it"):
            open_scorers([f"panel:{panel}"])
        assert lock.read_text() == content


def test_members_recorded_at_the_same_time_are_all_kept(panel):
    (member, _) = read_members(f"panel:{panel}")
    pins = {f"m{i}": Pin(model="a", files={"config.json": str(i)}) for i in range(8)}
    workers = [
        threading.Thread(target=panel_locks._record, args=(member._replace(name=name), pin))
        for name, pin in pins.items()
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert panel_locks._read(member.lock).members == pins
    # Whoever comes second compares with what the first one found.
    assert panel_locks._record(member._replace(name="m0"), pins["m1"]) == pins["m0"]


def test_a_panel_in_a_folder_that_is_not_writable_says_what_to_do(panel, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(panel_locks, "open_lock", refuse)
    message = r"cannot be recorded \(Permission denied\)\. Copy the panel to a folder"
    with pytest.raises(CheckpointError, match=message):
        open_scorers([f"panel:{panel}/first"])


MEMBER = {"model": "a", "label": "LABEL_1", "reading": "softmax"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "members: expected at least one value"),
        ({"a/b": MEMBER}, "members: 'a/b' is no name of letters, digits, - and _"),
        ({"first": None}, r"members\.first: expected keys and values, found nothing"),
        (
            {"first": {k: v for k, v in MEMBER.items() if k != "reading"}},
            r"members\.first\.reading: is required",
        ),
        (
            {"first": MEMBER | {"reading": "sigmiod"}},
            r"members\.first\.reading: 'sigmiod' is not .* Did you mean 'sigmoid'",
        ),
        ({"first": MEMBER | {"threshold": 2}}, r"first\.threshold: expected a number .*at most 1"),
        ({"first": MEMBER | {"lable": "a"}}, r"first\.lable: unknown key; did you mean 'label'"),
        (
            {"first": MEMBER | {"label": "toxic"}},
            r"no label 'toxic'.*LABEL_0, LABEL_1\. Correct members.first in .*/mine.yaml\.$",
        ),
        (
            {"first": {"model": "multi", "label": "toxic", "reading": "softmax"}},
            "panel says softmax, but config.json says multi_label_classification, which is read by "
            r"sigmoid\. Correct members.first in .*/mine.yaml\.$",
        ),
        ({"first": MEMBER | {"model": "one", "label": "LABEL_0"}}, "single output .* sigmoid"),
        ({"first": MEMBER | {"model": "adapter"}}, "is an adapter"),
        (
            {"first": MEMBER | {"model": "missing"}},
            "scorer 'panel:.*/first': '.*missing': no such file or folder",
        ),
    ],
)
def test_a_panel_that_leaves_a_reading_open_or_is_wrong_is_refused(panel, members, message):
    tiny_models.tiny_bert(panel.parent / "one", labels=1)
    (panel.parent / "adapter").mkdir(exist_ok=True)
    (panel.parent / "adapter" / "adapter_config.json").write_text("{}")
    write_panel(panel, **members)
    with pytest.raises(BmergeError, match=f"(?s){message}"):
        open_scorers([f"panel:{panel}"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("panel:toxicty", "there is no panel 'toxicty'; there is toxicity.*ends in .yaml"),
        ("panel:toxicity/hop", "no member 'hop'; it has hap, detoxify, toxigen. Did you mean"),
        ("panel:toxicity/", "no member ''"),
        ("panel:/x", "expected panel:NAME or panel:FILE.yaml"),
        ("panel:", "expected .*panel:NAME"),
        ("panel:/nowhere/mine.yaml", "mine.yaml: cannot be read"),
        ("panel:toxicity", "is several scorers, .* Name one of its members: panel:toxicity/hap, "),
    ],
)
def test_a_name_that_is_no_single_scorer_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        open_scorer(spec)
    with pytest.raises(ConfigError, match=message):
        open_scorers([spec], single=True)


def test_a_member_that_is_named_twice_is_refused(panel):
    with pytest.raises(ConfigError, match=r"named twice: panel:.*mine\.yaml/second"):
        open_scorers([f"panel:{panel}/second", f"panel:{panel}"])


def test_no_output_replaces_a_panel_or_its_members(panel):
    for output in (panel, panel.parent / "multi", panel.parent):
        config = EvaluateConfig(
            model="m", toxicity="p", scorer=f"panel:{panel}/second", output=str(output), force=True
        )
        with pytest.raises(CheckpointError, match=r"would replace .*, an input"):
            refuse_settings(config)


def test_the_panel_of_the_package_names_every_reading(monkeypatch, tmp_path):
    members = read_members("panel:toxicity")
    assert [m.spec for m in members] == [
        "panel:toxicity/hap",
        "panel:toxicity/detoxify",
        "panel:toxicity/toxigen",
    ]
    assert {m.settings.reading for m in members} == {"softmax", "sigmoid"}
    monkeypatch.delenv("BMERGE_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (hap,) = read_members("panel:toxicity/hap")
    assert hap.lock == tmp_path / "data" / "bmerge" / "panels" / "toxicity.lock.json"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    (hap,) = read_members("panel:toxicity/hap")
    assert hap.lock.is_relative_to(Path.home())
    monkeypatch.setenv("BMERGE_HOME", str(tmp_path / "own"))
    (hap,) = read_members("panel:toxicity/hap")
    assert hap.lock == tmp_path / "own" / "panels" / "toxicity.lock.json"
    monkeypatch.delenv("BMERGE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    with pytest.raises(ConfigError, match=r"there is none\. Set BMERGE_HOME to a folder"):
        read_members("panel:toxicity/hap")


def test_scorers_outside_of_panels_are_reported_as_before():
    info = ScorerInfo(kind="words", fingerprint="0")
    assert set(info.model_dump()) == {"kind", "fingerprint", "label", "reading", "reason"}


def next_process(monkeypatch):
    """Forget which commit a revision meant, as a new process does."""
    monkeypatch.setattr(sources, "_COMMITS", {})


def test_a_member_on_the_hub_is_loaded_at_its_first_commit(hub, judges, tmp_path, monkeypatch):
    repo = hub.add("org/a", files(judges / "a"))
    first = repo.refs["main"]
    panel = write_panel(tmp_path / "mine.yaml", first=MEMBER | {"model": "org/a"})
    (scorer,) = open_scorers([f"panel:{panel}"])
    assert locked(panel)["first"]["commit"] == first == scorer.info.pin.commit
    hub.add("org/b", files(judges / "b"))
    repo.commit("main", hub.repos["org/b"].commits[hub.repos["org/b"].refs["main"]], "moved on")
    next_process(monkeypatch)
    (again,) = open_scorers([f"panel:{panel}"])
    assert (again.folder.name, again.info) == (first, scorer.info)
    assert again.score(["bad film"]) == scorer.score(["bad film"])
    # The recorded commit may be written into the panel; another one is another member.
    write_panel(panel, first=MEMBER | {"model": f"org/a@{first}"})
    open_scorers([f"panel:{panel}"])
    write_panel(panel, first=MEMBER | {"model": f"org/a@{repo.refs['main']}"})
    message = f"names another model. Expected org/a, found org/a@{repo.refs['main']}"
    with pytest.raises(CheckpointError, match=message):
        open_scorers([f"panel:{panel}"])
    panel.with_suffix(".lock.json").unlink()
    (moved,) = open_scorers([f"panel:{panel}"])
    assert moved.info.pin.commit == repo.refs["main"]
    assert moved.score(["bad film"]) != scorer.score(["bad film"])


def test_another_content_of_the_same_commit_is_refused(hub, judges, tmp_path, monkeypatch):
    hub.add("org/a", files(judges / "a"))
    panel = write_panel(tmp_path / "mine.yaml", first=MEMBER | {"model": "org/a"})
    (scorer,) = open_scorers([f"panel:{panel}"])
    stored = (scorer.folder / "model.safetensors").resolve()
    stored.write_bytes((judges / "b" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"its model\.safetensors is not the same"):
        open_scorers([f"panel:{panel}"])


def test_a_member_in_a_pull_request_of_the_hub_is_found(hub, judges, tmp_path):
    repo = hub.add("org/a", {"README.md": b"no tensors here"})
    hub.add("org/b", files(judges / "a"))
    commit = repo.commit(
        "refs/pr/1", hub.repos["org/b"].commits[hub.repos["org/b"].refs["main"]], "converted"
    )
    panel = write_panel(tmp_path / "mine.yaml", first=MEMBER | {"model": "org/a@refs/pr/1"})
    (scorer,) = open_scorers([f"panel:{panel}"])
    assert scorer.info.pin.commit == commit


# The labels that pages of the Hub show of "unbiased": seven kinds, and nine groups mentioned.
UNBIASED = [
    *("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat"),
    *("sexual_explicit", "male", "female", "homosexual_gay_or_lesbian", "christian", "jewish"),
    *("muslim", "black", "white", "psychiatric_or_mental_illness"),
]


def test_the_panel_of_the_package_is_fetched_and_recorded(hub, judges, tmp_path, monkeypatch):
    """Stand-ins under the published names: the tensors of two are in a pull request only."""
    monkeypatch.setenv("BMERGE_HOME", str(tmp_path / "own"))
    many = tiny_models.tiny_bert(tmp_path / "many", labels=16, names=UNBIASED, problem_type=MULTI)
    hub.add("ibm-granite/granite-guardian-hap-38m", files(judges / "a"))
    for name, folder, ref in (
        ("unitary/unbiased-toxic-roberta", many, "refs/pr/2"),
        ("tomh/toxigen_roberta", judges / "b", "refs/pr/1"),
    ):
        converted = hub.add("org/converted", files(folder))
        repo = hub.add(name, {"pytorch_model.bin": b"a pickle"})
        repo.commit(ref, converted.commits[converted.refs["main"]], "converted")
    scorers = open_scorers(["panel:toxicity"])
    read = {s.spec: (s.info.label, s.info.reading) for s in scorers}
    assert read == {
        "panel:toxicity/hap": ("LABEL_1", "softmax"),
        "panel:toxicity/detoxify": ("toxicity", "sigmoid"),
        "panel:toxicity/toxigen": ("LABEL_1", "softmax"),
    }
    lock = tmp_path / "own" / "panels" / "toxicity.lock.json"
    recorded = json.loads(lock.read_text())["members"]
    assert {name: pin["commit"] for name, pin in recorded.items()} == {
        "hap": hub.repos["ibm-granite/granite-guardian-hap-38m"].refs["main"],
        "detoxify": hub.repos["unitary/unbiased-toxic-roberta"].refs["refs/pr/2"],
        "toxigen": hub.repos["tomh/toxigen_roberta"].refs["refs/pr/1"],
    }
    assert lock.parent.stat().st_mode & 0o077 == 0


def test_what_could_not_be_opened_is_not_recorded(panel):
    """The corrected panel would be refused for naming another model than at its first use."""
    content = panel.read_text()
    panel.write_text(content.replace("model: a\n", "model: multi\n").replace("LABEL_1", "rude"))
    with pytest.raises(ConfigError, match="rude"):
        open_scorers([f"panel:{panel}/first"])
    assert not panel.with_suffix(".lock.json").exists()
    panel.write_text(content)
    open_scorers([f"panel:{panel}/first"])
    assert list(locked(panel)) == ["first"]


def test_a_wrong_label_of_the_panel_of_the_package_says_what_to_write(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("BMERGE_HOME", str(tmp_path / "own"))
    named = tiny_models.tiny_bert(tmp_path / "named", names=["clean", "hate"])
    hub.add("ibm-granite/granite-guardian-hap-38m", files(named))
    message = (
        "has no label 'LABEL_1'. Name the toxic one of: clean, hate. Copy .*/toxicity.yaml to a "
        "panel of your own, correct members.hap there, and name it"
    )
    with pytest.raises(ConfigError, match=message):
        open_scorers(["panel:toxicity/hap"])


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [({0: "toxic", 1: "toxic"}, "0 and 1"), ({0: "a", 5: "toxic"}, "5"), ({-1: "toxic"}, "-1")],
)
def test_a_label_without_an_output_of_its_own_is_refused(judges, tmp_path, labels, numbers):
    shutil.copytree(judges / "a", tmp_path / "a")
    config = tmp_path / "a" / "config.json"
    more = {"id2label": {"0": "other"} | labels, "label2id": {}}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    with pytest.raises(CheckpointError, match=f"gives 'toxic' the number {numbers}, and the 2 out"):
        open_scorer(f"model:{tmp_path / 'a'}#toxic")


def test_the_commit_of_a_classifier_outside_of_panels_is_reported(hub, judges):
    repo = hub.add("org/a", files(judges / "a"))
    assert open_scorer("model:org/a#LABEL_1").info.commit == repo.refs["main"]
    info = open_scorer(f"model:{judges / 'a'}#LABEL_1").info
    assert "commit" not in info.model_dump()


def test_a_hub_id_that_is_a_folder_here_is_not_guessed(hub, judges, tmp_path, monkeypatch):
    hub.add("org/a", files(judges / "a"))
    panel = write_panel(tmp_path / "mine.yaml", first=MEMBER | {"model": "org/a"})
    shutil.copytree(judges / "b", tmp_path / "elsewhere" / "org" / "a")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="'org/a' is a Hub id for the panel, and a folder where"):
        open_scorers([f"panel:{panel}"])


def test_a_folder_that_appears_in_the_place_of_a_hub_id_is_refused(hub, judges, tmp_path):
    repo = hub.add("org/a", files(judges / "a"))
    panel = write_panel(tmp_path / "mine.yaml", first=MEMBER | {"model": "org/a"})
    open_scorers([f"panel:{panel}"])
    shutil.copytree(judges / "a", tmp_path / "org" / "a")
    message = f"at another commit. Expected {repo.refs['main']}, found None"
    with pytest.raises(CheckpointError, match=message):
        open_scorers([f"panel:{panel}"])


@pytest.mark.slow
def test_two_processes_make_one_record_and_compare_with_it(panel):
    first, second = found_by_two("tests.test_panels", panel.parent)
    assert first == second
    assert locked(panel)["first"]["files"] == first["files"]
    assert list(locked(panel)) == ["first", "second"]
    (panel.parent / "a" / "config.json").write_text("{}")
    first, second = found_by_two("tests.test_panels", panel.parent)
    assert first["error"] == second["error"]
    assert "its config.json is not the same" in first["error"]


def child(folder):
    import torch.distributed as dist

    dist.init_process_group("gloo")
    result = {"world": dist.get_world_size()}
    try:
        scorers = open_scorers([f"panel:{folder / 'mine.yaml'}"])
        result["files"] = scorers[0].info.pin.files
    except BmergeError as error:
        result["error"] = str(error)
    results = [None, None]
    dist.all_gather_object(results, result)
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(results))
    dist.destroy_process_group()  # its threads may else end the interpreter with an abort


@pytest.fixture
def world(panel, monkeypatch):
    monkeypatch.chdir(panel.parent)
    tiny_models.tiny_gpt2("m")
    prompts = ["the cat", "a dog sat on", "the", "good film"]
    Path("prompts.jsonl").write_text("".join(json.dumps({"text": p}) + "\n" for p in prompts))
    return panel.parent


def test_each_member_has_its_own_row_in_the_report(world):
    report = run_evaluate(
        EvaluateConfig(
            model="m",
            toxicity="prompts.jsonl",
            scorer="panel:mine.yaml",
            continuations=3,
            new_tokens=6,
            threshold=0.6,
            output="out",
        )
    )
    names = ["panel:mine.yaml/first", "panel:mine.yaml/second"]
    assert list(report.toxicity) == list(report.scorers) == names
    assert [t.threshold for t in report.toxicity.values()] == [0.6, 0.25]
    rows = [json.loads(line) for line in Path("out/continuations.jsonl").read_text().splitlines()]
    scores = [row["scores"][names[1]] for row in rows]
    assert report.toxicity[names[1]].share.value == sum(s >= 0.25 for s in scores) / len(scores)
    assert report.scorers[names[0]].pin.files == locked(world / "mine.yaml")["first"]["files"]
    (pair,) = report.agreement
    assert (pair.first, pair.second, pair.texts) == (*names, 12)
    verdicts = [
        [row["scores"][n] >= t for n, t in zip(names, (0.6, 0.25), strict=True)] for row in rows
    ]
    assert pair.same.value == pytest.approx(sum(a == b for a, b in verdicts) / 12)
    assert [report.bias[name].threshold for name in names] == [0.6, 0.25]
    again = read_report("out")
    assert (again.agreement, again.bias, again.scorers) == (
        report.agreement,
        report.bias,
        report.scorers,
    )


def test_the_screen_shows_agreement_and_bias(world):
    options = ["--toxicity", "prompts.jsonl", "--scorer", "panel:mine.yaml", "--continuations", "2"]
    done = CliRunner().invoke(app, ["evaluate", "m", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    screen = " ".join(done.stderr.split())
    assert "panel:mine.yaml/first: softmax of the label, since the panel says so" in screen
    assert "since the panel says so; toxic from 0.25 on" in screen
    assert "do the scorers agree?" in screen
    assert "panel:mine.yaml/second on civil sentences that name a group: furthest a" in screen


def test_texts_that_a_classifier_does_not_read_in_full_are_counted(judges):
    scorer = open_scorer(f"model:{judges / 'a'}#LABEL_1")  # 64 positions
    texts = ["the cat " * count for count in (1, 31, 32, 100)]  # 2 tokens more each
    assert scorer.cut(texts) == 2
    assert scorer.cut([]) == 0
