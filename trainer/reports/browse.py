"""Rows of the report's prompt tables: sampled prompts with their best and worst completion, and held-out prompts before
and after training. A page of a table reads the ids of all prompts, but the texts of its own rows only."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute

from strop.trainer.reports.reading import RunRecord
from strop.trainer.run.tables import find_rows, read_table

SAMPLED, HELD_OUT = 120, 150  # rows of a page; those of SAMPLED are shared by the rounds
CHARACTERS = 1000  # of a prompt or completion that are shown


def sampled_rows(run: RunRecord, page: int = 0) -> tuple[list[dict], int]:
    """(rows, prompts of all rounds): prompts with the number of correct completions and the best and worst completion.

    A page has up to SAMPLED rows, as many of each round."""
    rows, total = [], 0
    judged = judged_of(run)
    stages = [stage for stage in run.of_kind("scores") if stage["inputs"]["sample"] in judged]
    for stage in stages:
        prompts = run.dir / stage["inputs"]["prompts"]
        scores = read_table(judged[stage["inputs"]["sample"]], ["prompt_id", "sample_index", "score", "correct"])
        known = scores["prompt_id"].unique()
        total += len(known)
        asked = read_table(prompts / "prompts.parquet", ["prompt_id", "source"])
        chosen = spread(asked.filter(compute.is_in(asked["prompt_id"], known)), page, max(1, SAMPLED // len(stages)))
        by_prompt = defaultdict(list)
        for score in scores.filter(compute.is_in(scores["prompt_id"], pa.array(chosen, pa.string()))).to_pylist():
            by_prompt[score["prompt_id"]].append(score)
        ranked = {i: sorted(by_prompt[i], key=rank) for i in chosen}
        texts, asked = completions(run.dir / stage["inputs"]["sample"], chosen), read_prompts(prompts, chosen)
        for prompt_id in chosen:
            mine = ranked[prompt_id]
            best, worst = (shown(texts[prompt_id, s["sample_index"]] | s) for s in (mine[0], mine[-1]))
            right = sum(s["correct"] for s in mine)
            state = "all right" if right == len(mine) else "some right" if right else "none right"
            rows.append({**asked[prompt_id], "round": stage["stage"].split("/")[0],
                         "right": f"{right}/{len(mine)}", "state": state, "best": best, "worst": worst})
    return rows, total


def rank(row: dict) -> tuple:
    """Sort key of samples: the best score first, those without one last."""
    return row["score"] is None, -(row["score"] or 0.0), row["sample_index"]


def judged_of(run: RunRecord) -> dict[str, Path]:
    """Stage of samples -> the table with the score and verdict of each of them."""
    found = {}
    for stage in run.of_kind("selection"):
        rounds = [int(name.split(".")[1]) for name in stage["inputs"] if name.startswith("history.")]
        if rounds:
            found[stage["inputs"][f"history.{max(rounds)}.0"]] = run.dir / stage["stage"] / "judged.parquet"
    return found


def held_out_rows(run: RunRecord, page: int = 0) -> tuple[list[dict], int]:
    """(rows, test prompts): up to HELD_OUT test prompts with the completions of the base and of the newest promoted
    weights."""
    if run.base is None:
        return [], 0
    entry = next(s for s in run.stages if s["stage"] == run.base[0])
    table = read_table(run.dir / run.base[0] / "results.parquet", ["candidate", "split", "source", "prompt_id"])
    mine = table.filter(compute.and_(compute.equal(table["candidate"], run.base[1]),
                                     compute.equal(table["split"], "test")))
    chosen = spread(mine, page, HELD_OUT)
    prompts = read_prompts(run.dir / entry["inputs"]["prompts"], chosen)
    before = results(run.dir, run.base, chosen)
    after = results(run.dir, run.current, chosen) if run.current else {}
    rows = []
    for prompt_id in chosen:
        old, new = before[prompt_id], after.get(prompt_id)
        state = ("right" if old["correct"] else "wrong") if new is None else {
            (False, True): "gained", (True, False): "lost", (True, True): "stays right",
            (False, False): "stays wrong"}[old["correct"], new["correct"]]
        rows.append({**prompts[prompt_id], "state": state, "base": shown(old), "now": new and shown(new)})
    return rows, mine.num_rows


def read_prompts(folder: Path, ids: list[str]) -> dict[str, dict]:
    """prompt_id -> source, prompt (all but system turns, as text), answer."""
    found = {}
    for row in find_rows(folder / "prompts.parquet", ["source", "messages", "answer"], ids):
        turns = [m for m in row["messages"] if m["role"] != "system"]
        text = turns[0]["content"] if len(turns) == 1 else "\n".join(f"{m['role']}: {m['content']}" for m in turns)
        found[row["prompt_id"]] = {"source": row["source"], "prompt": cut(text), "answer": cut(row["answer"] or "")}
    return found


def completions(folder: Path, ids: list[str]) -> dict[tuple[str, int], dict]:
    return {(r["prompt_id"], r["sample_index"]): r for shard in sorted(folder.glob("shard-*.parquet"))
            for r in find_rows(shard, ["sample_index", "completion", "finish"], ids)}


def results(run_dir: Path, where: tuple[str, str], ids: list[str]) -> dict[str, dict]:
    rows = find_rows(run_dir / where[0] / "results.parquet", ["candidate", "completion", "finish", "score", "correct"],
                     ids)
    return {r["prompt_id"]: r for r in rows if r["candidate"] == where[1]}


def shown(row: dict) -> dict:
    return {"completion": cut(row["completion"]), "finish": row["finish"], "score": row["score"],
            "correct": row["correct"]}


def spread(prompts: pa.Table, page: int, limit: int) -> list[str]:
    """A page of `limit` ids of a table with prompt_id and source, taking turns among the sources, independent of the
    order of the rows."""
    prompts = prompts.sort_by([("source", "ascending"), ("prompt_id", "ascending")])
    source = prompts["source"].combine_chunks().dictionary_encode().indices.to_numpy()
    sizes = np.bincount(source)
    turn = np.arange(len(source)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return prompts["prompt_id"].take(np.lexsort((source, turn))[page * limit:(page + 1) * limit]).to_pylist()


def cut(text: str) -> str:
    left = len(text) - CHARACTERS
    return text if left <= 0 else f"{text[:CHARACTERS]} … ({left:,} more characters)"
