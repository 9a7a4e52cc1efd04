"""What the Hub's test double holds: repositories in memory, content-addressed as in git.

Files of tensors are large (LFS; the Hub goes by name, size and content), all others regular. A
test sets what goes wrong (`gated`, `cut_uploads`, `cut_downloads`, `faults`, `tamper`) and reads
the requests (`log`).
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

LARGE = (".safetensors", ".posterior")
TOKEN = "hf_aTokenThatNobodyMaySee"
USER = "me"
ORGANISATIONS = ("org", "me")


class Blob(NamedTuple):
    """The content of a file; `lfs` says whether it is stored as a large one."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def sha1(self) -> str:
        """The git hash."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The hash by which the Hub names the file."""
        return self.sha256 if self.lfs else self.sha1


@dataclass
class Repo:
    """A repository: commits as listings of files, and refs that name them."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, Blob], message: str) -> str:
        """Replace all files of a ref in one commit; returns its hash."""
        listing = json.dumps(
            [sorted((p, b.oid) for p, b in files.items()), message, len(self.commits)]
        )
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Content by path."""
        return {p: b.content for p, b in self.commits[self.refs.get(revision, revision)].items()}


class Request(NamedTuple):
    """A request that the server received."""

    method: str
    path: str
    range: str | None
    token: str | None


class Answer(NamedTuple):
    """What the server sends."""

    status: int
    headers: dict[str, str]
    content: bytes = b""


@dataclass
class Fault:
    """Answers in place of the right ones.

    Attributes:
        method: Method of the requests.
        part: Part of their path.
        answer: What is sent; None for a connection that breaks off.
        times: How often.
        done: Whether the request is carried out nevertheless.
    """

    method: str
    part: str
    answer: Answer | None
    times: int = 1
    done: bool = False


class Hub:
    """The state of the server.

    Attributes:
        repos: Repositories by name.
        large: Content of large files by SHA-256.
        log: The requests so far.
        cut_uploads: Number of large files that still arrive; then every connection breaks. None
            for no limit.
        cut_downloads: Number of answers of more than a kilobyte that break off half-way.
        auth: What whoami says of the token.
        orgs: What whoami says of the user's organisations.
        faults: Answers in place of the right ones.
        tamper: Called with path and answer; returns what is sent instead.
        silent: Part of the paths of requests that are never answered.
        url: Address of the server.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[Request] = []
        self.cut_uploads: int | None = None
        self.cut_downloads = 0
        self.auth: dict[str, Any] = {"type": "access_token"}
        self.orgs: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.tamper: Callable[[str, Answer], Answer] = lambda path, answer: answer
        self.silent: str | None = None
        self.closing = threading.Event()
        self.url = ""

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.part in path:
                fault.times -= 1
                return fault
        return None

    def requested(self, method: str, part: str = "") -> list[str]:
        """Paths that contain `part` and were requested by a method."""
        return [r.path for r in self.log if r.method == method and part in r.path]

    def add(self, name: str, files: dict[str, bytes] | None = None, **options: Any) -> Repo:
        """A repository with one commit."""
        repo = self.repos[name] = Repo(**options)
        blobs = {p: Blob(c, p.endswith(LARGE)) for p, c in (files or {}).items()}
        self.large |= {b.sha256: b.content for b in blobs.values() if b.lfs}
        repo.commit("main", blobs, "initial commit")
        return repo
