"""A folder arrives on the Hub in one commit, or is refused with one message."""

import pytest

from bmerge_cli.main import app
from mergekit_bayes.errors import CheckpointError, ConfigError
from mergekit_bayes.hub import push_folder
from tests import hub_double, pushing
from tests.pushing import RUN, files, front, peft_adapter

hub = pushing.hub
merged = pushing.merged


def test_a_folder_arrives_whole_in_one_commit(hub, merged):
    report = push_folder(merged, "org/ab", posterior_form="entries")
    repo = hub.repos["org/ab"]
    there = repo.files()
    assert len(repo.messages) == 2  # the repository's own first one
    assert {n: c for n, c in there.items() if n not in ("README.md", ".gitattributes")} == files(
        merged
    )
    assert (
        front(there["README.md"].decode())["license"] == "apache-2.0"
    )  # of the parents' cards on the Hub
    assert report.commit == repo.refs["main"]
    assert not (merged / "README.md").exists()


def test_an_unchanged_folder_makes_no_commit(hub, merged):
    first = push_folder(merged, "org/ab")
    asked = len(hub.log)
    again = push_folder(merged, "org/ab")
    assert not again.changed
    assert again.commit == first.commit == hub.repos["org/ab"].refs["main"]
    assert not [r for r in hub.log[asked:] if r.method == "PUT" or "/commit/" in r.path]


def test_a_changed_file_is_sent_alone(hub, merged):
    push_folder(merged, "org/ab")
    (merged / "config.json").write_text('{"model_type": "llama"}')
    assert push_folder(merged, "org/ab").sent == ("config.json",)


def test_private_revision_message_and_pull_request(hub, merged):
    push_folder(merged, "org/ab", private=True, message="first")
    repo = hub.repos["org/ab"]
    assert repo.private
    assert repo.messages[-1] == "first"
    main = repo.refs["main"]
    (merged / "config.json").write_text('{"model_type": "llama"}')
    push_folder(merged, "org/ab", revision="v1")
    assert repo.refs["main"] == main
    assert repo.files("v1")["config.json"] == b'{"model_type": "llama"}'
    report = push_folder(merged, "org/ab", create_pr=True)
    assert report.pull_request == f"{hub.url}/org/ab/discussions/1"
    assert repo.refs["main"] == main
    assert repo.files("refs/pr/1")["config.json"] == b'{"model_type": "llama"}'
    (merged / "config.json").write_text('{"model_type": "gpt2"}')
    assert push_folder(merged, "org/ab", revision="refs/pr/1").sent == ("config.json",)
    assert repo.refs["main"] == main
    assert repo.files("refs/pr/1")["config.json"] == b'{"model_type": "gpt2"}'
    with pytest.raises(ConfigError, match="pull request on main"):
        push_folder(merged, "org/ab", create_pr=True, revision="v1")


def test_private_is_refused_where_the_repository_is_public(hub, merged):
    hub.add("org/ab", {"README.md": b"hello"})
    with pytest.raises(CheckpointError, match="exists and is public"):
        push_folder(merged, "org/ab", private=True)
    assert hub.repos["org/ab"].files() == {"README.md": b"hello"}


def test_an_interrupted_push_leaves_nothing_half_and_is_resumed_by_the_same_line(
    hub, merged, monkeypatch
):
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    hub.cut_uploads = 1
    with pytest.raises(CheckpointError, match="run the same line again"):
        push_folder(merged, "org/ab")
    assert set(hub.repos["org/ab"].files()) == {".gitattributes"}
    hub.cut_uploads, arrived = None, set(hub.large)
    asked = len(hub.log)
    push_folder(merged, "org/ab")
    sent = {r.path.removeprefix("/lfs/") for r in hub.log[asked:] if r.method == "PUT"}
    assert sent
    assert not sent & arrived
    assert (
        hub.repos["org/ab"].files()["model.safetensors"]
        == (merged / "model.safetensors").read_bytes()
    )


def test_a_card_that_cannot_be_made_makes_no_repository(hub, merged):
    (merged / "README.md").write_text("---\na: [\n---\nText\n")
    with pytest.raises(ConfigError, match="front matter"):
        push_folder(merged, "org/ab")
    assert "org/ab" not in hub.repos


def test_a_persons_card_on_the_hub_is_kept(hub, merged):
    hub.add("org/ab", {"README.md": b"# Mine\n\nBy hand.\n"})
    push_folder(merged, "org/ab")
    assert (
        hub.repos["org/ab"]
        .files()["README.md"]
        .decode()
        .count("# Mine\n\nBy hand.\n\n<!-- bmerge: begin")
        == 1
    )


def test_a_persons_card_on_the_hub_is_kept_though_peft_leaves_one_in_the_folder(hub, tmp_path):
    where = peft_adapter(tmp_path / "a")
    hub.add("org/a", {"README.md": b"---\nlicense: mit\n---\n# Mine\n\nBy hand.\n"})
    push_folder(where, "org/a")
    card = hub.repos["org/a"].files()["README.md"].decode()
    assert "# Mine\n\nBy hand.\n\n<!-- bmerge: begin" in card
    assert front(card)["license"] == "mit"
    assert "[More Information Needed]" not in card


@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        ("org/ab", None, "you are not logged in"),
        ("org/ab", "hf_wrong", "does not accept your token"),
        ("else/ab", hub_double.TOKEN, "no right to do this"),
    ],
)
def test_a_refusal_is_one_message_with_the_way_out(
    hub, merged, monkeypatch, tmp_path, name, token, says
):
    hub_double.use(hub, monkeypatch, tmp_path / "home", token)
    with pytest.raises(CheckpointError, match=says):
        push_folder(merged, name)


def test_a_pull_request_to_a_repository_that_is_not_there_is_refused(hub, merged):
    with pytest.raises(CheckpointError, match="no such repository"):
        push_folder(merged, "org/nowhere", create_pr=True)
    assert "org/nowhere" not in hub.repos


@pytest.mark.parametrize("name", ["ab", "org/ab@v1", "org/ab/c", "-x/y"])
def test_a_name_that_is_none_is_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(ConfigError, match="not the name of a repository"):
        push_folder(tmp_path / "missing", name)


def test_a_file_is_not_pushed(hub, merged, tmp_path):
    out = RUN.invoke(
        app, ["merge", "org/a", "org/b", "-o", "x.safetensors", "--push-to", "org/both"]
    )
    assert out.exit_code == 2
    assert "--push-to pushes a folder" in out.stderr
