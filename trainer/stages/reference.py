"""The reference's per-token log-probs of every pair, computed once; no second model is in memory while DPO trains."""

from pathlib import Path

import pyarrow as pa
import torch

from strop.trainer.batch import collate, pack, share_out
from strop.trainer.config import Recipe
from strop.trainer.engine import Scorer
from strop.trainer.models import DTYPES, context_length, load_model
from strop.trainer.pairs import load_pairs
from strop.trainer.probe import probe
from strop.trainer.store import Stage, read_table, write_table

CHUNK = 64  # microbatches a file: the unit of resume
SCHEMA = pa.schema([("row_id", pa.string()), ("fingerprint", pa.string()), ("chosen", pa.list_(pa.float32())),
                    ("rejected", pa.list_(pa.float32()))])


@torch.no_grad()
def reference(stage: Stage, recipe: Recipe, *, select: Path, model: Path) -> None:
    """Writes reference.parquet: per pair the fp32 log-probs of its loss tokens under `model`, with a fingerprint of the
    tokens and masks that they belong to."""
    world = stage.world
    context = context_length(model, recipe.model.trust_remote_code)
    pairs = load_pairs(stage, select / "pairs.parquet", recipe, context, record=False)
    bins = pack([p.tokens for p in pairs], recipe.dpo.max_tokens)
    mine = share_out([float(sum(pairs[i].tokens for i in b)) for b in bins], world.size)[world.rank]
    todo = [mine[i:i + CHUNK] for i in range(0, len(mine), CHUNK)]
    parts = [stage.work / f"part-{world.size}-{world.rank}-{i:05}.parquet" for i in range(len(todo))]
    if not all(p.exists() for p in parts):
        loaded = load_model(model, DTYPES[recipe.dtype], world.device, trust_remote_code=recipe.model.trust_remote_code)
        scorer = Scorer(loaded, probe(loaded, stage.console))
        with stage.console.progress(stage.name, total=sum(map(len, todo)), unit="batches") as bar:
            for chunk, part in zip(todo, parts, strict=True):
                if not part.exists():
                    write_table(part, score_chunk(scorer, pairs, [bins[b] for b in chunk], world.device, bar))
    world.barrier()
    if world.first:
        tables = [read_table(p) for p in sorted(stage.work.glob(f"part-{world.size}-*.parquet"))]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        assert table.num_rows == len(pairs), (table.num_rows, len(pairs))
        write_table(stage.dir / "reference.parquet", table.sort_by("row_id"))
        stage.counts |= {"pairs": len(pairs), "tokens": sum(p.tokens for p in pairs)}


def score_chunk(scorer: Scorer, pairs, bins: list[list[int]], device: torch.device, bar) -> pa.Table:
    rows = []
    for indices in bins:
        groups = collate(pairs, indices, device)
        logp = scorer(groups).cpu()
        for j, i in enumerate(indices):
            chosen, rejected = (logp[a:b].tolist() for a, b in groups.target_bounds[2 * j:2 * j + 2])
            rows.append({"row_id": pairs[i].row_id, "fingerprint": pairs[i].fingerprint(), "chosen": chosen,
                         "rejected": rejected})
        bar.advance(1, tokens=groups.num_tokens)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
