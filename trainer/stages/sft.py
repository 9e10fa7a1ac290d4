"""SFT: next-token loss on the selected completions, normalized by the loss tokens of the global batch."""

from pathlib import Path

import torch

from strop.kernels import Group
from strop.trainer.config import Log, Lora, Part, Sft
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.training.batch import Example, mixed, plan_steps
from strop.trainer.training.engines import open_engine
from strop.trainer.training.guard import open_guard
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.loop import train
from strop.trainer.training.probe import probe

NAMES = ("nll", "tokens", "correct", "entropy")


def sft(stage: Stage, *, sft: Sft, lora: Lora, model: Part, compute: Part, log: Log, seed: int, select: Path,
        start: Path, evaluate: Part | None = None, prompts: Path | None = None,
        mix: dict[str, float] | None = None) -> None:
    """Trains the weights `start` on select/sft.parquet; writes model/, snapshots/, ema/ and guard.json.

    compute: the recipe's dtype and attention. prompts and evaluate's max_new_tokens: for the checks during
    training. mix: factors of the rows' weights by source. Raises UserError if no row is left to train on in the first
    round; later the weights stay as they are."""
    folder = ModelFolder(start, model)
    limit = min(sft.max_length or 1 << 30, folder.context_length(), sft.max_tokens)
    examples = load_examples(stage, select / "sft.parquet", limit, mix)
    plan = plan_steps(examples, sft.epochs, sft.batch_size, seed)
    engine = open_engine(folder, sft, stage, len(plan), compute=compute, lora=lora, seed=seed)
    engine.score_with(Scorer(engine.model, engine.run(probe, engine.model, stage.console, engine.mesh.sequence)))

    def totals(rows):
        return {"tokens": sum(sum(examples[i].targets()) for i in rows)}

    def loss(groups, step):
        logp, found = engine.logprobs(groups, stats=("top1", "entropy"))
        nll = -logp.sum()
        vector = torch.stack([nll.detach(), torch.full_like(nll, groups.num_targets, requires_grad=False),
                              found["top1"].float().sum(), found["entropy"].detach().sum()])
        return nll / max(1, step.totals["tokens"]), vector

    def finish(sums):
        nll, tokens, correct, entropy = sums.tolist()
        return {"loss": nll / tokens, "mean_token_accuracy": correct / tokens, "entropy": entropy / tokens}

    guard = open_guard(stage, engine, examples, prompts, evaluate)
    steps = train(stage, engine, examples, plan, totals, loss, NAMES, finish, log.interval, guard)
    tokens = sum(examples[i].tokens for rows in plan[:steps] for i in rows)
    stage.counts |= {"rows": len(examples), "steps": steps, "tokens": tokens}


def load_examples(stage: Stage, path: Path, limit: int, mix: dict[str, float] | None = None) -> list[Example]:
    """Rows of sft.parquet as examples; rows over `limit` tokens or without a loss token are dropped. Raises UserError
    if no row is left in the first round."""
    examples, drops = [], Drops(stage)
    for row in mixed(read_table(path).to_pylist(), mix, drops):
        example = Example(row["row_id"], Group(row["prompt_tokens"], [row["completion_tokens"]], [row["loss_mask"]]),
                          row["weight"])
        ids = {name: row[name] for name in ("prompt_id", "sample_index", "source")}
        if example.tokens > limit:
            drops.add("overlong", **ids, detail=f"{example.tokens} tokens, {limit} fit")
        elif example.targets() == [0]:
            drops.add("empty", **ids, detail="no loss token")
        else:
            examples.append(example)
    if stage.world.first:
        drops.write()
    if not examples:
        stage.nothing_to_learn(f"{path}: no row is left to train on; rows of {limit} tokens fit (sft.max_tokens, sft."
                               f"max_length, the model's context), see drops.parquet there and in {stage.dir}, or set "
                               "sft.enabled=false")
    return examples
