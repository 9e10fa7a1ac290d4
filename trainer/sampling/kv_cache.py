"""The KV cache of prompts and their completions, and attention over both.

A prompt's KV are stored once and read once per step for all its completions. The model runs on one row of tokens and
reaches this cache through the keyword `kv_step`, which transformers passes down to the attention function.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from strop.kernels.attention import cached as attention_cached
from strop.kernels.decoder import Decoder
from strop.trainer.errors import UserError

ATTENTION = "strop_generate"
FIRST_CHUNK = 32  # positions
LOOK_AHEAD = 64  # prompts that a prefill skips because they are cheaper after it
IGNORED = {"dropout", "is_causal", "position_ids", "output_attentions", "output_hidden_states", "use_cache"}


def onto(device: torch.device, *columns: list[int]) -> tuple[Tensor, ...]:
    """The int64 columns on `device`, moved in one copy that the host does not wait for."""
    flat = torch.tensor([number for column in columns for number in column], dtype=torch.int64)
    return carry(flat, device).split([len(column) for column in columns])


def carry(x: Tensor, device: torch.device) -> Tensor:
    """The host's `x` on `device`. A copy from pageable memory would make the host wait for the device."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def is_precise(x: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.float64)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [X, Y, M, D] @ b [X, Y, D, N], summed and returned in at least fp32: attention scores rounded to bf16 would be
    off by up to 2^-8 of their size, in the exponent of a softmax."""
    if is_precise(a):
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])


class PromptKV:
    """Buffers per layer, allocated on first use. prompt_k, prompt_v: [groups, kv heads, prompt length, head dim].

    completion_k, completion_v: flat memory of chunks [rows, kv heads, chunk size, head dim]. A matrix product over
    whole chunks needs no copy, unlike one over a slice of a longer buffer, and a step reads only the chunks that its
    longest completion reaches. Only chunks that a completion has reached take memory.
    """

    def __init__(self, groups: int, prompt_length: int, rows: int, completion_length: int, device: torch.device):
        self.prompt_shape, self.rows = (groups, prompt_length), rows
        self.chunks: list[tuple[int, int]] = []  # (start, size), sizes doubling
        start, size = 0, FIRST_CHUNK
        while start < completion_length:
            self.chunks.append((start, min(size, completion_length - start)))
            start, size = start + size, max(start + size, FIRST_CHUNK)
        self.chunk_table = torch.tensor(self.chunks).view(-1, 2)
        self.chunk_start, self.chunk_size = onto(
            device, *([pair[i] for pair in self.chunks for _ in range(pair[1])] for i in (0, 1)))
        self.prompt_k: dict[int, Tensor] = {}
        self.prompt_v: dict[int, Tensor] = {}
        self.completion_k: dict[int, Tensor] = {}
        self.completion_v: dict[int, Tensor] = {}

    def allocate(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Allocates the buffers of a layer, with the heads, dtype and device of k and v [Hkv, T, D]."""
        for x, prompt, completion in ((k, self.prompt_k, self.completion_k), (v, self.prompt_v, self.completion_v)):
            groups, length = self.prompt_shape
            prompt[layer] = x.new_zeros(groups, x.shape[0], length, x.shape[2])
            completion[layer] = x.new_zeros(self.rows * x.shape[0] * self.chunks[0][1], x.shape[2])

    def grow(self, layer: int, longest: int) -> None:
        """Makes room for the chunks of completions of `longest` tokens."""
        length = sum(self.reached(longest)[-1])
        for buffers in (self.completion_k, self.completion_v):
            held, rows = buffers[layer], self.rows * self.prompt_k[layer].shape[1]
            if held.shape[0] < rows * length:
                buffers[layer] = held.new_zeros(rows * length, held.shape[1])
                buffers[layer][: held.shape[0]].copy_(held)

    def allocated(self, layer: int) -> list[tuple[int, int]]:
        """The chunks that the layer has memory for."""
        length = self.completion_k[layer].shape[0] // (self.rows * self.prompt_k[layer].shape[1])
        return [(start, size) for start, size in self.chunks if start + size <= length]

    def reached(self, longest: int) -> list[tuple[int, int]]:
        return [chunk for chunk in self.chunks if chunk[0] < longest]

    def chunk(self, buffer: Tensor, heads: int, start: int, size: int) -> Tensor:
        """View [rows, heads, size, D] of a completion buffer."""
        first = self.rows * heads * start
        return buffer[first : first + self.rows * heads * size].view(self.rows, heads, size, -1)

    def move(self, source: list[int], target: list[int], longest: int) -> None:
        """Copies the first `longest` tokens of the completions in rows `source` to rows `target`."""
        sources, targets = onto(self.chunk_start.device, source, target)
        for layer, prompt in self.prompt_k.items():
            for buffer in (self.completion_k[layer], self.completion_v[layer]):
                for start, size in self.allocated(layer):
                    if start < longest:
                        chunk = self.chunk(buffer, prompt.shape[1], start, size)
                        chunk.index_copy_(0, targets, chunk.index_select(0, sources))


class Held:
    """The prompts in the groups of the cache, including finished ones."""

    def __init__(self, groups: int, longest: int):
        self.tokens = np.full((groups, longest), -1)

    def common(self, prompt: list[int]) -> np.ndarray:
        """[groups]: length of the prefix that `prompt` shares with each group's, at most len(prompt) - 1."""
        differs = self.tokens[:, : len(prompt)] != prompt
        differs[:, -1] = True
        return differs.argmax(1)

    def put(self, group: int, prompt: list[int]) -> None:
        self.tokens[group] = -1
        self.tokens[group, : len(prompt)] = prompt


def fill_places(batch) -> list[int]:
    """Gives the free places among batch.rows to waiting completions, after a prefill where none is ready. Returns the
    places that were filled, whose rows have no token yet."""
    filled = []
    for r, row in enumerate(batch.rows):
        if row is None:
            if not batch.ready and batch.waiting and batch.free_groups:
                batch.prefill()
            if not batch.ready:
                break
            batch.rows[r] = batch.ready.popleft()
            filled.append(r)
    return filled


class CachedPrefix(NamedTuple):
    """A prompt for `group` of the cache: the KV of its first `cached` tokens are copied from group `source`."""

    prompt: list[int]
    group: int
    cached: int
    source: int


class Step:
    """Tokens that run together, T of them.

    group, seen, length [T] int64: the group of a token's prompt, how many prompt tokens it sees, and its position in
    its completion (-1 in a prompt). copies: target and source groups [n] each of the KV of the first `most_cached`
    tokens to copy before. longest_completion: the cache must have room for so many tokens.
    """

    cache: PromptKV
    group: Tensor
    seen: Tensor
    length: Tensor
    copies: list[Tensor]
    most_cached: int = 0
    longest_completion: int = 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
               window: int | None) -> Tensor:
        """Stores k and v [Hkv, T, D] and attends with q [Hq, T, D] -> [T, Hq, D]."""
        self.make_room(layer, k, v)
        if not attention_cached.takes(q, k, v):
            return self.composed(layer, q, k, v, scaling, softcap, window)
        cache = self.cache
        return attention_cached.attention_over_cache(
            q, k, v, cache.prompt_k[layer], cache.prompt_v[layer], cache.completion_k[layer],
            cache.completion_v[layer], cache.chunk_table[: len(cache.allocated(layer))], self.group, self.seen,
            self.length, scale=scaling, softcap=softcap, window=window)

    def make_room(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Allocates the layer's buffers for heads as those of k and v, and copies the prefixes that are cached."""
        cache = self.cache
        if layer not in cache.prompt_k:
            cache.allocate(layer, k, v)
        cache.grow(layer, self.longest_completion)
        if self.most_cached:
            for buffer in (cache.prompt_k[layer], cache.prompt_v[layer]):
                buffer[self.copies[0], :, : self.most_cached] = buffer[self.copies[1], :, : self.most_cached]

    def decode(self, decoder: Decoder, cos: Tensor, sin: Tensor, keep: Tensor) -> Tensor:
        """Logits [n, V] of the tokens keep [n], of a whole model at once; cos and sin [T, D]."""
        cache, heads = self.cache, cos.new_empty(decoder.key_heads, 0, decoder.size)
        for layer in range(decoder.layers):
            self.make_room(layer, heads, heads)
        caches = (cache.prompt_k, cache.prompt_v, cache.completion_k, cache.completion_v)
        return decoder(self.tokens[0], cos, sin, *([of[layer] for layer in range(decoder.layers)] for of in caches),
                       cache.chunk_table[: len(cache.allocated(0))], self.group, self.seen, self.length, keep)

    def composed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
                 window: int | None) -> Tensor:
        """`attend` in PyTorch operators, where there is no fused kernel."""
        raise NotImplementedError


class Prefill(Step):
    """The uncached tokens of `prompts`, packed end to end in one row of T tokens."""

    def __init__(self, cache: PromptKV, prompts: list[CachedPrefix], device: torch.device):
        cached, groups = (torch.tensor(x) for x in ([p.cached for p in prompts], [p.group for p in prompts]))
        lengths = torch.tensor([len(p.prompt) for p in prompts]) - cached
        column = torch.arange(int(lengths.max()))
        real, position = column < lengths[:, None], cached[:, None] + column  # [prompts, longest rest], with padding
        self.cache, self.longest, self.most_cached = cache, max(len(p.prompt) for p in prompts), int(cached.max())
        copies = [(p.group, p.source) for p in prompts if p.cached]
        *self.copies, tokens = onto(device, *([pair[i] for pair in copies] for i in (0, 1)),
                                    [t for p in prompts for t in p.prompt[p.cached :]])
        self.tokens = tokens[None]
        self.positions, self.seen = carry(position[real], device)[None], carry(position[real] + 1, device)
        self.group, self.length = carry(groups.repeat_interleave(lengths), device), torch.full_like(self.seen, -1)
        self.groups, self.padded_positions = carry(groups, device), carry(position, device)
        self.last = carry(lengths.cumsum(0) - 1, device)
        # packed row -> [prompts, longest rest]: padding reads token 0, and its output is dropped
        self.unpack = torch.zeros(real.shape, dtype=torch.int64).masked_scatter_(real, torch.arange(int(real.sum())))
        self.unpack = carry(self.unpack, device)
        self.pack = carry(real.flatten().nonzero()[:, 0], device)

    def composed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
                 window: int | None) -> Tensor:
        buffers = self.cache.prompt_k[layer], self.cache.prompt_v[layer]
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[self.group, :, self.seen - 1] = new.transpose(0, 1)
        q = q.transpose(0, 1)[self.unpack].transpose(1, 2)  # [prompts, heads, longest rest, D]
        k, v = (buffer[self.groups, :, : self.longest] for buffer in buffers)
        mask = None
        if softcap is not None or self.most_cached or (window is not None and window < self.longest):
            ahead = self.padded_positions[:, None, :, None] - torch.arange(self.longest, device=q.device)
            mask = (ahead >= 0) & (ahead < (window or self.longest))
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling,
                                                 enable_gqa=q.shape[1] != k.shape[1])
        else:
            rep = q.shape[1] // k.shape[1]
            q, k = q.unflatten(1, (-1, rep)), k.transpose(-1, -2)  # [prompts, Hkv, rep, longest rest, D]
            if is_precise(q):
                scores = q @ (k[:, :, None] * scaling)
            else:
                scores = product(q.flatten(2, 3), k).unflatten(2, (rep, -1)) * scaling
            scores = (torch.tanh(scores / softcap) * softcap).float().masked_fill(~mask[:, :, None], -math.inf)
            out = (scores.softmax(-1).to(v.dtype) @ v[:, :, None]).flatten(1, 2)
        return out.transpose(1, 2).flatten(0, 1)[self.pack]


class Decode(Step):
    """One token for each of n rows: token number length[r], from 0, of a completion of the prompt in group[r].

    members [G, M] int64: the rows of every group, padded with any row; place [n] int64: the index of row r in the
    flattened members. prompt_length [G] int64.
    """

    def __init__(self, cache: PromptKV, tokens: Tensor, group: Tensor, length: Tensor, prompt_length: Tensor,
                 members: Tensor, place: Tensor, longest_prompt: int, longest_completion: int):
        self.cache, self.members, self.place, self.longest_completion = cache, members, place, longest_completion
        capacity = cache.prompt_shape[1]
        self.prompt_width = longest_prompt if 2 * longest_prompt < capacity else capacity  # a slice costs a copy
        self.chunks = cache.reached(longest_completion)
        self.width = self.prompt_width + sum(self.chunks[-1])
        self.group, self.seen, self.length = group, prompt_length[group], length
        self.tokens, self.positions = tokens[None], (self.seen + length)[None]
        self.masks: dict[tuple, Tensor] = {}
        self.writes: dict[int, Tensor] = {}

    def write(self, heads: int) -> Tensor:
        """Indices [n * heads] of the new KV in a layer's completion buffer."""
        if heads not in self.writes:
            row_head = torch.arange(self.length.numel() * heads, device=self.length.device).view(-1, heads)
            start, size = self.cache.chunk_start[self.length], self.cache.chunk_size[self.length]
            first = self.cache.rows * heads * start + self.length - start
            self.writes[heads] = (first[:, None] + row_head * size[:, None]).flatten()
        return self.writes[heads]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask [n, 1, 1, width]: 0 where the row's token attends, else -inf."""
        if (window, dtype) not in self.masks:
            column = torch.arange(self.width, device=self.length.device)
            completion = column - self.prompt_width
            position = torch.where(completion < 0, column, completion + self.seen[:, None])
            seen = torch.where(completion < 0, column < self.seen[:, None], completion <= self.length[:, None])
            if window is not None:
                seen &= position > self.positions[0, :, None] - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
            self.masks[window, dtype] = mask[:, None, None]
        return self.masks[window, dtype]

    def composed(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None,
                 window: int | None) -> Tensor:
        cache, n, heads, groups = self.cache, q.shape[1], k.shape[0], self.members.shape[0]
        for buffer, new in ((cache.completion_k[layer], k), (cache.completion_v[layer], v)):
            buffer.index_copy_(0, self.write(heads), new.transpose(0, 1).reshape(n * heads, -1))
        prompt_k, prompt_v = (buffer[layer][:groups, :, : self.prompt_width]
                              for buffer in (cache.prompt_k, cache.prompt_v))
        own_k, own_v = ([cache.chunk(buffer[layer], heads, *chunk)[:n] for chunk in self.chunks]
                        for buffer in (cache.completion_k, cache.completion_v))
        q = (q * scaling if is_precise(q) else q).transpose(0, 1).unflatten(1, (heads, -1))  # [n, Hkv, rep, D]
        q_column = q.transpose(-1, -2)
        scores = torch.cat((self.by_row(product(self.by_group(q), prompt_k.transpose(-1, -2))),
                            *(product(chunk, q_column).transpose(-1, -2) for chunk in own_k)), -1)
        if not is_precise(q):
            scores *= scaling
        if softcap is not None:
            scores = torch.tanh(scores.float() / softcap) * softcap
        p = (scores + self.mask(window, scores.dtype)).softmax(-1, dtype=torch.float32).to(v.dtype)
        p_prompt, *p_own = p.split([self.prompt_width, *(size for _, size in self.chunks)], -1)
        out = self.by_row(self.by_group(p_prompt) @ prompt_v)
        for p_chunk, chunk in zip(p_own, own_v, strict=True):
            out += p_chunk @ chunk
        return out.flatten(1, 2)

    def by_group(self, x: Tensor) -> Tensor:
        """[n, Hkv, rep, X] -> [G, Hkv, M * rep, X]"""
        return x[self.members].transpose(1, 2).flatten(2, 3)

    def by_row(self, x: Tensor) -> Tensor:
        """[G, Hkv, M * rep, X] -> [n, Hkv, rep, X]"""
        return x.unflatten(2, (self.members.shape[1], -1)).transpose(1, 2).flatten(0, 1)[self.place]


def cached_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
                     scaling: float, softcap: float | None = None, sliding_window: int | None = None,
                     kv_step: Prefill | Decode | None = None, **other):
    """transformers' attention function: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> ([1, T, Hq, D], None).
    Raises UserError on a missing step, on a mask, and on unknown keywords (e.g. attention sinks)."""
    unknown = sorted(k for k, v in other.items() if k not in IGNORED and v is not None)
    if kv_step is None or attention_mask is not None or unknown:
        why = f"uses {', '.join(unknown)}" if unknown else "does not pass keywords down to its attention"
        raise UserError(f"{type(module).__name__} {why}: the in-process sampler does not support this model")
    out = kv_step.attend(module.layer_idx, query[0], key[0], value[0], scaling, softcap, sliding_window)
    return out[None], None


def attend_with_cache(model: nn.Module) -> None:
    """Sets `cached_attention` as the attention implementation of a transformers model."""
    from transformers import AttentionInterface  # takes seconds to import

    AttentionInterface.register(ATTENTION, cached_attention)
    model.set_attn_implementation(ATTENTION)
