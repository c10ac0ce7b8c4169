"""A Hugging Face Hub on 127.0.0.1, as far as downloads need one: repo info, and files with etags and ranges; of models,
and of datasets, whose names begin with datasets/."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """repos: name -> {file name -> bytes}. gated: repo names that answer 401 unless `token` comes. cut: file name ->
    bytes after which each of the next connections breaks; and then there is no more of it if `gone`. corrupt: file
    names served with one byte changed. requests: what was asked, in order."""

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.token = "hf_right"
        self.cut: dict[str, list[int]] = {}
        self.gone = False
        self.corrupt: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fetched(self, name: str) -> list[str | None]:
        """The ranges of the GETs of a file, in order."""
        return [wanted for verb, path, wanted in self.requests if verb == "GET" and path.endswith("/" + name)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        asked = parts[0] == "api"
        parts = parts[1:] if asked else parts
        kind = "datasets/" if parts[0] == "datasets" else ""
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        repo, rest = kind + "/".join(parts[:2]), parts[2:]
        if asked:
            return self.info(repo, rest)
        name = "/".join(rest[2:])
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound")
        if self.locked(repo):
            return self.refuse(401, "GatedRepo")
        if name not in self.hub.repos[repo]:
            return self.refuse(404, "EntryNotFound")
        self.file(name, self.hub.repos[repo][name], body)

    def locked(self, repo: str) -> bool:
        return repo in self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}"

    def info(self, repo: str, rest: list[str]) -> None:
        if repo not in self.hub.repos:
            return self.refuse(404, "RepoNotFound")
        if self.locked(repo):
            return self.refuse(401, "GatedRepo")
        files = self.hub.repos[repo]
        if rest[:1] == ["tree"] and rest[2:]:
            return self.refuse(404, "EntryNotFound")  # there are no folders
        if rest[:1] == ["tree"]:
            found = [{"type": "file", "path": n, "size": len(d), "oid": _oid(n, d)} for n, d in files.items()]
        else:
            found = {
                "id": repo,
                "modelId": repo,
                "sha": self.hub.commit,
                "siblings": [_sibling(*f) for f in files.items()],
            }
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def file(self, name: str, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{_oid(name, data)}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status = 206
        if name in self.hub.corrupt:
            data = data[:-1] + bytes([data[-1] ^ 1])
        cuts = self.hub.cut.get(name) if body else None
        if body and self.hub.gone and not cuts:
            return self.refuse(503, "Busy")
        cut = cuts.pop(0) if cuts else None
        self.send(status, data[start:], headers, body, cut)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict, body: bool = True, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True


def _sibling(name: str, data: bytes) -> dict:
    found = {"rfilename": name, "size": len(data), "blobId": "0" * 40}
    large = len(_oid(name, data)) == 64
    return found | ({"lfs": {"sha256": _oid(name, data), "size": len(data), "pointerSize": 130}} if large else {})


def _oid(name: str, data: bytes) -> str:
    """Large files are named by their SHA-256, small ones by Git's SHA-1."""
    if name.endswith((".json", ".txt")):
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()
