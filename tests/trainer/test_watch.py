"""The live page: what it serves and to whom, and how it behaves in a browser while a run goes on."""

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from browser import BINARY, DRIVER, chromium
from runs import Size, make_run
from test_report import Page as Html

from strop.trainer.errors import UserError
from strop.trainer.reports.html import settled
from strop.trainer.reports.watch import Page, serve, watch
from strop.trainer.run.files import write_json

needs_chromium = pytest.mark.skipif(not (BINARY and DRIVER), reason="chromium and chromedriver are not installed")
HOLD = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); " \
       "time.sleep(600)"


@contextmanager
def served(run_dir):
    server = serve(run_dir, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def at_work(run_dir):
    """Another process that holds the run directory, as a run does."""
    lock = run_dir / ".lock"
    lock.write_text("")
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        lock.write_text(str(process.pid))
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(port, path, host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), dict(answer.getheaders())


def note(run_dir, done, label="round-00/sft"):
    write_json(run_dir / "progress.json", {"label": label, "done": done, "total": 40, "unit": "steps",
                                           "pace": "321 tok/s", "left": 75.0, "updated": time.time()})


def test_it_serves_the_report_with_what_is_going_on(tmp_path):
    run = make_run(tmp_path / "demo", until="round-00/select")
    note(run, 12)
    with served(run) as port:
        status, html, headers = ask(port, "/")
        page = Html(html)
        assert status == 200 and "pass" in page.ids and headers["Cache-Control"] == "no-store"
        assert "stopped" in page.text and "before round-00/sft" in page.text
        with at_work(run) as pid:
            page = Html(ask(port, "/")[1])
            assert "running" in page.text and "round-00/sft 12/40, 321 tok/s, 1:15 left" in page.text
            assert f"process {pid}" not in page.text and page.tags["progress"] == 1


def test_nothing_is_sent_again_while_nothing_changes(tmp_path):
    run = make_run(tmp_path / "demo", until="baseline")
    page = Page(run)
    stamp, html = page.get()
    assert html and page.get(stamp) == (stamp, None)
    note(run, 1)
    newer, html = page.get(stamp)
    assert newer != stamp and html
    with (run / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"stage": "round-00/sft", "step": 1, "time": 1.0, "loss": 2.0}) + "\n")
    newest, html = page.get(newer)
    assert newest != newer and "training" in Html(html).ids


def test_finished_stages_are_read_once(tmp_path, monkeypatch):
    run = make_run(tmp_path / "demo", until="round-00/dpo")
    calls = []
    monkeypatch.setattr("strop.trainer.reports.watch.settled", lambda run: calls.append(1) or settled(run))
    page = Page(run)
    for done in (1, 2, 3):
        note(run, done)
        assert page.get()[1]
    assert len(calls) == 1


def test_other_hosts_and_other_paths_get_nothing(tmp_path):
    run = make_run(tmp_path / "demo", until="prompts")
    with served(run) as port:
        assert ask(port, "/", host="evil.example")[0] == 403
        assert ask(port, "/config.yaml")[0] == ask(port, "/../config.yaml")[0] == 404
        assert ask(port, "/", host=f"localhost:{port}")[0] == 200
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET http://[ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_port_that_is_taken_and_a_run_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "runs" / "demo", until="prompts")
    with served(run) as port, pytest.raises(UserError, match=f"--port {port}: cannot listen"):
        watch(None, "demo", port=port)
    with pytest.raises(UserError, match=r"demmo: no such run directory; did you mean demo\?"):
        watch(None, "demmo")


def test_later_pages_hold_every_prompt_once(tmp_path):
    run = make_run(tmp_path / "demo", size=Size(test=170, validation=5, train=70, k=2))
    with served(run) as port:
        first = ask(port, "/")[1]
        for table, total, part in (("sampled", 280, 120), ("held-out", 340, 150)):
            body = re.search(rf'<section id="{table}".*?</section>', first, re.DOTALL).group()
            pages = [re.findall("<tr .*?</tr>", body, re.DOTALL)]
            while rows := re.findall("<tr .*?</tr>", ask(port, f"/rows?table={table}&page={len(pages)}")[1], re.DOTALL):
                pages.append(rows)
            assert [len(page) for page in pages] == [part] * (total // part) + [total % part], table
            assert len({row for page in pages for row in page}) == total
        for bad in ("/rows", "/rows?table=prompts&page=1", "/rows?table=sampled&page=-1", "/rows?table=sampled&page=x"):
            assert ask(port, bad)[0] == 404


@needs_chromium
def test_in_a_browser_more_rows_come_by_click(tmp_path):
    run = make_run(tmp_path / "demo", size=Size(test=100, validation=5, train=70, k=2))
    with served(run) as port, chromium(tmp_path) as browser:
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.text("#held-out [data-shown]") == "150 of 150 shown"
        browser.click("#held-out [data-more]")
        browser.wait("document.querySelector('#held-out [data-shown]').textContent === '200 of 200 shown'")
        assert browser.run("return document.querySelector('#held-out [data-more]').hidden")
        browser.type("#sampled input", "What is 1")
        browser.click("#sampled [data-more]")
        browser.wait("document.querySelectorAll('#sampled tbody tr').length === 240")
        rows = browser.run("return [...document.querySelectorAll('#sampled tbody tr')].filter(r => r.offsetParent)"
                           ".map(r => r.innerText)")
        assert rows and all("What is 1" in row for row in rows)
        assert [e for e in browser.call("se/log", {"type": "browser"}) if "favicon" not in e["message"]] == []


@needs_chromium
def test_in_a_browser_it_keeps_up_and_keeps_what_the_user_did(tmp_path):
    run = make_run(tmp_path / "demo", until="round-00/evaluate")
    with at_work(run), served(run) as port, chromium(tmp_path) as browser:
        note(run, 3, "round-01/sample")
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.querySelector('.live').textContent.includes('3/40')")
        assert "training" in browser.text("nav").lower() and browser.run(
            "return document.querySelectorAll('.chip.done').length") == 12
        browser.type("#sampled input", "What is 12")
        browser.click("#sampled h2")  # the focus goes elsewhere
        before = browser.text("#sampled [data-shown]")
        note(run, 31, "round-01/sample")
        browser.wait("document.querySelector('.live').textContent.includes('31/40')")
        make_run(tmp_path / "more")
        for stage in ("sample", "score", "select"):  # three more stages are done
            (run / "round-01").mkdir(exist_ok=True)
            (tmp_path / "more" / "round-01" / stage).rename(run / "round-01" / stage)
        browser.wait("document.querySelectorAll('.chip.done').length === 15")
        assert browser.run("return document.querySelector('#sampled input').value") == "What is 12"
        shown, total = browser.text("#sampled [data-shown]").removesuffix(" shown").split(" of ")
        assert int(total) == 120 > int(before.split(" of ")[1].removesuffix(" shown")) and 0 < int(shown) < 60
        assert [e for e in browser.call("se/log", {"type": "browser"}) if "favicon" not in e["message"]] == []
