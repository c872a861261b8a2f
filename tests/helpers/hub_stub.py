"""A small Hugging Face hub on 127.0.0.1: enough of its API for huggingface-hub's snapshot_download."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server offers: repository names to folders, and names whose licence nobody here has accepted.

    cut: files of which only the first half is sent before the connection is closed. held: files of which the second
    half waits until the server ends; holding says that one does. requests: paths asked for so far.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)
    holding: threading.Event = field(default_factory=threading.Event)
    ending: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` at `hub.url` until the block ends."""

    class Handler(_Handler):
        content = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def ask_only(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface-hub, in this process, ask `hub` and keep what it gets in `cache`."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(BaseHTTPRequestHandler):
    content: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        """/api/models/ORG/NAME/revision/REV, /api/models/ORG/NAME/tree/REV or /ORG/NAME/resolve/REV/FILE."""
        path = unquote(urlsplit(self.path).path)
        self.content.requests.append(path)
        parts = path.removeprefix("/api/models").strip("/").split("/")
        parts += [""] * (4 - len(parts))
        repository, action, revision, rest = "/".join(parts[:2]), parts[2], parts[3], "/".join(parts[4:])
        folder = self.content.repositories.get(repository)
        if repository in self.content.gated:
            self.refuse(403, "GatedRepo", with_body)
        elif folder is None:
            self.refuse(401, "RepoNotFound", with_body)
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound", with_body)
        elif action == "revision":
            files = [{"rfilename": file.name} for file in _files(folder)]
            self.send(json.dumps({"id": repository, "sha": COMMIT, "siblings": files}).encode(), {}, with_body)
        elif action == "tree":
            tree = [_tree_entry(file) for file in _files(folder)]
            self.send(json.dumps(tree).encode(), {}, with_body)
        elif action == "resolve" and (folder / rest).is_file():
            body = (folder / rest).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_digest(body)}"', "X-Linked-Size": str(len(body))}
            if with_body and rest in self.content.cut | self.content.held:
                self.send_half(body, headers, hold=rest in self.content.held)
            else:
                self.send(body, headers, with_body)
        else:
            self.refuse(404, "EntryNotFound", with_body)

    def send(self, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def send_half(self, body: bytes, headers: dict[str, str], hold: bool) -> None:
        self.send(body, headers, with_body=False)
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if hold:
            self.content.holding.set()
            self.content.ending.wait()
        self.close_connection = True

    def refuse(self, status: int, code: str, with_body: bool) -> None:
        body = json.dumps({"error": code}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _tree_entry(file: Path) -> dict[str, object]:
    body = file.read_bytes()
    return {"type": "file", "path": file.name, "size": len(body), "oid": _digest(body)}


def _digest(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()
