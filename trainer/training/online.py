"""Online training: each step samples completions from the weights in training and takes a step on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.kernels import PREFERENCE_METRICS, preference_loss, preference_means
from strop.kernels.policy import POLICY_METRICS, leave_one_out, policy_loss
from strop.trainer.errors import UserError
from strop.trainer.method_recipes import Online
from strop.trainer.run import stopping
from strop.trainer.run.store import Stage
from strop.trainer.training.batch import Example, Packing, collate, microbatches
from strop.trainer.training.engine import Training, learning_rate
from strop.trainer.training.flops import peak_flops, training_flops
from strop.trainer.training.guard import Guard
from strop.trainer.training.logprobs import Scorer
from strop.trainer.training.loop import resume, save_last, stop_if_not_finite
from strop.trainer.training.rollouts import Rollouts, group_of, grouped

# Mean difference, by dtype, of the log-probs that sampler and trainer give to the same tokens: rounding of two correct
# ways to compute them. Other weights, another template or other positions are off by far more.
SAME_WEIGHTS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
CHECKED = ("entropy", "sampling_difference", "tokens")


@dataclass
class Batch:
    """What a step trains on. given: of each example a value per completion, its advantage or its reference log-prob;
    sampled: the sampler's log-probs of the example's tokens. count: completions or pairs of the step. skipped: how many
    completions or prompts of the step are left out, by reason."""

    examples: list[Example]
    given: list[list[float]]
    sampled: list[list[float]]
    count: int
    skipped: dict[str, int]


class PolicyGradient:
    """Leave-one-out policy gradients, kernels/policy."""

    names = POLICY_METRICS

    def __init__(self, section: Online):
        self.section = section

    def batch(self, rows: list[dict]) -> Batch:
        """The reward of a completion is what its scorers say less beta (log p(policy) - log p(reference)) of it, with
        the log-probs that were sampled. Completions without a score, or alone with one, are left out."""
        scored = [i for i, row in enumerate(rows) if row["reward"] is not None]
        by_prompt: dict[str, list[int]] = {}
        for i in scored:
            by_prompt.setdefault(rows[i]["prompt_id"], []).append(i)
        groups = [mine for mine in by_prompt.values() if len(mine) > 1]
        used = [i for mine in groups for i in mine]
        rewards = [rows[i]["reward"] - self.section.beta * kl_of(rows[i]) for i in used]
        prompts = torch.tensor([g for g, mine in enumerate(groups) for _ in mine], dtype=torch.int64)
        values = leave_one_out(torch.tensor(rewards, dtype=torch.float64), prompts)
        advantage = dict(zip(used, values.tolist(), strict=True))
        parts = grouped(rows, used, self.section.max_tokens)
        return Batch([Example(named(rows, part), group_of([rows[i] for i in part])) for part in parts],
                     [[advantage[i] for i in part] for part in parts],
                     [[p for i in part for p in rows[i]["logprobs"]] for part in parts], len(used),
                     {"unscored": len(rows) - len(scored), "alone": len(scored) - len(used)})

    def loss(self, logp: Tensor, groups, given: Tensor, start: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        mirror = {"start_logp": start, "mirror_weight": self.section.mirror_weight}
        return policy_loss(logp, given, segments=groups.target_segment, num_segments=groups.num_completions,
                           loss_type=self.section.loss, denominator=count,
                           **(mirror if self.section.loss == "mdloo" else {}))

    def means(self, sums: Tensor) -> dict[str, float]:
        *values, count = sums.tolist()
        found = dict(zip(self.names, (value / max(count, 1) for value in values), strict=False))
        return found if self.section.loss == "mdloo" else {"loss": found["loss"]}


class OnlinePairs:
    """The best and the worst completion of each prompt, and a preference loss, kernels/preference."""

    names = PREFERENCE_METRICS

    def __init__(self, section: Online):
        self.section = section

    def batch(self, rows: list[dict]) -> Batch:
        """Completions without a reward are left out, and prompts whose completions all have the same one."""
        by_prompt: dict[str, list[dict]] = {}
        for row in rows:
            by_prompt.setdefault(row["prompt_id"], []).append(row)
        pairs, tied = [], 0
        for mine in by_prompt.values():
            scored = [row for row in mine if row["reward"] is not None]
            if len(scored) < 2:
                continue
            best, worst = (pick(scored, key=lambda row: row["reward"]) for pick in (max, min))
            if best["reward"] == worst["reward"] or best["completion_tokens"] == worst["completion_tokens"]:
                tied += 1
            else:
                pairs.append([best, worst])
        return Batch([Example(pair[0]["prompt_id"], group_of(pair)) for pair in pairs],
                     [[row["ref_logp"] for row in pair] for pair in pairs],
                     [[p for row in pair for p in row["logprobs"]] for pair in pairs], len(pairs),
                     {"unscored": sum(row["reward"] is None for row in rows), "tied": tied})

    def loss(self, logp: Tensor, groups, given: Tensor, start: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
        return preference_loss(logp, given, segments=groups.target_segment, num_segments=groups.num_completions,
                               loss_type=self.section.loss, beta=self.section.beta, pair_denominator=count)

    def means(self, sums: Tensor) -> dict[str, float]:
        return preference_means(sums) if sums[PREFERENCE_METRICS.index("count")] else {}


def kl_of(row: dict) -> float:
    """log p(policy) - log p(reference) of a completion, as sampled: an estimate of the KL, 0 without a reference."""
    return 0.0 if row["ref_logp"] is None else sum(row["logprobs"]) - row["ref_logp"]


def named(rows: list[dict], part: list[int]) -> str:
    return f"{rows[part[0]]['prompt_id']}:" + ",".join(str(rows[i]["sample_index"]) for i in part)


def train_online(stage: Stage, engine: Training, scorer: Scorer, rollouts: Rollouts,
                 objective: PolicyGradient | OnlinePairs, interval: int = 1, guard: Guard | None = None,
                 seen: Callable[[list[dict]], None] = lambda rows: None) -> int:
    """Runs section.steps steps of section.epochs optimizer steps each: resumes, logs every `interval` optimizer steps,
    writes resume points after whole steps, snapshots and the final weights. seen(rows) is called with the completions
    of every step that this process runs. Returns the number of optimizer steps, fewer than planned if the guard stopped
    it.

    Raises UserError if in the first step the sampler's log-probs of its own tokens are not those of the trainer.
    """
    section, world, work = engine.section, engine.world, stage.work
    keep = resume(stage, engine, engine.steps, guard)
    peak = peak_flops(world.device, engine.dtype)
    step, saved, logged = engine.step_index // section.epochs, engine.step_index, Means()
    check = FirstStep(stage)
    with engine.checkpoints, stage.console.progress(stage.name, total=section.steps, unit="steps", done=step) as bar:
        while step < section.steps and not (guard and guard.stopped):
            rows = rollouts.of(step)
            seen(rows)
            batch = objective.batch(rows)
            logged.add(described(rows, batch) | rollouts.seconds)
            costs = [training_flops(engine.sizes, example) for example in batch.examples]
            shares = microbatches(batch.examples, list(range(len(costs))), costs, section.max_tokens, world.size)
            packing = Packing(batch.examples, costs, section.max_tokens)
            packing.add(shares)
            starts: list[Tensor] = []  # log-probs under the policy that wrote the step's completions
            for epoch in range(section.epochs):
                started = time.perf_counter()
                host, largest = backward(engine, scorer, objective, batch, shares[world.rank], starts)
                *sums, loss = host.tolist()
                entropy, difference, tokens = (value / max(sums[-1], 1.0) for value in sums[-3:])
                if tokens and not epoch:
                    check(difference, largest, engine)
                norm = engine.step().item()
                stop_if_not_finite(stage, engine, batch.examples,
                                   {engine.step_index - 1: list(range(len(batch.examples)))}, engine.step_index,
                                   torch.tensor([loss, norm * world.size]))
                seconds = time.perf_counter() - started
                logged.add(objective.means(host[:len(objective.names)]) | {
                    "grad_norm": norm, "mfu": packing.flops / seconds / peak / world.size,
                    "tokens_per_second": packing.tokens / seconds})
                if tokens:
                    logged.add({"entropy": entropy})
                if tokens and not epoch:
                    logged.add({"sampling/sampling_logp_difference/mean": difference})
                    logged.largest("sampling/sampling_logp_difference/max", largest)
                checks = guard is not None and guard.due()
                if engine.step_index % interval == 0 or engine.step_index == engine.steps or checks:
                    values = logged.take() | {"learning_rate": learning_rate(engine.step_index - 1, engine.steps,
                                                                             section)}
                    values |= guard.check() if checks else {}
                    stage.metrics.log(stage.name, engine.step_index, values, total=engine.steps)
                if guard and guard.stopped:
                    break
                if engine.step_index in keep:
                    engine.save(stage.dir / "snapshots" / f"step-{engine.step_index:06}")
            step += 1
            bar.advance(1, tokens=sum(len(row["completion_tokens"]) for row in rows))
            # a stage that the guard stopped is resumed from before that check, and comes to it again
            ends = step == section.steps or (guard is not None and bool(guard.stopped))
            stops, _ = engine.agree(stopping.requested() and not ends, True)
            if not ends and (stops or engine.step_index - saved >= section.checkpoint_steps):
                engine.save_checkpoint(work)
                saved = engine.step_index
            if stops:
                engine.checkpoints.finish()
                stopping.point()
    save_last(stage, engine, guard)
    return engine.step_index


def backward(engine: Training, scorer: Scorer, objective: PolicyGradient | OnlinePairs, batch: Batch,
             share: list[list[int]], starts: list[Tensor]) -> tuple[Tensor, float]:
    """Gradients of one optimizer step over this rank's microbatches. starts: filled in the step's first epoch.

    Returns, over all ranks and on the host, the sums [objective.names, CHECKED, loss] and the largest difference of the
    sampler's log-probs from the trainer's, which counts in the first epoch only."""
    device, ranks, first = engine.world.device, engine.world.size, not starts
    if engine.lora.dropout:
        torch.manual_seed(hash((engine.seed, engine.step_index, engine.world.rank)))
    sums = torch.zeros(len(objective.names) + len(CHECKED) + 1 + ranks, device=device)
    for i, indices in enumerate(share):
        groups = collate(batch.examples, indices, device)
        logp, found = scorer(groups, stats=("entropy",))
        given, sampled = (torch.tensor([x for j in indices for x in values[j]], dtype=torch.float32, device=device)
                          for values in (batch.given, batch.sampled))
        if first:
            starts.append(logp.detach())
        value, vector = objective.loss(logp, groups, given, starts[i], batch.count)
        engine.backward(value, i == len(share) - 1)
        off = (logp.detach() - sampled).abs() if first else torch.zeros_like(sampled)
        tokens = torch.tensor(float(len(sampled)), device=device)
        sums[:len(vector)] += vector
        sums[len(vector):-ranks] += torch.stack([found["entropy"].sum(), off.sum(), tokens, value.detach()])
        worst = sums[engine.world.rank - ranks]
        torch.maximum(worst, off.max(), out=worst)
    engine.world.sum_([sums])
    host = sums.cpu()
    return host[:-ranks], host[-ranks:].max().item()


class FirstStep:
    """Compares the log-probs of sampler and trainer in the first step that this process trains."""

    def __init__(self, stage: Stage):
        self.stage, self.done, self.warned = stage, False, False

    def __call__(self, mean: float, largest: float, engine: Training) -> None:
        bound = SAME_WEIGHTS[engine.dtype]
        if mean <= bound:
            self.done = True
            return
        what = (f"{self.stage.name}: step {engine.step_index + 1}: the log-probs of sampled tokens differ between "
                f"sampler and trainer by {mean:.2g} on average, {largest:.2g} at most; rounding is up to {bound:g}")
        if not self.done:  # NaN too
            raise UserError(f"{what}. The sampler does not run the weights in training as the trainer does: this model "
                            "cannot be trained online; use sample, select and dpo instead")
        if not self.warned:
            self.stage.console.warn(what)
        self.warned = True


def described(rows: list[dict], batch: Batch) -> dict[str, float]:
    """Metrics of a step's completions, by TRL's names where it has one."""
    lengths = [len(row["completion_tokens"]) for row in rows]
    found = {"completions/mean_length": statistics.fmean(lengths), "completions/min_length": min(lengths),
             "completions/max_length": max(lengths),
             "completions/clipped_ratio": statistics.fmean(row["finish"] == "length" for row in rows)}
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        if row["reward"] is not None:
            by_prompt.setdefault(row["prompt_id"], []).append(row["reward"])
    if rewards := [reward for mine in by_prompt.values() for reward in mine]:
        found["reward"] = statistics.fmean(rewards)
    if spreads := [statistics.stdev(mine) for mine in by_prompt.values() if len(mine) > 1]:
        found |= {"reward_std": statistics.fmean(spreads),
                  "frac_reward_zero_std": statistics.fmean(spread == 0 for spread in spreads)}
    by_scorer: dict[str, list[float]] = {}
    for score in (score for row in rows for score in row["scores"] if score["value"] is not None):
        by_scorer.setdefault(score["scorer"], []).append(score["value"])
    for name, values in by_scorer.items():
        found |= {f"rewards/{name}/mean": statistics.fmean(values), f"rewards/{name}/std": statistics.pstdev(values)}
    if rows[0]["ref_logp"] is not None:
        found["kl"] = statistics.fmean(map(kl_of, rows))
    return found | {f"skipped/{reason}": float(n) for reason, n in batch.skipped.items() if n}


class Means:
    """Values to log: their means since the last time, and the largest."""

    def __init__(self):
        self.found: dict[str, list[float]] = {}
        self.most: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.found.setdefault(name, []).append(value)

    def largest(self, name: str, value: float) -> None:
        self.most[name] = max(value, self.most.get(name, value))

    def take(self) -> dict[str, float]:
        values = {name: sum(found) / len(found) for name, found in self.found.items()} | self.most
        self.found, self.most = {}, {}
        return values
