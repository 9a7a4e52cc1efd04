"""How long a Hub can make us wait, and that what is asked again is done once."""

import threading
import time
from collections import Counter

import pytest

from mergekit_bayes.checkpoint import hub_client, sources
from mergekit_bayes.checkpoint.hub_client import ALL_WAITS, LONGEST_WAIT, asked_wait, in_words
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.hub import check_login, push_folder
from tests import pushing
from tests.hub_state import TOKEN, Answer, Fault
from tests.pushing import files, folder

hub = pushing.hub


class Waits(list):
    """Seconds, in the order of the waits, and their sum by thread."""

    def __init__(self):
        super().__init__()
        self.by_thread = Counter()

    def add(self, seconds):
        self.append(seconds)
        self.by_thread[threading.get_ident()] += seconds


@pytest.fixture
def slept(hub, monkeypatch):
    """The seconds of all waits; none takes any time."""
    waits = Waits()
    monkeypatch.setattr(hub_client, "_sleep", waits.add)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub's own
    monkeypatch.setattr(hub_client, "_now", lambda: 100.0 + sum(waits))
    return waits


def busy(status=429, **headers):
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, names, b'{"error": "slow down"}')


_STEPS = [
    ("GET", "whoami"),
    ("POST", "repos/create"),
    ("GET", "/api/models/org/new"),
    ("GET", "/tree/"),
    ("POST", "/branch/"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/commit/"),
    ("HEAD", "/resolve/"),
    ("GET", "/resolve/"),
]


@pytest.mark.parametrize("status", [429, 503])
def test_every_step_of_a_push_and_of_a_fetch_waits_as_asked_and_goes_on(
    hub, slept, tmp_path, caplog, status
):
    hub.faults = [Fault(*step, busy(status, Retry_After="7"), times=2) for step in _STEPS]
    check_login("org/new")
    push_folder(folder(tmp_path / "a"), "org/new", revision="side")
    sources.resolve("org/new@side")
    assert [fault.times for fault in hub.faults] == [0] * len(_STEPS)
    assert [wait for wait in slept if wait == 7.0] == [7.0] * 2 * len(_STEPS)
    assert "asking again in 7 seconds" in caplog.text
    assert len(hub.repos["org/new"].messages) == 2


@pytest.mark.parametrize(
    ("method", "part", "headers"),
    [
        ("GET", "/api/models/", {"Retry_After": "100000"}),
        ("HEAD", "/resolve/", {"Retry_After": "9" * 400}),
        ("POST", "/commit/", {"Retry_After": "9" * 5000}),
        ("GET", "/tree/", {"Retry_After": "Fri, 31 Dec 9999 23:59:59 GMT"}),
        ("PUT", "/lfs/", {"RateLimit": '"api";r=0;t=100000'}),
        ("POST", "/create", {"RateLimit": f'"api";r=0;t={"9" * 5000}'}),
    ],
)
def test_a_wait_of_hours_is_one_message(hub, slept, tmp_path, method, part, headers):
    hub.add("org/a", files(folder(tmp_path / "a")))
    hub.faults = [Fault(method, part, busy(**headers), times=99)]
    with pytest.raises(CheckpointError, match=r"'org/\w+': the Hub limits requests \(429\) and"):
        _fetch_and_push(folder(tmp_path / "b", seed=1))
    assert sum(slept) == 0


def _fetch_and_push(path):
    sources.resolve("org/a")
    push_folder(path, "org/b")


_STATUSES = (429, 500, 502, 503, 504, 408)
_ASKED = ("100000", "59", None, "-1", "soon", "", "²", "1e9")


@pytest.mark.parametrize(
    ("status", "retry_after"),
    [
        pytest.param(
            status, asked, marks=() if (i + j) % 12 == 0 and status < 504 else pytest.mark.slow
        )
        for i, status in enumerate(_STATUSES)
        for j, asked in enumerate(_ASKED)
    ],
)
def test_no_answer_makes_us_wait_longer_than_the_caps(hub, slept, tmp_path, status, retry_after):
    hub.add("org/a", files(folder(tmp_path / "a")))
    headers = {} if retry_after is None else {"Retry_After": retry_after}
    for part in ("/api/models/", "/resolve/"):
        hub.faults = [
            Fault(method, part, busy(status, **headers), times=10**6)
            for method in ("GET", "HEAD", "POST")
        ]
        slept.by_thread.clear()
        with pytest.raises(CheckpointError, match="'org/a'"):
            sources.resolve("org/a")
        assert max(slept, default=0) <= LONGEST_WAIT
        # Files are fetched at once, in a thread each; the user waits as long as one of them.
        assert max(slept.by_thread.values(), default=0) <= ALL_WAITS


def test_huggingface_hub_itself_does_not_wait_for_what_a_server_asks(hub, monkeypatch, tmp_path):
    hub.add("org/a", files(folder(tmp_path / "a")))
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)
    hub.faults = [Fault("GET", "/tree/", busy(500, Retry_After="100000"), times=99)]
    with pytest.raises(CheckpointError, match="asks to wait 1 day 3 hours"):
        sources.resolve("org/a")
    assert asked
    assert max(asked) <= 8


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/commit/", None, done=True),
        Fault("POST", "/commit/", busy(504), done=True),
        Fault("POST", "/commit/", busy(502), done=True),
        Fault("POST", "/commit/", Answer(200, {}, b"<html>"), done=True),
    ],
    ids=["connection-lost", "504", "502", "nonsense"],
)
def test_a_commit_whose_answer_is_lost_is_found_and_not_made_twice(hub, slept, tmp_path, fault):
    hub.faults = [fault]
    report = push_folder(folder(tmp_path / "a"), "org/new")
    repo = hub.repos["org/new"]
    assert len(repo.messages) == 2
    assert (report.changed, report.commit) == (True, repo.refs["main"])
    assert not push_folder(tmp_path / "a", "org/new").changed


def test_a_commit_of_somebody_else_is_not_taken_for_ours(hub, slept, tmp_path):
    repo = hub.add("org/new", {".gitattributes": b""})
    hub.faults = [Fault("POST", "/commit/", None)]
    hub.tamper = lambda path, answer: (
        repo.commit("main", {}, "theirs") and answer if "/validate-yaml" in path else answer
    )
    with pytest.raises(CheckpointError, match="the connection to"):
        push_folder(folder(tmp_path / "a"), "org/new")
    assert repo.messages == ["initial commit", "theirs"]


@pytest.mark.parametrize(
    ("answer", "tries"), [(busy(504), 1), (busy(503), 1), (busy(429, Retry_After="1"), 2)]
)
def test_a_pull_request_is_asked_for_again_only_where_it_was_refused(
    hub, slept, tmp_path, answer, tries
):
    hub.add("org/new", {".gitattributes": b""})
    hub.faults = [Fault("POST", "/commit/", answer)]
    try:
        push_folder(folder(tmp_path / "a"), "org/new", create_pr=True)
        assert tries == 2
    except CheckpointError:
        assert tries == 1
    assert len(hub.requested("POST", "/commit/")) == tries


def test_the_name_of_a_repository_in_conflict_is_not_asked_for_without_end(hub, slept, tmp_path):
    text = b"Cannot create repo: another conflicting operation is in progress"
    hub.faults = [Fault("POST", "repos/create", Answer(409, {}, text), times=10**6)]
    with pytest.raises(CheckpointError, match="still busy"):
        push_folder(folder(tmp_path / "a"), "org/new")
    assert len(hub.requested("POST", "repos/create")) < 20


@pytest.mark.parametrize("part", ["/revision/", "/api/models/org/a", "/tree/", "/resolve/"])
def test_a_hub_that_says_nothing_is_one_message(hub, slept, monkeypatch, tmp_path, part):
    from huggingface_hub import constants

    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, 0.02)
    monkeypatch.setattr(hub_client, "SILENCE", 0.02)
    monkeypatch.setattr("huggingface_hub.file_download._ETAG_RETRY_TIMEOUT", 0.02)
    repo = hub.add("org/a", files(folder(tmp_path / "a")))
    repo.refs["v1"] = repo.refs["main"]
    hub.silent = part
    with pytest.raises(CheckpointError, match="the connection to"):
        sources.resolve("org/a@v1")


def test_a_push_to_a_hub_that_says_nothing_is_one_message(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub_client, "SILENCE", 0.02)
    hub.silent = "repos/create"
    with pytest.raises(CheckpointError, match="the connection to"):
        push_folder(folder(tmp_path / "a"), "org/new")


def test_a_program_keeps_the_client_that_it_has_set(hub, monkeypatch):
    import httpx2
    import huggingface_hub

    made = []

    def factory():
        made.append(httpx2.Client())
        return made[-1]

    monkeypatch.setattr(hub_client, "_installed", False)
    huggingface_hub.set_client_factory(factory)
    try:
        hub.add("org/a", {"config.json": b"{}"})
        sources.resolve("org/a")
        assert made
    finally:
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
        monkeypatch.setattr(hub_client, "_installed", False)
        hub_client.prepare()


def test_what_an_answer_asks_for_is_read_in_its_forms():
    assert asked_wait(429, {"retry-after": " 12 "}) == 12
    assert asked_wait(429, {"retry-after": "1.5"}) == 1.5
    assert asked_wait(429, {"ratelimit": '"api";r=0;t=55', "retry-after": "3"}) == 55
    assert asked_wait(503, {"ratelimit": '"api";r=0;t=55', "retry-after": "3"}) == 3
    assert asked_wait(429, {"ratelimit": '"api";r=5;t=55'}) is None
    assert asked_wait(429, {"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}) == 0
    for odd in ("-3", "soon", "", "²", "1e9", "Thu, 99 Foo", "0x10"):
        assert asked_wait(429, {"retry-after": odd}) is None
    assert in_words(100_000) == "1 day 3 hours"
    assert in_words(59) == "59 seconds"
    assert in_words(90) == "1 minute 30 seconds"
    assert in_words(float("inf")) == "more than 100 days"


def test_waits_of_threads_at_once_count_once(monkeypatch):
    budget, now = hub_client._Budget(), [100.0]
    monkeypatch.setattr(hub_client, "_now", lambda: now[0])
    assert all(budget.take(60) for _ in range(50))
    for _ in range(4):
        now[0] += 60
        assert budget.take(60)
    now[0] += 60
    assert not budget.take(1)


def test_a_token_is_in_no_line_about_waiting(hub, slept, tmp_path, caplog):
    hub.add("org/a", files(folder(tmp_path / "a")))
    hub.faults = [Fault("GET", "/api/models/", busy(Retry_After="1", X_Error_Message=TOKEN))]
    sources.resolve("org/a")
    assert "asking again" in caplog.text
    assert TOKEN not in caplog.text
