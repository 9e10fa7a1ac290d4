"""Examples to steps: which rows a step takes, how they are packed, and which rank computes which pack.

All of it is host arithmetic that every rank repeats, so the counts that normalise a loss are known everywhere without
a word between the ranks.
"""

import hashlib
import math
import random
from dataclasses import dataclass

import torch

from strop.kernels.layout import Group, PackedGroups


@dataclass(frozen=True)
class Example:
    """A prompt with one completion (SFT) or with chosen and rejected (DPO)."""

    row_id: str
    group: Group
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        return len(self.group.prompt) + sum(len(c) for c in self.group.completions)

    def targets(self) -> list[int]:
        """Predicted tokens of each completion: those the mask leaves in, less a first token nothing precedes."""
        counts = []
        for i, completion in enumerate(self.group.completions):
            mask = self.group.loss_masks[i] if self.group.loss_masks else [True] * len(completion)
            counts.append(sum(bool(m) for m in (mask if self.group.prompt else mask[1:])))
        return counts

    def fingerprint(self) -> str:
        """Hash of tokens and masks: what the cached reference log-probs are valid for."""
        group = self.group
        masks = [[int(m) for m in mask] for mask in group.loss_masks] if group.loss_masks else None
        text = repr((list(group.prompt), [list(c) for c in group.completions], masks))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def plan_steps(examples: list[Example], epochs: float, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of the examples of every optimizer step.

    Each epoch is a fresh seeded order in which a row of weight w stands floor(w) times and once more with probability
    w - floor(w). A fractional last epoch is cut after its share of the rows.
    """
    order: list[int] = []
    for epoch in range(math.ceil(epochs)):
        draw = random.Random(f"{seed}:{epoch}")
        rows = []
        for i, example in enumerate(examples):
            whole = int(example.weight)
            rows += [i] * (whole + (draw.random() < example.weight - whole))
        draw.shuffle(rows)
        order += rows[:math.ceil(len(rows) * min(1.0, epochs - epoch))]
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def pack(lengths: list[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: indices of `lengths` in bins of at most `budget` tokens. No length may exceed it."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if fits:
            best = min(fits, key=lambda b: room[b])
            bins[best].append(i)
            room[best] -= lengths[i]
        else:
            assert lengths[i] <= budget, (lengths[i], budget)
            bins.append([i])
            room.append(budget - lengths[i])
    return bins


def share_out(costs: list[float], ranks: int) -> list[list[int]]:
    """For each rank the indices of its work: heaviest first to the rank with least so far."""
    loads, shares = [0.0] * ranks, [[] for _ in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[i]
        shares[rank].append(i)
    return shares


def microbatches(examples: list[Example], indices: list[int], budget: int, rank: int, ranks: int) -> list[list[int]]:
    """This rank's microbatches of a step, each a list of indices into `examples`."""
    bins = pack([examples[i].tokens for i in indices], budget)
    costs = [float(sum(examples[indices[j]].tokens for j in b)) for b in bins]
    return [[indices[j] for j in bins[b]] for b in share_out(costs, ranks)[rank]]


def collate(examples: list[Example], indices: list[int], device: torch.device) -> PackedGroups:
    """One packed row, on `device`; the copy does not wait for the device."""
    groups = PackedGroups.pack([examples[i].group for i in indices])
    if device.type == "cuda":
        return groups.pin_memory().to(device, non_blocking=True)
    return groups
