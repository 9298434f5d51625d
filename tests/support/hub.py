"""A look-alike of the Hugging Face Hub on loopback: what huggingface_hub and modelfs ask of its public API.

Repositories have commits; files of ``LARGE`` bytes and more are kept as LFS: resolving one redirects to a signed
address on another host name. A gated repository wants a token.
"""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.support.served import Quiet, served

LARGE = 1000
TOKEN = "hf_CANARYTOKEN"


@dataclass
class Repository:
    """Files by commit; the last commit is ``main``."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def commit(self, **changes: bytes | None) -> str:
        """Make a commit in which files are put or (``None``) removed; return its id."""
        files = dict(self.commits[self.head]) if self.commits else {}
        for path, data in changes.items():
            if data is None:
                files.pop(path, None)
            else:
                files[path] = data
        number = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[number] = files
        return number


@dataclass
class Hub:
    """The state of a running look-alike."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    down: bool = False
    served_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    @contextlib.contextmanager
    def running(self) -> Iterator["Hub"]:
        """Serve on a free port."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        with served(Handler) as self.url:
            yield self


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(Quiet):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self.respond()

    def respond(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if self.hub.down:
            self.close_connection = True
            return
        path = unquote(urlsplit(self.path).path)
        query = parse_qs(urlsplit(self.path).query)
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self.send_large(match[1], query)
            return
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)(/.*)?", path)
        match = match or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        plain = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        name, what, revision, rest = match.groups() if match else (plain[1] if plain else "", "revision", "main", "")
        found = self.hub.repositories.get(name)
        if found is None or not found.commits:
            self.refuse(401, "RepoNotFound", "Repository not found")
            return
        if found.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401 if "Authorization" not in self.headers else 403, "GatedRepo", "Access is restricted")
            return
        commit = found.head if revision == "main" else revision
        files = found.commits.get(commit)
        if files is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif what == "revision":
            self.send_json({"id": name, "sha": commit, "lastModified": "2026-01-02T03:04:05.000Z", "tags": [],
                            "siblings": [{"rfilename": path} for path in files]})  # fmt: skip
        elif what == "tree":
            self.send_json([_entry(path, data) for path, data in files.items()])
        else:
            self.resolve(commit, files.get(rest or ""))

    def resolve(self, commit: str, data: bytes | None) -> None:
        if data is None:
            self.refuse(404, "EntryNotFound", "Entry not found")
        elif len(data) < LARGE:
            self.send_range(data, {"ETag": f'"{blob_id(data)}"', "X-Repo-Commit": commit})
        else:
            digest = hashlib.sha256(data).hexdigest()
            port = self.hub.url.rpartition(":")[2]
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{port}/cdn/{digest}?sig={quote('a+b/c=')}")
            self.send_header("X-Linked-ETag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def send_large(self, digest: str, query: dict[str, list[str]]) -> None:
        if "Authorization" in self.headers or query.get("sig") != ["a+b/c="]:
            self.refuse(400, "Bad", "a signed address takes no token")
            return
        for repository in self.hub.repositories.values():
            for files in repository.commits.values():
                for data in files.values():
                    if hashlib.sha256(data).hexdigest() == digest:
                        self.send_range(data, {"ETag": '"another-store"'})
                        return
        self.refuse(404, "Gone", "no such blob")

    def send_range(self, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        status, part = 200, data
        if match and int(match[1]) < len(data):
            part = data[int(match[1]) : int(match[2]) + 1]
            status = 206
            headers["Content-Range"] = f"bytes {match[1]}-{int(match[1]) + len(part) - 1}/{len(data)}"
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(part))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)
            with self.hub.lock:
                self.hub.served_bytes += len(part)

    def send_json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _entry(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob_id(data)}
    if len(data) >= LARGE:
        digest = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 134}
    return entry
