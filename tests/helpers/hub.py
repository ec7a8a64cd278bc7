"""A Hub in one process: enough of its API, over real HTTP, to create, push, refuse, break off, and load again."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_THRESHOLD = 10 * 1024
_STARTED = "2026-01-01T00:00:00.000Z"


def push_args(folder: str | Path, cls: type | None = None, **over: Any) -> Any:
    """Return arguments of a tiny CPU run of 4 steps that saves twice; of class `TrainingArguments` without `cls`."""
    from transformers import TrainingArguments

    settings = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
    }
    return (cls or TrainingArguments)(str(folder), **{**settings, **over})


@dataclass
class Fault:
    """
    What goes wrong with the next requests.

    Args:
        path (`str`): Part of the address, such as `/commit/`.
        status (`int`, *optional*): Answer with this.
        headers (`dict`, *optional*): Of that answer.
        cut (`bool`, *optional*): Close the connection without an answer.
        delay (`float`, *optional*): Seconds before the request is handled as usual.
        times (`int`, *optional*, defaults to 1): How many requests it hits.
        echo (`bool`, *optional*): Repeat the request's authorization in the answer.
    """

    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    delay: float = 0.0
    times: int = 1
    echo: bool = False


class LocalHub:
    """
    Serve from memory at `url`; use as a context manager.

    `requests` has (method, path) of everything that was asked, `times` when, and `files(repo)` what a repository
    holds.
    """

    def __init__(self, user: str = "tester", token: str | None = None) -> None:
        self.user, self.token = user, token
        self.repos: dict[str, list[tuple[str, str, dict[str, tuple[str, Any]]]]] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.times: list[float] = []
        self._lock = threading.Lock()

    def __enter__(self) -> LocalHub:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def use(self, monkeypatch: Any, **environment: str) -> None:
        """Send the uploads of this process here."""
        here = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for name, value in {**here, **environment}.items():
            monkeypatch.setenv(name, value)

    def files(self, repo: str) -> dict[str, bytes]:
        """Return path -> content of the newest commit."""
        return {path: self.content(entry) for path, entry in self.repos[repo][-1][2].items()}

    def messages(self, repo: str) -> list[str]:
        """Return the messages of all commits but the first, empty one."""
        return [message for _, message, _ in self.repos[repo][1:]]

    def content(self, entry: tuple[str, Any]) -> bytes:
        return entry[1] if entry[0] == "regular" else self.lfs[entry[1]]

    def blob_id(self, entry: tuple[str, Any] | None) -> str | None:
        if entry is None:
            return None
        content = self.content(entry)
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def next_fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def log_message(self, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        path, body = urllib.parse.unquote(address.path), self._body()
        self.hub.requests.append((self.command, path))
        self.hub.times.append(time.monotonic())
        fault = self.hub.next_fault(path)
        authorization = self.headers.get("Authorization") or ""
        if fault is not None:
            if fault.cut:
                self.close_connection = True
                return
            if fault.status is not None:
                message = f"as asked for: {authorization}" if fault.echo else "as asked for"
                self.answer({"error": message}, fault.status, {**fault.headers, "X-Error-Message": message})
                return
            time.sleep(fault.delay)
        if self.hub.token and "/lfs-up/" not in path and authorization != f"Bearer {self.hub.token}":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        self.route(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_request

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def not_found(self, code: str) -> None:
        self.answer({"error": code}, 404, {"X-Error-Code": code, "X-Error-Message": code})

    def route(self, path: str, body: bytes) -> None:
        hub = self.hub
        if path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.match(r"/api/models/([^/]+/[^/]+)(/.*)?$", path):
            self._model(found[1], found[2] or "", body)
        elif re.match(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch$", path):
            self._lfs_batch(json.loads(body))
        elif path.startswith("/lfs-up/"):
            name = path.rsplit("/", 1)[1]
            good = hashlib.sha256(body).hexdigest() == name
            if good:
                hub.lfs[name] = body
            self.answer({} if good else {"error": "sha256 differs"}, 200 if good else 400)
        elif path == "/lfs-verify":
            self.answer({}, 200 if json.loads(body)["oid"] in hub.lfs else 404)
        elif found := re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path):
            self._file(found[1], found[2], found[3])
        else:
            self.answer({"error": f"no route {self.command} {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        url = f"{self.hub.url}/{repo}"
        if repo in self.hub.repos:
            self.answer({"error": "You already created this model repo", "url": url}, 409)
            return
        self.hub.repos[repo] = [("0" * 40, "", {})]
        self.answer({"url": url, "name": repo, "id": repo})

    def _model(self, repo: str, rest: str, body: bytes) -> None:
        if repo not in self.hub.repos:
            self.not_found("RepoNotFound")
            return
        commit, _, files = self.hub.repos[repo][-1]
        if rest.startswith("/preupload/"):
            asked = json.loads(body)["files"]
            self.answer({"files": [self._preupload(entry, files) for entry in asked]})
        elif rest.startswith("/commit/"):
            self._commit(repo, body)
        elif rest.startswith("/tree/"):
            self.answer([self._tree_entry(path, entry) for path, entry in files.items()])
        elif rest == "" or rest.startswith("/revision/"):
            names = [{"rfilename": path} for path in files]
            known = {"_id": "1", "id": repo, "modelId": repo, "private": False, "sha": commit, "tags": []}
            times = {"createdAt": _STARTED, "lastModified": _STARTED, "downloads": 0, "likes": 0}
            self.answer({**known, **times, "siblings": names})
        else:
            self.not_found("EntryNotFound")

    def _preupload(self, asked: dict[str, Any], files: dict[str, Any]) -> dict[str, Any]:
        large = asked["size"] > LFS_THRESHOLD or asked["path"].endswith((".safetensors", ".bin", ".pt"))
        return {
            "path": asked["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": self.hub.blob_id(files.get(asked["path"])),
        }

    def _tree_entry(self, path: str, entry: tuple[str, Any]) -> dict[str, Any]:
        size = len(self.hub.content(entry))
        lfs = {"lfs": {"oid": entry[1], "size": size, "pointerSize": 130}} if entry[0] == "lfs" else {}
        return {"type": "file", "path": path, "size": size, "oid": self.hub.blob_id(entry), **lfs}

    def _commit(self, repo: str, body: bytes) -> None:
        before, _, files = self.hub.repos[repo][-1]
        files, message = dict(files), ""
        for line in body.splitlines():
            kind, value = (part := json.loads(line))["key"], part["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = ("regular", base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                files[value["path"]] = ("lfs", value["oid"])
        commit = hashlib.sha1(f"{before}{message}{time.time()}".encode()).hexdigest()
        self.hub.repos[repo].append((commit, message, files))
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.answer({"commitUrl": url, "commitOid": commit, "success": True, "hookOutput": ""})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        def entry(wanted: dict[str, Any]) -> dict[str, Any]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] in self.hub.lfs:
                return known
            upload = {"href": f"{self.hub.url}/lfs-up/{wanted['oid']}", "header": {}}
            return {
                **known,
                "actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}},
            }

        self.answer({"transfer": "basic", "objects": [entry(wanted) for wanted in asked["objects"]]})

    def _file(self, repo: str, revision: str, path: str) -> None:
        if repo not in self.hub.repos:
            self.not_found("RepoNotFound")
            return
        commits = {"main": self.hub.repos[repo][-1], **{commit[0]: commit for commit in self.hub.repos[repo]}}
        if revision not in commits:
            self.not_found("RevisionNotFound")
            return
        commit, _, files = commits[revision]
        if path not in files:
            self.not_found("EntryNotFound")
            return
        entry = files[path]
        tag = entry[1] if entry[0] == "lfs" else self.hub.blob_id(entry)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Content-Type": "application/octet-stream"}
        self.answer(self.hub.content(entry), headers=headers)
