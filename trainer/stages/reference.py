"""The reference's per-token log-probs of what DPO trains on, computed once, so that it keeps no second model in
memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch

from strop.trainer.config import Part
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.sequence import Sequence
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import read_table, write_table
from strop.trainer.training.batch import Example, collate, microbatches, nothing, plan_steps
from strop.trainer.training.engines import open_frozen
from strop.trainer.training.flops import Sizes, sizes_of, training_flops
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.mesh import Mesh, mesh_of
from strop.trainer.training.pairs import load_pairs
from strop.trainer.training.probe import probe
from strop.trainer.training.rated import limit_of, load_rated, mismatched

CHUNK = 64  # microbatches per file: the unit of resume
SCHEMA = pa.schema([("row_id", pa.string()), ("fingerprint", pa.string()),
                    ("logps", pa.list_(pa.list_(pa.float32())))])


@torch.no_grad()
def reference(stage: Stage, *, dpo: Part, model: Part, compute: Part, seed: int, select: Path, weights: Path,
              rows: str = "pairs", mismatches: bool = False, mix: dict[str, float] | None = None) -> None:
    """Writes reference.parquet: of each pair, labeled completion or list (`rows`) the fp32 log-probs of its loss tokens
    under `weights`, with a fingerprint of its tokens and masks. mismatches: also of KTO's mismatched completions.
    mix: as the stage dpo gets it.

    They run in the microbatches in which DPO sees them first, so that equal weights give equal bits on the same number
    of ranks and the same machine, also in bf16.
    """
    world, folder = stage.world, ModelFolder(weights, model)
    context = folder.context_length()
    if rows == "pairs":
        pairs = load_pairs(stage, select / "pairs.parquet", dpo, context, record=False, mix=mix)
    else:
        pairs = load_rated(stage, select / "rated.parquet", dpo, rows, context, record=False, mix=mix)
    loaded, run, is_sharded = open_frozen(folder, stage, compute=compute)
    mesh = mesh_of(world, compute.engine)
    sizes = sizes_of(loaded)
    plan = plan_steps(pairs, dpo.epochs, dpo.batch_size, seed)
    mine = looks(pairs, plan, sizes, dpo.max_tokens, mesh)
    if mismatches:
        others, steps = mismatched(pairs, plan, min(limit_of(dpo, context), dpo.max_tokens))
        theirs = looks(others, steps, sizes, dpo.max_tokens, mesh)
        mine += [([len(pairs) + i for i in indices], positions) for indices, positions in theirs]
        pairs = [*pairs, *others]
    todo = [mine[i:i + CHUNK] for i in range(0, len(mine), CHUNK)]
    parts = [stage.work / f"part-{mesh.size}-{mesh.rank}-{i:05}.parquet" for i in range(len(todo))]
    missing = [i for i, part in enumerate(parts) if not part.exists()]
    if mesh.sequence:  # the ranks of a group must agree, and only one of them writes
        missing = world.gather(missing)[world.rank - mesh.sequence.rank]
    passes = sum(len(todo[i]) for i in missing)
    most = max(world.gather(passes)) if is_sharded else passes
    if most:
        scorer = Scorer(loaded, run(probe, loaded, stage.console, mesh.sequence))
        with stage.console.progress(stage.name, total=len(mine), unit="batches") as bar:
            for i in missing:
                table = score_chunk(partial(run, scorer), pairs, todo[i], world.device, bar, mesh.sequence)
                if mesh.speaks:
                    write_table(parts[i], table)
            for _ in range(most - passes):
                run(scorer, nothing(world.device, mesh.sequence))
    stage.meet()
    if world.first:
        tables = [read_table(p) for p in sorted(stage.work.glob(f"part-{mesh.size}-*.parquet"))]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        assert table.num_rows == len(pairs), (table.num_rows, len(pairs))
        write_table(stage.dir / "reference.parquet", table.sort_by("row_id"))
        stage.counts |= {"pairs" if rows == "pairs" else "rows": len(pairs), "tokens": sum(p.tokens for p in pairs)}


def looks(pairs: list[Example], plan: list[list[int]], sizes: Sizes, budget: int,
          mesh: Mesh) -> list[tuple[list[int], list[int]]]:
    """This rank's microbatches of first_looks."""
    return first_looks(pairs, plan, [training_flops(sizes, pair) for pair in pairs], budget, mesh.size)[mesh.rank]


def first_looks(pairs: list[Example], plan: list[list[int]], costs: list[int], budget: int,
                ranks: int) -> list[list[tuple[list[int], list[int]]]]:
    """Each rank's microbatches with new pairs: (indices, positions in it of pairs that no earlier microbatch has).

    First the microbatches of the plan, then those of pairs that the plan does not use."""
    unseen, shares = set(range(len(pairs))), [[] for _ in range(ranks)]
    for rows in [*plan, sorted(unseen.difference(*plan))]:
        if not unseen:
            break
        for share, batches in zip(shares, microbatches(pairs, rows, costs, budget, ranks), strict=True):
            for indices in batches:
                positions = [j for j, i in enumerate(indices) if i in unseen and i not in indices[:j]]
                unseen.difference_update(indices)
                if positions:
                    share.append((indices, positions))
    return shares


def score_chunk(scorer: Callable, pairs: list[Example], chunk: list[tuple[list[int], list[int]]], device: torch.device,
                bar, sequence: Sequence | None = None) -> pa.Table:
    rows = []
    for indices, positions in chunk:
        groups = collate(pairs, indices, device, sequence)
        logp = scorer(groups).cpu()
        for j in positions:
            pair = pairs[indices[j]]
            own = [logp[a:b].tolist() for (a, b), g in zip(groups.target_bounds, groups.completion_group, strict=True)
                   if g == j]
            rows.append({"row_id": pair.row_id, "fingerprint": pair.fingerprint(), "logps": own})
        bar.advance(1, tokens=groups.num_tokens)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
