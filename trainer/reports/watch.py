"""`strop watch`: the report as a live page, served to this machine only and refreshed during the run."""

import hashlib
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from strop.trainer.errors import UserError
from strop.trainer.reports.html import moving, render, render_rows, settled
from strop.trainer.reports.reading import RunRecord, find_run, holder, progress, read_run
from strop.trainer.reports.show import how_far, state

PORT = 8765


def watch(console, argument: str, port: int | None = None) -> None:
    """Serves the page until Ctrl-C. Without `port`: the default port, or a free one if that is in use. Raises UserError
    if there is no such run or `port` is in use."""
    run_dir = find_run(argument)
    with serve(run_dir, port) as server:
        console.line(f"http://127.0.0.1:{server.server_port}/   {run_dir}   Ctrl-C stops the page, not the run")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.line("")


def serve(run_dir: Path, port: int | None = None) -> ThreadingHTTPServer:
    """A server of the page on the loopback address; call its `serve_forever`."""
    handler = type("Handler", (PageHandler,), {"page": Page(run_dir)})
    try:
        return Server(("127.0.0.1", PORT if port is None else port), handler)
    except OSError as e:
        if port is not None:
            raise UserError(f"--port {port}: cannot listen ({e.strerror}); choose another port") from e
        return Server(("127.0.0.1", 0), handler)


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address) -> None:
        """Ends a connection that broke, or that never spoke HTTP, without a traceback in the terminal."""


class Page:
    """The current page of a run; artifacts are read again only when a stage completed."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.lock = run_dir, threading.Lock()
        self.stamp = self.html = self.made = self.settled = self.run = None

    def get(self, known: str = "") -> tuple[str, str | None]:
        """(stamp, page); no page if the stamp is `known`."""
        with self.lock:
            stamp = stamp_of(self.run_dir)
            if stamp != self.stamp:
                self.run = run = read_run(self.run_dir)
                made = [(stage, m["key"], m["created"]) for stage, m in run.manifests.items()]
                if made != self.made:
                    self.settled, self.made = settled(run), made
                self.html = render(self.settled | moving(run) | {"live": live(run, stamp)})
                self.stamp = stamp
            return stamp, None if known == stamp else self.html

    def rows(self, table: str, page: int) -> str:
        """The rows of a later page of a prompt table; only their texts are read."""
        with self.lock:
            self.run = self.run or read_run(self.run_dir)
            return render_rows(self.run, table, page)


def stamp_of(run_dir: Path) -> str:
    """A hash that changes whenever the page's content changes in the run directory."""
    seen = [holder(run_dir)]
    for path in [*run_dir.glob("*"), *run_dir.glob("round-*/*")]:
        if path.name != "report.html":
            with suppress(OSError):  # renamed meanwhile
                stat = path.stat()
                seen.append((str(path), stat.st_mtime_ns, stat.st_size))
    return hashlib.blake2b(repr(sorted(map(repr, seen))).encode(), digest_size=12).hexdigest()


def live(run: RunRecord, stamp: str) -> dict:
    """The banner: running, finished or stopped, and the progress of the running stage."""
    if holder(run.dir):
        at = progress(run.dir)
        return {"stamp": stamp, "kind": "running",
                "text": "  ·  ".join([run.rounds_done, *([how_far(at)] if at else [])]),
                "share": min(1.0, at["done"] / at["total"]) if at and at["total"] else None}
    kind = "finished" if run.finished else "stopped"
    return {"stamp": stamp, "kind": kind, "text": state(run, None).partition(" ")[2].lstrip(", "), "share": None}


class PageHandler(BaseHTTPRequestHandler):
    """GET /, /page?stamp=... and /rows?table=...&page=...; nothing else is served."""

    page: Page
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in ("127.0.0.1", "localhost"):  # DNS rebinding by a foreign page
            return self.answer(403, "this page is for 127.0.0.1 only")
        try:
            url = urlsplit(self.path)
            asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        except ValueError as e:
            return self.answer(400, f"not a URL: {e}")
        table, number = asked.get("table"), asked.get("page", "")
        try:
            if url.path in ("/", "/page"):
                _, html = self.page.get(asked.get("stamp", ""))
            elif url.path == "/rows" and table in ("sampled", "held-out") and re.fullmatch("[0-9]{1,9}", number):
                html = self.page.rows(table, int(number))
            else:
                return self.answer(404, "no such page")
        except Exception as e:  # the run directory changed during the read: the next request succeeds
            return self.answer(503, f"{type(e).__name__}: {e}")
        return self.answer(204 if html is None else 200, html or "", "text/html")

    def answer(self, status: int, text: str, kind: str = "text/plain") -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
