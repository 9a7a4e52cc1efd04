"""Models and posteriors taken from the Hub by name, against a hub on the loopback interface."""

import errno
import json

import pytest
import yaml
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import hub_errors, remote, sources
from mergekit_bayes.errors import CheckpointError, PrecisionError
from mergekit_bayes.inspect.run import run_inspect
from mergekit_bayes.merge import MergeConfig, run_merge
from mergekit_bayes.plan import plan_merge
from mergekit_bayes.posterior import open_posterior
from tests import hub_double, pushing, tiny
from tests.pushing import adapter, files, folder

hub = pushing.hub


def test_a_hub_id_is_fetched_with_its_commit(hub, tmp_path):
    repo = hub.add("org/a", files(folder(tmp_path / "a")))
    found = open_posterior("org/a")
    assert found.commit == repo.refs["main"]
    assert found.pinned == f"org/a@{repo.refs['main']}"
    assert found.has_precision
    found.close()


def test_uniform_weights_fetch_no_posterior(hub, tmp_path):
    hub.add("org/a", files(folder(tmp_path / "a")))
    open_posterior("org/a", with_precision=False).close()
    assert hub.requested("GET", "model.safetensors")
    assert not hub.requested("GET", "resolve/main/posterior")
    assert not [p for p in hub.requested("GET") if "/posterior/" in p]


def test_all_files_of_a_process_are_of_one_commit(hub, tmp_path):
    repo = hub.add("org/a", files(folder(tmp_path / "a")))
    first = sources.resolve("org/a", sources.CHECKPOINT)
    repo.commit("main", {}, "emptied in between")
    assert sources.resolve("org/a", sources.CHECKPOINT + sources.POSTERIOR) == first
    assert (first / "posterior" / "precision.posterior").exists()


def test_a_branch_and_a_commit_are_revisions(hub, tmp_path):
    repo = hub.add("org/a", files(folder(tmp_path / "a", seed=0)))
    first = repo.refs["main"]
    repo.refs["v1"] = first
    repo.commit("main", {}, "emptied")
    for ref in ("org/a@v1", f"org/a@{first}"):
        assert open_posterior(ref, with_precision=False).commit == first


def test_a_download_that_breaks_off_is_taken_up_again(hub, tmp_path):
    whole = tiny.write(tmp_path / "x.safetensors", tiny.arrays(0, {"w": (99, 99)})).read_bytes()
    hub.add("org/a", {"model.safetensors": whole})
    hub.cut_downloads = 1
    assert (sources.resolve("org/a") / "model.safetensors").read_bytes() == whole
    assert len(hub.requested("GET", "/model.safetensors")) == 2


def test_offline_mode_serves_what_is_cached_and_says_so_of_the_rest(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.add("org/a", files(folder(tmp_path / "a")))
    here = sources.resolve("org/a", sources.CHECKPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sources, "_COMMITS", {})
    asked = len(hub.log)
    assert sources.resolve("org/a", sources.CHECKPOINT) == here
    with pytest.raises(CheckpointError, match="offline mode is on"):
        sources.resolve("org/a", sources.CHECKPOINT + sources.POSTERIOR)
    with pytest.raises(CheckpointError, match="offline mode is on"):
        sources.resolve("org/b")
    assert len(hub.log) == asked


@pytest.mark.parametrize(
    ("options", "token", "says"),
    [
        ({"gated": True}, hub_double.TOKEN, "is gated: ask for access at"),
        ({"private": True}, None, "private, log in with `hf auth login`"),
        ({}, "hf_wrong", "does not accept your token"),
        (None, hub_double.TOKEN, "no such repository"),
    ],
)
def test_what_cannot_be_fetched_says_the_way_out(hub, tmp_path, monkeypatch, options, token, says):
    hub_double.use(hub, monkeypatch, tmp_path / "home", token)
    if options is not None:
        hub.add("org/a", {"config.json": b"{}", "model.safetensors": b"x"}, **options)
    with pytest.raises(CheckpointError, match="'org/a'") as caught:
        sources.resolve("org/a")
    assert says in str(caught.value)
    assert "hf_" not in str(caught.value)


@pytest.mark.parametrize("length", range(270, 301, 5))
def test_no_part_of_a_token_is_in_a_message_however_long(hub, monkeypatch, length):
    for token in (hub_double.TOKEN, "hf_somebodyElsesToken"):
        said = hub_errors.explain(ValueError("x" * (length - 1) + " " + token + " more"), "org/a")
        assert "x" * 200 in said
        assert token[:4] not in said
        assert len(said) < 400


def test_an_unknown_revision_is_named(hub):
    hub.add("org/a", {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match="no such branch, tag or commit"):
        sources.resolve("org/a@v9")


def test_headers_are_read_without_fetching_the_file(hub, tmp_path):
    hub.add("org/a", files(folder(tmp_path / "a")))
    (header,) = remote.read_headers("org/a", ("posterior/precision.posterior",))
    shapes = {n.removeprefix("precision:"): t.shape for n, t in header.tensors.items()}
    assert shapes == tiny.SHAPES
    assert '"estimator":"ggn"' in header.metadata["bmerge"]
    assert all(r.range for r in hub.log if "/resolve/" in r.path)
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_base_plus_adapter_is_pinned_by_both_commits(hub, tmp_path):
    base = hub.add("org/base", files(folder(tmp_path / "base"))).refs["main"]
    over = hub.add("org/a", files(adapter(tmp_path / "a", "org/base"))).refs["main"]
    out = tmp_path / "out"
    run_merge(MergeConfig(models=("org/base+org/a",), base="org/base", out=str(out)))
    recipe = yaml.safe_load((out / "merge_recipe.yaml").read_text())
    assert recipe["models"] == [f"org/base@{base}+org/a@{over}"]
    report = json.loads((out / "merge_report.json").read_text())
    assert [m["commit"] for m in report["models"]] == [base, f"{base}+{over}"]


def test_a_precision_may_live_in_another_repository_whose_model_is_not_fetched(hub, tmp_path):
    whole = files(folder(tmp_path / "a"))
    hub.add("org/a", {n: c for n, c in whole.items() if not n.startswith("posterior")})
    commit = hub.add("other/a-posterior", whole).refs["main"]
    hub.add("org/b", files(folder(tmp_path / "b", seed=1)))
    config = {
        "models": ["org/a", "org/b"],
        "weights": "precision",
        "precision": {"org/a": "other/a-posterior"},
        "out": str(tmp_path / "out"),
    }
    run_merge(MergeConfig(**config))
    assert not hub.requested("GET", f"other/a-posterior/resolve/{commit}/model.safetensors")
    recipe = yaml.safe_load((tmp_path / "out" / "merge_recipe.yaml").read_text())
    assert list(recipe["precision"].values()) == [f"other/a-posterior@{commit}"]


def test_a_precision_of_other_weights_is_an_error(hub, tmp_path):
    hub.add("org/a", files(folder(tmp_path / "a", precision=False)))
    hub.add("org/b", files(folder(tmp_path / "b", seed=1)))
    config = {
        "models": ["org/a", "org/b"],
        "weights": "precision",
        "precision": {"org/a": "org/b"},
        "out": str(tmp_path / "out"),
    }
    with pytest.raises(PrecisionError, match="other weights"):
        plan_merge(MergeConfig(**config))


def test_inspect_reads_headers_of_the_hub_and_fetches_nothing(hub, tmp_path):
    where = folder(tmp_path / "a")
    commit = hub.add("org/a", files(where)).refs["main"]
    there, here = run_inspect("org/a"), run_inspect(str(where))
    assert there.path == f"org/a@{commit}"
    assert (there.parameters, there.tensors, there.dtypes, there.bytes) == (
        here.parameters,
        here.tensors,
        here.dtypes,
        here.bytes,
    )
    assert [(x.name, x.parameters) for x in there.layers] == [
        (x.name, x.parameters) for x in here.layers
    ]
    assert there.precision.info == here.precision.info
    assert (there.precision.covered, there.precision.numbers) == (
        here.precision.covered,
        here.precision.numbers,
    )
    assert all(r.range for r in hub.log if "/resolve/" in r.path)
    assert not [p for p in (tmp_path / "home").rglob("*") if p.suffix in (".safetensors", ".json")]


def test_inspect_of_the_hub_prints_what_it_knows(hub, tmp_path):
    hub.add("org/a", files(folder(tmp_path / "a")))
    out = CliRunner().invoke(app, ["inspect", "org/a"])
    assert out.exit_code == 0, out.output
    assert "only headers were read" in out.stderr
    assert "ggn, of weights unread, for 100 tokens" in out.stderr
    hub.add("org/pickled", {"pytorch_model.bin": b"x"})
    refused = CliRunner().invoke(app, ["inspect", "org/pickled"])
    assert refused.exit_code == 2
    assert "bmerge convert org/pickled" in refused.stderr


def test_a_disk_that_is_full_is_not_called_a_connection(hub):
    full = hub_errors.explain(OSError(errno.ENOSPC, "No space left on device"), "org/a")
    assert "reading or writing failed here (No space left on device)" in full
    assert "the connection to" in hub_errors.explain(
        ConnectionResetError(errno.ECONNRESET, "reset"), "org/a"
    )


def test_a_mistyped_local_path_is_answered_with_its_neighbour(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"If a local path was meant: did you mean 'runs/base'\?"
    ):
        sources.resolve("runs/basee")
