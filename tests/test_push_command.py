"""The push command lists files, prints the address and never shows the token."""

import json
import os
import subprocess
import sys

import pytest

from bmerge_cli.main import app
from tests import hub_double, pushing
from tests.pushing import RUN, files, front

hub = pushing.hub
merged = pushing.merged


def test_a_dry_run_lists_files_and_card_and_contacts_nobody(hub, merged):
    asked = len(hub.log)
    push = ["push", str(merged), "org/ab", "--posterior-form", "entries", "--dry-run"]
    out = RUN.invoke(app, [*push, "--json"])
    assert out.exit_code == 0, out.output
    document = json.loads(out.stdout)
    assert {f["path"]: f["size"] for f in document["files"]} == {
        n: len(c) for n, c in files(merged).items()
    } | {"README.md": len(document["card"].encode())}
    assert front(document["card"])["base_model_relation"] == "merge"
    assert len(hub.log) == asked
    text = RUN.invoke(app, push)
    assert document["card"] in text.stdout
    assert "model.safetensors" in text.stderr


def test_the_command_prints_the_address_and_one_json_document(hub, merged):
    out = RUN.invoke(app, ["push", str(merged), "org/ab"])
    assert out.stdout.strip() == f"{hub.url}/org/ab"
    assert "pushed to org/ab" in out.stderr
    again = RUN.invoke(app, ["push", str(merged), "org/ab", "--json", "-q"])
    assert json.loads(again.stdout)["changed"] is False
    assert again.stderr == ""


@pytest.mark.parametrize("token", [hub_double.TOKEN, "hf_wrongButSecret", "hf_with\x01control"])
def test_the_token_is_nowhere_in_what_a_process_says_or_writes(hub, merged, tmp_path, token):
    home = tmp_path / "fresh"
    environment = (
        os.environ
        | hub_double.environment(hub, home, token)
        | {"HF_HUB_VERBOSITY": "debug", "HF_DEBUG": "0"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "bmerge_cli.main", "push", str(merged), "org/ab"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == (0 if token == hub_double.TOKEN else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert token not in done.stdout + done.stderr
    assert token.replace("\x01", "\\x01") not in done.stdout + done.stderr
    for place in (home, merged):
        for path in place.rglob("*") if place.exists() else ():
            assert not path.is_file() or token.encode() not in path.read_bytes(), path
    assert all(token.encode() not in c for r in hub.repos.values() for c in r.files().values())


def test_a_quiet_merge_by_name_prints_nothing(hub, merged, tmp_path):
    environment = os.environ | hub_double.environment(hub, tmp_path / "fresh")
    del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
    line = [
        sys.executable,
        "-m",
        "bmerge_cli.main",
        "merge",
        "org/a",
        "org/b",
        "--push-to",
        "org/quiet",
        "-q",
    ]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "model.safetensors" in hub.repos["org/quiet"].files()
