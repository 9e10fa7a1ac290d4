"""A step of a decoder of Llama's kind on a CPU in one call (csrc/cpu_decoder.cpp), for processors that multiply pairs
of bf16. Its weights lie in one piece of memory, in the order in which the products read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _cpu

_PANEL = 32  # outputs of a panel of weights, and elements of a tile of rows; csrc/cpu_matmul.h
_NO_WINDOW = 1 << 40
_SLOTS = 9  # places of a layer's weights
HEAD_SIZES = range(32, 257, 16)


def available() -> bool:
    """Whether the library was built and this processor has what it needs."""
    return _cpu.multiplies_bf16()


@dataclass
class Layer:
    """Weights of a layer, bf16: norm, mlp_norm [W]; q [Hq * D, W]; k, v [Hkv * D, W]; bias [(Hq + 2 Hkv) * D] of all
    three or None; q_norm, k_norm [D] or None; out [W, Hq * D]; gate, up [F, W]; down [W, F]. window: the number of most
    recent tokens that a token sees, None for all."""

    norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    window: int | None = None


def pack(weight: Tensor) -> Tensor:
    """weight [N, K] bf16 in panels: [N / 32, K / 32, 2, 16, 16, 2], rounded up and padded with zeros."""
    outputs, width = weight.shape
    panels, steps = -(-outputs // _PANEL), -(-width // _PANEL)
    if (outputs, width) != (panels * _PANEL, steps * _PANEL):
        padded = weight.new_zeros(panels * _PANEL, steps * _PANEL)
        padded[:outputs, :width] = weight
        weight = padded
    pairs = weight.contiguous().view(torch.int32).view(panels, 2, 16, steps, 16)
    return pairs.permute(0, 3, 1, 4, 2).contiguous().view(torch.bfloat16).flatten()


def _by_head(weight: Tensor, size: int) -> Tensor:
    """[H * D, K] with each head's outputs padded to whole panels."""
    heads = weight.unflatten(0, (-1, size))
    return torch.nn.functional.pad(heads, (0, 0, 0, -size % _PANEL)).flatten(0, 1)


def _alternating(gate: Tensor, up: Tensor) -> Tensor:
    """Panels of 16 outputs of each."""
    missing = -gate.shape[0] % (_PANEL // 2)
    halves = (torch.nn.functional.pad(x, (0, 0, 0, missing)).unflatten(0, (-1, _PANEL // 2)) for x in (gate, up))
    return torch.cat(tuple(halves), 1).flatten(0, 1)


class Decoder:
    """Packed copies of a decoder's weights, which it is called with. `layers` is read one at a time, so that the caller
    can free each. embedding, head [V, W], final_norm [W], all bf16. heads, key_heads: Hq and Hkv, of `size` D; eps: of
    all norms; scale: of attention's scores; hidden: F. Raises ValueError on a head size that is not supported."""

    def __init__(self, embedding: Tensor, layers: Iterable[Layer], count: int, final_norm: Tensor, head: Tensor, *,
                 heads: int, key_heads: int, size: int, hidden: int, eps: float, scale: float):
        if size not in HEAD_SIZES:
            raise ValueError(f"heads of size {size}: supported are 32 to 256 in steps of 16")
        self.embedding, self.heads, self.key_heads, self.size, self.hidden = embedding, heads, key_heads, size, hidden
        self.eps, self.scale, self.layers = eps, scale, count
        vocab, width = embedding.shape
        up = {n: -(-n // _PANEL) * _PANEL for n in (vocab, width, size, hidden, heads * size)}
        gates = -(-hidden // (_PANEL // 2)) * _PANEL
        of_layer = (up[size] * up[width] * (heads + 2 * key_heads) + up[width] * up[heads * size] + gates * up[width]
                    + up[width] * up[hidden] + 2 * width + (heads + 2 * key_heads + 2) * size)
        room = count * (of_layer + _SLOTS * _PANEL) + (up[vocab] + 1) * up[width] + 2 * _PANEL
        self.weights = embedding.new_empty(room)
        torch.ops.strop.cpu_use_huge_pages(self.weights)
        self.used = 0
        places, windows = [], []
        for x in layers:
            qkv = torch.cat([_by_head(part, size) for part in (x.q, x.k, x.v)])
            places.append([self._keep(part) for part in (
                x.norm, pack(qkv), x.bias, x.q_norm, x.k_norm, pack(x.out), x.mlp_norm,
                pack(_alternating(x.gate, x.up)), pack(x.down))])
            windows.append(_NO_WINDOW if x.window is None else x.window)
        places.append([self._keep(final_norm), self._keep(pack(head)), *[-1] * (_SLOTS - 2)])
        self.places, self.windows = torch.tensor(places), torch.tensor(windows)
        self.scratch = self.logits = embedding.new_empty(0)
        if _cpu.HAS_MATRIX_UNIT:
            torch.cpu._init_amx()  # asks the system for the registers

    def _keep(self, x: Tensor | None) -> int:
        """Copies x behind what is there; returns its place, -1 for None."""
        if x is None:
            return -1
        place, self.used = self.used, self.used + -(-x.numel() // _PANEL) * _PANEL  # whole lines of the cache
        self.weights[place : place + x.numel()] = x.flatten()
        return place

    def __call__(self, ids: Tensor, cos: Tensor, sin: Tensor, prompt_k: Sequence[Tensor], prompt_v: Sequence[Tensor],
                 completion_k: Sequence[Tensor], completion_v: Sequence[Tensor], chunks: Tensor, group: Tensor,
                 seen: Tensor, length: Tensor, keep: Tensor) -> Tensor:
        """Logits [n, V] bf16 after the tokens keep [n] of T new ones, whose keys and values are cached.

        ids [T] int64; cos, sin [T, D] bf16; the caches of each layer, chunks, group, seen and length [T] as in
        attention.cached. The next call overwrites the logits. Raises RuntimeError on mismatched tensors and on
        positions outside the cache.
        """
        tokens, width = ids.numel(), self.embedding.shape[1]
        columns = (width, self.heads * self.size, self.hidden)
        needed = -(-tokens // 16) * 16 * (columns[0] + columns[1] + sum(-(-n // _PANEL) * _PANEL for n in columns))
        if self.scratch.numel() < needed:
            self.scratch = self.embedding.new_empty(needed)
        vocab = self.embedding.shape[0]
        if self.logits.numel() < keep.numel() * vocab:  # fresh memory would cost a page fault every 4 KiB
            self.logits = self.embedding.new_empty(keep.numel() * vocab)
        logits = self.logits[: keep.numel() * vocab].view(-1, vocab)
        torch.ops.strop.cpu_decoder_step(
            self.weights, self.places, self.embedding,
            [self.heads, self.key_heads, self.size, self.hidden, int(_cpu.HAS_MATRIX_UNIT)], self.windows, self.eps,
            self.scale, ids, cos, sin, prompt_k, prompt_v, completion_k, completion_v, chunks, group, seen, length,
            keep, self.scratch, logits)
        return logits
