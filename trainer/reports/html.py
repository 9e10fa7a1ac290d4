"""The report of a run, finished or not: one self-contained HTML file."""

import base64
import hashlib
import json
import time
from functools import cache
from pathlib import Path
from statistics import median_high

import jinja2
import numpy as np
from markupsafe import Markup

from strop.trainer.errors import UserError
from strop.trainer.reports import comparison
from strop.trainer.reports.browse import held_out_rows, judged_of, sampled_rows
from strop.trainer.reports.card import GGUF_NOTE
from strop.trainer.reports.charts import COLORS, Dot, Line, bar_chart, column_chart, dot_chart, line_chart, number
from strop.trainer.reports.reading import RunRecord, lineage, plan_rows, read_run
from strop.trainer.reports.statistics import values_of, wilson, win_rate
from strop.trainer.reports.writers import released, writer_rows
from strop.trainer.run.console import duration
from strop.trainer.run.files import read_json, write_atomic
from strop.trainer.run.metrics import RESERVED
from strop.trainer.run.records import KL, read_record
from strop.trainer.run.tables import read_table

TEMPLATES = Path(__file__).parent / "templates"
PANELS = {  # charts per training stage: title -> metrics; other metrics get one chart each
    "loss": ("loss",), "token accuracy": ("mean_token_accuracy",), "reward margin": ("rewards/margins", "margin"),
    "preference accuracy": ("rewards/accuracies", "accuracy"), "rewards": ("rewards/chosen", "rewards/rejected"),
    "log-probs of completions": ("logps/chosen", "logps/rejected"), "NLL of chosen": ("nll_loss",),
    "entropy": ("entropy",), "gradient norm": ("grad_norm",), "learning rate": ("learning_rate",),
    "tokens per second": ("tokens_per_second",), "share of the peak speed (MFU)": ("mfu",),
    "tokens of checked completions": ("eval/mean_length",), "checked completions that were cut": ("eval/cut_share",),
    "KL of the start weights, checked": ("eval/kl",),
    "reward": ("reward",), "spread of a prompt's rewards": ("reward_std",), "KL to the reference": ("kl",),
    "tokens of completions": ("completions/mean_length", "completions/max_length"),
    "completions cut by length": ("completions/clipped_ratio",),
    "log-probs, sampler against trainer": ("sampling/sampling_logp_difference/mean",),
    "seconds of sampling and scoring": ("sampling_seconds", "scoring_seconds"),
    "packing and balance": ("packing_efficiency", "packing_fill", "rank_balance"),
}
SOURCES, DROPS, RECIPE = 12, 200, 50_000  # the report's charted sources, rows of drops, characters of the recipe
REST = 20  # refreshing the report during a run takes at most 1/REST of its time


def write_report(run_dir: Path) -> Path:
    """Writes report.html into the run directory and returns its path. Raises UserError if there is no such folder."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    run = read_run(run_dir)
    html = render(settled(run) | moving(run))
    path = run_dir / "report.html"
    write_atomic(path, lambda p: p.write_text(html, encoding="utf-8", errors="replace"))
    return path


class Refresh:
    """Refreshes report.html after a stage; an instance is called with its manifest. A failure is only a warning."""

    def __init__(self, run_dir: Path, console, clock=time.monotonic):
        self.run_dir, self.console, self.clock, self.not_before = run_dir, console, clock, clock()

    def __call__(self, manifest: dict) -> None:
        started = self.clock()
        if started < self.not_before:
            return
        try:
            write_report(self.run_dir)
        except Exception as e:  # must not stop the run
            self.console.warn(f"{self.run_dir / 'report.html'}: not refreshed ({type(e).__name__}: {e})")
        self.not_before = self.clock() + REST * (self.clock() - started)


@cache
def templates() -> jinja2.Environment:
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.globals |= {"colors": COLORS, "comparison_columns": comparison.COLUMNS,
                            "comparison_note": comparison.NOTE}
    environment.filters |= {"percent": lambda v: f"{100 * v:.1f}\N{NO-BREAK SPACE}%", "duration": duration,
                            "points": lambda v: f"{100 * v:+.1f}", "count": count}
    return environment


def render_rows(run: RunRecord, table: str, page: int) -> str:
    """The rows of a page of the table "sampled" or "held-out", as HTML; empty behind the last one."""
    rows, _ = (sampled_rows if table == "sampled" else held_out_rows)(run, page)
    macros = templates().get_template("rows.html.j2").module
    return macros.sampled(rows) if table == "sampled" else macros.held_out(rows, run.current is not None)


def render(values: dict) -> str:
    """The HTML page of a run, from `settled`, `moving` and `live`."""
    parts = ("watch.js", "report.js") if values["live"] else ("report.js",)
    script = "".join((TEMPLATES / part).read_text(encoding="utf-8") for part in parts)
    return templates().get_template("report.html.j2").render(
        values, script=Markup(script), style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())


def moving(run: RunRecord) -> dict:
    """Values of the page that change while a stage runs; cheap."""
    return {
        "name": run.name, "seed": run.config.get("seed"), "finished": run.finished, "rounds": run.rounds,
        "rounds_done": len(run.promotions), "pipeline": pipeline(run), "training": training(run),
        "time_chart": Markup(time_chart(run)), "config_text": run.config_text[:RECIPE],
        "config_left": max(0, len(run.config_text) - RECIPE), "live": None,
    }


def settled(run: RunRecord) -> dict:
    """Values of the page that change only when a stage completes."""
    results = run.attempt("results", run.results, default=[])
    path = str(run.config.get("model", {}).get("path", ""))
    sampling = run.attempt("samples", sampling_rows, run, default=[])
    kl = run.attempt("kl.json", kl_of, run, default={})
    drops = run.attempt("drops", drop_rows, run, default=[])
    sampled, of_sampled = run.attempt("sampled prompts", sampled_rows, run, default=([], 0))
    held_out, of_held_out = run.attempt("held-out prompts", held_out_rows, run, default=([], 0))
    return {
        "model": run.start,
        "gguf_note": GGUF_NOTE if path.startswith("package:") or path.endswith(".gguf") else "",
        "headline": headline(results), "results": result_table(results, kl),
        "synthetic": synthetic(run),
        "result_sources": sources_of(results)[:SOURCES], "of_sources": len(sources_of(results)),
        "pass_charts": pass_charts(results),
        "change_charts": change_charts(results, kl),
        "judges": run.attempt("judges", judge_rows, run, default=[]),
        "rewards": run.attempt("reward models", reward_rows, run, default=[]),
        "compared": run.attempt("comparison", comparison_rows, run, default=[]),
        "by_source": run.attempt("sources.json", source_rows, run, default=[]),
        "scorers": run.attempt("scores", scorer_table, run, results, default=[]),
        "sampling": sampling, "writers": run.attempt("writers", writer_rows, run, default=[]),
        "solved_chart": Markup(solved_chart(sampling)), "stages": stage_rows(run),
        "seconds": sum(m["seconds"] for m in run.manifests.values()),
        "sampled_tokens": sum(row["tokens"] for row in sampling),
        "drops": drops[:DROPS], "of_drops": len(drops), "sampled": sampled, "of_sampled": of_sampled,
        "held_out": held_out, "of_held_out": of_held_out,
        "lineage": lineage(run), "problems": run.problems, "versions": run.versions,
        "created": next((m["created"] for m in reversed(run.manifests.values())), ""),
    }


def pipeline(run: RunRecord) -> list[tuple[str, list[dict]]]:
    """Rows of the progress section: (name, stages with state "done", "partly" or "open")."""
    return [(name, [{
        "name": s["stage"].split("/")[-1], "seconds": run.manifests.get(s["stage"], {}).get("seconds"),
        "state": "done" if run.is_done(s) else "partly" if s["stage"] in run.partial else "open"}
        for s in stages]) for name, stages in plan_rows(run)]


def label(row: dict) -> str:
    return "base" if row["round"] is None else f"round {row['round']} {row['stop']}"


def headline(results: list[dict]) -> dict | None:
    """Base and newest promoted weights on the test split."""
    if not results:
        return None
    now = next((r for r in reversed(results) if r["promoted"]), None)
    return {"base": results[0]["test"]["pass_rate"], "n": results[0]["test"]["n"],
            "now": now and now["test"]["pass_rate"], "label": now and label(now), "gain": now and now["over_base"]}


def kl_of(run: RunRecord) -> dict[tuple[str, str], dict]:
    """(evaluation, candidate) -> its KL from the start weights."""
    files = {s["stage"]: run.dir / s["inputs"]["completions"] / "kl.json" for s in run.of_kind("evaluation")}
    return {(stage, name): found for stage, file in files.items() if file.exists()
            for name, found in read_record(file, KL).items()}


def result_table(results: list[dict], kl: dict) -> list[dict]:
    rows = []
    for r in results:
        splits = {s: r[s] | dict(zip(("low", "high"), wilson(r[s]["pass_rate"], r[s]["n"]), strict=True))
                  for s in ("validation", "test")}
        rows.append({"label": label(r), "promoted": r["promoted"], "over_base": r.get("over_base"),
                     "part": r.get("part"), "before": r.get("before"), "kl": kl.get(tuple(r["where"])), **splits})
    return rows


def scorer_table(run: RunRecord, results: list[dict]) -> list[dict]:
    """A row per weights with `cells`: scorer -> mean, pass_rate and win_rate on the test split, or None."""
    names = sorted({name for r in results for name in r["test"].get("scorers", {})})
    places = [(run.dir / r["where"][0], r["where"][1]) for r in results]
    values = {name: [values_of(*place, "test", name) for place in places] for name in names}
    return [{"label": label(r), "promoted": r["promoted"], "cells": {
        name: r["test"]["scorers"][name] | {"win_rate": win_rate(values[name][i], values[name][0]) if i else None}
        if name in r["test"]["scorers"] else None for name in names}} for i, r in enumerate(results) if names]


def reward_rows(run: RunRecord) -> list[dict]:
    """A block per trained reward model: its `rows` over all held-out pairs and by source, and its calibration chart."""
    blocks = []
    for s in run.of_kind("reward"):
        found = read_json(run.dir / s["stage"] / "reward.json")
        rows = [(name, row) for name, row in [("all", found["all"]), *found["by_source"].items()] if row["n"]]
        bins = found["all"]["calibration"]["bins"] if rows else []
        dots = [Dot(f"{100 * b['confidence']:.0f}", "confidence, %", b["accuracy"], b["low"], b["high"], True,
                    f"of {b['n']} pairs") for b in bins]
        chart = dot_chart(dots, 490, 200, label="accuracy by confidence with 95 % intervals")
        blocks.append({"stage": s["stage"], "rows": rows if len(rows) != 2 else rows[:1], "chart": Markup(chart)})
    return blocks


def comparison_rows(run: RunRecord) -> list[tuple[list[list[str]], Markup]]:
    """(table, figure) of each comparison of policies with the best of n."""
    found = [read_json(run.dir / s["stage"] / "comparison.json") for s in run.of_kind("comparison")]
    return [([comparison.cells(row) for row in rows], Markup(comparison.figure(rows))) for rows in found]


def judge_rows(run: RunRecord) -> list[tuple[str, dict]]:
    """(stage, judge.json) of the stages that judges scored."""
    files = [(s["stage"], run.dir / s["stage"] / "judge.json") for s in run.stages if run.is_done(s)]
    return [(stage, read_json(file)) for stage, file in files if file.exists()]


def source_rows(run: RunRecord) -> list[dict]:
    """A row per stage that scored, source and scorer: n, and mean and std or the shares of topics."""
    files = [(s["stage"], run.dir / s["stage"] / "sources.json") for s in run.of_kind("scores")]
    return [{"stage": stage, "source": source, "scorer": name} | about for stage, file in files if file.exists()
            for source, scorers in read_json(file).items() for name, about in scorers.items()]


def sources_of(results: list[dict]) -> list[str]:
    return list(results[0]["test"].get("by_source", {})) if results else []


def dot(row: dict, value: float, interval: tuple[float, float] | None = None, note: str = "") -> Dot:
    """A value of a row of results at its place in a chart."""
    is_base = row["round"] is None
    return Dot("start" if is_base else row["stop"], "base" if is_base else f"round {row['round']}", value,
               *(interval or (value, value)), row["promoted"] or is_base, note)


def pass_charts(results: list[dict]) -> dict:
    """{"test", "validation": chart, "sources": [(source, chart)]}"""

    def chart(parts: list[dict | None], *size: int) -> Markup:
        return Markup(dot_chart([dot(r, p["pass_rate"], wilson(p["pass_rate"], p["n"]), f"of {p['n']} prompts")
                                 for r, p in zip(results, parts, strict=True) if p and p["n"]], *size))

    charts = {split: chart([r[split] for r in results], 1000, 230) for split in ("test", "validation")}
    return charts | {"sources": [(s, chart([r["test"]["by_source"].get(s) for r in results], 490, 200))
                                 for s in sources_of(results)[:SOURCES]]}


def change_charts(results: list[dict], kl: dict) -> list[tuple[str, Markup]]:
    """(title, chart) of KL, length and cut share, by round."""
    measured = [(r, kl[tuple(r["where"])]) for r in results if tuple(r["where"]) in kl]
    kls = [dot(r, k["kl"], (max(0.0, k["kl"] - 1.96 * (k["stderr"] or 0.0)), k["kl"] + 1.96 * (k["stderr"] or 0.0)),
               f"over {k['tokens']} tokens of {k['prompts']} prompts") for r, k in measured]
    lengths = [dot(r, r["test"]["mean_length"]) for r in results]
    cut = [dot(r, r["test"]["cut_share"], wilson(r["test"]["cut_share"], r["test"]["n"])) for r in results]
    charts = [("KL to the start weights, nats per token", dot_chart(kls, 340, 190, form=number, label="KL by round")),
              ("tokens per completion, test split", dot_chart(lengths, 340, 190, form=number, label="length by round")),
              ("completions cut by length, test split", dot_chart(cut, 340, 190, label="share cut by round"))]
    return [(title, Markup(chart)) for title, chart in charts if chart]


def training(run: RunRecord) -> list[dict]:
    """A block per kind of training stage: charts with a curve per round."""
    blocks = []
    trained = [s for s in run.stages if s["kind"] in ("training", "reward")]
    for title in dict.fromkeys(s["title"] for s in trained):
        names = [s["stage"] for s in trained if s["title"] == title]
        stages = {s: rows for s, rows in run.metrics.items() if s in names}
        logged = list(dict.fromkeys(n for rows in stages.values() for row in rows for n in row if n not in RESERVED))
        known = {name for names in PANELS.values() for name in names}
        panels = [(panel, names) for panel, names in PANELS.items() if set(names) & set(logged)]
        panels += [(name, (name,)) for name in logged if name not in known]
        charts = []
        for panel, names in panels:
            lines = [Line(" ".join([stage.split("/")[0], *([name.split("/")[-1]] if len(names) > 1 else [])]),
                          [row["step"] for row in rows], [row.get(name) for row in rows])
                     for stage, rows in stages.items() for name in names]
            chart = line_chart(lines, zero=names[0] in ("rewards/margins", "grad_norm", "learning_rate"))
            if chart:
                charts.append({"title": panel, "svg": Markup(chart), "legend": [line.name for line in lines]})
        if charts:
            blocks.append({"title": title, "charts": charts})
    return blocks


def sampling_rows(run: RunRecord) -> list[dict]:
    """Per round: samples, tokens, mean length, shares cut and correct, histogram of correct samples per prompt."""
    rows = []
    judged = judged_of(run)
    for stage in (s["stage"] for s in run.of_kind("samples")):
        counts = run.manifests[stage]["counts"]
        row = {"round": stage.split("/")[0], "samples": counts["samples"], "tokens": counts["tokens"],
               "mean_length": counts["mean_length"], "cut": counts["cut_share"], "correct": None, "solved": None,
               "histogram": None, "released": released(run, stage)}
        if stage in judged:
            table = read_table(judged[stage], ["prompt_id", "correct"])
            counted = table.set_column(1, "correct", table["correct"].cast("int32")).group_by("prompt_id").aggregate(
                [("correct", "sum"), ("correct", "count")])
            right, drawn = counted["correct_sum"].to_numpy(), counted["correct_count"].to_numpy()
            row |= {"correct": right.sum() / drawn.sum(), "solved": (right > 0).mean(),
                    "histogram": np.bincount(right, minlength=drawn.max() + 1).tolist()} if len(right) else {}
        rows.append(row)
    return rows


def synthetic(run: RunRecord) -> list[str]:
    """By round, how many prompts a model wrote."""
    return [f"{stage['stage']}: {count(run.manifests[stage['stage']]['counts']['prompts'])}"
            for stage in run.of_kind("synthetic prompts") if stage["stage"] in run.manifests]


def solved_chart(sampling: list[dict]) -> str:
    scored = [row for row in sampling if row["histogram"]]
    if not scored:
        return ""
    k = max(len(row["histogram"]) for row in scored)
    series = [(row["round"], [*map(float, row["histogram"]), *[0.0] * (k - len(row["histogram"]))]) for row in scored]
    return column_chart([f"{i}" for i in range(k)], series, 490, 200)


def time_chart(run: RunRecord) -> str:
    total = sum(m["seconds"] for m in run.manifests.values()) or 1.0
    bars = []
    for stage, m in run.manifests.items():
        speeds = [r["tokens_per_second"] for r in run.metrics.get(stage, []) if r.get("tokens_per_second")]
        speed = f" · {median_high(speeds):,.0f} tok/s" if speeds else ""
        bars.append((stage, m["seconds"], f"{duration(m['seconds'])} · {100 * m['seconds'] / total:.0f} %{speed}"))
    return bar_chart(bars)


def drop_rows(run: RunRecord) -> list[dict]:
    """A row per stage, reason and source, with the count and an example."""
    rows = []
    for stage in run.manifests:
        path = run.dir / stage / "drops.parquet"
        if path.exists():
            groups = read_table(path, ["reason", "source", "detail"]).group_by(["reason", "source"], use_threads=False)
            found = groups.aggregate([("detail", "first"), ([], "count_all")])
            rows += [{"stage": stage, "reason": row["reason"], "source": row["source"] or "", "n": row["count_all"],
                      "detail": (row["detail_first"] or "")[:160]} for row in found.to_pylist()]
    return rows


def stage_rows(run: RunRecord) -> list[dict]:
    rows = []
    for stage, m in run.manifests.items():
        tokens = m["counts"].get("tokens")
        rows.append({"stage": stage, "seconds": m["seconds"], "created": m["created"], "tokens": tokens,
                     "speed": tokens / m["seconds"] if tokens and m["seconds"] else None,
                     "bytes": sum(f["bytes"] for f in m["files"].values()),
                     "counts": [(k, count(v)) for k, v in m["counts"].items()
                                if k != "tokens" and not k.startswith("dropped/")]})
    return rows


def count(value) -> str:
    if isinstance(value, float) and value != int(value):
        return f"{value:,.4g}"
    return f"{int(value):,}" if isinstance(value, int | float) else json.dumps(value)
