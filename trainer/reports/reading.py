"""Reads a run directory, finished or not: plan, manifests, metrics, results, and the process that runs it."""

import difflib
import fcntl
import os
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from html import escape
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import yaml

from strop.trainer.config import Section
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import recipe_class
from strop.trainer.reports.statistics import round_results
from strop.trainer.run.artifacts import Artifact, content_hash, read_manifest
from strop.trainer.run.console import PROGRESS
from strop.trainer.run.files import check_file_type, read_json
from strop.trainer.run.metrics import read_metrics
from strop.trainer.run.records import PLAN_RECORD, PROMOTIONS, read_record
from strop.trainer.run.store import PLAN
from strop.trainer.run.tables import read_table

UNREADABLE = (ValueError, KeyError, OSError, TypeError)  # errors that a partial or damaged artifact can cause


@dataclass
class RunRecord:
    """The content of a run directory. `problems` lists parts that could not be read."""

    dir: Path
    config: dict = field(default_factory=dict)
    config_text: str = ""
    plan: dict = field(default_factory=dict)  # plan.json, see Store
    manifests: dict[str, dict] = field(default_factory=dict)  # by stage, oldest first
    partial: list[str] = field(default_factory=list)
    promotions: list[dict] = field(default_factory=list)
    metrics: dict[str, list[dict]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, function, *args, default=None):
        """function(*args), or `default` and an entry in `problems` if the artifacts cannot be read."""
        try:
            return function(*args)
        except UNREADABLE as e:
            self.problems.append(f"{what}: {type(e).__name__ if not str(e) else str(e).splitlines()[0]}")
            return default

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.dir.name))

    @property
    def stages(self) -> list[dict]:
        """The entries of plan.json, in order; without one, entries made from the manifests."""
        made = [{"stage": stage, "kind": m.get("kind", "other"), "title": stage.split("/")[-1], "inputs": {},
                 "round": int(stage.split("/")[0].removeprefix("round-")) if "/" in stage else None, "state": "done"}
                for stage, m in self.manifests.items()]
        return self.plan.get("stages") or made

    @property
    def rounds(self) -> int:
        return len({s["round"] for s in self.stages if s["round"] is not None})

    @property
    def rounds_done(self) -> str:
        return f"{len(self.promotions)} of {self.rounds} rounds done"

    @property
    def versions(self) -> dict[str, str]:
        return next((m["versions"] for m in reversed(self.manifests.values()) if m.get("versions")), {})

    def is_done(self, stage: dict) -> bool:
        return stage["stage"] in self.manifests and stage["state"] != "stale"

    def of_kind(self, kind: str) -> list[dict]:
        """The completed stages of a kind, in the order of the plan."""
        return [s for s in self.stages if s["kind"] == kind and s["stage"] in self.manifests]

    @property
    def finished(self) -> bool:
        return next_stage(self) is None and bool(self.manifests)

    @property
    def start(self) -> str:
        """The start weights as the recipe names them, with their commit if they are from the hub."""
        commit = self.plan.get("base", {}).get("revision")
        return str(self.config.get("model", {}).get("path", "")) + (f" at commit {commit}" if commit else "")

    @property
    def base(self) -> tuple[str, str] | None:
        """Where the start weights were evaluated: (evaluation, candidate in it)."""
        for s in self.of_kind("evaluation"):
            for name in self.manifests[s["stage"]]["inputs"]:
                if name.startswith("candidates."):
                    return s["stage"], name.removeprefix("candidates.")
        return None

    @property
    def current(self) -> tuple[str, str] | None:
        """Where the newest promoted weights were evaluated: (evaluation, candidate in it)."""
        for promotion in reversed(self.promotions):
            if where := promotion["candidates"].get(promotion["promoted"]):
                return where[0], where[1]
        return None

    @property
    def reward_model(self) -> str | None:
        """The stage of the reward model that the run is for; None if it is for another model, or not done."""
        last = self.stages[-1:]
        return last[0]["stage"] if last and last[0]["kind"] == "reward" and self.is_done(last[0]) else None

    @property
    def model(self) -> Path | None:
        """The published model folder, a trained reward model, or the newest promoted weights; None before there is
        one."""
        if published := self.of_kind("model"):
            return self.dir / published[-1]["stage"]
        if self.reward_model:
            return self.dir / self.reward_model / "model"
        return next((self.dir / p["weights"] for p in reversed(self.promotions) if p["weights"]), None)

    def results(self) -> list[dict]:
        """Pass rates and paired gains of the start weights and of every round's candidates, see `round_results`."""
        return round_results(self.dir, self.promotions, self.base, self.resamples)

    def table(self, stage: str, name: str | None = None) -> pa.Table:
        """A table of a stage: run.table("round-00/select", "pairs"). Without a name: its only table, or all shards of a
        sampling stage. Raises UserError if there is no such table."""
        files = sorted((self.dir / stage).glob("*.parquet" if name is None else f"{name}.parquet"))
        if name is None:
            files = [f for f in files if f.stem != "drops"]
        if not files or (len(files) > 1 and not all(f.name.startswith("shard-") for f in files)):
            there = ", ".join(f.stem for f in sorted((self.dir / stage).glob("*.parquet"))) or "none"
            raise UserError(f"{self.dir / stage}: no table {name or ''}; there are: {there}")
        return pa.concat_tables([read_table(f) for f in files])

    def _repr_html_(self) -> str:
        """The report, for Jupyter."""
        report = self.dir / "report.html"
        text = report.read_text(encoding="utf-8") if report.exists() else f"<p>{escape(str(self.dir))}: no report</p>"
        return (f'<iframe sandbox="allow-scripts" srcdoc="{escape(text)}" style="width: 100%; height: 40em; '
                'border: 1px solid #ccc"></iframe>')

    @property
    def resamples(self) -> int:
        asked = self.config.get("evaluate", {}).get("bootstrap")
        return asked if isinstance(asked, int) else 10_000


def find_run(argument: str | Path) -> Path:
    """A run directory by its path, or by its name under runs/. Raises UserError if there is none."""
    for path in (Path(argument), Path("runs") / argument):
        if path.is_dir() and any((path / name).exists() for name in ("config.yaml", PLAN)):
            return path
    if Path(argument).is_dir():
        raise UserError(f"{argument}: not a run directory, it has no config.yaml")
    there = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
    near = difflib.get_close_matches(Path(argument).name, there, n=1, cutoff=0.5)
    known = f"did you mean {near[0]}?" if near else f"under runs/ there are: {', '.join(there) or 'none'}"
    raise UserError(f"{argument}: no such run directory; {known}")


def load_run(run: str | Path) -> RunRecord:
    """A run, finished or not, by its directory or by its name under runs/. Raises UserError if there is none."""
    return read_run(find_run(run))


_parsed = lru_cache(maxsize=4)(yaml.safe_load)  # a run at work is read after each stage


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run directory; damaged parts end up in `problems`."""
    run = RunRecord(run_dir)
    for name in ("config.yaml", "metrics.jsonl"):
        check_file_type(run_dir / name)
    if (run_dir / "config.yaml").exists():
        run.config_text = (run_dir / "config.yaml").read_text(encoding="utf-8", errors="replace")
        try:
            config = deepcopy(_parsed(run.config_text))
            config = config if isinstance(config, dict) else {}
            sections = {k for k, f in recipe_class(config).model_fields.items() if isinstance(f.default, Section)}
            wrong = [k for k in sections & config.keys() if not isinstance(config[k], dict)]
            run.problems += [f"config.yaml: {k} is not a section of a recipe" for k in sorted(wrong)]
            run.config = {k: v for k, v in config.items() if k not in wrong}
        except (yaml.YAMLError, RecursionError):
            run.problems.append("config.yaml: not YAML")
    if (run_dir / PLAN).exists():
        run.plan = run.attempt(PLAN, read_record, run_dir / PLAN, PLAN_RECORD, default={})
    found = []
    for path in sorted([*run_dir.glob("*/manifest.json"), *run_dir.glob("round-*/*/manifest.json")]):
        stage = path.parent.relative_to(run_dir).as_posix()
        manifest = run.attempt(f"{stage}/manifest.json", read_manifest, path.parent)
        if manifest and manifest["stage"] == stage:  # not a partial or stale one
            found.append(manifest)
    order = {s["stage"]: i for i, s in enumerate(run.plan.get("stages", []))}
    found.sort(key=lambda m: (m["created"], order.get(m["stage"], len(order))))
    run.manifests = {m["stage"]: m for m in found}
    run.partial = sorted(str(p.relative_to(run_dir)).removesuffix(".partial")
                         for p in [*run_dir.glob("*.partial"), *run_dir.glob("round-*/*.partial")])
    if (run_dir / "promotions.json").exists():
        promotions = run.attempt("promotions.json", read_record, run_dir / "promotions.json", PROMOTIONS, default=[])
        # after a key changed, promotions of rounds that have not been re-run yet may point to stale artifacts
        run.promotions = [p for p in promotions if all(w[0] in run.manifests for w in p["candidates"].values())]
    for row in read_metrics(run_dir / "metrics.jsonl"):
        run.metrics.setdefault(row["stage"], []).append(row)
    return run


def plan_rows(run: RunRecord) -> list[tuple[str, list[dict]]]:
    """(name, stages) of each row of the plan: "start", the rounds, "end"."""
    rows = [(r, list(stages)) for r, stages in groupby(run.stages, lambda s: s["round"])]
    return [(f"round {r}" if r is not None else "end" if i else "start", stages) for i, (r, stages) in enumerate(rows)]


def next_stage(run: RunRecord) -> str | None:
    """The first stage of the plan that is not done."""
    return next((s["stage"] for s in run.stages if not run.is_done(s)), None)


def holder(run_dir: Path) -> int | None:
    """The id of the process (on this machine) that runs in this directory, or None."""
    try:
        pid = int((run_dir / ".lock").read_text().strip())
        os.kill(pid, 0)
        with open(run_dir / ".lock") as f:  # the id may belong to another process by now: is the lock held?
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the lock is held, or it is another user's process
        return pid
    except (OSError, ValueError):
        pass
    return None


def progress(run_dir: Path) -> dict | None:
    """The content of progress.json: label, done, total, unit, pace, left (seconds or null), updated (epoch)."""
    with suppress(UserError, OSError):
        found = read_json(run_dir / PROGRESS)
        if isinstance(found, dict) and {"label", "done", "total", "updated"} <= found.keys():
            return found
    return None


def lineage(run: RunRecord) -> list[dict]:
    """The inputs of every artifact, matched by content hash; `maker` is None for inputs from outside the run."""
    makers = {}
    for stage, m in run.manifests.items():
        artifact = Artifact(run.dir / stage, content_hash(m["files"]), m["files"])
        makers[artifact.hash] = stage
        for folder in {f.split("/")[0] for f in m["files"] if "/" in f}:
            makers.setdefault(artifact.sub(folder).hash, f"{stage}/{folder}")
    rows = []
    for stage, m in run.manifests.items():
        inputs = [{"name": name, "hash": value[:12], "maker": makers.get(value)} for name, value in m["inputs"].items()
                  if isinstance(value, str) and len(value) == 32]
        rows.append({"stage": stage, "hash": content_hash(m["files"])[:12], "inputs": inputs, "created": m["created"],
                     "files": len(m["files"])})
    return rows
