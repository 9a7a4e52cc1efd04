"""A Hub on the loopback interface whose answers are broken, as files are elsewhere."""

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.fuzzing.documents import TEXTS, json_spelling, json_values
from scripts.fuzzing.mutations import BYTES, TEXT
from tests import hub_double
from tests.hub_state import Answer, Hub
from tests.pushing import files

_STATUSES = (204, 206, 301, 304, 307, 400, 401, 403, 404, 409, 412, 416, 418, 429, 500, 503, 504)
_HEADERS = (
    *("ETag", "X-Linked-ETag", "X-Linked-Size", "X-Repo-Commit", "Location", "Retry-After"),
    *("Content-Type", "Content-Encoding", "Link", "X-Error-Code", "X-Error-Message"),
)
_VALUES = ("-1", "1" * 400, "1e9", "100000", "0" * 40, "/api/models/org/a", "gzip", "x" * 5000)


@contextlib.contextmanager
def served(world: Path, home: Path) -> Iterator[Hub]:
    """A Hub with the models of the world, to which the client of this process talks.

    Args:
        world: The world.
        home: The client's cache, which begins empty.
    """
    shutil.rmtree(home, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch, hub_double.serving() as hub:
        hub_double.use(hub, patch, home)
        patch.setattr(time, "sleep", lambda seconds: None)  # the client waits before it asks again
        for name in ("a", "b"):
            hub.add(f"org/{name}", files(world / name))
        yield hub


def requested(hub: Hub) -> list[str]:
    """The paths that were asked for, sorted."""
    return sorted({request.path for request in hub.log})


def break_answers(hub: Hub, path: str, rng: random.Random) -> str:
    """Let the answers for a path be broken in one way; returns which."""
    kind = rng.choice(("status", "header", "header", "content", "content", "content"))
    status, times = rng.choice(_STATUSES), rng.choice((1, 10**9))
    header, value = rng.choice(_HEADERS), _header_text(rng)
    ways = (json_values, json_values, json_values, json_spelling, *BYTES, *TEXT)
    change, seed = rng.choice(ways), rng.random()
    left = times

    def tamper(asked: str, answer: Answer) -> Answer:
        nonlocal left
        if asked.partition("?")[0] != path or left == 0:
            return answer
        left -= 1
        if kind == "status":
            return answer._replace(status=status)
        if kind == "header":
            return answer._replace(headers=answer.headers | {header: value})
        try:
            return answer._replace(content=change(answer.content, random.Random(seed)))
        except ValueError:  # no JSON
            return answer._replace(content=answer.content[::-1])

    hub.tamper = tamper
    what = {"status": status, "header": f"{header} {value[:40]!r}", "content": change.__name__}
    return f"{kind}: {what[kind]}, {'once' if times == 1 else 'always'}"


def _header_text(rng: random.Random) -> str:
    text = rng.choice((*TEXTS, *_VALUES)).encode("latin-1", "replace").decode("latin-1")
    return text.replace("\n", " ").replace("\0", " ")
