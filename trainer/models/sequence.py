"""Sequence parallelism as in DeepSpeed-Ulysses (arXiv 2309.14509): the ranks of a group share a packed row.

Each runs embeddings, norms, projections and MLPs on its slice of the tokens. Attention changes slices of tokens into
slices of heads, so that every rank sees all tokens of its heads, and back. Log-probs and scores are computed where
their hidden states are, and gathered: every rank has those of the whole row and computes the same loss, whose gradient
flows back through the values that the rank computed itself. So gradients of weights are sums over the ranks, as they
are over ranks with other rows.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import lcm

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from strop.kernels import PackedGroups

IGNORED = -100  # linear_logprob's ignore_index


@dataclass(frozen=True)
class Sequence:
    """The ranks that share a packed row: this rank's place among them, and how many they are. Slices are in their
    order. Every method is called on every one of them. waits: around every wait for the others."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    waits: AbstractContextManager = field(default_factory=nullcontext, compare=False)

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ...]: part i goes to rank i. Returns the parts that the ranks sent to this one, in their order."""
        found = torch.empty_like(x)
        with self.waits:
            dist.all_to_all_single(found, x, group=self.group)
        return found

    def all_gather(self, x: Tensor) -> Tensor:
        """[size, ...] of every rank's x, which all have one shape."""
        found = x.new_empty(self.size, *x.shape)
        with self.waits:
            dist.all_gather(list(found.unbind()), x, group=self.group)
        return found

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """query [1, H, S, D], key and value [1, Hkv, S, D] of this rank's slice, whose S tokens may end in padding; to
        [1, H / size, tokens, D] and [1, K / size, tokens, D]. K is Hkv, or where the size does not divide it, its
        least multiple that the size divides: key heads are then repeated. Raises ValueError if the size does not divide
        H."""
        if query.shape[1] % self.size:
            raise ValueError(f"{query.shape[1]} attention heads cannot be divided among {self.size} ranks")
        copies = lcm(key.shape[1], self.size) // key.shape[1]
        if copies > 1:
            key, value = (x.repeat_interleave(copies, 1) for x in (key, value))
        inputs = query, key, value
        parts = [x[0].unflatten(0, (self.size, -1)).transpose(1, 2).flatten(2) for x in inputs]  # [size, S, width]
        rows = _AllToAll.apply(torch.cat(parts, -1), self).flatten(0, 1)[:tokens]
        split = rows.split([part.shape[-1] for part in parts], -1)
        return tuple(part.unflatten(-1, (-1, x.shape[-1])).transpose(0, 1)[None]
                     for part, x in zip(split, inputs, strict=True))

    def to_tokens(self, out: Tensor) -> Tensor:
        """out [1, H / size, tokens, D] to [1, H, S, D] of this rank's slice, 0 in its padding."""
        rows = out[0].transpose(0, 1).flatten(1)
        missing = -len(rows) % self.size
        rows = (F.pad(rows, (0, 0, 0, missing)) if missing else rows).unflatten(0, (self.size, -1))
        heads = _AllToAll.apply(rows.contiguous(), self).unflatten(-1, (-1, out.shape[-1]))  # [size, S, H / size, D]
        return heads.transpose(0, 1).flatten(1, 2).transpose(0, 1)[None]

    def join(self, values: Tensor, places: Tensor) -> Tensor:
        """values [n, ...] of this rank's slice, n the same on all ranks; places [m]: where the wanted ones are among
        the values of all ranks, end to end. Returns [m, ...], whose gradient goes to this rank's own values."""
        return _AllGather.apply(values.contiguous(), self).flatten(0, 1).index_select(0, places)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sequence: Sequence) -> Tensor:
        ctx.sequence = sequence
        return sequence.all_to_all(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.sequence.all_to_all(grad.contiguous()), None


class _AllGather(torch.autograd.Function):
    """Every rank goes on with the same values, so each takes the gradient of its own from its own loss."""

    @staticmethod
    def forward(ctx, x: Tensor, sequence: Sequence) -> Tensor:
        ctx.rank = sequence.rank
        return sequence.all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return grad[ctx.rank], None


@dataclass(frozen=True)
class SlicedGroups(PackedGroups):
    """PackedGroups of which this rank holds the rows [rank * S, (rank + 1) * S), S = ceil(T / size). The last ranks
    repeat the last row where there are no more; no token sees these copies, and nothing is read from them.

    Tensors, all int64:
        rows: [S], the row offsets that this rank holds.
        pred_rows, own_target: [n], as pred_index and target, of the targets that this rank predicts: places in its
            slice, and tokens. n is the largest number of any rank; IGNORED fills up.
        target_places: [M], where the joined values of all ranks have the groups' targets.
        end_rows, end_places: likewise of the completions' last tokens.
    """

    rows: Tensor
    pred_rows: Tensor
    own_target: Tensor
    target_places: Tensor
    end_rows: Tensor
    end_places: Tensor
    sequence: Sequence

    @classmethod
    def of(cls, groups: PackedGroups, sequence: Sequence) -> "SlicedGroups":
        """groups: on the host."""
        length = -(-groups.num_tokens // sequence.size)
        rows = torch.arange(sequence.rank * length, (sequence.rank + 1) * length).clamp(max=groups.num_tokens - 1)
        own, pred_rows, target_places = _divide(groups.pred_index, length, sequence)
        own_target = torch.full_like(pred_rows, IGNORED)
        own_target[:len(own)] = groups.target[own]
        ends = torch.tensor([end - 1 for _, end in groups.completion_bounds])
        _, end_rows, end_places = _divide(ends, length, sequence)
        return cls(**vars(groups), rows=rows, pred_rows=pred_rows, own_target=own_target, target_places=target_places,
                   end_rows=end_rows, end_places=end_places, sequence=sequence)


def _divide(rows: Tensor, length: int, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Of row offsets [m]: the indices of those in this rank's slice of `length` rows, and their places in it, filled up
    with 0 to the largest number of any rank; for all of them the place among these of all ranks, end to end."""
    holder = rows // length
    counts = holder.bincount(minlength=sequence.size)
    most = max(1, int(counts.max()))
    order = holder.argsort(stable=True)
    within = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[holder[order]]
    places = torch.empty_like(rows)
    places[order] = holder[order] * most + within
    own = (holder == sequence.rank).nonzero()[:, 0]
    return own, F.pad(rows[own] - sequence.rank * length, (0, most - len(own))), places


def hidden_states(body: nn.Module, groups: PackedGroups) -> Tensor:
    """The decoder's hidden states [T, D] of the packed row; of SlicedGroups those of this rank's slice, [S, D]."""
    ids, positions, more = groups.input_ids, groups.position_ids, {}
    if isinstance(groups, SlicedGroups):
        ids, positions = ids.index_select(0, groups.rows), positions.index_select(0, groups.rows)
        more = {"exchange": groups.sequence}
    return body(input_ids=ids[None], position_ids=positions[None], groups=groups, use_cache=False,
                **more).last_hidden_state[0]
