"""PackedGroups: prompts and their completions, concatenated into one row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of an attention tile: the largest block of a kernel; smaller blocks split a tile.
TILE = 128

Span = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, as token ids.

    loss_masks holds one sequence per completion with one bool per token; False excludes the token from the loss. None
    includes every completion token. nll_masks, likewise, is for losses with an NLL term that covers other tokens than
    the rest of the loss; None: the same tokens.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    loss_masks: Sequence[Sequence[bool]] | None = None
    nll_masks: Sequence[Sequence[bool]] | None = None

    def targets(self, i: int) -> list[tuple[int, bool, bool]]:
        """(place in completion i, in the loss, in the NLL term) of its predicted tokens: those in either. With an empty
        prompt nothing precedes the first token, so nothing predicts it."""
        n = len(self.completions[i])
        loss = self.loss_masks[i] if self.loss_masks else [True] * n
        nll = self.nll_masks[i] if self.nll_masks else loss
        return [(j, bool(loss[j]), bool(nll[j])) for j in range(0 if self.prompt else 1, n) if loss[j] or nll[j]]


class Bounds(NamedTuple):
    """The host-side fields of PackedGroups that attention needs."""

    prompt_bounds: tuple[Span, ...]
    completion_bounds: tuple[Span, ...]
    completion_group: tuple[int, ...]

    @classmethod
    def of(cls, segments: Tensor) -> Bounds:
        """From PackedGroups.segments."""
        rows = segments.tolist()
        prompts = {group: (start, end) for group, start, end, _, _ in rows}
        completions = tuple((start, end) for *_, start, end in rows)
        return cls(tuple(prompts.values()), completions, tuple(row[0] for row in rows))


@dataclass(frozen=True)
class PackedGroups:
    """One packed row of T tokens without padding: group after group, each a prompt followed by its completions.

    A token sees the prompt of its group and the preceding tokens of its own completion. Positions restart at the
    prompt's end for every completion. M is the number of predicted tokens: completion tokens in the loss or the NLL
    term.

    Host side (bounds are half-open row offsets):
        prompt_bounds: per group.
        completion_bounds: per completion.
        completion_group: the group of each completion.
        target_bounds: per completion, its slice of pred_index, target and target_segment.
        segments: [completions, 5] int32 tensor that stays on the host: group, prompt start and end, start and end.
        max_queries, max_keys: the longest span of query rows and of keys. The first completion's query span includes
            the prompt's rows; every completion's key span is the prompt and the completion.
    Tensors:
        input_ids, position_ids: [T] int64.
        pred_index: [M] int64, the row offset of the hidden state that predicts the target. A completion's first token
            is predicted by the prompt's last token, for every completion.
        target: [M] int64, the token to predict.
        target_segment: [M] int32, the completion of the target.
        loss_mask, nll_mask: [M] bool, whether the target is in the loss and in its NLL term. None if no group has
            nll_masks: then every target is in both.
    Tensors for attention, all int32:
        tiles: [tiles, 6], up to TILE rows of one group each: start, end, the group's start, its prompt's end. The last
            two columns order the tiles, longest first: by the keys that their rows see, by the rows that see them.
        readers_end: [T], one past the last row that sees the row: row i sees row j iff j <= i < readers_end[j]. The
            group's end for a prompt's rows, the completion's end for a completion's rows.
        query_offsets, key_offsets: [completions + 1], start offsets of the query spans, and of the spans in key_index.
        key_index: the rows of prompt and completion, for every completion.
    """

    prompt_bounds: tuple[Span, ...]
    completion_bounds: tuple[Span, ...]
    completion_group: tuple[int, ...]
    target_bounds: tuple[Span, ...]
    segments: Tensor
    max_queries: int
    max_keys: int
    input_ids: Tensor
    position_ids: Tensor
    pred_index: Tensor
    target: Tensor
    target_segment: Tensor
    loss_mask: Tensor | None
    nll_mask: Tensor | None
    tiles: Tensor
    readers_end: Tensor
    query_offsets: Tensor
    key_offsets: Tensor
    key_index: Tensor

    @classmethod
    def pack(cls, groups: Sequence[Group], device: torch.device | str | None = None) -> PackedGroups:
        """Pack the groups into one row. Raises ValueError on empty or malformed groups."""
        if len(groups) == 0:
            raise ValueError("PackedGroups.pack needs at least one group")
        tokens: list[int] = []
        positions: list[int] = []
        pred_index: list[int] = []
        target: list[int] = []
        segment: list[int] = []
        in_loss: list[bool] = []
        in_nll: list[bool] = []
        prompt_bounds, completion_bounds, completion_group, target_bounds = [], [], [], []
        for g, group in enumerate(groups):
            _check_group(g, group)
            prompt_start, prompt_end = len(tokens), len(tokens) + len(group.prompt)
            tokens.extend(group.prompt)
            positions.extend(range(prompt_end - prompt_start))
            prompt_bounds.append((prompt_start, prompt_end))
            for c, completion in enumerate(group.completions):
                start, first_target = len(tokens), len(target)
                tokens.extend(completion)
                positions.extend(range(prompt_end - prompt_start, prompt_end - prompt_start + len(completion)))
                for offset, loss, nll in group.targets(c):
                    pred_index.append(start + offset - 1 if offset else prompt_end - 1)
                    target.append(completion[offset])
                    in_loss.append(loss)
                    in_nll.append(nll)
                segment.extend([len(completion_bounds)] * (len(target) - first_target))
                target_bounds.append((first_target, len(target)))
                completion_bounds.append((start, len(tokens)))
                completion_group.append(g)
        input_ids = torch.tensor(tokens, dtype=torch.int64)
        masks = [None, None]
        if any(group.nll_masks for group in groups):
            masks = [torch.tensor(mask, dtype=torch.bool) for mask in (in_loss, in_nll)]
        if int(input_ids.min()) < 0:
            raise ValueError(f"negative token id {int(input_ids.min())} at row offset {int(input_ids.argmin())}")
        packed = cls(
            prompt_bounds=tuple(prompt_bounds), completion_bounds=tuple(completion_bounds),
            completion_group=tuple(completion_group), target_bounds=tuple(target_bounds), input_ids=input_ids,
            position_ids=torch.tensor(positions, dtype=torch.int64),
            pred_index=torch.tensor(pred_index, dtype=torch.int64), target=torch.tensor(target, dtype=torch.int64),
            target_segment=torch.tensor(segment, dtype=torch.int32), loss_mask=masks[0], nll_mask=masks[1],
            **_attention_layout(prompt_bounds, completion_bounds, completion_group),
        )
        return packed if device is None else packed.to(device)

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_completions(self) -> int:
        return len(self.completion_bounds)

    @property
    def num_targets(self) -> int:
        return self.target.numel()

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor) and name != "segments"}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedGroups:
        """The same layout with its tensors on `device`."""
        moved = {name: value.to(device, non_blocking=non_blocking) for name, value in self._tensors().items()}
        return replace(self, **moved)

    def pin_memory(self) -> PackedGroups:
        """The same layout with its tensors in pinned memory, so that `to(..., non_blocking=True)` overlaps."""
        return replace(self, **{name: value.pin_memory() for name, value in self._tensors().items()})


def _attention_layout(prompts: list[Span], completions: list[Span], groups: list[int]) -> dict[str, Tensor | int]:
    """The fields of PackedGroups that only attention reads."""
    group_end = dict(zip(groups, (end for _, end in completions), strict=True))
    tiles = [
        (row, min(row + TILE, group_end[g]), start, end)
        for g, (start, end) in enumerate(prompts)
        for row in range(start, group_end[g], TILE)
    ]
    segments = torch.tensor(
        [(g, *prompts[g], *span) for g, span in zip(groups, completions, strict=True)], dtype=torch.int32
    )
    _, prompt_start, prompt_end, start, end = segments.unbind(1)
    prompt_length, length = prompt_end - prompt_start, end - start
    first = start == prompt_end
    queries = torch.where(first, end - prompt_start, length)
    # A prompt is visible up to its group's end, a completion up to its own end.
    pieces = torch.stack([prompt_length.where(first, 0), length], dim=1).flatten()
    last_end = torch.tensor([group_end[g] for g in groups], dtype=torch.int32)
    readers_end = torch.stack([last_end, end], dim=1).flatten().repeat_interleave(pieces)
    keys = torch.stack([prompt_length, length], dim=1).flatten()
    key_start = torch.stack([prompt_start, start], dim=1).flatten()
    before = keys.cumsum(0, dtype=torch.int32) - keys
    total = int(keys.sum())
    key_index = (key_start - before).repeat_interleave(keys) + torch.arange(total, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    return {
        "segments": segments, "max_queries": int(queries.max()), "max_keys": int((prompt_length + length).max()),
        "tiles": _ordered(torch.tensor(tiles, dtype=torch.int32), readers_end, start.contiguous()),
        "readers_end": readers_end,
        "query_offsets": torch.cat([zero, queries.cumsum(0, dtype=torch.int32)]),
        "key_offsets": torch.cat([zero, (prompt_length + length).cumsum(0, dtype=torch.int32)]),
        "key_index": key_index,
    }


def _ordered(tiles: Tensor, readers_end: Tensor, completion_start: Tensor) -> Tensor:
    """The tiles' first four columns with the two that order them. completion_start: first rows, ascending."""
    start, end, group_start, prompt_end = tiles.T.contiguous()
    own = completion_start[(torch.searchsorted(completion_start, start, right=True) - 1).clamp(min=0)]
    keys = end - torch.where(start < prompt_end, group_start, own - (prompt_end - group_start))
    readers = torch.maximum(readers_end[start], readers_end[end - 1]) - start
    order = [work.argsort(descending=True, stable=True).int() for work in (keys, readers)]
    return torch.cat([tiles, torch.stack(order, dim=1)], dim=1)


def _check_group(g: int, group: Group) -> None:
    """Raises ValueError if the group is malformed."""
    if len(group.completions) == 0:
        raise ValueError(f"group {g} has no completions")
    for c, completion in enumerate(group.completions):
        if len(completion) == 0:
            raise ValueError(f"group {g}, completion {c} is empty")
    for name, masks in (("loss", group.loss_masks), ("NLL", group.nll_masks)):
        if masks is None:
            continue
        if len(masks) != len(group.completions):
            raise ValueError(f"group {g} has {len(group.completions)} completions but {len(masks)} {name} masks")
        for c, (completion, mask) in enumerate(zip(group.completions, masks, strict=True)):
            if len(mask) != len(completion):
                raise ValueError(f"group {g}, completion {c} has {len(completion)} tokens but {len(mask)} mask "
                                 "entries")
