"""The HTTP client with which huggingface_hub talks to a Hub: patient within limits, and wary.

A server says how long to wait, how much to read, and under which names its answers are stored in
the cache. The client waits at most a minute at a time and a few minutes in all, says so, and asks
again; it gives up on a server that stays silent, and refuses an answer that is too large or that
names what cannot be a commit, a file or a hash. It is installed by `set_client_factory`, so that
fetching and pushing share it. A program that has set a factory of its own keeps that one.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_bayes.documents import DocumentError, parse_json
from mergekit_bayes.errors import CheckpointError, shown

if TYPE_CHECKING:
    import httpx2

logger = logging.getLogger(__name__)

LONGEST_WAIT = 60.0  # seconds of one wait that a server asks for
ALL_WAITS = 300.0  # seconds of waiting in one operation, such as a push
SILENCE = 120.0  # seconds in which a server must answer where huggingface_hub sets no limit
LARGEST_ANSWER = 64 << 20  # bytes of an answer that is held in memory
LONGEST_ANSWER = 600.0  # seconds in which such an answer must be complete
FILES = 500_000  # in the lists of files of one operation
_FIRST_WAIT, _TRIES = 1.0, 4  # where the server does not say how long
_SECONDS = re.compile(r"\d{1,15}(\.\d+)?", re.ASCII)
_LIMIT_RESET = re.compile(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", re.ASCII)
_CONFLICT = "another conflicting operation is in progress"  # huggingface_hub asks again at once
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r'(W/)?"?\w[\w.+=:-]{0,199}"?', re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_HUB_HOSTS = ("huggingface.co", "hf.co")
_OPENS_A_REQUEST = "create_pr"  # the parameter of a commit that opens a pull request


class HubError(CheckpointError):
    """What a Hub answers cannot be used; the text names no repository."""


class _Budget:
    """What is left of an operation's waits and files; waits of several threads count once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self._left, self._until, self._files = ALL_WAITS, 0.0, FILES

    def turn_page(self, files: int) -> bool:
        self._files -= max(files, 100)  # pages may be empty, and without end
        return self._files >= 0

    def take(self, seconds: float) -> bool:
        with self._lock:
            now = _now()
            more = max(0.0, now + seconds - max(now, self._until))
            if more > self._left:
                return False
            self._left -= more
            self._until = max(self._until, now + seconds)
            return True


_BUDGET = _Budget()
_sleep, _now = time.sleep, time.monotonic
_installed = False


def prepare() -> None:
    """Import huggingface_hub with our client in it, and begin a new operation's waits.

    Raises:
        CheckpointError: The library cannot be loaded, as by a wrong variable of the environment.
    """
    global _installed
    try:
        from huggingface_hub import set_client_factory
        from huggingface_hub.utils import _http
    except Exception as error:  # its settings are read while it is imported
        raise CheckpointError(
            f"huggingface_hub cannot be loaded ({type(error).__name__}: {shown(str(error))}). "
            "Check the variables of the environment that begin with HF_."
        ) from None
    _BUDGET.reset()
    default = _http.default_client_factory
    if not _installed and getattr(_http, "_GLOBAL_CLIENT_FACTORY", default) is default:
        set_client_factory(_factory(default))
    _installed = True


def is_commit(value: object) -> bool:
    """Whether a value is the hash of a commit."""
    return isinstance(value, str) and _COMMIT.fullmatch(value) is not None


def in_words(seconds: float) -> str:
    """A duration as a message shows it: its two largest units."""
    if seconds > 100 * 86400:
        return "more than 100 days"
    whole = max(1, round(seconds))
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    parts = []
    for name, size in units:
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count} {name}{'s' * (count > 1)}")
    return " ".join(parts[:2])


def asked_wait(status: int, headers: Mapping[str, str]) -> float | None:
    """The seconds that an answer asks to wait; None if it does not say so in a usable form."""
    if status == 429 and (reset := _LIMIT_RESET.search(headers.get("ratelimit", ""))):
        return float(reset[1][:16])
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    if text.isascii() and text.isdigit():
        return float("inf")
    import email.utils  # only for a date, which is rare

    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def _factory(default: "Callable[[], httpx2.Client]") -> "Callable[[], httpx2.Client]":
    import httpx2

    class Client(httpx2.Client):
        """A client whose requests end, and whose answers are checked."""

        def send(
            self, request: httpx2.Request, *, stream: bool = False, **options: Any
        ) -> httpx2.Response:
            """Send a request, again where the Hub asks for that and the body can be repeated."""
            request.extensions["timeout"] = _timeout(request)
            _keep_token(request)
            tries = 0
            while True:
                response = super().send(request, stream=True, **options)
                try:
                    _check_headers(response)
                    if not stream or response.status_code in (409, 429):
                        response = _read(response)
                    wait = _wait(request, response, tries)
                    if wait is None:
                        return response
                except BaseException:
                    response.close()
                    raise
                response.close()
                tries += 1
                _sleep(wait)
                if not _is_repeatable(request):  # huggingface_hub sends it again, from its file
                    return response

    def make() -> httpx2.Client:
        plain = default()
        plain.close()
        return Client(
            event_hooks=plain.event_hooks,
            follow_redirects=plain.follow_redirects,
            timeout=None,  # `_timeout` sets it for each request
        )

    return make


def _keep_token(request: "httpx2.Request") -> None:
    """Send the user's token to no host but the Hub's, as to one that a list's next page names.

    Nor is it sent in the clear, but to a Hub of the user's own that is named so.
    """
    import httpx2
    from huggingface_hub import constants, get_token

    url = request.url
    is_hub = url.host in _HUB_HOSTS and url.scheme == "https"
    if is_hub or url.origin == httpx2.URL(constants.ENDPOINT).origin:
        return
    if request.headers.get("authorization") == f"Bearer {get_token()}":
        del request.headers["authorization"]


def _timeout(request: "httpx2.Request") -> dict[str, float]:
    """Timeouts where huggingface_hub sets none, as it does for all but downloads."""
    given = request.extensions.get("timeout") or {}
    return {key: given.get(key) or SILENCE for key in ("connect", "read", "write", "pool")}


def _wait(request: "httpx2.Request", response: "httpx2.Response", tries: int) -> float | None:
    """The seconds to wait before a request is sent again; None to hand the answer on.

    Raises:
        HubError: The server limits requests for longer than we wait.
    """
    status, fetches = response.status_code, request.method in ("GET", "HEAD")
    if status < 400:
        return None
    asked = asked_wait(status, response.headers)
    response.extensions["asked"] = asked
    # Else huggingface_hub would wait as well, for as long as the server likes.
    for name in ("retry-after", "ratelimit"):
        response.headers.pop(name, None)
    is_limit = status == 429 or (status == 409 and _CONFLICT in response.text)
    wait = min(_FIRST_WAIT * 2**tries, LONGEST_WAIT) if asked is None else max(asked, _FIRST_WAIT)
    # A server that asks to wait has done nothing. Else a pull request may be open already, and what
    # is fetched huggingface_hub asks for again itself, or takes from its cache.
    if not is_limit and not (status == 503 and asked is not None):
        opens = _OPENS_A_REQUEST in request.url.params
        is_done = fetches or opens or tries >= _TRIES or not _is_repeatable(request)
        if status not in (502, 503, 504) or is_done:
            return None
    if wait <= LONGEST_WAIT and _BUDGET.take(wait):
        cause = "limits requests" if is_limit else "is busy"
        logger.warning("The Hub %s (%d); asking again in %s.", cause, status, in_words(wait))
        return wait
    if not is_limit:
        return None
    what = "is still busy" if asked is None else f"asks to wait {in_words(asked)}"
    raise HubError(
        f"the Hub limits requests ({status}) and {what}; bmerge waits at most "
        f"{in_words(LONGEST_WAIT)} at a time and {in_words(ALL_WAITS)} in all. What has arrived is "
        "kept: run the same line again later."
    )


def _is_repeatable(request: "httpx2.Request") -> bool:
    """Whether the body is in memory, and not a file that has been read."""
    import httpx2

    try:
        return request.content is not None
    except httpx2.RequestNotRead:
        return False


def _check_headers(response: "httpx2.Response") -> None:
    """Refuse names by which huggingface_hub would store files, and strip control characters.

    Raises:
        HubError: A commit or a hash that is none.
    """
    for name, text in list(response.headers.multi_items()):
        if _CONTROL.search(text):  # some are printed, as those of X-HF-Warning
            response.headers[name] = _CONTROL.sub("?", text)
    checks = {"x-repo-commit": _COMMIT, "x-linked-etag": _ETAG}
    if "x-repo-commit" in response.headers and "resolve" in response.request.url.path:
        checks["etag"] = _ETAG
    for name, form in checks.items():
        value = response.headers.get(name)
        if value is not None and (not form.fullmatch(value) or ".." in value):
            raise HubError(
                f"the Hub answered with {name}: {shown(value)}, which is no "
                f"{'commit' if form is _COMMIT else 'hash of a file'}; nothing was stored under it."
            )


def _read(response: "httpx2.Response") -> "httpx2.Response":
    """The answer with its body, of limited size, in limited time.

    Raises:
        HubError: It is larger, takes longer, or lists files under impossible names.
    """
    import httpx2

    end, size, pieces = _now() + LONGEST_ANSWER, 0, []
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_ANSWER or _now() > end:
            raise HubError(
                f"the Hub's answer to {shown(response.request.url.path)} has more than "
                f"{LARGEST_ANSWER >> 20} MiB or takes more than {in_words(LONGEST_ANSWER)}. It "
                "was not read further."
            )
    response.close()
    body = b"".join(pieces)
    path = response.request.url.path
    if response.status_code == 200 and "/api/" in path and "/tree/" in path:
        _check_listing(body)
    headers = httpx2.Headers(response.headers)
    for name in ("content-encoding", "transfer-encoding"):
        headers.pop(name, None)
    if response.request.method != "HEAD":
        headers["content-length"] = str(size)
    answer = httpx2.Response(
        response.status_code,
        headers=headers,
        stream=httpx2.ByteStream(body),
        request=response.request,
        extensions=response.extensions,
        history=response.history,
        default_encoding=response.default_encoding,
    )
    answer.next_request = response.next_request
    answer.read()
    return answer


def _check_listing(body: bytes) -> None:
    """Check a page of a repository's files, whose names become paths and are shown.

    Raises:
        HubError: It is no list of files, or names one outside of the repository.
    """
    try:
        rows = parse_json(body)
    except DocumentError as error:
        raise HubError(f"the Hub's list of files cannot be read ({error}).") from None
    rows = rows if isinstance(rows, list) else [rows]
    if not _BUDGET.turn_page(len(rows)):
        raise HubError(f"the Hub's list of files has more than {FILES:,} files, or does not end.")
    for row in rows:
        path = row.get("path") if isinstance(row, dict) else None
        if not isinstance(path, str) or not _is_plain(path):
            raise HubError(
                f"the Hub lists {shown(row if path is None else path)}, which is no path of a "
                "file in a repository; nothing was fetched."
            )
        size = row.get("size", 0) if isinstance(row, dict) else None
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise HubError(f"the Hub gives {shown(path)} the size {shown(size)}.")


def _is_plain(path: str) -> bool:
    parts = re.split(r"[/\\]", path)
    names_one = all(part not in ("", ".", "..") and len(part.encode()) < 256 for part in parts)
    return names_one and not _CONTROL.search(path)
