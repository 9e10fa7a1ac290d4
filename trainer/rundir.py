"""Reading a run directory, finished or not: what was made, from what, what comes next, and who is at work in it."""

import difflib
import fcntl
import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from strop.trainer.metrics import read_metrics
from strop.trainer.store import content_hash, read_json

ROUND_STAGES = ("sample", "score", "select", "sft", "reference", "dpo", "merge", "evaluate")
UNREADABLE = (ValueError, KeyError, OSError, TypeError)  # what a half-made or damaged artifact can cause
PROGRESS = "progress.json"  # how far the stage at work is; written by the console


@dataclass
class Run:
    """What a run directory holds. `problems` collects what could not be read; readers go on without it."""

    dir: Path
    config: dict = field(default_factory=dict)
    config_text: str = ""
    manifests: dict[str, dict] = field(default_factory=dict)  # by stage, in the order they were made
    partial: list[str] = field(default_factory=list)
    promotions: list[dict] = field(default_factory=list)
    metrics: dict[str, list[dict]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, function, *args, default=None):
        try:
            return function(*args)
        except UNREADABLE as e:
            self.problems.append(f"{what}: {type(e).__name__ if not str(e) else str(e).splitlines()[0]}")
            return default

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.dir.name))

    @property
    def rounds(self) -> int:
        """As many as the recipe asks for, or more if more are there."""
        seen = {s.split("/")[0] for s in [*self.manifests, *self.partial] if s.startswith("round-")}
        return max(len(seen), int(self.config.get("rounds", 0)))

    @property
    def finished(self) -> bool:
        return "final" in self.manifests


def find_run(argument: str) -> Path:
    """A run directory by its path, or by its name under runs/. Raises ValueError if there is neither."""
    for path in (Path(argument), Path("runs") / argument):
        if path.is_dir() and any((path / name).exists() for name in ("config.yaml", "prompts", "round-00")):
            return path
    if Path(argument).is_dir():
        raise ValueError(f"{argument}: no run directory, it has no config.yaml")
    there = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
    near = difflib.get_close_matches(Path(argument).name, there, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}?" if near else f"under runs/ there are: {', '.join(there) or 'none'}"
    raise ValueError(f"{argument}: no such run directory; {known}")


def read_run(run_dir: Path) -> Run:
    run = Run(run_dir)
    if (run_dir / "config.yaml").exists():
        run.config_text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            config = yaml.safe_load(run.config_text)
            run.config = config if isinstance(config, dict) else {}
        except yaml.YAMLError:
            run.problems.append("config.yaml: not YAML")
    found = []
    for path in sorted([*run_dir.glob("*/manifest.json"), *run_dir.glob("round-*/*/manifest.json")]):
        stage = path.parent.relative_to(run_dir).as_posix()
        manifest = run.attempt(f"{stage}/manifest.json", read_json, path)
        if manifest and manifest.get("stage") == stage:  # what is partly made or set aside stands elsewhere
            found.append(manifest)
    found.sort(key=lambda m: (m["created"], stage_order(m["stage"])))
    run.manifests = {m["stage"]: m for m in found}
    run.partial = sorted(str(p.relative_to(run_dir)).removesuffix(".partial")
                         for p in [*run_dir.glob("*.partial"), *run_dir.glob("round-*/*.partial")])
    if (run_dir / "promotions.json").exists():
        promotions = run.attempt("promotions.json", read_json, run_dir / "promotions.json", default=[])
        # after a key has changed, promotions of rounds that are to be made again may point at what is set aside
        run.promotions = [p for p in promotions if all(w[0] in run.manifests for w in p["candidates"].values())]
    for row in read_metrics(run_dir / "metrics.jsonl"):
        run.metrics.setdefault(row["stage"], []).append(row)
    return run


def stage_order(stage: str) -> tuple:
    head, _, tail = stage.partition("/")
    first = {"prompts": 0, "baseline": 1, "final": 3}.get(head, 2)
    return first, head, ROUND_STAGES.index(tail) if tail in ROUND_STAGES else len(ROUND_STAGES)


def planned(run: Run) -> list[tuple[str, list[str]]]:
    """(row's name, its stages) of all that the recipe asks for, in order: the start, each round, the end."""
    off = {s for s in ("sft", "dpo") if run.config.get(s, {}).get("enabled") is False}
    off |= {"reference"} if "dpo" in off else set()
    sources = run.config.get("data", {}).get("sources", True)
    off |= set() if sources else {"sample", "score", "evaluate"}
    rows = [("start", ["prompts", "baseline"])] if sources else []
    rows += [(f"round {r}", [f"round-{r:02}/{s}" for s in ROUND_STAGES if s not in off])
             for r in range(run.rounds)]
    return [*rows, ("end", ["final"])]


def next_stage(run: Run) -> str | None:
    """The first stage of the recipe that is not made yet."""
    return next((s for _, stages in planned(run) for s in stages if s not in run.manifests), None)


def holder(run_dir: Path) -> int | None:
    """The id of the process that runs in this directory, None if there is none (on this machine)."""
    try:
        pid = int((run_dir / ".lock").read_text().strip())
        os.kill(pid, 0)
        with open(run_dir / ".lock") as f:  # a process of that id may be another one by now: does it hold the lock?
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return pid
    except PermissionError:  # another user's process
        return pid
    except (OSError, ValueError):
        pass
    return None


def progress(run_dir: Path) -> dict | None:
    """What the stage at work said last: label, done, total, unit, pace, left (seconds or null), updated (epoch)."""
    try:
        found = read_json(run_dir / PROGRESS)
    except (ValueError, OSError):
        return None
    return found if isinstance(found, dict) and {"label", "done", "total", "updated"} <= found.keys() else None


def lineage(run: Run) -> list[dict]:
    """Which artifacts each artifact was made from, found by content hash; what no stage made came from outside."""
    makers = {}
    for stage, m in run.manifests.items():
        makers[content_hash(m["files"])] = stage
        for folder in {f.split("/")[0] for f in m["files"] if "/" in f}:
            files = {k.removeprefix(f"{folder}/"): v for k, v in m["files"].items() if k.startswith(f"{folder}/")}
            makers.setdefault(content_hash(files), f"{stage}/{folder}")
    rows = []
    for stage, m in run.manifests.items():
        inputs = [{"name": name, "hash": value[:12], "maker": makers.get(value)} for name, value in m["inputs"].items()
                  if isinstance(value, str) and len(value) == 32]
        rows.append({"stage": stage, "hash": content_hash(m["files"])[:12], "inputs": inputs, "created": m["created"],
                     "files": len(m["files"])})
    return rows


def standing(run: Run) -> list[str] | None:
    """Where the newest promoted weights were evaluated: [artifact, candidate]."""
    for promotion in reversed(run.promotions):
        where = promotion["candidates"].get(promotion["promoted"])
        if where:
            return where
    return None
