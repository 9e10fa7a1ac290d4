"""`strop show`: a run's state, lineage, results and next step, in the terminal."""

import shlex
import time

from strop.trainer.reports.reading import RunRecord, find_run, holder, lineage, next_stage, progress, read_run
from strop.trainer.reports.statistics import points
from strop.trainer.run.console import duration


def show(console, argument: str) -> None:
    """Prints a summary of a run. Raises UserError if there is no such run."""
    run = read_run(find_run(argument))
    pid = holder(run.dir)
    console.line(f"{run.name}   {run.dir}")
    console.line(f"state: {state(run, pid)}")
    if run.config.get("model"):
        console.line(f"from {run.start}   seed {run.config.get('seed')}   "
                     f"{sum(m['seconds'] for m in run.manifests.values()):,.1f} s in stages")
    console.table("lineage", ["stage", "state", "seconds", "hash", "made from"], lineage_rows(run, pid))
    if gained := gains(run):
        console.line("")
        console.line(gained)
    for problem in run.problems:
        console.warn(problem)
    console.line("")
    console.line(f"next: {advice(run, pid)}")


def state(run: RunRecord, pid: int | None) -> str:
    """One line: running, finished, or stopped, and at which stage."""
    if pid:
        at = progress(run.dir)
        return f"running (process {pid}), {run.rounds_done}" + (f"; {how_far(at)}" if at else "")
    if run.finished:
        return f"finished, {run.rounds_done}"
    where = next_stage(run)
    partly = ", partly done" if where in run.partial else ""
    return f"stopped before {where}{partly}, {run.rounds_done}" if where else f"stopped, {run.rounds_done}"


def how_far(at: dict) -> str:
    """`round-00/sample 640/1,152, 550 tok/s, 1:20 left`"""
    left = at.get("left")
    parts = [f"{at['label']} {at['done']:,}/{at['total']:,}", at.get("pace") or "",
             f"{duration(left)} left" if left is not None and at["done"] < at["total"] else ""]
    ago = time.time() - at["updated"]
    return ", ".join(filter(None, parts)) + (f"  ({duration(ago)} ago)" if ago > 60 else "")


def lineage_rows(run: RunRecord, pid: int | None) -> list[list[str]]:
    made = {row["stage"]: row for row in lineage(run)}
    rows = []
    for entry in run.stages:
        stage = entry["stage"]
        if not run.is_done(entry):
            state = "stale" if stage in made else "to run"
            if stage in run.partial:
                state = "running" if pid else "partly done"
            rows.append([stage, state, "", "", ""])
            continue
        inputs = dict.fromkeys(i["maker"] or f"{i['name'].split('.')[-1]} from outside" for i in made[stage]["inputs"])
        rows.append([stage, "done", f"{run.manifests[stage]['seconds']:.1f}", made[stage]["hash"], ", ".join(inputs)])
    return rows


def gains(run: RunRecord) -> str:
    """Pass rates of base and promoted weights on the test split; empty if there are none yet."""
    if run.current is None:
        return ""
    results = run.attempt("results", run.results, default=[])
    now = next((r for r in reversed(results) if r["promoted"]), None)
    if now is None:
        return f"test split: base {results[0]['test']['pass_rate']:.1%}, nothing better was promoted" if results else ""
    return (f"test split: base {results[0]['test']['pass_rate']:.1%}, round {now['round']} {now['stop']} "
            f"{now['test']['pass_rate']:.1%}, gain {points(now['over_base'])} (paired, 95 %) on "
            f"{now['test']['n']} prompts")


def advice(run: RunRecord, pid: int | None) -> str:
    """The command to give next."""
    quoted = shlex.quote(str(run.dir))
    if pid:
        return f"strop watch {quoted}   (a live page)"
    if run.finished:
        return f"strop export {quoted} DIR   (copies the promoted model); {quoted}/report.html"
    recipe = shlex.quote(str(run.dir / "config.yaml"))
    return f"strop {recipe}   (resumes at {next_stage(run) or 'the start'}; --plan shows what would run)"
