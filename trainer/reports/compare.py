"""`strop compare`: two or more runs side by side: recipes, pass rates on the same prompts, and cost."""

from collections import Counter

from strop.trainer.errors import UserError
from strop.trainer.reports.reading import RunRecord, find_run, read_run
from strop.trainer.reports.statistics import correct, gain, percent, points, wilson
from strop.trainer.run.console import duration
from strop.trainer.run.tables import read_table

ABSENT = "-"
IGNORED = ("name", "output_dir")
MEASURES = ("evaluate.max_new_tokens", "score.", "data.sources")  # keys that change how pass rates are measured
KINDS = {"samples": "sampling", "writer": "sampling", "revisions": "sampling", "training": "training",
         "log-probs": "training",
         "reward": "training", "held-out": "evaluation", "evaluation": "evaluation"}


def compare(console, *arguments: str) -> None:
    """Prints the tables of two or more runs; the others are compared with the first one. Raises UserError if one of
    them is not a run directory, or if a run is given twice."""
    runs = [read_run(find_run(a)) for a in arguments]
    if len({r.dir.resolve() for r in runs}) < len(runs):
        raise UserError(f"compare {' '.join(arguments)}: the same run twice; name different runs")
    names = labels(runs)
    differing = differences(runs)
    console.table("what differs in their recipes", ["key", *names],
                  [[key, *map(short, values)] for key, values in differing] or [["nothing", *[""] * len(runs)]])
    if measured := [key for key, _ in differing if key.startswith(MEASURES)]:
        more = f" and {len(measured) - 4} more" if len(measured) > 4 else ""
        console.warn(f"{', '.join(measured[:4])}{more} differ: the pass rates below are not comparable")
    results = [result(run) for run in runs]
    console.table("test split, promoted weights (95 % intervals; differences are paired by prompt)", ["", *names],
                  across(result_cells(results, names[0])) + source_rows(results))
    console.table("cost", ["", *names], across([cost_cells(run) for run in runs]))


def across(columns: list[dict[str, str]]) -> list[list[str]]:
    """Rows of a table from one {row's name: cell} per column."""
    return [[name, *(column[name] for column in columns)] for name in columns[0]]


def labels(runs: list[RunRecord]) -> list[str]:
    """Names of the runs; paths of those that share a name."""
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else str(run.dir) for run in runs]


def differences(runs: list[RunRecord]) -> list[tuple[str, list]]:
    """(key, its value in each run) of every key of the recipes that differs between runs."""
    flat = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(k for f in flat for k in f if k not in IGNORED)
    found = [(k, [f.get(k, ABSENT) for f in flat]) for k in keys]
    return [(k, values) for k, values in found if any(v != values[0] for v in values)]


def flatten(tree, prefix: str = "") -> dict:
    """Dotted key -> value; lists of plain values are values."""
    if isinstance(tree, list) and any(isinstance(t, dict) for t in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        return {k: v for name, t in tree.items() for k, v in flatten(t, f"{prefix}{name}.").items()}
    return {prefix[:-1]: tree}


def short(value) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 48 else text[:45] + "..."


def result(run: RunRecord) -> dict | None:
    """Test results of base and promoted weights, prompt_id -> correct, with a label; None before any evaluation."""
    if run.base is None:
        return None
    where = run.current or run.base
    label = "base (promoted)" if run.promotions else "base"
    if where != run.base:
        label = " ".join([where[0].split("/")[0].replace("-0", " "), where[1]])
    table = read_table(run.dir / where[0] / "results.parquet", ["prompt_id", "source"])
    sources = dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    return {"label": label, "base": correct(run.dir, run.base, "test"), "now": correct(run.dir, where, "test"),
            "sources": sources, "resamples": run.resamples}


def rate(right: dict[str, bool]) -> str:
    if not right:
        return ABSENT
    share = sum(right.values()) / len(right)
    low, high = wilson(share, len(right))
    return f"{percent(share)} [{100 * low:.1f}, {100 * high:.1f}]"


def result_cells(results: list[dict | None], first_name: str) -> list[dict[str, str]]:
    columns, first = [], results[0]
    for r in results:
        if r is None:
            columns.append({"weights": "not evaluated yet"})
            continue
        over_first = gain(r["now"], first["now"], r["resamples"]) if first and r is not first else None
        columns.append({
            "weights": r["label"], "prompts": str(len(r["now"])), "base": rate(r["base"]), "pass rate": rate(r["now"]),
            "over its base": points(gain(r["now"], r["base"], r["resamples"])),
            f"over {first_name}": ABSENT if r is first else points(over_first) or "no prompt in common",
            "prompts in common": str(over_first["n"]) if over_first else ABSENT})
    names = dict.fromkeys(name for column in columns for name in column)
    return [dict.fromkeys(names, ABSENT) | column for column in columns]


def source_rows(results: list[dict | None]) -> list[list[str]]:
    """Each run's pass rate by source, where there is more than one source."""
    names = sorted({s for r in results if r for s in r["sources"].values()})
    if len(names) < 2:
        return []
    return [[f"  {s}", *(rate({i: ok for i, ok in r["now"].items() if r["sources"][i] == s}) if r else ABSENT
                  for r in results)] for s in names]


def cost_cells(run: RunRecord) -> dict[str, str]:
    seconds = Counter()
    for m in run.manifests.values():
        seconds[KINDS.get(m.get("kind"), "other")] += m["seconds"]
    counts = [(m.get("kind"), m["counts"]) for m in run.manifests.values()]
    trained = sum(c.get("tokens", 0) for kind, c in counts if kind == "training")
    ranks = sorted({m.get("ranks", 1) for m in run.manifests.values()}) or [0]
    versions = next((m["versions"] for m in reversed(run.manifests.values()) if m.get("versions")), {})
    return {
        "state": "finished" if run.finished else f"{len(run.promotions)} of {run.rounds} rounds done",
        "time in stages": duration(sum(seconds.values())),
        **{f"  {kind}": duration(seconds[kind]) for kind in ("sampling", "training", "evaluation", "other")},
        "processes": " or ".join(map(str, ranks)),
        "sampled tokens": f"{sum(c.get('tokens', 0) for kind, c in counts if kind == 'samples'):,}",
        "trained tokens": f"{trained:,}" if trained else ABSENT,
        "optimizer steps": f"{sum(c.get('steps', 0) for kind, c in counts if kind == 'training'):,}",
        "made with": " ".join(f"{k} {v}" for k, v in versions.items() if k in ("strop", "torch")),
    }
