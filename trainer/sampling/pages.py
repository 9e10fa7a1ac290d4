"""The KV cache of the sampler on a GPU: pages of a pool that grows with what the rows need.

A prompt's pages are read once per step for all its completions, and prompts that begin alike share pages. As with
kv_cache.py, the model reaches a step through the keyword `kv_step` of its attention function.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from strop.kernels import Group, PackedGroups, prefix_attention
from strop.kernels.attention.paged import PAGE, Tables, decode_attention, takes
from strop.trainer.sampling.kv_cache import carry, onto

GROWTH = 1.5


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE)


def supports(model: nn.Module) -> bool:
    """Whether the model's keys and values fit decode_attention, on the GPU that it is on."""
    config, device = model.config.get_text_config(), model.device
    if device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8):
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = [getattr(config, name, None) or size for name in ("global_head_dim", "v_head_dim", "qk_head_dim")]
    return all(takes(size, other) for other in sizes)


class Pool:
    """Per layer two buffers [pages, kv heads, PAGE, head dim], and the number of holders of each page.

    `version` counts reallocations, after which a captured graph must not be replayed.
    """

    def __init__(self):
        self.size, self.version = 0, 0
        self.k: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Frees all pages; keeps the memory."""
        self.free, self.holders = list(range(self.size)), [0] * self.size

    def take(self, count: int) -> list[int]:
        """Pages for one holder."""
        if count > len(self.free):
            self.grow(self.size - len(self.free) + count)
        pages = [heapq.heappop(self.free) for _ in range(count)]
        for page in pages:
            self.holders[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """The pages, for one more holder."""
        for page in pages:
            self.holders[page] += 1
        return pages

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self.holders[page] -= 1
            if not self.holders[page]:
                heapq.heappush(self.free, page)

    def grow(self, size: int) -> None:
        """Makes room for `size` pages, and for more where memory allows."""
        before, wanted = self.size, max(size, int(self.size * GROWTH))
        try:
            self._reallocate(wanted)
        except torch.OutOfMemoryError:
            self._reallocate(wanted := size)
        self.size = wanted
        self.holders += [0] * (wanted - before)
        for page in range(before, wanted):
            heapq.heappush(self.free, page)

    def _reallocate(self, size: int) -> None:
        self.version += 1
        for buffers in (self.k, self.v):
            for layer, held in buffers.items():
                buffers[layer] = held.new_empty(size, *held.shape[1:])
                buffers[layer][: self.size].copy_(held[: self.size])

    def layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, with the heads, dtype and device of k and v [Hkv, T, D]."""
        if layer not in self.k:
            for x, buffers in ((k, self.k), (v, self.v)):
                buffers[layer] = x.new_empty(self.size, x.shape[0], PAGE, x.shape[2])
        return self.k[layer], self.v[layer]

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for buffers in (self.k, self.v) for x in buffers.values())


class PagedPrompt(NamedTuple):
    """A prompt and its pages, of which the first hold the KV of `cached` tokens already, a multiple of PAGE."""

    prompt: list[int]
    pages: list[int]
    cached: int


class PagedPrefill:
    """The uncached tokens of `prompts`, packed end to end in one row of T tokens."""

    def __init__(self, pool: Pool, prompts: list[PagedPrompt], device: torch.device):
        self.pool = pool
        # Attention runs on whole prompts: queries of cached tokens are zeros, and their outputs are dropped.
        groups = PackedGroups.pack([Group([], [p.prompt]) for p in prompts])
        position = groups.position_ids.numpy()
        starts = np.repeat(np.cumsum([0, *(len(p.prompt) for p in prompts)])[:-1], [len(p.prompt) for p in prompts])
        new = np.repeat([p.cached for p in prompts], [len(p.prompt) for p in prompts]) <= position
        page = np.concatenate([np.repeat(p.pages, PAGE)[: len(p.prompt)] for p in prompts])
        where, rows = [page, position % PAGE], np.nonzero(new)[0]
        is_last = np.append(starts[1:] != starts[:-1], True)[rows]
        self.groups = (groups.pin_memory() if device.type == "cuda" else groups).to(device, non_blocking=True)
        self.tokens, self.positions = self.groups.input_ids[None], self.groups.position_ids[None]
        self.all = self.rows = None
        if len(rows) < len(position):
            self.all = tuple(carry(torch.from_numpy(x), device) for x in where)
            self.rows = carry(torch.from_numpy(rows), device)
            self.tokens, self.positions = self.tokens[:, self.rows], self.positions[:, self.rows]
        self.page, self.offset = (carry(torch.from_numpy(x[rows]), device) for x in where)
        self.last, = onto(device, np.nonzero(is_last)[0].tolist())

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
               window: int | None) -> Tensor:
        """Stores k and v [Hkv, T, D] and attends with q [Hq, T, D] -> [T, Hq, D]."""
        for pages, new in zip(self.pool.layer(layer, k, v), (k, v), strict=True):
            pages[self.page, :, self.offset] = new.transpose(0, 1)
        if self.rows is not None:
            k, v = (pages[self.all[0], :, self.all[1]].transpose(0, 1) for pages in self.pool.layer(layer, k, v))
            some, q = q, q.new_zeros(k.shape[1], q.shape[0], q.shape[2]).transpose(0, 1)
            q[:, self.rows] = some
        out = prefix_attention(q[None], k[None], v[None], self.groups, scale=scaling, sliding_window=window,
                               softcap=softcap)[0].transpose(0, 1)
        return out if self.rows is None else out[self.rows]


class PagedDecode:
    """One token for each row of `tables`. No prompt has more than longest_prompt tokens, no completion more than
    longest_completion before this one."""

    def __init__(self, pool: Pool, tables: Tables, longest_prompt: int, longest_completion: int):
        self.pool, self.tables = pool, tables
        self.longest = {"longest_prompt": longest_prompt, "longest_completion": longest_completion}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
               window: int | None) -> Tensor:
        """Stores k and v [Hkv, R, D] and attends with q [Hq, R, D] -> [R, Hq, D]."""
        pages, (q, k, v) = self.pool.layer(layer, k, v), (x.transpose(0, 1) for x in (q, k, v))
        return decode_attention(q, k, v, *pages, self.tables, **self.longest, scale=scaling, softcap=softcap,
                                window=window)
