"""A hub on this machine that speaks what huggingface_hub's client asks of it when a model is pushed, on a real socket.

It keeps what it is sent: `repositories` by id, `requests` with their headers. `refusals` has, by what a path contains,
the status and the message with which a request is refused; `breaks` is what a path contains whose connection breaks.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", ".gguf")


@dataclass
class Repository:
    """What the hub holds of one."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)  # their summaries
    tags: tuple[str, ...] = ()


class HubServer(ThreadingHTTPServer):
    """The state, and the answers by method and path."""

    daemon_threads = True

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token, self.url = token, f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # uploaded, by SHA-256
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        self.breaks = ""

    def paths(self) -> list[str]:
        return [f"{method} {path}" for method, path, _ in self.requests]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        routes = {
            r"GET /api/whoami-v2": lambda: (200, {"type": "user", "name": "me"}),
            r"POST /api/repos/create": lambda: self._create(json.loads(body)),
            r"POST /api/validate-yaml": lambda: (200, {"warnings": [], "errors": []}),
            r"GET /api/models/([^/]+/[^/]+)": self._info,
            r"POST /api/models/([^/]+/[^/]+)/preupload/main": lambda name: (200, self._modes(json.loads(body))),
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": lambda name: (200, self._batch(json.loads(body))),
            r"PUT /upload/(\w+)": lambda oid: self._upload(oid, body),
            r"POST /api/models/([^/]+/[^/]+)/commit/main": lambda name: self._commit(name, body),
        }
        for route, action in routes.items():
            if match := re.fullmatch(route, f"{method} {path.partition('?')[0]}"):
                return action(*match.groups())
        return 404, {"error": f"no such endpoint: {method} {path}"}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        self.repositories[name] = Repository(asked["visibility"] == "private", {".gitattributes": b""})
        return 200, {"url": f"{self.url}/{name}"}

    def _info(self, name: str) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        found = self.repositories[name]
        siblings = [{"rfilename": path} for path in found.files]
        sha = hashlib.sha1(str(len(found.commits)).encode()).hexdigest()
        of = {"id": name, "private": found.private, "siblings": siblings, "tags": list(found.tags), "sha": sha}
        return 200, of

    def _modes(self, asked: dict[str, Any]) -> Any:
        modes = {file["path"]: "lfs" if file["path"].endswith(LARGE) else "regular" for file in asked["files"]}
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]}

    def _batch(self, asked: dict[str, Any]) -> Any:
        objects = []
        for one in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.url}/upload/{one['oid']}", "header": {}}}}
            objects.append({**one, **({} if one["oid"] in self.objects else upload)})
        return {"transfer": "basic", "objects": objects}

    def _upload(self, oid: str, body: bytes) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "other bytes than were promised"}
        self.objects[oid] = body
        return 200, {}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        found, new = self.repositories[name], dict[str, bytes]()
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.objects[value["oid"]]
            else:
                found.commits.append(value["summary"])
        found.files |= new
        found.tags = tuple(re.findall(r"^- (\S+)$", new.get("README.md", b"").decode().partition("\n---")[0], re.M))
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        hub, path = self.server, self.path
        hub.requests.append((self.command, path, dict(self.headers)))
        if hub.breaks and hub.breaks in path:
            self.rfile.read(10)  # in the middle of it
            self.close_connection = True
            self.connection.close()
            return
        body = self._body()
        refusals = [refusal for part, refusal in hub.refusals.items() if part in path]
        if refusals:
            status, content = refusals[0][0], {"error": refusals[0][1]}
        elif path.startswith("/upload/") or self.headers.get("authorization") == f"Bearer {hub.token}":
            status, content = hub.answer(self.command, path, body)
        else:
            status, content = 401, {"error": "Invalid username or password."}
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: Any) -> None:
        """Nothing: the test's output is the launcher's."""


@contextmanager
def hub_server(token: str) -> Iterator[HubServer]:
    """A running hub that knows this token."""
    server = HubServer(token)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
