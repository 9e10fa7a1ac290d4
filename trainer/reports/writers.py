"""What each writer of a round's samples contributed, where there are several."""

import pyarrow as pa
import pyarrow.compute as compute

from strop.trainer.reports.browse import judged_of
from strop.trainer.reports.reading import RunRecord
from strop.trainer.run.tables import read_table

IDS = ["prompt_id", "sample_index"]


def released(run: RunRecord, stage: str) -> int:
    """Completions that sample.enough left out in this sampling stage and its writers' stages."""
    return sum(run.manifests[s]["counts"].get("dropped/released", 0) for s in [stage, *writers_of(run, stage)]
               if s in run.manifests)


def writers_of(run: RunRecord, stage: str) -> list[str]:
    """The stages of the writers whose samples a sampling stage joins."""
    inputs = next(s["inputs"] for s in run.stages if s["stage"] == stage)
    return [origin for name, origin in inputs.items() if name.startswith("writers.")]


def writer_rows(run: RunRecord) -> list[dict]:
    """Per round and writer: completions, share correct, and the writer's shares of the round's SFT rows and of the two
    sides of its pairs (None if there are none)."""
    rows = []
    scored = judged_of(run)
    selected = {s["round"]: run.dir / s["stage"] for s in run.of_kind("selection")}
    for entry in run.of_kind("samples"):
        stage, folder = entry["stage"], selected.get(entry["round"])
        if stage not in scored or not writers_of(run, stage):
            continue
        shards = sorted((run.dir / stage).glob("shard-*.parquet"))
        samples = pa.concat_tables([read_table(shard, [*IDS, "writer"]) for shard in shards])
        correct = samples.join(read_table(scored[stage], [*IDS, "correct"]), IDS)
        correct = correct.set_column(3, "correct", correct["correct"].cast("int32"))
        counted = correct.group_by("writer").aggregate([("correct", "sum"), ("correct", "count")]).sort_by("writer")
        used = {}
        if folder:
            sides = {"sft": ("sft", "writer"), "chosen": ("pairs", "chosen_writer"),
                     "rejected": ("pairs", "rejected_writer")}
            for what, (table, column) in sides.items():
                found = read_table(folder / f"{table}.parquet", ["origin", column])
                mine = found.filter(compute.field("origin") == stage.split("/")[0])[column].combine_chunks()
                used[what] = {c["values"]: c["counts"] / len(mine) for c in mine.value_counts().to_pylist()}
        rows += [{"round": stage.split("/")[0], "writer": row["writer"], "samples": row["correct_count"],
                  "correct": row["correct_sum"] / row["correct_count"],
                  **{what: used[what].get(row["writer"], 0.0) if used.get(what) else None
                     for what in ("sft", "chosen", "rejected")}} for row in counted.to_pylist()]
    return rows
