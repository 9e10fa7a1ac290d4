"""Console output of a run: progress bars on a terminal, plain lines everywhere else."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from html import escape as html_escape
from pathlib import Path
from typing import TextIO

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from strop.trainer.errors import clean

PLAIN_SECONDS = 10.0  # between two plain progress lines
NOTE_SECONDS = 1.0  # between two updates of the progress file or of a notebook's progress bar
PROGRESS = "progress.json"  # the progress of the running stage


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss; "-:--" if unknown."""
    if not 0 <= seconds < 1e8:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def plain_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of an aligned table; the first column is left-aligned, numeric columns right-aligned."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    right = [is_numeric(rows, i) for i in range(len(columns))]
    lines = []
    for row in [columns, ["-" * w for w in widths], *rows]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def is_numeric(rows: list[list[str]], column: int) -> bool:
    return column > 0 and all(row[column][:1] in "+-±[.0123456789" for row in rows)


class Progress:
    """Items (and tokens) done out of a total, and the pace. `advance` is cheap: call it per batch."""

    def __init__(self, label: str, total: int, unit: str, done: int, clock=time.monotonic):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.resumed, self.tokens = done, done, 0
        self.clock, self.start = clock, clock()
        self.show: Callable[[], None] = lambda: None
        self.note: Path | None = None
        self.noted = -NOTE_SECONDS

    def advance(self, items: int = 1, tokens: int = 0) -> None:
        self.done += items
        self.tokens += tokens
        self.show()
        if self.note and self.clock() - self.noted >= NOTE_SECONDS:
            self.noted = self.clock()
            self.write_note()

    def write_note(self) -> None:
        """Replaces the file `note`, which `strop show` and `strop watch` read; a failed write is ignored."""
        left = self.left()
        known = left < 1e8
        note = {"label": self.label, "done": self.done, "total": self.total, "unit": self.unit,
                "pace": self.pace() if known else "", "left": left if known else None, "updated": time.time()}
        temporary = self.note.with_name(f".{self.note.name}.tmp")
        with suppress(OSError):
            temporary.write_text(json.dumps(note) + "\n", encoding="utf-8")
            temporary.replace(self.note)

    def left(self) -> float:
        """Seconds left at the pace so far; items that an earlier process finished do not count towards the pace."""
        fresh = self.done - self.resumed
        return (self.clock() - self.start) * (self.total - self.done) / fresh if fresh > 0 else float("inf")

    def pace(self) -> str:
        """Tokens per second; items per second if no tokens are counted and the items have a name."""
        elapsed = self.clock() - self.start
        if elapsed <= 0:
            return ""
        if self.tokens:
            return f"{self.tokens / elapsed:,.0f} tok/s"
        return f"{(self.done - self.resumed) / elapsed:,.1f} {self.unit}/s" if self.unit != "tokens" else ""

    def when(self, final: bool) -> str:
        return f"took {duration(self.clock() - self.start)}" if final else f"{duration(self.left())} left"

    def line(self, final: bool) -> str:
        return "  ".join(filter(None, [self.label, f"{self.done:,}/{self.total:,}", self.pace(), self.when(final)]))


class Console:
    """Prints on the first rank; on other ranks (`enabled=False`) every method is silent.

    plain: plain lines instead of bars; by default if stdout is a file, a pipe or a CI job's log. note: a file that
    holds the progress of the running stage.
    """

    note: Path | None = None

    def __init__(self, enabled: bool = True, plain: bool | None = None, file: TextIO | None = None):
        self.enabled, self.file = enabled, file
        if plain is None:
            dumb = os.environ.get("TERM") == "dumb" or os.environ.get("CI", "").lower() not in ("", "0", "false")
            plain = dumb or not (file or sys.stdout).isatty()
        self.plain = plain
        self.notebook = file is None and in_notebook()
        self.rich = None if plain else RichConsole(file=file, highlight=False)
        self.bars: RichProgress | None = None  # one live display for all open bars: rich allows no second
        self.open = 0

    def line(self, text: str) -> None:
        """One line, verbatim: no markup, no wrapping, no color codes."""
        self._print(text)

    def warn(self, text: str) -> None:
        self._print("warning: " + clean(text), style="yellow")

    def heading(self, text: str) -> None:
        self._print(f"\n== {text} ==", style="bold")

    def table(self, title: str, columns: list[str], rows: list[list]) -> None:
        """A titled table; cells are converted with `str`."""
        columns, *rows = [[clean(str(c)) for c in row] for row in (columns, *rows)]
        if not self.enabled:
            return
        if self.plain:
            self._print("\n".join([f"\n{title}", *plain_table(columns, rows)]))
            return
        table = Table(title=escape(clean(title)), title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            table.add_column(escape(column), justify="right" if is_numeric(rows, i) else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        self.rich.print(table)

    @contextmanager
    def progress(self, label: str, total: int, unit: str = "tokens", done: int = 0):
        """Yields a `Progress`: call its `advance(items, tokens)`. unit: name of the items, if they are not tokens;
        done: items that an earlier process finished."""
        bar = Progress(label, total, unit, done)
        if self.enabled and self.note:
            bar.note = self.note
            bar.write_note()
        if not self.enabled:
            yield bar
        elif self.notebook:
            yield from self._throttled(bar, NOTE_SECONDS, self._notebook_display(bar), last=-NOTE_SECONDS)
        elif self.plain:
            yield from self._throttled(bar, PLAIN_SECONDS, lambda final: self._print(bar.line(final)), bar.clock())
        else:
            yield from self._rich_progress(bar)

    def _throttled(self, bar: Progress, seconds: float, show: Callable[[bool], None], last: float):
        """Calls show(final) at most every `seconds` until the bar is full, and at the end."""

        def show_sometimes() -> None:
            nonlocal last
            if bar.clock() - last >= seconds and bar.done < bar.total:
                last = bar.clock()
                show(False)

        bar.show = show_sometimes
        yield bar
        show(True)  # not in a `finally`: a stage that failed has not finished

    def _notebook_display(self, bar: Progress) -> Callable[[bool], None]:
        """One line below the cell that is updated in place."""
        from IPython.display import display

        handle = display({"text/plain": bar.label}, raw=True, display_id=True)

        def show(final: bool) -> None:
            text = clean(bar.line(final))
            html = (f'<progress max="{bar.total}" value="{bar.done}"></progress> '
                    f'<span style="font-family: monospace">{html_escape(text)}</span>')
            handle.update({"text/plain": text, "text/html": html}, raw=True)

        return show

    def _rich_progress(self, bar: Progress):
        if self.bars is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                       TextColumn("{task.fields[pace]}"), TextColumn("{task.fields[when]}"))
            self.bars = RichProgress(*columns, console=self.rich)
            self.bars.start()
        self.open += 1
        bars = self.bars
        task = bars.add_task(bar.label, total=bar.total, completed=bar.done, pace="", when="")
        bar.show = lambda: bars.update(task, completed=bar.done, pace=bar.pace(), when=bar.when(False))
        try:
            yield bar
            bars.update(task, when=bar.when(True))
        finally:
            self.open -= 1
            if not self.open:
                bars.stop()
                self.bars = None

    def _print(self, text: str, style: str | None = None) -> None:
        if not self.enabled:
            return
        file = self.file or sys.stdout
        encoding = getattr(file, "encoding", None) or "utf-8"
        text = "\n".join(map(clean, text.split("\n"))).encode(encoding, "replace").decode(encoding)
        try:
            if self.plain:
                file.write(text + "\n")  # one write per line: other ranks cannot interleave
                file.flush()
            else:
                self.rich.print(text, style=style, markup=False, soft_wrap=True)
        except OSError:  # the reader (`| head`) or the terminal is gone; the run continues silently
            self.enabled = False
            if file is sys.stdout:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")
