"""Decode attention over pages of keys and values: a prompt is read once for all completions of its group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._triton import HAS_TRITON
from . import reference

# Tokens of a page, and keys of a part whose softmax one program computes. Both are part of the result to rounding.
PAGE = 32
SPLIT = 256
# Query rows of a tile, at most: a group with more of them has its prompt read once per tile.
_TILE_QUERIES = 64


class Tables(NamedTuple):
    """What is where, int32 tensors on the device: for G prompts and R rows, each a completion of one of them.

    prompt_pages [G, any], own_pages [R, any]: the pages that hold a prompt's and a completion's tokens in order.
    prompt_length, group: [G] and [R].
    length [R]: the number of a row's completion tokens before the new one; -1: the row is not decoded.
    tiles [any, members]: rows of one group each, padded with -1 at the end; every decoded row is in one tile.
    """

    prompt_pages: Tensor
    own_pages: Tensor
    prompt_length: Tensor
    group: Tensor
    length: Tensor
    tiles: Tensor


def takes(head_size: int, value_size: int) -> bool:
    """Whether decode_attention supports keys and values of these sizes on a GPU."""
    return HAS_TRITON and head_size == value_size <= 256


def tile_members(group_size: int, heads_per_key: int) -> int:
    """Rows of a tile, for groups of `group_size` rows."""
    members = 1
    while members < group_size and 2 * members * heads_per_key <= _TILE_QUERIES:
        members *= 2
    return members


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, tables: Tables, *, longest_prompt: int,
    longest_completion: int, scale: float, softcap: float | None = None, window: int | None = None,
) -> Tensor:
    """Store k and v [R, Hkv, D] of a new token of every row and attend with q [R, Hq, D]; returns [R, Hq, D].

    A row sees its prompt, the completion tokens before the new one, and the new one. k_pages, v_pages [pages, Hkv,
    PAGE, D], contiguous, one float dtype with q, k and v. longest_prompt and longest_completion bound prompt_length and
    length; a launch has room for so many keys, and the result does not depend on them. Scores are fp32. window: the
    number of most recent tokens a token sees, itself included. A row that is not decoded stores nothing and gets zeros.
    Deterministic, and a row's result does not depend on the other rows.
    """
    splits = max(1, -(-longest_prompt // SPLIT)), max(1, -(-longest_completion // SPLIT))
    return _op(q, k, v, k_pages, v_pages, *tables, *splits, SPLIT, scale, softcap or 0.0, window or 0)


def _on_cpu(q, k, v, k_pages, v_pages, prompt_pages, own_pages, prompt_length, group, length, tiles, prompt_splits,
            own_splits, split, scale, cap, window):
    tables = Tables(prompt_pages, own_pages, prompt_length, group, length, tiles)
    return reference.decode_attention(q, k, v, k_pages, v_pages, tables, scale=scale, softcap=cap or None,
                                      window=window or None)


def _on_gpu(*arguments):
    from .._triton import decode_attention as kernels

    return kernels.decode_attention(*arguments)


_library = torch.library.Library("strop", "FRAGMENT")
_library.define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor prompt_pages, "
    "Tensor own_pages, Tensor prompt_length, Tensor group, Tensor length, Tensor tiles, int prompt_splits, "
    "int own_splits, int split, float scale, float cap, int window) -> Tensor"
)
_library.impl("decode_attention", _on_cpu, "CPU")
_library.impl("decode_attention", _on_gpu, "CUDA")
torch.library.register_fake("strop::decode_attention", lambda q, *_: q.new_empty(q.shape), lib=_library)
_op = torch.ops.strop.decode_attention.default
