"""Artifacts of sampled and scored rounds, written by hand."""

from pathlib import Path

import pyarrow as pa

from strop.trainer.run.tables import write_table
from strop.trainer.scoring.table import VALUES


def prompts_of(folder: Path, ids, **columns) -> Path:
    """A prompts artifact; every prompt is 'ask <id>' with its id as the answer, of source `s`, split train."""
    rows = [{"prompt_id": i, "source": "s", "split": "train", "messages": [{"role": "user", "content": f"ask {i}"}],
             "answer": i, "conversational": False, "metadata": "{}"} | columns for i in ids]
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / "prompts.parquet", pa.Table.from_pylist(rows))
    return folder


def sample_of(folder: Path, samples: dict[str, list], shard: int = 2) -> Path:
    """A sample artifact in shards of `shard` prompts. A sample is (text, score) or (text, score, finish); its tokens
    are its characters, with token 2 behind it if it stopped; the prompt's tokens are its id's characters."""
    rows = []
    for prompt_id, drawn in samples.items():
        for i, (text, _, *finish) in enumerate(drawn):
            finish = finish[0] if finish else "stop"
            rows.append({"prompt_id": prompt_id, "sample_index": i, "prompt_tokens": [ord(c) for c in prompt_id],
                         "completion_tokens": [ord(c) for c in text] + [2] * (finish == "stop"), "completion": text,
                         "logp": -1.0, "finish": finish})
    folder.mkdir(parents=True)
    ids = list(samples)
    for n in range(0, len(ids), shard):
        mine = [r for r in rows if r["prompt_id"] in ids[n:n + shard]]
        write_table(folder / f"shard-{n // shard:05}.parquet", pa.Table.from_pylist(mine))
    return folder


def round_of(folder: Path, samples: dict[str, list], turned: bool = False) -> tuple[Path, Path]:
    """(sample, score) artifacts, scores by the scorer `exact`, or {scorer: score}; with `turned` the scores lie in the
    opposite order."""
    rows = [{"prompt_id": prompt_id, "sample_index": i, "scorer": name, "version": "v", "value": value, "detail": None,
             "error": None if value is not None else "it failed"}
            for prompt_id, drawn in samples.items() for i, (_, scores, *_) in enumerate(drawn)
            for name, value in (scores if isinstance(scores, dict) else {"exact": scores}).items()]
    sample = sample_of(folder / "sample", samples)
    (folder / "score").mkdir()
    schema = pa.schema([("prompt_id", pa.string()), ("sample_index", pa.int32()), *VALUES])
    rows = rows[::-1] if turned else rows
    write_table(folder / "score" / "scores.parquet", pa.Table.from_pylist(rows, schema=schema))
    return sample, folder / "score"
