"""Examples to steps: which rows a step takes, how they are packed, and which rank computes which pack.

Every rank repeats this arithmetic on the host, so the counts that normalize a loss need no communication.
"""

import bisect
import hashlib
import heapq
import math
import random
from dataclasses import dataclass

import torch

from strop.kernels.layout import Group, PackedGroups
from strop.trainer.errors import UserError
from strop.trainer.models.sequence import Sequence, SlicedGroups
from strop.trainer.run.tables import Drops

MOST_ROWS = 50_000_000  # of a plan, which is a list of indices


@dataclass(frozen=True)
class Example:
    """A prompt with one completion (SFT) or with chosen and rejected (DPO). weight: expected uses per epoch."""

    row_id: str
    group: Group
    weight: float = 1.0

    @property
    def tokens(self) -> int:
        return len(self.group.prompt) + sum(len(c) for c in self.group.completions)

    def targets(self) -> list[int]:
        """Number of loss tokens of each completion."""
        return [sum(loss for _, loss, _ in self.group.targets(i)) for i in range(len(self.group.completions))]

    def nll_targets(self) -> list[int]:
        """Number of tokens of each completion in the NLL term."""
        return [sum(nll for *_, nll in self.group.targets(i)) for i in range(len(self.group.completions))]

    def predicted(self) -> int:
        """Number of tokens in either."""
        return sum(len(self.group.targets(i)) for i in range(len(self.group.completions)))

    def fingerprint(self) -> str:
        """Hash of tokens and masks, the key of cached reference log-probs."""
        group = self.group
        masks = [[[int(m) for m in mask] for mask in kind] if kind else None
                 for kind in (group.loss_masks, group.nll_masks)]
        text = repr((list(group.prompt), [list(c) for c in group.completions], masks))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def mixed(rows: list[dict], mix: dict[str, float] | None, drops: Drops) -> list[dict]:
    """The rows with their weight times the factor of their source, by default 1; rows of factor 0 are dropped."""
    kept = []
    for row in rows:
        if factor := (mix or {}).get(row["source"], 1.0):
            kept.append(row | {"weight": row["weight"] * factor})
        else:
            drops.add("mix", prompt_id=row["prompt_id"], source=row["source"], detail=row["row_id"])
    return kept


def plan_steps(examples: list[Example], epochs: float, batch_size: int, seed: int) -> list[list[int]]:
    """Indices of the examples of every optimizer step.

    Each epoch is reshuffled from `seed` and holds a row of weight w floor(w) times, and once more with probability
    w - floor(w). A fractional last epoch takes that fraction of its rows.
    Raises UserError on more than MOST_ROWS.
    """
    total = epochs * sum(example.weight for example in examples)
    if total > MOST_ROWS:
        raise UserError(f"epochs={epochs:g}: {len(examples):,} weighted rows make {total:.3g} training rows, more than "
                        f"{MOST_ROWS:,}; lower epochs, or the data's weight")
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
    """Best-fit decreasing: indices of `lengths` in bins of at most `budget` tokens. No length may exceed `budget`."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        assert lengths[i] <= budget, (lengths[i], budget)
        at = bisect.bisect_left(room, (lengths[i], -1))
        if at < len(room):
            left, best = room.pop(at)
        else:
            left, best = budget, len(bins)
            bins.append([])
        bins[best].append(i)
        bisect.insort(room, (left - lengths[i], best))
    return bins


def pack_evenly(lengths: list[int], budget: int) -> list[list[int]]:
    """`pack` with the smallest budget that needs no more bins: the bins are filled evenly. The largest bin sets the
    peak memory, and a small last bin would be a slow pass."""
    if not lengths:
        return []
    bins = pack(lengths, budget)
    low, high = max(max(lengths), -(-sum(lengths) // len(bins))), budget
    while low < high:
        middle = (low + high) // 2
        tighter = pack(lengths, middle)
        if len(tighter) <= len(bins):
            bins, high = tighter, middle
        else:
            low = middle + 1
    return bins


def ends_first(lengths: list[int], room: int) -> list[int]:
    """Indices, ascending, of ranked completions that fit into `room` tokens: the best, the worst, the second best and
    so on."""
    left, kept, best = list(range(len(lengths))), [], True
    while left:
        i = left.pop(0 if best else -1)
        if lengths[i] <= room:
            kept.append(i)
            room, best = room - lengths[i], not best
    return sorted(kept)


def share_out(costs: list[float], ranks: int) -> list[list[int]]:
    """Indices of `costs` for each rank: greedy, the heaviest first to the least loaded rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = loads[0]
        shares[rank].append(i)
        heapq.heapreplace(loads, (load + costs[i], rank))
    return shares


def microbatches(examples: list[Example], rows: list[int], costs: list[int], budget: int,
                 ranks: int) -> list[list[list[int]]]:
    """Each rank's microbatches of a step over `rows`; a microbatch is a list of indices into `examples`.

    costs: FLOPs of every example. Ranks get equal FLOPs, since they wait for each other once per step, and pack their
    examples into microbatches of at most `budget` tokens; an example over it, which there is only after a step ran out
    of memory, is a microbatch of its own.
    """
    found = []
    for share in share_out([costs[i] for i in rows], ranks):
        own = [rows[j] for j in share if examples[rows[j]].tokens <= budget]
        alone = [[rows[j]] for j in share if examples[rows[j]].tokens > budget]
        found.append([[own[j] for j in b] for b in pack_evenly([examples[i].tokens for i in own], budget)] + alone)
    return found


@dataclass
class Packing:
    """Packing statistics of the added steps. Packed rows have no padding tokens.

    packing_efficiency: tokens / room, where a rank's room is its number of microbatches times its largest one, which
    sets the peak memory.
    packing_fill: tokens / (microbatches * budget). Low for small steps: on average half a microbatch is unused.
    rank_balance: FLOPs / (ranks * FLOPs of the busiest rank); the rest is waiting.
    """

    examples: list[Example]
    costs: list[int]
    budget: int
    tokens: int = 0
    room: int = 0
    microbatches: int = 0
    flops: int = 0
    busiest: int = 0

    def add(self, shares: list[list[list[int]]]) -> None:
        """Adds a step, as `microbatches` returns it."""
        for share in shares:
            loads = [sum(self.examples[i].tokens for i in rows) for rows in share]
            self.tokens += sum(loads)
            self.room += len(loads) * max(loads, default=0)
            self.microbatches += len(loads)
        work = [sum(self.costs[i] for rows in share for i in rows) for share in shares]
        self.flops += sum(work)
        self.busiest += len(work) * max(work)

    def values(self) -> dict[str, float]:
        return {"packing_efficiency": self.tokens / max(1, self.room),
                "packing_fill": self.tokens / max(1, self.microbatches * self.budget),
                "rank_balance": self.flops / max(1, self.busiest)}


def nothing(device: torch.device, sequence: Sequence | None = None) -> PackedGroups:
    """A row without a target, for ranks that must take part in a pass but have no row left."""
    return collate([Example("", Group([0], [[0]], [[False]]))], [0], device, sequence)


def collate(examples: list[Example], indices: list[int], device: torch.device,
            sequence: Sequence | None = None) -> PackedGroups:
    """One packed row on `device`, copied without a host sync; SlicedGroups where ranks share it."""
    groups = PackedGroups.pack([examples[i].group for i in indices])
    groups = groups if sequence is None else SlicedGroups.of(groups, sequence)
    return groups.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else groups
