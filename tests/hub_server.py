"""A server that speaks as much of the Hub's protocol as creating, filling and reading a dataset takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_testtokenoftests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """What the server holds, and what it was asked."""

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def add(self, name: str, *, private: bool, **files: bytes) -> None:
        self.private[name] = private
        self.files[name] = {".gitattributes": b"", **files}


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """The server on a free port, until the end of the block."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self._path()
        if path == "/api/whoami-v2":
            self._answer({"name": "somebody", "type": "user"})
        elif path.startswith("/api/datasets/"):
            self._info("/".join(path.split("/")[3:5]))
        elif "/resolve/" in path:
            name, _, file = path.removeprefix("/datasets/").partition("/resolve/")
            self._file(self.hub.files.get(name, {}).get(file.partition("/")[2]))
        else:
            self._missing()

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        self.hub.objects[self._path().rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        name = "/".join(path.split("/")[3:5])
        if not self._is_allowed():
            self._answer({"error": "Invalid credentials"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(".parquet") else "regular"}
                for one in json.loads(body)["files"]
            ]
            self._answer({"files": [one | {"shouldIgnore": False} for one in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            self._commit(name, [json.loads(line) for line in body.splitlines() if line])
        else:
            self._missing()

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
        if name in self.hub.files:
            self._answer({"error": "You already created this dataset repo", "url": f"{self.hub.url}/datasets/{name}"}, 409)
            return
        self.hub.add(name, private=asked.get("private", asked.get("visibility") == "private"))
        self._answer({"url": f"{self.hub.url}/datasets/{name}", "name": name, "id": name})

    def _commit(self, name: str, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.hub.files[name][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                content = self.hub.objects[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"]
                self.hub.files[name][value["path"]] = content
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/datasets/{name}/commit/{COMMIT}"})

    def _info(self, name: str) -> None:
        if name in self.hub.cards:
            self._answer({"id": name, "sha": COMMIT, "private": False, "siblings": [], "cardData": self.hub.cards[name]})
        elif name in self.hub.files and self._is_allowed():
            siblings = [{"rfilename": file} for file in self.hub.files[name]]
            self._answer({"id": name, "sha": COMMIT, "private": self.hub.private[name], "siblings": siblings})
        else:
            self._missing()

    def _file(self, content: bytes | None) -> None:
        if content is None:
            self._missing()
            return
        tag = hashlib.sha1(content).hexdigest()
        self._send(content, 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Content-Type": "text/plain"})

    def _missing(self) -> None:
        self._send(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

    def _answer(self, value: Any, status: int = 200, kind: str = "application/json") -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": kind})

    def _send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _path(self) -> str:
        path = self.path.partition("?")[0]
        self.hub.asked.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"
