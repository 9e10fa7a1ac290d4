"""A headless Chromium, driven by its own driver's protocol (W3C WebDriver): pages are clicked as a user would."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--disable-dev-shm-usage"]
BINARY, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which WebDriver names an element


class Browser:
    """A page. `css` selects one element; scripts return JSON values."""

    def __init__(self, at: str):
        self.at = at

    def call(self, path: str, body: dict | None = None, method: str | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.at}/{path}".rstrip("/"), data, {"Content-Type": "application/json"},
                                         method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(json.load(e)["value"]["message"]) from e

    def open(self, url: str) -> None:
        self.call("url", {"url": url})

    def run(self, script: str, *arguments):
        return self.call("execute/sync", {"script": script, "args": list(arguments)})

    def find(self, css: str) -> str:
        return self.call("element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css: str) -> None:
        self.call(f"element/{self.find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        self.call(f"element/{self.find(css)}/value", {"text": text})

    def text(self, css: str) -> str:
        return self.call(f"element/{self.find(css)}/text")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Until the expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.1)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("screenshot")))

    def pdf(self) -> bytes:
        return base64.b64decode(self.call("print", {"background": True}))


@contextmanager
def chromium(folder: Path, width: int = 1366, height: int = 768):
    """A browser with a fresh profile in `folder`; its window is as large as a laptop's screen."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              start_new_session=True)
    try:
        end = time.monotonic() + 30
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert driver.poll() is None and time.monotonic() < end, "chromedriver does not start"
            time.sleep(0.05)
        options = {"binary": BINARY, "args": [*FLAGS, f"--window-size={width},{height}",
                                              f"--user-data-dir={folder / 'profile'}"]}
        root = Browser(f"http://127.0.0.1:{port}")
        session = root.call("session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        page = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
        try:
            yield page
        finally:
            page.call("", method="DELETE")
    finally:
        with suppress(ProcessLookupError):  # the browser with its driver, whatever state they are in
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(timeout=10)
