"""Rows of the report's prompt tables: sampled prompts with their best and worst completion, and held-out prompts before
and after training."""

from collections import defaultdict
from itertools import zip_longest
from pathlib import Path

from strop.trainer.reports.reading import RunRecord
from strop.trainer.run.tables import read_table

PER_ROUND, HELD_OUT, CHARACTERS = 60, 150, 1500


def sampled_rows(run: RunRecord) -> list[dict]:
    """Up to PER_ROUND prompts per round, with the number of correct completions and the best and worst completion."""
    rows = []
    for stage in run.of_kind("scores"):
        prompts = read_prompts(run.dir / stage["inputs"]["prompts"])
        scores = defaultdict(list)
        for score in read_table(run.dir / stage["stage"] / "scores.parquet").to_pylist():
            scores[score["prompt_id"]].append(score)
        chosen = spread(list(scores), prompts, PER_ROUND)
        texts = completions(run.dir / stage["inputs"]["sample"], set(chosen))
        for prompt_id in chosen:
            ranked = sorted(scores[prompt_id], key=lambda s: (-s["score"], s["sample_index"]))
            best, worst = (shown(texts[prompt_id, s["sample_index"]] | s) for s in (ranked[0], ranked[-1]))
            right = sum(s["correct"] for s in ranked)
            state = "all right" if right == len(ranked) else "some right" if right else "none right"
            rows.append({**prompts[prompt_id], "round": stage["stage"].split("/")[0],
                         "right": f"{right}/{len(ranked)}", "state": state, "best": best, "worst": worst})
    return rows


def held_out_rows(run: RunRecord) -> list[dict]:
    """Up to HELD_OUT test prompts with the completions of the base and of the newest promoted weights."""
    if run.base is None:
        return []
    entry = next(s for s in run.stages if s["stage"] == run.base[0])
    prompts = read_prompts(run.dir / entry["inputs"]["prompts"])
    before = results(run.dir, run.base)
    after = results(run.dir, run.current) if run.current else {}
    rows = []
    for prompt_id in spread(list(before), before, HELD_OUT):
        old, new = before[prompt_id], after.get(prompt_id)
        state = ("right" if old["correct"] else "wrong") if new is None else {
            (False, True): "gained", (True, False): "lost", (True, True): "stays right",
            (False, False): "stays wrong"}[old["correct"], new["correct"]]
        rows.append({**prompts[prompt_id], "state": state, "base": shown(old), "now": new and shown(new)})
    return rows


def read_prompts(folder: Path) -> dict[str, dict]:
    """prompt_id -> source, prompt (all but system turns, as text), answer."""
    found = {}
    for row in read_table(folder / "prompts.parquet").to_pylist():
        turns = [m for m in row["messages"] if m["role"] != "system"]
        text = turns[0]["content"] if len(turns) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in turns)
        found[row["prompt_id"]] = {"source": row["source"], "prompt": cut(text), "answer": cut(row["answer"] or "")}
    return found


def completions(folder: Path, wanted: set[str]) -> dict[tuple[str, int], dict]:
    found = {}
    for shard in sorted(folder.glob("shard-*.parquet")):
        table = read_table(shard).select(["prompt_id", "sample_index", "completion", "finish"])
        found |= {(r["prompt_id"], r["sample_index"]): r for r in table.to_pylist() if r["prompt_id"] in wanted}
    return found


def results(run_dir: Path, where: tuple[str, str]) -> dict[str, dict]:
    table = read_table(run_dir / where[0] / "results.parquet").select(
        ["candidate", "split", "source", "prompt_id", "completion", "finish", "score", "correct"])
    return {r["prompt_id"]: r for r in table.to_pylist() if r["candidate"] == where[1] and r["split"] == "test"}


def shown(row: dict) -> dict:
    return {"completion": cut(row["completion"]), "finish": row["finish"], "score": row["score"],
            "correct": row["correct"]}


def spread(ids: list[str], rows: dict[str, dict], limit: int) -> list[str]:
    """Up to `limit` ids, taking turns among the sources in `rows`, independent of the order of `ids`."""
    by_source = defaultdict(list)
    for i in sorted(ids):
        by_source[rows[i]["source"]].append(i)
    turns = zip_longest(*(by_source[s] for s in sorted(by_source)))
    return [i for turn in turns for i in turn if i is not None][:limit]


def cut(text: str) -> str:
    left = len(text) - CHARACTERS
    return text if left <= 0 else f"{text[:CHARACTERS]} … ({left:,} more characters)"
