"""A hub on 127.0.0.1 that speaks as much of Hugging Face's protocol as streaming needs, with faults on order."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

FAULTS = ("drop", "short", "stall", "429", "500", "503")


@functools.cache
def digest_of(data: bytes) -> str:
    """SHA-256. Kept: Python hashes bytes for the look-up once, and large files are asked for often."""
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repository:
    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    token: str | None = None
    """What alone may read it."""

    def commit(self) -> str:
        """A hash that changes with the content, as a commit's does."""
        digest = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            digest.update(f"{path} {digest_of(data)} ".encode())
        return digest.hexdigest()


class LoopbackHub(ThreadingHTTPServer):
    """Used as a context manager; `endpoint` goes into HF_ENDPOINT.

    `fault_rate`: share of file requests that go wrong, in a seeded order, each in one of `fault_kinds`.
    """

    daemon_threads = True
    page = 1000
    """Entries of a page of a tree."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: Counter[str] = Counter()
        """"info", "tree", "file" and each fault -> how often."""
        self.sent: Counter[str] = Counter()
        """Path of a file -> bytes sent of it."""
        self.tokens: set[str] = set()
        self.fault_rate, self.fault_kinds = 0.0, FAULTS
        self.stall_seconds = 3.0
        self.down = False
        self._random, self._lock = random.Random(0), threading.Lock()

    def add(self, name: str, files: dict[str, bytes], **options: object) -> Repository:
        self.repositories[name] = Repository(files, **options)  # type: ignore[arg-type]
        return self.repositories[name]

    def fault(self) -> str | None:
        with self._lock:
            if self.down:
                return "503"
            if self._random.random() >= self.fault_rate:
                return None
            return self._random.choice(self.fault_kinds)

    @property
    def bytes_sent(self) -> int:
        return sum(self.sent.values())

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.sent.clear()

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that hang up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        authorization = self.headers.get("Authorization", "")
        if authorization:
            self.server.tokens.add(authorization.removeprefix("Bearer "))
        api = (
            parts[0] == "api"
        )  # api/datasets/OWNER/NAME/..., api/models/NAME/..., datasets/OWNER/NAME/..., NAME/...
        place = parts[2:] if api else parts[1:] if parts[0] == "datasets" else parts
        length = 1 if place[0] in self.server.repositories else 2
        name, rest = "/".join(place[:length]), place[length:]
        repository = self.server.repositories.get(name)
        if authorization.endswith("bad"):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repository is None or (repository.token and not authorization.endswith(repository.token)):
            return self.refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
        if repository.gated and not api:
            return self.refuse(403, "GatedRepo", "Access to this data set is restricted")
        if self.server.down and api:
            return self.refuse(503, "", "down")
        revision = unquote(rest[1]) if len(rest) > 1 else "main"
        branches = {"main": repository.commit(), **repository.branches}
        commit = branches.get(revision, revision)
        if len(commit) != 40:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if api and rest[:1] in ([], ["revision"]):
            self.server.requests["info"] += 1
            siblings = [{"rfilename": path} for path in repository.files]
            return self.answer({"id": name, "sha": commit, "siblings": siblings, "tags": []})
        if api and rest[0] == "tree":
            return self.tree(repository, name, "/".join(rest[2:]), commit, parse_qs(address.query))
        if api and rest[0] == "paths-info":
            return self.answer(list(self.about(repository, parse_qs(self.body)["paths"])))
        if not api and rest[0] == "resolve":
            return self.file(repository, "/".join(rest[2:]), commit)
        return self.refuse(404, "", "Not found")

    def about(self, repository: Repository, paths: list[str]) -> Iterator[dict[str, object]]:
        """What a tree says of some files and folders; those that are not there are left out."""
        for path in paths:
            data = repository.files.get(path)
            if data is None:
                if any(file.startswith(f"{path}/") for file in repository.files):
                    yield {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}
                continue
            oid = hashlib.sha1(data).hexdigest()
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": oid}
            if len(data) > 1000:
                entry["lfs"] = {"oid": digest_of(data), "size": len(data), "pointerSize": 130}
            yield entry

    def tree(
        self, repository: Repository, name: str, folder: str, commit: str, query: dict[str, list[str]]
    ) -> None:
        self.server.requests["tree"] += 1
        prefix = f"{folder}/" if folder else ""
        paths = sorted(path for path in repository.files if path.startswith(prefix))
        if folder and not paths:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if query.get("recursive") == ["false"]:
            paths = sorted({prefix + path.removeprefix(prefix).split("/")[0] for path in paths})
        first = int(query.get("cursor", ["0"])[0])
        entries = list(self.about(repository, paths[first : first + self.server.page]))
        headers = {}
        if first + self.server.page < len(paths):
            following = f"{self.server.endpoint}/api/datasets/{name}/tree/{commit}/{folder}?recursive=true"
            headers["Link"] = f'<{following}&cursor={first + self.server.page}>; rel="next"'
        return self.answer(entries, headers)

    def file(self, repository: Repository, path: str, commit: str) -> None:
        self.server.requests["file"] += 1
        data = repository.files.get(path)
        if data is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        fault = self.server.fault()
        if fault is not None:
            self.server.requests[fault] += 1
        if fault in ("429", "500", "503"):
            return self.refuse(int(fault), "", "try again", {"Retry-After": "0"} if fault == "429" else {})
        begin, end = 0, len(data)
        span = self.headers.get("Range")
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            if begin >= len(data):
                return self.refuse(416, "", "out of range")
        body = data[begin:end]
        declared = len(body)
        if fault == "short":
            body = body[: len(body) // 2]
            declared = len(body)
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(declared))
        if span:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(data)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{digest_of(data)}"')
        self.end_headers()
        if self.command == "HEAD":
            return None
        if fault in ("drop", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.server.sent[path] += len(body)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(self.server.stall_seconds)
        if fault in ("drop", "stall"):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        return None

    def answer(self, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        for name, value in {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
