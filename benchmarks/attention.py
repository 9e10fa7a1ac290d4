"""prefix_attention and its peers: completions that share a prompt, forward and backward, in one layer."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from strop.kernels import Group, PackedGroups, prefix_attention
from strop.kernels.attention.varlen import INSTALLED

from .shapes import Head
from .suite import DTYPES, Case, Unavailable

NAME = "attention"
REFERENCE = "SDPA, separate rows"
# Query heads, key heads, head size.
HEADS = {
    Head("SmolLM2-135M", 576, 0): (9, 3, 64),
    Head("Llama-3.2-1B", 2048, 0): (32, 8, 64),
    Head("Llama-3.1-8B", 4096, 0): (32, 8, 128),
}
SMOLLM2, LLAMA_1B, LLAMA_8B = HEADS
# Groups, prompt tokens, completions per group, completion tokens.
LAYOUTS = {
    "1 x 4096 + 8 x 512": (1, 4096, 8, 512),
    "12 x 512 + 2 x 64": (12, 512, 2, 64),
    "2 x 512 + 2 x 64": (2, 512, 2, 64),
}
SHARED, PAIRS, FEW_PAIRS = LAYOUTS


def cases(device: torch.device) -> list[Case]:
    if device.type != "cuda":
        return [Case(NAME, SMOLLM2, FEW_PAIRS, _tokens(FEW_PAIRS))]
    return [Case(NAME, head, name, _tokens(name)) for head in (LLAMA_1B, LLAMA_8B) for name in (SHARED, PAIRS)]


def _tokens(name: str) -> int:
    groups, prompt, count, length = LAYOUTS[name]
    return groups * (prompt + count * length)


def inputs(case: Case, device: torch.device) -> SimpleNamespace:
    number, prompt, count, length = LAYOUTS[case.variant]
    heads, key_heads, size = HEADS[case.head]
    groups = PackedGroups.pack([Group([1] * prompt, [[1] * length] * count)] * number)
    draw = torch.Generator(device).manual_seed(0)

    def normal(of: int) -> Tensor:
        shape = (1, case.tokens, of, size)
        return torch.randn(shape, device=device, generator=draw, dtype=DTYPES[case.dtype]).transpose(1, 2)

    qkv = [normal(of).requires_grad_() for of in (heads, key_heads, key_heads)]
    # Separate rows of a prompt and one completion, as trainers without sharing use: [rows, prompt + length].
    start = torch.tensor(groups.completion_bounds)[:, :1] - prompt
    offset = torch.arange(prompt + length)
    prompts = torch.tensor([groups.prompt_bounds[g] for g in groups.completion_group])[:, :1]
    rows = torch.where(offset < prompt, prompts + offset, start + offset)
    first = (torch.arange(len(rows)) % count == 0).unsqueeze(1) | (offset >= prompt)
    return SimpleNamespace(
        groups=groups.to(device), qkv=qkv, upstream=normal(heads), rows=rows.to(device), first=first.to(device)
    )


def floor(case: Case) -> tuple[float, float]:
    """2 GEMMs forward and 5 backward over visible (query, key) pairs; q, k, v, out and gradients moved once."""
    number, prompt, count, length = LAYOUTS[case.variant]
    heads, key_heads, size = HEADS[case.head]
    pairs = prompt * (prompt + 1) / 2 + count * (length * prompt + length * (length + 1) / 2)
    tensors = 5 * heads + 6 * key_heads
    return 14 * number * pairs * heads * size, tensors * case.tokens * size * DTYPES[case.dtype].itemsize


def flat(result: tuple[Tensor, ...], inputs: SimpleNamespace) -> tuple[Tensor, ...]:
    """out and the gradients of q, k and v, [1, heads, T, size]; separate rows mapped back to the packed layout."""
    out, *gradients = result
    if out.shape[0] != 1 or out.shape[2] != inputs.upstream.shape[2]:
        out = _back(torch.where(inputs.first[:, None, :, None], out, 0), inputs)
        gradients = [_back(x, inputs) for x in gradients]
    return torch.linalg.vector_norm(out, dtype=torch.float32), out, *gradients


def _back(x: Tensor, inputs: SimpleNamespace) -> Tensor:
    total = x.new_zeros(inputs.upstream.shape[2], x.shape[1], x.shape[3], dtype=torch.float32)
    total.index_add_(0, inputs.rows.flatten(), x.transpose(1, 2).flatten(0, 1).float())
    return total.transpose(0, 1).unsqueeze(0).to(x.dtype)


def _call(attend: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor], upstream: Tensor):
    def call() -> tuple[Tensor, ...]:
        out = attend(*qkv)
        return (out.detach(), *torch.autograd.grad(out, qkv, upstream))

    return call


def _ours(backend: str | None):
    def make(case: Case, x: SimpleNamespace):
        if backend == "sdpa" and not x.upstream.is_cuda:
            raise Unavailable("what Strop takes on the CPU")
        if backend in INSTALLED and not x.upstream.is_cuda:
            raise Unavailable("for GPUs")
        if not INSTALLED.get(backend, True):
            raise Unavailable(f"{backend.replace('_', '-')} is not installed")
        return _call(lambda q, k, v: prefix_attention(q, k, v, x.groups, backend=backend), x.qkv, x.upstream)

    return make


def _separate(case: Case, x: SimpleNamespace):
    rows = [tensor.detach()[0][:, x.rows].transpose(0, 1).contiguous().requires_grad_() for tensor in x.qkv]
    # Gradients of a prompt's copies are summed.
    upstream = torch.where(x.first[:, None, :, None], x.upstream[0][:, x.rows].transpose(0, 1), 0).contiguous()
    return _call(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), rows, upstream
    )


def _flex(with_mask: bool):
    def make(case: Case, x: SimpleNamespace):
        if not x.upstream.is_cuda:
            raise Unavailable("it has no backward on the CPU")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        readers_end, tokens = x.groups.readers_end, case.tokens
        compiled, compiled_mask = torch.compile(flex_attention), torch.compile(create_block_mask)

        def visible(b, h, row, column):
            return (column <= row) & (row < readers_end[column])

        mask = compiled_mask(visible, None, None, tokens, tokens, device=x.upstream.device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            blocks = compiled_mask(visible, None, None, tokens, tokens, device=q.device) if with_mask else mask
            return compiled(q, k, v, block_mask=blocks, enable_gqa=True)

        return _call(attend, x.qkv, x.upstream)

    return make


CONTENDERS = {
    "Strop": _ours(None),
    "flash-attn, gathered keys": _ours("flash_attn"),
    "flash-attn-4, gathered keys": _ours("flash_attn_4"),
    "varlen, gathered keys": _ours("varlen"),
    "SDPA, segments": _ours("sdpa"),
    "SDPA, separate rows": _separate,
    "FlexAttention": _flex(False),
    "FlexAttention, its mask too": _flex(True),
}
