"""Metrics of a run: metrics.jsonl is the record; TensorBoard, trackers and the console are views of it.

A line of metrics.jsonl is one flat JSON object: `stage`, `step`, `time` (seconds since the epoch) and the metrics under
TRL's names. NaN and infinities are `null`.
"""

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from strop.trainer.run.console import Console
from strop.trainer.run.files import write_atomic, writing
from strop.trainer.run.trackers import Tracker, open_trackers

RESERVED = {"stage": str, "step": int, "time": int | float}
SHOWN = {  # metrics on the console: name -> (label, format)
    "reward": ("reward", ".3g"),
    "kl": ("kl", ".2g"),
    "loss": ("loss", ".4g"),
    "nll_loss": ("nll", ".4g"),
    "rewards/margins": ("margin", ".3g"),
    "rewards/accuracies": ("accuracy", ".0%"),
    "mean_token_accuracy": ("token_accuracy", ".1%"),
    "learning_rate": ("lr", ".1e"),
    "lr": ("lr", ".1e"),
    "grad_norm": ("grad_norm", ".2g"),
}


def step_line(stage: str, step: int, values: dict[str, float], total: int | None = None) -> str:
    """`round-00/sft  step 12/40  loss 1.234  lr 1.0e-05  grad_norm 0.8  1,234 tok/s`"""
    parts = [stage, f"step {step}/{total}" if total else f"step {step}"]
    parts += [f"{label} {values[name]:{form}}" for name, (label, form) in SHOWN.items() if name in values]
    if "tokens_per_second" in values:
        parts.append(f"{values['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def read_metrics(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl in order, without lines that were cut off or hold no metrics; none without a file."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            if is_row(row):
                rows.append(row)
    return rows


def is_row(row) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), t) for name, t in RESERVED.items()):
        return False
    return all(isinstance(value, int | float | None) for name, value in row.items() if name not in RESERVED)


def open_metrics(recipe, run_dir: Path, console: Console, enabled: bool) -> "Metrics":
    """The metrics of a run, configured by recipe.log. Raises UserError if a tracker does not start."""
    trackers = open_trackers(recipe, run_dir, console) if enabled and recipe.log.report_to else ()
    return Metrics(run_dir, console, recipe.log.tensorboard, enabled, trackers)


class Metrics:
    """Logs steps on the first rank; on other ranks (`enabled=False`) every method does nothing. A stage that logs a
    step again went back to a checkpoint or started over: that step and later ones of the stage are removed first."""

    def __init__(self, run_dir: Path, console: Console, tensorboard: bool = True, enabled: bool = True,
                 trackers: Sequence[Tracker] = ()):
        self.enabled, self.console, self.trackers = enabled, console, trackers
        self.writer = self.file = None
        if not enabled:
            return
        self.path = Path(run_dir) / "metrics.jsonl"
        self.events = Path(run_dir) / "tensorboard" if tensorboard else None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._rewrite(read_metrics(self.path))  # drops a line that a kill cut off

    def log(self, stage: str, step: int, values: dict[str, float], total: int | None = None) -> None:
        """Logs one step of `stage` to every view. total: the stage's number of steps, for the console."""
        if not self.enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        if reserved := [name for name in values if name in RESERVED]:
            raise ValueError(f"metric {reserved[0]!r} of stage {stage}: the name is reserved; rename it")
        if step <= self.last.get(stage, -1):
            self.rewind(stage, step - 1)
        row = {"stage": stage, "step": step, "time": round(time.time(), 3)} | values
        with writing(self.path):
            self.file.write(encode(row) + "\n")
            self.file.flush()
        self.last[stage] = step
        self._to_tensorboard(row)
        for tracker in self.trackers:
            tracker.log(stage, {"step": step} | values)
        self.console.line(step_line(stage, step, values, total))

    def stage_done(self, manifest: dict) -> None:
        """Sends a stage's counts (pass rates, KL, tokens, drops, ...) to the trackers."""
        for tracker in self.trackers:
            tracker.log(f"stages/{manifest['stage']}", manifest["counts"] | {"seconds": manifest["seconds"]})

    def rewind(self, stage: str, step: int) -> None:
        """Removes what `stage` logged after `step`: a stage calls this when it resumes from a checkpoint."""
        if self.enabled and self.last.get(stage, -1) > step:
            self._rewrite([r for r in read_metrics(self.path) if r["stage"] != stage or r["step"] <= step])

    def close(self) -> None:
        if self.enabled:
            self.file.close()
            if self.writer:
                self.writer.close()
            for tracker in self.trackers:
                tracker.close()

    def _rewrite(self, rows: list[dict]) -> None:
        if self.file:
            self.file.close()
        text = "".join(encode(row) + "\n" for row in rows)
        write_atomic(self.path, lambda p: p.write_text(text, encoding="utf-8"))
        self.file = self.path.open("a", encoding="utf-8")
        self.last: dict[str, int] = {}
        for row in rows:
            self.last[row["stage"]] = max(row["step"], self.last.get(row["stage"], -1))
        if self.events:
            self._replay(rows)

    def _replay(self, rows: list[dict]) -> None:
        """Rewrites TensorBoard's events: it cannot take back a step, and a kill loses what it has queued."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if self.writer:
            self.writer.close()
        for old in self.events.glob("events.out.tfevents.*"):
            old.unlink()
        self.writer = SummaryWriter(self.events, flush_secs=10)
        for row in rows:
            self._to_tensorboard(row)

    def _to_tensorboard(self, row: dict) -> None:
        if self.writer is None:
            return
        for name, value in row.items():
            if name not in RESERVED:
                self.writer.add_scalar(f"{row['stage']}/{name}", math.nan if value is None else value, row["step"],
                                       walltime=row["time"])


def encode(row: dict) -> str:
    """One line of strict JSON, which has no NaN and no infinities: they become null."""
    safe = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(safe, ensure_ascii=False, allow_nan=False)
