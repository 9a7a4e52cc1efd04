"""A Hub on the loopback interface, with which the real client library talks in tests.

Nothing leaves the machine. Its state is in `hub_state`, its answers are in `hub_handler`.
"""

import sys
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any

from tests.hub_handler import Handler
from tests.hub_state import TOKEN, Hub


@contextmanager
def serving():
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()


def environment(hub: Hub, home: Any, token: str | None = TOKEN) -> dict[str, str]:
    """What a process needs to take `hub` for the Hub."""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return variables | ({"HF_TOKEN": token} if token else {})


def use(hub: Hub, monkeypatch: Any, home: Any, token: str | None = TOKEN) -> None:
    """Point this process's client library at `hub`, with a new cache, until the test ends.

    huggingface_hub reads its environment at import, so the constants that it read are set instead;
    it looks them up at every call.
    """
    from huggingface_hub import constants, hf_api

    from mergekit_bayes.checkpoint import hub_client, sources

    home.mkdir(parents=True, exist_ok=True)
    for name, value in environment(hub, home, token).items():
        monkeypatch.setenv(name, value)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(sources, "_COMMITS", {})
    monkeypatch.setattr(hub_client, "_sleep", lambda seconds: None)
    if "transformers.utils.hub" in sys.modules:  # it keeps a client, of the hub of an earlier test
        monkeypatch.setattr(sys.modules["transformers.utils.hub"], "_hf_api", None)
