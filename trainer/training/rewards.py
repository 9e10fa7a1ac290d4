"""Reward modeling: ranked completions of a prompt as examples, and the Bradley-Terry loss over their pairs."""

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.kernels import Group
from strop.trainer.config import Part, Reward
from strop.trainer.data.samples import read_samples
from strop.trainer.run.store import Stage
from strop.trainer.run.tables import Drops, read_table
from strop.trainer.training.batch import Example, ends_first
from strop.trainer.training.pairs import reward_margin

REWARD_METRICS = ("loss", "accuracy", "margin", "mean_reward", "groups")  # sums; the last one counts


@dataclass(frozen=True)
class Ranked:
    """Completions of a prompt in one group. pairs: (better, worse, margin), the indices of completions; margin: how
    much better the data says it is, 0 where it does not say."""

    example: Example
    pairs: list[tuple[int, int, float]]
    source: str

    @property
    def prompt(self) -> str:
        """Hash of the prompt's tokens."""
        return hashlib.blake2b(repr(list(self.example.group.prompt)).encode(), digest_size=16).hexdigest()


def load_ranked(stage: Stage, section: Reward | Part, context: int, select: Path,
                history: list[tuple[Path, Path]], mix: dict[str, float] | None = None) -> list[Ranked]:
    """The groups to train on: the rows of select/pairs.parquet, a pair each; with section.pairs=all the samples of
    `history`, (sample, select) folders, take the place of its rows that were made from samples: all of a prompt's
    completions in one group, with every pair of different scores. mix: factors of the weights by source. Writes the
    drops."""
    drops, found = Drops(stage), []
    limit = min(section.max_length or 1 << 30, context)
    for row in read_table(select / "pairs.parquet").to_pylist():
        if section.pairs == "all" and row["prompt_id"] is not None:
            continue
        completions = [row["chosen_tokens"], row["rejected_tokens"]]
        if completions[0] == completions[1]:
            drops.add("identical", prompt_id=row["prompt_id"], source=row["source"])
            continue
        group = scored_group(row["prompt_tokens"], completions)
        found.append(Ranked(Example(row["row_id"], group, row["weight"]), [(0, 1, reward_margin(row) or 0.0)],
                            row["source"]))
    for sample, selected in history:
        found += ranked_samples(sample, selected, drops)
    kept = []
    for row in found:
        fitting = fit(row, limit, section.max_tokens)
        ids = {"source": row.source, "prompt_id": row.example.row_id}
        if fitting is None:
            drops.add("overlong", **ids, detail=f"{row.example.tokens} tokens, completions of {limit} (reward."
                      f"max_length, the model's context) and groups of {section.max_tokens} fit (reward.max_tokens)")
            continue
        gone = len(row.example.group.completions) - len(fitting.example.group.completions)
        for _ in range(gone):
            drops.add("overlong", **ids, detail="one of the completions, so that the others fit")
        if factor := (mix or {}).get(row.source, 1.0):
            example = replace(fitting.example, weight=factor * fitting.example.weight)
            kept.append(replace(fitting, example=example))
        else:
            drops.add("mix", **ids, detail="its source has the factor 0")
    if stage.world.first:
        drops.write()
    return kept


def ranked_samples(sample: Path, select: Path, drops: Drops) -> list[Ranked]:
    """A group per prompt of its scored samples that differ, best first: with every pair of different scores, and with
    (revision, what it revises) where these are equal (edited > chosen > rejected, Llama 3, section 4.1.2)."""
    judged = {(r["prompt_id"], r["sample_index"]): r["score"]
              for r in read_table(select / "judged.parquet").to_pylist()}
    sources = {r["prompt_id"]: r["source"] for r in read_table(select / "difficulty.parquet").to_pylist()}
    by_prompt: dict[str, dict[tuple, tuple]] = defaultdict(dict)
    prompts, found, revised = {}, [], {}  # revised: (prompt_id, sample_index) -> the sample_index that it revises
    for row in read_samples(sample):
        score = judged.get((row["prompt_id"], row["sample_index"]))
        ids = {name: row[name] for name in ("prompt_id", "sample_index")} | {"source": sources[row["prompt_id"]]}
        tokens = tuple(row["completion_tokens"])
        if score is None or not row["completion"].strip():
            drops.add("unscored" if score is None else "empty", **ids)
        elif by_prompt[row["prompt_id"]].setdefault(tokens, (score, row["sample_index"]))[1] != row["sample_index"]:
            drops.add("duplicate", **ids)
        prompts[row["prompt_id"]] = row["prompt_tokens"]
        if row.get("revised_from"):
            revised[row["prompt_id"], row["sample_index"]] = row["revised_from"]["sample_index"]
    for prompt_id, samples in by_prompt.items():
        ranked = sorted(samples.items(), key=lambda item: (-item[1][0], (prompt_id, item[1][1]) not in revised,
                                                           item[1][1]))
        scores, index = [score for _, (score, _) in ranked], [number for _, (_, number) in ranked]
        pairs = [(i, j, scores[i] - scores[j]) for i, j in combinations(range(len(ranked)), 2)
                 if scores[i] > scores[j] or revised.get((prompt_id, index[i])) == index[j]]
        if not pairs:
            drops.add("tie", prompt_id=prompt_id, source=sources[prompt_id],
                      detail=f"{len(ranked)} different completions with equal scores")
            continue
        group = scored_group(prompts[prompt_id], [list(tokens) for tokens, _ in ranked])
        name = f"{sample.parent.name}/{prompt_id}"
        found.append(Ranked(Example(name, group), pairs, sources[prompt_id]))
    return found


def scored_group(prompt: list[int], completions: list[list[int]]) -> Group:
    """No token is predicted: the loss looks at the last hidden state of each completion."""
    return Group(prompt, completions, [[False] * len(c) for c in completions])


def fit(row: Ranked, limit: int, budget: int) -> Ranked | None:
    """The row without completions of more than `limit` tokens with the prompt, and if it has more than `budget` tokens
    with the best and the worst ones that fit; None if no pair is left."""
    group = row.example.group
    left = [i for i, c in enumerate(group.completions) if len(group.prompt) + len(c) <= limit]
    kept = [left[j] for j in ends_first([len(group.completions[i]) for i in left], budget - len(group.prompt))]
    at = {old: new for new, old in enumerate(kept)}
    pairs = [(at[i], at[j], margin) for i, j, margin in row.pairs if i in at and j in at]
    if not pairs:
        return None
    used = scored_group(group.prompt, [group.completions[i] for i in kept])
    return replace(row, example=replace(row.example, group=used), pairs=pairs)


def split(rows: list[Ranked], share: float, seed: int) -> tuple[list[Ranked], list[Ranked]]:
    """(to train on, held out), by a hash of the prompt: a prompt is on one side only, the same in every run."""
    def held(row: Ranked) -> bool:
        digest = hashlib.blake2b(f"{seed}:{row.prompt}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < share * 2**64

    sides = [held(row) for row in rows]
    return ([row for row, out in zip(rows, sides, strict=True) if not out],
            [row for row, out in zip(rows, sides, strict=True) if out])


def pair_tensors(rows: list[Ranked], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the packed rows: better, worse [pairs] int64, the completions' places in the pack; margin, share [pairs] fp32,
    where share is 1 / the number of pairs of their group."""
    columns: tuple[list, list, list, list] = ([], [], [], [])
    first = 0
    for row in rows:
        for i, j, margin in row.pairs:
            for column, value in zip(columns, (first + i, first + j, margin, 1 / len(row.pairs)), strict=True):
                column.append(value)
        first += len(row.example.group.completions)
    dtypes = torch.int64, torch.int64, torch.float32, torch.float32
    tensors = [torch.tensor(column, dtype=dtype) for column, dtype in zip(columns, dtypes, strict=True)]
    if device.type == "cuda":
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return tuple(tensors)


def reward_loss(scores: Tensor, better: Tensor, worse: Tensor, margin: Tensor, share: Tensor, groups: int, *,
                label_smoothing: float = 0.0, centering: float = 0.0) -> tuple[Tensor, Tensor]:
    """(loss, fp32 [5] sums in the order of REWARD_METRICS) of some of the `groups` of a step.

    Of a pair: -log sigmoid(better - worse - margin), the margin as in Llama 2 (2307.09288, eq. 2); with label smoothing
    e it counts 1 - e, and e times the loss of the pair turned around. A group's loss is the mean over its pairs
    (InstructGPT, 2203.02155, eq. 1), the step's the mean over groups. centering: weight of (better + worse)^2, which
    keeps scores around zero (2312.09244, section 3.2). scores: fp32 [completions]."""
    high, low = scores[better], scores[worse]
    difference = high - low
    loss = -(1 - label_smoothing) * F.logsigmoid(difference - margin)
    if label_smoothing:
        loss = loss - label_smoothing * F.logsigmoid(-difference - margin)
    if centering:
        loss = loss + centering * (high + low).square()
    total = (loss * share).sum()
    with torch.no_grad():
        sums = [total.detach(), ((difference > 0) * share).sum(), (difference * share).sum(),
                ((high + low) / 2 * share).sum(), share.sum()]
    return total / groups, torch.stack(sums)


def reward_means(sums: Tensor) -> dict[str, float]:
    """TRL's names -> means over groups, from sums of REWARD_METRICS on the host."""
    *values, groups = sums.tolist()
    return {name: value / max(1.0, groups) for name, value in zip(REWARD_METRICS, values, strict=False)}
