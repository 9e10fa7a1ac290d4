import io
import subprocess
import sys

import pytest

from strop.trainer.run.console import Console, Progress, duration, plain_table


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def out():
    return io.StringIO()


def test_lines_are_printed_as_they_stand(out):
    console = Console(file=out)
    text = "[bold]not markup[/bold] " + "x" * 300
    console.line(text)
    console.warn("careful")
    assert out.getvalue().splitlines() == [text, "warning: careful"]


def test_control_characters_cannot_drive_the_terminal(out):
    Console(file=out).line("a\x1b[2Jb\rc")
    assert out.getvalue() == "a\\x1b[2Jb\\rc\n"


def test_an_encoding_that_lacks_a_character_does_not_stop_the_run():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file).line("naïve")
    assert raw.getvalue() == b"na?ve\n"


def test_other_ranks_are_silent(out):
    console = Console(enabled=False, file=out)
    console.line("a")
    console.warn("b")
    console.heading("c")
    console.table("t", ["x"], [["y"]])
    with console.progress("p", 3) as p:
        p.advance(3, tokens=10)
    assert out.getvalue() == ""
    assert p.done == 3


@pytest.mark.parametrize(("file", "ci", "plain"), [(io.StringIO(), "", True), (Terminal(), "", False),
                                                   (Terminal(), "true", True), (Terminal(), "0", False)])
def test_plain_when_not_a_terminal_or_under_ci(file, ci, plain, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", ci)
    assert Console(file=file).plain is plain


def test_plain_progress_prints_now_and_then_and_at_the_end(out, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(Progress.__init__, "__defaults__", (lambda: now[0],))
    with Console(file=out).progress("sample", 100) as p:
        for _ in range(100):
            now[0] += 0.25
            p.advance(tokens=50)
    assert out.getvalue().splitlines() == [
        "sample  40/100  200 tok/s  0:15 left", "sample  80/100  200 tok/s  0:05 left",
        "sample  100/100  200 tok/s  took 0:25"]


def test_a_stage_that_fails_prints_no_closing_line(out):
    with pytest.raises(RuntimeError), Console(file=out).progress("sample", 10) as p:
        p.advance()
        raise RuntimeError
    assert out.getvalue() == ""


def test_resumed_items_do_not_count_as_pace():
    now = [0.0]
    p = Progress("x", total=100, unit="tokens", done=90, clock=lambda: now[0])
    assert p.left() == float("inf") and p.pace() == ""
    now[0] = 2.0
    p.advance(5, tokens=10)
    assert p.left() == 2.0 and p.pace() == "5 tok/s"


@pytest.mark.parametrize(("unit", "tokens", "pace"), [("steps", 100, "50 tok/s"), ("rows", 0, "1.5 rows/s"),
                                                      ("tokens", 0, "")])
def test_pace_names_what_it_counts(unit, tokens, pace):
    now = [0.0]
    p = Progress("x", total=9, unit=unit, done=0, clock=lambda: now[0])
    now[0] = 2.0
    p.advance(3, tokens=tokens)
    assert p.pace() == pace


def test_terminal_shows_bars_also_nested_and_after_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    console = Console(plain=False, file=file)
    with pytest.raises(RuntimeError), console.progress("outer", 4) as outer:
        outer.advance(2, tokens=7)
        console.line("between " + "y" * 200)
        with console.progress("inner [x]", 2) as inner:
            inner.advance()
            raise RuntimeError
    assert console.bars is None
    assert "2/4" in file.getvalue() and "inner [x]" in file.getvalue() and "between " + "y" * 200 in file.getvalue()
    with console.progress("again", 1) as p:
        p.advance()
    assert "again" in file.getvalue()


def test_table_aligns_any_width(out):
    rows = [["base", "12.0 %", "w" * 100], ["round-00", "9.5 %", ""]]
    Console(file=out).table("Rounds", ["round", "pass rate", "note"], rows)
    assert out.getvalue().splitlines() == [
        "", "Rounds", "round     pass rate  note", "--------  ---------  " + "-" * 100,
        "base         12.0 %  " + "w" * 100, "round-00      9.5 %"]


def test_table_on_a_terminal_takes_markup_for_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    Console(plain=False, file=file).table("T", ["a"], [["[red]x[/red]"]])
    assert "[red]x[/red]" in file.getvalue()


def test_empty_table_has_a_head():
    assert plain_table(["a", "b"], []) == ["a  b", "-  -"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3661, "1:01:01"), (float("inf"), "-:--"),
                                               (float("nan"), "-:--"), (-1, "-:--")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_closed_pipe_does_not_end_the_run():
    code = ("from strop.trainer.run.console import Console\nimport sys\nc = Console()\n"
            "for i in range(20000): c.line('x' * 50)\nsys.stderr.write('finished')")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.readline()
    run.stdout.close()
    assert run.stderr.read() == b"finished"
    assert run.wait() == 0
