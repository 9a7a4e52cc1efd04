"""`bmerge merge --then`: a merge, and an adaptation of it, in one line."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.errors import ConfigError
from tests import tiny
from tests.finetuning import texts
from tests.tiny_models import tiny_gpt2

RUN = CliRunner()


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two models, rows of each task, and settings of an adaptation that name no model."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        tiny_gpt2(name, seed=seed)
        texts(f"{name}.jsonl", rows=24, seed=seed)
    settings = {"add": ["a.jsonl", "b.jsonl"], "posterior": "none", "max_steps": 2, "batch_size": 4}
    Path("adapt.yaml").write_text(yaml.safe_dump(settings))


def merge(*words):
    return RUN.invoke(app, ["merge", "a", "b", "--then", "adapt.yaml", *words])


def test_the_merge_is_adapted(world):
    done = merge("-o", "both", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["path"] == "both-adapted"
    # Adapted from the merge: the same as the two lines one after the other.
    words = ["merge", "a", "b", "-o", "merged", "-q"]
    assert RUN.invoke(app, words).exit_code == 0
    changes = ["--set", "model=merged", "--set", "output=again", "-q"]
    assert RUN.invoke(app, ["adapt", "adapt.yaml", *changes]).exit_code == 0
    merged, adapted, again = (tiny.read(name) for name in ("both", "both-adapted", "again"))
    assert any((merged[name] != adapted[name]).any() for name in merged)
    assert all((again[name] == adapted[name]).all() for name in again)


@pytest.mark.parametrize("named", ["both", "./both", "a/../both/", "absolute"])
def test_settings_may_name_the_merge_itself_in_any_spelling(world, monkeypatch, named):
    def end(config, **_):
        raise ConfigError(f"adapting '{config.model}'.")

    monkeypatch.setattr("mergekit_bayes.adapt.run.run_adapt", end)
    path = Path("both").absolute() if named == "absolute" else named
    Path("adapt.yaml").write_text(f"model: {path}\nadd: a.jsonl\n")
    assert "adapting 'both'." in merge("-o", "both").output


REFUSED = {
    "a file": (("-o", "both.safetensors"), "in a folder"),
    "a plan": (("-o", "both", "--dry-run"), "--then goes with none"),
    "a part": (("-o", "both", "--shard", "1/2"), "--then goes with none"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_merged_at_once_is_not_adapted(world, kind):
    words, message = REFUSED[kind]
    done = merge(*words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(Path().glob("both*"))


BEFORE = {
    "no precision for its prior": ("prior: stored\nadd: a.jsonl\n", "this merge writes none"),
    "rows that are not there": ("add: [a.jsonl, nope.jsonl]\n", "'nope.jsonl': no such file"),
    "no path": ("model: 3\nadd: a.jsonl\n", "--then adapts the merge, 'both'"),
    "another model": ("model: a\nadd: a.jsonl\n", "--then adapts the merge, 'both'"),
    "an output that exists": ("add: a.jsonl\noutput: a\n", "'a'"),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_what_the_adaptation_will_refuse_is_said_before_the_merge(world, kind):
    settings, message = BEFORE[kind]
    Path("adapt.yaml").write_text(settings)
    done = merge("-o", "both")
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert not list(Path().glob("both*"))


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (ConfigError("no."), 2)])
def test_an_adaptation_that_ends_says_how_to_go_on_from_the_merge(world, monkeypatch, error, code):
    def end(*_, **__):
        raise error

    monkeypatch.setattr("mergekit_bayes.adapt.run.run_adapt", end)
    done = merge("-o", "both")
    assert done.exit_code == code
    line = "bmerge adapt adapt.yaml --set=model=both --set=output=both-adapted"
    assert line in " ".join(done.output.split())
    assert Path("both/model.safetensors").exists()


def test_wrong_settings_of_the_adaptation_are_said_before_the_merge(world):
    Path("adapt.yaml").write_text("add: a.jsonl\nmax_stepz: 3\n")
    done = merge("-o", "both")
    assert done.exit_code == 2
    assert "max_stepz" in done.output
    assert not Path("both").exists()
