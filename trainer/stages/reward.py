"""Reward model: Bradley-Terry on pairs of completions, prompt shared, and how good it is on held-out pairs."""

from pathlib import Path

import pyarrow as pa
import torch

from strop.trainer.config import Log, Lora, Part, Reward
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.reward import ENDS_TURN, Rewarder, base_of, copy_tokenizer, packs, padding_token
from strop.trainer.reports.rewards import summarize
from strop.trainer.run.files import write_json
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import write_table
from strop.trainer.training.batch import collate, pack_evenly, plan_steps
from strop.trainer.training.engine import Training
from strop.trainer.training.engines import open_engine
from strop.trainer.training.loop import train
from strop.trainer.training.rewards import (
    REWARD_METRICS,
    Ranked,
    load_ranked,
    pair_tensors,
    reward_loss,
    reward_means,
    split,
)

HELD_OUT = pa.schema([("row_id", pa.string()), ("source", pa.string()), ("prompt", pa.string()),
                      ("chosen", pa.float64()), ("rejected", pa.float64()), ("chosen_tokens", pa.int32()),
                      ("rejected_tokens", pa.int32())])


def reward(stage: Stage, *, reward: Reward, lora: Lora, model: Part, compute: Part, log: Log, seed: int, select: Path,
           start: Path, history: list[tuple[Path, Path]], order: int | None = None,
           mix: dict[str, float] | None = None) -> None:
    """Trains a reward model from the weights `start`, a causal LM or a reward model; writes model/, snapshots/, ema/,
    held_out.parquet and reward.json.

    compute: the recipe's dtype and attention. history: the (sample, select) folders with reward.pairs=all. seed: of the
    score head and of what is held out; order: of the data's order, by default seed. mix: factors of the groups'
    weights by source. Raises UserError if no pair is left to train on."""
    folder = ModelFolder(start, model)
    rows = load_ranked(stage, reward, folder.context_length(), select, history, mix)
    rows, held = split(rows, reward.held_out, seed)
    if not rows:
        raise UserError(f"{select / 'pairs.parquet'}: no pair is left to train a reward model on, and {len(held)} are "
                        f"held out (reward.held_out={reward.held_out}); see drops.parquet there and in {stage.dir}")
    examples = [row.example for row in rows]
    plan = plan_steps(examples, reward.epochs, reward.batch_size, seed if order is None else order)
    engine = open_engine(folder, reward, stage, len(plan), compute=compute, lora=lora, seed=seed, reward=True)
    set_padding(engine, folder, [*rows, *held], stage)
    rewarder = Rewarder(engine.model, engine.run(packs, engine.model, stage.console, engine.mesh.sequence))
    engine.score_with(rewarder)

    def totals(indices):
        return {"groups": len(indices)}

    def loss(groups, step):
        better, worse, margin, share = pair_tensors([rows[i] for i in step.rows], groups.input_ids.device)
        return reward_loss(engine.run(rewarder, groups), better, worse, reward.margin * margin, share,
                           step.totals["groups"], label_smoothing=reward.label_smoothing, centering=reward.centering)

    train(stage, engine, examples, plan, totals, loss, REWARD_METRICS, reward_means, log.interval)
    stage.counts |= {"groups": len(rows), "pairs": sum(len(row.pairs) for row in rows), "steps": len(plan),
                     "tokens": sum(examples[i].tokens for indices in plan for i in indices)}
    found = held_out_rows(engine, rewarder, held, reward.max_tokens, stage)
    if stage.world.first:
        write_table(stage.dir / "held_out.parquet", pa.Table.from_pylist(found, schema=HELD_OUT))
        summary = summarize(found)
        write_json(stage.dir / "reward.json", summary)
        stage.counts |= {"held_out_pairs": len(found)} | ({"held_out_accuracy": summary["all"]["accuracy"]} if found
                                                          else {})


def set_padding(engine: Training, folder: ModelFolder, rows: list[Ranked], stage: Stage) -> None:
    """Makes the saved folder give our scores in plain transformers: its padding token is none that completions end
    in."""
    tokenizer = folder.tokenizer()
    ends = {c[-1] for row in rows for c in row.example.group.completions} | {tokenizer.eos_token_id}
    pad, config = padding_token(tokenizer, ends), base_of(engine.model).config
    config.get_text_config().pad_token_id = config.pad_token_id = pad
    setattr(config, ENDS_TURN, "end_of_turn")
    engine.tokenizer_files = stage.work / "tokenizer"
    if stage.world.first:
        copy_tokenizer(folder.path, engine.tokenizer_files, tokenizer.convert_ids_to_tokens(pad))


@torch.no_grad()
def held_out_rows(engine: Training, rewarder: Rewarder, held: list[Ranked], budget: int, stage: Stage) -> list[dict]:
    """A row of held_out.parquet per pair; every rank scores its share."""
    world, mesh, scores = stage.world, engine.mesh, []
    bins = pack_evenly([row.example.tokens for row in held], budget)
    offsets, total = [], 0
    for row in held:
        offsets.append(total)
        total += len(row.example.group.completions)
    scores = torch.zeros(total, dtype=torch.float64, device=world.device)
    rewarder.model.eval()
    mine = bins[mesh.rank::mesh.size]
    for _ in range(-(-len(bins) // mesh.size) - len(mine) if engine.together else 0):
        engine.run(rewarder, engine.nothing)
    for indices in mine:
        places = [offsets[i] + j for i in indices for j in range(len(held[i].example.group.completions))]
        groups = collate([row.example for row in held], indices, world.device, mesh.sequence)
        scores[torch.tensor(places, device=world.device)] = engine.run(rewarder, groups).double()
    mesh.sum_([scores])
    values, found = scores.tolist(), []
    for row, first in zip(held, offsets, strict=True):
        lengths = [len(c) for c in row.example.group.completions]
        found += [{"row_id": row.example.row_id, "source": row.source, "prompt": row.prompt,
                   "chosen": values[first + i], "rejected": values[first + j], "chosen_tokens": lengths[i],
                   "rejected_tokens": lengths[j]} for i, j, _ in row.pairs]
    return found
