"""SFT: next-token loss on the best completions, prompts masked, normalised by the loss tokens of the global batch."""

from pathlib import Path

import torch

from strop.kernels import Group
from strop.trainer.batch import Example, plan_steps
from strop.trainer.config import Recipe
from strop.trainer.engine import Engine, Scorer, train
from strop.trainer.models import context_length
from strop.trainer.probe import probe
from strop.trainer.store import Drops, Stage, read_table

NAMES = ("nll", "tokens", "correct", "entropy")


def sft(stage: Stage, recipe: Recipe, *, select: Path, start: Path) -> None:
    """Trains `start` on select/sft.parquet; writes model/, and snapshots/ and ema/ if asked for."""
    section = recipe.sft
    context = context_length(start, recipe.model.trust_remote_code)
    limit = min(section.max_length or 1 << 30, context, section.max_tokens)
    examples = load_examples(stage, select / "sft.parquet", limit)
    plan = plan_steps(examples, section.epochs, section.batch_size, recipe.seed)
    engine = Engine(start, section, recipe, stage, len(plan))
    scorer = Scorer(engine.model, probe(engine.model, stage.console))

    def totals(rows):
        return {"tokens": sum(sum(examples[i].targets()) for i in rows)}

    def loss(groups, step):
        logp, found = scorer(groups, stats=("top1", "entropy"))
        nll = -logp.sum()
        vector = torch.stack([nll.detach(), torch.full_like(nll, groups.num_targets, requires_grad=False),
                              found["top1"].float().sum(), found["entropy"].detach().sum()])
        return nll / max(1, step.totals["tokens"]), vector

    def finish(sums):
        nll, tokens, correct, entropy = sums.tolist()
        return {"loss": nll / tokens, "mean_token_accuracy": correct / tokens, "entropy": entropy / tokens}

    train(stage, engine, scorer, examples, plan, totals, loss, NAMES, finish)
    tokens = sum(examples[i].tokens for rows in plan for i in rows)
    stage.counts |= {"rows": len(examples), "steps": len(plan), "tokens": tokens}


def load_examples(stage: Stage, path: Path, limit: int) -> list[Example]:
    """Rows of sft.parquet as examples; those over `limit` tokens or without a loss token are dropped and counted."""
    examples, drops = [], Drops(stage)
    for row in read_table(path).to_pylist():
        example = Example(row["row_id"], Group(row["prompt_tokens"], [row["completion_tokens"]], [row["loss_mask"]]),
                          row["weight"])
        if example.tokens > limit:
            drops.add("overlong", prompt_id=row["prompt_id"], sample_index=row["sample_index"], source=row["source"],
                      detail=f"{example.tokens} tokens, {limit} fit")
        elif example.targets() == [0]:
            drops.add("empty", prompt_id=row["prompt_id"], sample_index=row["sample_index"], source=row["source"],
                      detail="no loss token")
        else:
            examples.append(example)
    if stage.world.first:
        drops.write()
    if not examples:
        raise ValueError(f"{path}: no row is left to train on; see drops.parquet there and in {stage.dir}, or set "
                         "sft.enabled=false")
    return examples
