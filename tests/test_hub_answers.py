"""What a hostile Hub answers ends in one message, writes nowhere else, and prints nothing odd."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from typer.testing import CliRunner

from bmerge_cli.main import app
from mergekit_bayes.checkpoint import hub_client, hub_errors, remote, sources
from mergekit_bayes.errors import BmergeError, CheckpointError
from mergekit_bayes.hub import check_login, push_folder
from tests import hub_double, pushing
from tests.hub_state import TOKEN, Answer
from tests.pushing import files, folder

server = pushing.hub
ODD = [None, True, -1, 10**30, 1.5, "", "\x1b[2J", [], {}, ["x"], {"x": 1}]
_RARELY = [
    ODD[6],
    *(pytest.param(value, marks=pytest.mark.slow) for value in ODD if value != ODD[6]),
]


@pytest.fixture
def hub(server, monkeypatch):
    """The Hub; huggingface_hub's own waits take no time."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return server


def tampered(hub, part, change):
    """Let `change` make another answer for paths with `part`."""
    hub.tamper = lambda path, answer: change(answer) if part in path else answer


def with_headers(**headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda answer: answer._replace(headers=answer.headers | names)


def with_json(change):
    """Change the JSON of the answers whose type `change` is made for."""

    def changed(answer):
        try:
            content = json.loads(answer.content)
            return answer._replace(content=json.dumps(change(content)).encode())
        except (TypeError, ValueError):
            return answer

    return changed


def listing(tmp_path):
    return {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize(
    "headers",
    [
        {"ETag": '"../../../../evil"'},
        {"ETag": '"FOLDER/evil"'},
        {"ETag": '".."'},
        {"ETag": '"' + "a" * 300 + '"'},
        {"X_Linked_ETag": '"../../../../evil"'},
        {"X_Repo_Commit": "../../../evil"},
        {"X_Repo_Commit": "0" * 39},
        {"X_Repo_Commit": "/etc"},
    ],
)
def test_a_hash_that_is_a_path_stores_nothing(hub, tmp_path, headers):
    hub.add("org/a", {"config.json": b"{}"})
    headers = {k: v.replace("FOLDER", str(tmp_path)) for k, v in headers.items()}
    tampered(hub, "/resolve/", with_headers(**headers))
    before = listing(tmp_path)
    with pytest.raises(CheckpointError, match=r"'org/a': the Hub answered with [a-z-]+: "):
        sources.resolve("org/a")
    stored = listing(tmp_path) - before
    assert all("models--org--a" in str(p) or "CACHEDIR" in str(p) for p in stored), stored


@pytest.mark.parametrize(
    "name",
    [
        "../evil.json",
        "/evil.json",
        "a/../../../../evil.json",
        "..\\evil.json",
        "a//b.json",
        "./x.json",
        "",
        "x\x1b[2J.json",
        "x\0.json",
        "x" * 300 + ".json",
        7,
        None,
        ["config.json"],
    ],
)
def test_a_listed_name_that_is_no_path_in_the_repository_is_refused(hub, tmp_path, name):
    hub.add("org/a", {"config.json": b"{}"})
    row = {"type": "file", "path": name, "size": 2, "oid": "0" * 40}
    tampered(hub, "/tree/", with_json(lambda rows: [*rows, row]))
    with pytest.raises(CheckpointError, match="'org/a': the Hub lists") as caught:
        sources.resolve("org/a", ())
    assert "\x1b" not in str(caught.value)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("value", _RARELY, ids=repr)
@pytest.mark.parametrize("key", ["size", "path", "oid", "lfs", "type"])
def test_odd_types_in_a_listing_are_one_message_or_nothing(hub, tmp_path, key, value):
    hub.add("org/a", {"config.json": b"{}"})
    tampered(
        hub,
        "/tree/",
        with_json(lambda rows: [row | {key: value} for row in rows]),
    )
    one_message(lambda: remote.file_sizes("org/a"))
    one_message(lambda: sources.resolve("org/a"))
    one_message(lambda: push_folder(folder(tmp_path / "a"), "org/a"))


@pytest.mark.parametrize("value", _RARELY, ids=repr)
@pytest.mark.parametrize(
    "part", ["whoami", "/api/models/org/a", "/tree/", "/preupload/", "/commit/", "/create", "batch"]
)
def test_an_answer_of_another_type_is_one_message(hub, tmp_path, part, value):
    hub.add("org/a", {"config.json": b"{}"})
    tampered(hub, part, with_json(lambda content: value))
    one_message(lambda: check_login("org/a"))
    one_message(lambda: push_folder(folder(tmp_path / "a"), "org/a"))
    one_message(lambda: remote.file_sizes("org/a"))


@pytest.mark.parametrize("value", _RARELY, ids=repr)
def test_odd_fields_of_an_account_and_of_a_repository_are_one_message(hub, tmp_path, value):
    hub.add("org/a", {"config.json": b"{}"})
    for key in ("name", "auth", "orgs"):
        tampered(hub, "whoami", with_json(lambda content, k=key: content | {k: value}))
        one_message(lambda: check_login("org/a"))
    hub.auth, hub.orgs = {"accessToken": {"role": "write"}}, [{"name": value}, value]
    hub.tamper = lambda path, answer: answer
    one_message(lambda: check_login("org/a"))
    for key in ("sha", "private", "siblings", "gated"):
        tampered(hub, "/models/org/a", with_json(lambda content, k=key: content | {k: value}))
        sources._COMMITS.clear()
        one_message(lambda: sources.resolve("org/a"))
        one_message(lambda path=tmp_path / key: push_folder(folder(path), "org/a", private=True))
    for key in ("commitOid", "commitUrl", "pullRequestUrl"):
        tampered(hub, "/commit/", with_json(lambda content, k=key: content | {k: value}))
        one_message(lambda path=tmp_path / key: push_folder(folder(path), "org/a", create_pr=True))


def one_message(call):
    """Nothing but an error of ours, without control characters and without the token."""
    said = ""
    try:
        call()
    except BmergeError as error:
        said = str(error)
    assert said.isprintable()
    assert TOKEN not in said


@pytest.mark.parametrize("part", ["/api/models/org/a", "/tree/", "/resolve/"])
def test_an_answer_that_fills_the_memory_is_not_read(hub, monkeypatch, part):
    hub.add("org/a", {"config.json": b"{}"})
    monkeypatch.setattr(hub_client, "LARGEST_ANSWER", 1000)
    tampered(hub, part, lambda answer: Answer(500 if "res" in part else 200, {}, b"[" * 5000))
    with pytest.raises(CheckpointError, match="'org/a': the Hub"):
        sources.resolve("org/a")


def test_a_list_of_files_without_end_is_one_message(hub, monkeypatch):
    hub.add("org/a", {"config.json": b"{}"})
    link = f'<{hub.url}/api/models/org/a/tree/main?cursor=x>; rel="next"'
    tampered(hub, "/tree/", with_headers(Link=link))
    monkeypatch.setattr(hub_client, "FILES", 1000)
    with pytest.raises(CheckpointError, match="has more than 1,000 files, or does not end"):
        sources.resolve("org/a")


@pytest.mark.parametrize("what", ["X-HF-Warning", "X-Error-Message", "body"])
def test_what_a_server_says_cannot_move_the_cursor_nor_show_a_token(hub, capfd, what):
    hub.add("org/a", {"config.json": b"{}"})
    text = f"\x1b[2J\x1b]0;owned\x07 {TOKEN} Bearer abc https://me:pw@host/?x"
    headers = {} if what == "body" else {what: f"topic{what}; {text}"}
    content = json.dumps({"error": text}).encode() if what == "body" else b"{}"
    tampered(hub, "/api/models/", lambda answer: Answer(418, headers, content))
    with pytest.raises(CheckpointError) as caught:
        sources.resolve("org/a")
    printed = str(caught.value) + "".join(capfd.readouterr()).replace("\n", "")
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert TOKEN not in str(caught.value)
    assert ":pw@" not in str(caught.value)


@pytest.mark.parametrize(
    "secret",
    ["hf_oauth_abc.def-ghi", "hf_jwt_aa.bb.cc", "hf_abc", "Bearer xyzzy", "https://u:xyzzy@h/"],
)
def test_tokens_of_all_forms_are_taken_out_of_messages(hub, secret):
    for text in (secret, f"x={secret}", f"'{secret}'", f"({secret}) and more", f"\n{secret}\n"):
        said = hub_errors.explain(ValueError(text), "org/a")
        assert not [part for part in ("abc", "def", "ghi", "aa.", "bb", "xyzzy") if part in said]


@pytest.fixture
def elsewhere():
    """Another server: its address, and the tokens that it has seen."""
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *args):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    threading.Thread(target=other.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{other.server_port}", seen
    other.shutdown()
    other.server_close()


def test_a_redirect_to_another_host_carries_no_token(hub, elsewhere):
    place, seen = elsewhere
    hub.add("org/a", {"config.json": b"[]"})
    headers = {"Location": f"{place}/blob", "X-Linked-Size": "2"}
    tampered(hub, "/resolve/", lambda a: Answer(302, a.headers | headers, b""))
    assert (sources.resolve("org/a") / "config.json").read_bytes() == b"[]"
    assert seen == [None]
    assert {request.token for request in hub.log} == {TOKEN}


@pytest.mark.parametrize("kind", ["moved", "next page"])
def test_a_list_that_goes_on_elsewhere_carries_no_token(hub, elsewhere, kind):
    place, seen = elsewhere
    hub.add("org/a", {"config.json": b"[]"})
    link = {"Link": f'<{place}/api/models/org/a/tree/main>; rel="next"'}
    moved = Answer(307, {"Location": f"{place}/api/models/org/a/tree/main"})
    tampered(hub, "/tree/", with_headers(**link) if kind == "next page" else lambda answer: moved)
    remote.file_sizes("org/a")
    assert seen == [None]


@pytest.mark.parametrize(
    ("address", "is_sent"),
    [
        ("https://huggingface.co/api/models/a/b", True),
        ("http://huggingface.co/api/models/a/b", False),
        ("https://huggingface.co.evil.example/a", False),
        ("https://huggingface.co@evil.example/a", False),
    ],
)
def test_a_token_goes_to_the_hub_alone_and_not_in_the_clear(hub, address, is_sent):
    request = httpx2.Request("GET", address, headers={"Authorization": f"Bearer {TOKEN}"})
    hub_client._keep_token(request)
    assert ("authorization" in request.headers) == is_sent


@pytest.mark.parametrize("part", ["whoami", "/api/models/org/a", "/tree/", "/commit/", "/create"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"", b"1" * 5000, b'{"a":NaN'])
def test_any_bytes_for_an_answer_are_one_message(hub, tmp_path, part, content):
    hub.add("org/a", {"config.json": b"{}"})
    tampered(hub, part, lambda answer: answer._replace(content=content))
    one_message(lambda: check_login("org/a"))
    one_message(lambda: sources.resolve("org/a"))
    one_message(lambda: push_folder(folder(tmp_path / "a"), "org/a"))


@pytest.mark.parametrize("kind", ["folder", "binary"])
def test_a_token_file_that_is_none_is_one_message(hub, monkeypatch, tmp_path, kind):
    monkeypatch.delenv("HF_TOKEN")
    token = tmp_path / "home" / "token"
    token.mkdir() if kind == "folder" else token.write_bytes(b"\xffsecret")
    hub.add("org/a", {"config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"'org/a': (your token holds|reading or writing)"):
        sources.resolve("org/a")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (10**9).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (60).to_bytes(8, "little")
        + b'{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}     ',
        (60).to_bytes(8, "little")
        + b'{"w":{"dtype":"\\u001b","shape":[1],"data_offsets":[0,4]}}   ',
        (58).to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":"x","data_offsets":[0,4]}}    ',
        (20).to_bytes(8, "little") + b'{"__metadata__": 7 }',
        (25).to_bytes(8, "little") + b'{"__metadata__":{"a":[]}}',
        b"{",
    ],
)
def test_a_header_that_is_none_is_one_message(hub, header):
    hub.add("org/a", {"model.safetensors": header, "config.json": b"{}"})
    with pytest.raises(CheckpointError) as caught:
        remote.read_headers("org/a", ("model.safetensors",))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("ref", ["org/a@../../x", "org/..", "../a/b", "org/a@", "org/a@x//y"])
def test_a_reference_that_leaves_the_cache_is_no_hub_id(hub, ref):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        sources.resolve(ref)
    assert not hub.log


@pytest.mark.parametrize(
    "ref", ["a" * 300, "org/" + "a" * 300, "~nobody-here/x", "a\0b", "\x1b[2J"]
)
def test_a_name_that_no_file_can_have_is_one_message(hub, ref):
    with pytest.raises(CheckpointError) as caught:
        sources.resolve(ref)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["garbage", "binary", "empty", "folder", "pipe", "path"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_damaged_note_in_the_cache_is_one_message(hub, monkeypatch, tmp_path, kind, offline):
    from huggingface_hub import constants

    hub.add("org/a", {"config.json": b"{}"})
    note = tmp_path / "home" / "hub" / "models--org--a" / "refs" / "main"
    note.parent.mkdir(parents=True)
    if kind == "folder":
        note.mkdir()
    elif kind == "pipe":
        os.mkfifo(note)
    else:
        content = {"garbage": b"x", "binary": b"\xff", "empty": b"", "path": b"../../../.."}
        note.write_bytes(content[kind])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    one_message(lambda: sources.resolve("org/a"))


# Wrong settings of the client, with the commands that cannot do without them.
_SETTINGS = {
    ("HF_HUB_DOWNLOAD_TIMEOUT", "soon"): ("inspect", "merge", "push"),
    ("HF_HUB_ETAG_TIMEOUT", ""): ("inspect", "merge", "push"),
    ("HF_ENDPOINT", "no address"): ("inspect", "merge", "push"),
    ("HF_TOKEN", "hf_secret\x01part"): ("inspect", "merge", "push"),
    ("HF_HOME", "/dev/null/x"): ("merge",),
    ("HF_HUB_CACHE", __file__): ("merge",),
    ("HF_HUB_VERBOSITY", "loud"): (),
}
_RUN = """
import os, sys
sys.argv = ["bmerge", *sys.argv[1:]]
from bmerge_cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "merge", "push"])
@pytest.mark.parametrize(("setting", "hindered"), _SETTINGS.items())
def test_a_wrong_setting_of_the_client_is_one_message(hub, tmp_path, command, setting, hindered):
    model = folder(tmp_path / "a")
    hub.add("org/a", files(model))
    words = {
        "inspect": ["org/a"],
        "merge": ["org/a", "org/a", "--weights", "uniform", "-o", str(tmp_path / "out")],
        "push": [str(model), "org/b"],
    }
    variables = hub_double.environment(hub, tmp_path / "home") | dict([setting])
    out = subprocess.run(
        [sys.executable, "-c", _RUN, command, *words[command]],
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert out.returncode == (2 if command in hindered else 0), out.stderr
    assert "Traceback" not in out.stderr
    assert "secret" not in out.stderr + out.stdout
    if command in hindered:
        assert out.stderr.strip().splitlines()[-1].startswith("CheckpointError: ")


def test_a_token_that_cannot_be_sent_is_named_and_not_shown(hub, monkeypatch):
    hub.add("org/a", {"config.json": b"{}"})
    for token in ("hf_sécret", "hf_se cret", "hf_se\x1bcret"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(CheckpointError, match="holds characters that no token has") as caught:
            sources.resolve("org/a")
        assert "cret" not in str(caught.value)


def test_a_port_that_refuses_is_one_message(hub, monkeypatch):
    from huggingface_hub import constants, hf_api

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(hf_api.api, "endpoint", f"http://127.0.0.1:{port}")
    out = CliRunner().invoke(app, ["inspect", "org/a"])
    assert out.exit_code == 2
    assert "the connection to" in out.stderr
