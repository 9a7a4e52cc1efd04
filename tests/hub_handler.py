"""How the Hub's test double answers: the requests that the client library sends."""

import base64
import hashlib
import json
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_state import (
    LARGE,
    ORGANISATIONS,
    TOKEN,
    USER,
    Answer,
    Blob,
    Fault,
    Hub,
    Repo,
    Request,
)

DATASETS = "datasets/"  # before the name of a data set in `Hub.repos`


class Refused(Exception):
    """An answer that is an error of the Hub, with its own code."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    """Answers the requests that the client library sends."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: two would wait for each other
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def handle_one_request(self) -> None:
        """Answer, unless the client has gone."""
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.content: bytes | None = None
        self.hub.log.append(
            Request(self.command, unquote(url.path), self.headers.get("Range"), token)
        )
        self.fault: Fault | None = self.hub.fault(self.command, unquote(url.path))
        if self.hub.silent is not None and self.hub.silent in url.path:
            self.hub.closing.wait()
        try:
            if self.fault is not None and not self.fault.done:
                self._body()
                self._answer(200, {}, b"")
                return
            self.token = token
            if token is not None and token != TOKEN:
                raise Refused(401, None, "Invalid credentials in Authorization header")
            parts = [unquote(p) for p in url.path.split("/")[1:]]
            self._route(parts, parse_qs(url.query))
        except Refused as refusal:
            self._body()  # what is left unread would be taken for the next request
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._json({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _route(self, parts: list[str], query: dict[str, list[str]]) -> None:
        if parts[:2] == ["api", "datasets"]:  # kept as repositories of models, of this owner
            parts = ["api", "models", f"{DATASETS}{parts[2]}", *parts[3:]]
        elif parts[0] == "datasets":
            parts = [f"{DATASETS}{parts[1]}", *parts[2:]]
        match parts:
            case ["api", "whoami-v2"]:
                self._login()
                self._json(
                    {"type": "user", "name": USER, "auth": self.hub.auth, "orgs": self.hub.orgs}
                )
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._body()
                self._json({"errors": [], "warnings": []})
            case ["api", "models", org, name]:
                self._json(self._model(f"{org}/{name}", "main"))
            case ["api", "models", org, name, "revision", revision]:
                self._json(self._model(f"{org}/{name}", revision))
            case ["api", "models", org, name, "tree", revision, *folder]:
                is_deep = query.get("recursive", ["true"])[0].lower() == "true"
                self._tree(f"{org}/{name}", revision, "/".join(folder), is_deep=is_deep)
            case ["api", "models", org, name, "paths-info", revision]:
                self._paths(f"{org}/{name}", revision)
            case ["api", "models", org, name, "preupload", revision]:
                self._preupload(f"{org}/{name}", revision)
            case ["api", "models", org, name, "commit", revision]:
                self._commit(f"{org}/{name}", revision, "create_pr" in query)
            case ["api", "models", org, name, "branch", branch]:
                self._branch(f"{org}/{name}", branch)
            case [org, name, "info", "lfs", "objects", "batch"]:
                self._batch(f"{org}/{name.removesuffix('.git')}")
            case ["lfs", oid]:
                self._put(oid)
            case [org, name, "resolve", revision, *path]:
                self._resolve(f"{org}/{name}", revision, "/".join(path))
            case _:
                raise Refused(404, None, "no such endpoint")

    def _login(self) -> None:
        if self.token is None:
            raise Refused(401, None, "Invalid username or password.")

    def _repo(self, name: str, *, write: bool = False, content: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            raise Refused(404 if self.token else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated:
            raise Refused(
                403, "GatedRepo", "Access to model is restricted. Visit the page to ask for access."
            )
        if write:
            self._login()
            if name.split("/")[0] not in ORGANISATIONS:
                raise Refused(403, None, "you do not have the rights to write here")
        return repo

    def _at(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _create(self) -> None:
        request = json.loads(self._body())
        self._login()
        name = f"{request.get('organization') or USER}/{request['name']}"
        if name.split("/")[0] not in ORGANISATIONS:
            raise Refused(
                403, None, "you do not have the rights to create a model under this namespace"
            )
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self._json(answer | {"error": "You already created this model repo"}, 409)
            return
        private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json(answer)

    def _model(self, name: str, revision: str) -> dict[str, Any]:
        repo = self._repo(name)
        sha = self._at(repo, revision)
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        name = name.removeprefix(DATASETS)
        about = {"_id": name, "id": name, "modelId": name, "tags": [], "downloads": 0, "likes": 0}
        return about | {
            "sha": sha,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "siblings": files,
        }

    def _tree(self, name: str, revision: str, folder: str, *, is_deep: bool) -> None:
        repo = self._repo(name)
        files = repo.commits[self._at(repo, revision)]
        inside = {p: b for p, b in files.items() if not folder or p.startswith(folder + "/")}
        if folder and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        here = len(folder.split("/")) if folder else 0
        deeper = {p for p in inside if not is_deep and p.count("/") > here}
        folders = sorted({"/".join(p.split("/")[: here + 1]) for p in deeper})
        rows: list[dict[str, Any]] = [
            {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
        ]
        self._json(rows + [_row(p, b) for p, b in sorted(inside.items()) if p not in deeper])

    def _paths(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._at(repo, revision)]
        asked = parse_qs(self._body().decode())["paths"]
        self._json([_row(path, files[path]) for path in asked if path in files])

    def _preupload(self, name: str, revision: str) -> None:
        request = json.loads(self._body())
        repo = self._repo(name, write=True)
        files = repo.commits[self._at(repo, revision)]
        self._json(
            {
                "files": [
                    {
                        "path": f["path"],
                        "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": files[f["path"]].oid if f["path"] in files else None,
                    }
                    for f in request["files"]
                ]
            }
        )

    def _batch(self, name: str) -> None:
        request = json.loads(self._body())
        self._repo(name, write=True)
        objects = []
        for item in request["objects"]:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.large:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            objects.append(row)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str) -> None:
        if self.hub.cut_uploads is not None:
            if self.hub.cut_uploads == 0:
                self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
                self.close_connection = True
                self.connection.close()
                return
            self.hub.cut_uploads -= 1
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        self._json({})

    def _commit(self, name: str, revision: str, pull_request: bool) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        repo = self._repo(name, write=True)
        files = dict(repo.commits[self._at(repo, revision)])
        message = ""
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    message = value["summary"]
                    at = self._at(repo, revision)
                    if not pull_request and value.get("parentCommit", at) != at:
                        raise Refused(412, None, "A commit has happened since. Please refresh.")
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    files[value["path"]] = Blob(self.hub.large[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
        number = 1 + sum(r.startswith("refs/pr/") for r in repo.refs)
        sha = repo.commit(f"refs/pr/{number}" if pull_request else revision, files, message)
        answer = {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.hub.url}/{name}/commit/{sha}",
            "hookOutput": "",
        }
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self._json(answer)

    def _branch(self, name: str, branch: str) -> None:
        request = json.loads(self._body() or b"{}")
        repo = self._repo(name, write=True)
        if branch in repo.refs:
            raise Refused(409, None, "Reference already exists")
        repo.refs[branch] = self._at(repo, request.get("startingPoint") or "main")
        self._json({}, 201)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name, content=True)
        sha = self._at(repo, revision)
        blob = repo.commits[sha].get(path)
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        content, status, byte_range = blob.content, 200, self.headers.get("Range")
        if byte_range:
            start, _, end = byte_range.removeprefix("bytes=").partition("-")
            stop = min(int(end) + 1 if end else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[int(start) : stop], 206
        if self.command == "GET" and self.hub.cut_downloads > 0 and len(content) > 1024:
            self.hub.cut_downloads -= 1
            self._answer(status, headers, content, half=True)
            return
        self._answer(status, headers, content)

    def _body(self) -> bytes:
        if self.content is None:
            self.content = self._read()
        return self.content

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._answer(
            status,
            {"Content-Type": "application/json"} | (headers or {}),
            json.dumps(content).encode(),
        )

    def _answer(
        self, status: int, headers: dict[str, str], content: bytes, *, half: bool = False
    ) -> None:
        if self.fault is not None:
            if self.fault.answer is None:
                self.close_connection = True
                self.connection.close()
                return
            status, headers, content = self.fault.answer
        path = unquote(self.path)
        status, headers, content = self.hub.tamper(path, Answer(status, headers, content))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        if half:
            self.wfile.flush()
            self.close_connection = True


def _row(path: str, blob: Blob) -> dict[str, Any]:
    """A file in a listing."""
    row = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.sha1}
    if blob.lfs:
        row["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return row
