"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP API as downloads use."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """`commits` of the branch main and of tags; who may read the files."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> files
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


class Hub:
    """Repositories under "models/owner/name" and "datasets/owner/name", served at `url`; `seen` notes each request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.seen: list[str] = []
        self.tokens: set[str] = set()  # what came in as credentials
        self.status = 0  # what every request is answered with, if set
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                answer(hub, self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def push(self, name: str, files: dict[str, bytes] | Path, *tags: str) -> str:
        """A new commit of main, and of `tags`, which holds `files`."""
        if isinstance(files, Path):
            files = {p.name: p.read_bytes() for p in files.iterdir()}
        repo = self.repos.setdefault(name, Repo())
        content = b"".join(k.encode() + v for k, v in sorted(files.items()))
        commit = hashlib.sha1(content + str(len(repo.commits)).encode()).hexdigest()
        repo.commits[commit] = files
        repo.refs |= dict.fromkeys(("main", *tags), commit)
        return commit

    def asked(self) -> list[str]:
        """The requests since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    url = urlsplit(request.path)
    body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
    hub.seen.append(f"{request.command} {url.path}")
    if token := request.headers.get("Authorization"):
        hub.tokens.add(token)
    if hub.status:
        return send(request, hub.status, b"")
    parts = [unquote(p) for p in url.path.strip("/").split("/")]
    if len(parts) < 4:
        return send(request, 404, b"")
    if parts[0] == "api":
        kind, owner, name, what, *rest = [*parts[1:], "revision"] if len(parts) == 4 else parts[1:]
        revision, path = (rest or ["main"])[0], "/".join(rest[1:])
    else:
        kind, owner, name, what, revision, *rest = parts if parts[0] == "datasets" else ["models", *parts]
        path = "/".join(rest)
    repo = hub.repos.get(f"{kind}/{owner}/{name}")
    if repo is None or (repo.private and not token):
        return send(request, 401, b"", {"X-Error-Code": "RepoNotFound"})
    commit = repo.refs.get(revision, revision)
    files = repo.commits.get(commit)
    if files is None:
        return send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
    if what == "resolve":
        if repo.gated and not token:
            return send(request, 401, b"", {"X-Error-Code": "GatedRepo"})
        if path not in files:
            return send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return send(request, 200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{oid(files[path])}"'})
    listed = [{"type": "file", "oid": oid(v), "size": len(v), "path": k} for k, v in sorted(files.items())]
    if what == "revision":
        siblings = [{"rfilename": e["path"], "size": e["size"], "blobId": e["oid"]} for e in listed]
        found = {"_id": "1", "id": f"{owner}/{name}", "sha": commit, "siblings": siblings, "private": False}
    elif what == "tree":
        found = [e for e in listed if not path or e["path"].startswith(f"{path}/")]
    else:
        wanted = json.loads(body)["paths"]
        found = [e for e in listed if e["path"] in wanted]
    send(request, 200, json.dumps(found).encode(), {"Content-Type": "application/json"})


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def send(request: BaseHTTPRequestHandler, status: int, content: bytes, headers: dict | None = None) -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)
