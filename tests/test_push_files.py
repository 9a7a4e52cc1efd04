"""The files of a model are pushed, stale ones are deleted, and all others stay."""

import json

import pytest

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.hub import push_folder
from mergekit_bayes.posterior import open_posterior
from tests import pushing
from tests.pushing import RUN, adapter, folder

hub = pushing.hub
merged = pushing.merged


def test_what_is_not_of_a_model_stays_and_is_named(hub, merged):
    for name in ("secrets.env", "data.jsonl", "old.safetensors", "modeling_x.py", ".hidden"):
        (merged / name).write_text("x")
    (merged / "checkpoint-10").mkdir()
    (merged / "posterior" / "stray.txt").write_text("x")
    report = push_folder(merged, "org/ab")
    assert set(report.left_out) == {
        "secrets.env",
        "data.jsonl",
        "old.safetensors",
        "modeling_x.py",
        ".hidden",
        "checkpoint-10/",
        "posterior/stray.txt",
    }
    assert not set(report.left_out) & set(hub.repos["org/ab"].files())


def test_every_kind_of_tokenizer_and_the_pooling_of_sentence_transformers_go_along(hub, merged):
    names = ("tokenizer.model.v3", "spiece.spm", "vocab.bpe", "modules.json")
    for name in names:
        (merged / name).write_text("x")
    (merged / "1_Pooling").mkdir()
    for name in ("config.json", "notes.txt"):
        (merged / "1_Pooling" / name).write_text("{}")
    report = push_folder(merged, "org/ab")
    assert {*names, "1_Pooling/config.json"} <= set(report.sent)
    assert "1_Pooling/notes.txt" in report.left_out


def test_code_that_the_config_names_goes_along(hub, merged):
    (merged / "config.json").write_text('{"auto_map": {"AutoModel": "modeling_x.Model"}}')
    (merged / "modeling_x.py").write_text("class Model: ...")
    assert "modeling_x.py" in push_folder(merged, "org/ab").sent


def test_no_posterior_leaves_it_at_home_and_takes_away_one_of_other_weights(hub, merged, tmp_path):
    push_folder(merged, "org/ab")
    push_folder(merged, "org/ab", posterior=False)
    assert "posterior/precision.posterior" in hub.repos["org/ab"].files()  # of the same weights
    other = folder(tmp_path / "other", seed=5)
    report = push_folder(other, "org/ab", posterior=False)
    names = ("precision.posterior", "precision.index.json", "posterior.json")
    precision = {f"posterior/{name}" for name in names}
    assert set(report.deleted) == precision | {"merge_report.json", "merge_recipe.yaml"}
    assert open_posterior("org/ab").precision is None


def test_stale_shards_are_deleted(hub, merged):
    hub.add(
        "org/ab",
        {
            "model-00001-of-00002.safetensors": b"x",
            "model.safetensors.index.json": b"{}",
            "mine.txt": b"x",
        },
    )
    report = push_folder(merged, "org/ab")
    assert set(report.deleted) == {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert hub.repos["org/ab"].files()["mine.txt"] == b"x"


def test_what_a_person_laid_beside_a_posterior_stays(hub, merged):
    theirs = {
        "posterior/README.md": b"mine",
        "posterior/plot.png": b"p",
        "model.safetensors.md5": b"m",
    }
    hub.add("org/ab", theirs | {"posterior/precision-00001-of-00002.posterior": b"x"})
    report = push_folder(merged, "org/ab")
    assert report.deleted == ("posterior/precision-00001-of-00002.posterior",)
    assert theirs.items() <= hub.repos["org/ab"].files().items()


def test_records_of_other_weights_are_deleted_and_shown_before_the_commit(hub, merged, tmp_path):
    push_folder(merged, "org/ab")
    other = folder(tmp_path / "other", seed=5)
    out = RUN.invoke(app, ["push", str(other), "org/ab", "--json"])
    assert set(json.loads(out.stdout)["deleted"]) == {"merge_report.json", "merge_recipe.yaml"}
    assert not set(hub.repos["org/ab"].files()) & {"merge_report.json", "merge_recipe.yaml"}
    lines = []
    push_folder(merged, "org/ab")
    hub_messages = hub.repos["org/ab"].messages
    before = len(hub_messages)
    push_folder(
        other, "org/ab", say=lambda line: lines.append((line.split()[1], len(hub_messages)))
    )
    assert lines == [("merge_recipe.yaml:", before), ("merge_report.json:", before)]
    assert "deletes   merge_report.json" in out.stderr


def test_records_of_the_same_weights_stay(hub, merged):
    push_folder(merged, "org/ab")
    for name in ("merge_report.json", "merge_recipe.yaml"):
        (merged / name).unlink()
    assert push_folder(merged, "org/ab").deleted == ()


@pytest.mark.parametrize("kinds", [("model", "adapter"), ("adapter", "model")])
def test_a_model_and_an_adapter_do_not_replace_each_other(hub, tmp_path, kinds):
    makers = {"model": folder, "adapter": lambda path: adapter(path, "org/base")}
    there, new = (makers[kind](tmp_path / kind) for kind in kinds)
    push_folder(there, "org/x")
    before = hub.repos["org/x"].files()
    for options in ({}, {"create_pr": True}, {"revision": "v1"}):
        with pytest.raises(
            CheckpointError, match=f"holds an? {kinds[0]} .* Push to another repository"
        ):
            push_folder(new, "org/x", **options)
    assert list(hub.repos["org/x"].refs) == ["main"]
    assert hub.repos["org/x"].files() == before
    hub.repos["org/x"].commit("bare", {}, "emptied")
    assert push_folder(new, "org/x", revision="bare").changed
