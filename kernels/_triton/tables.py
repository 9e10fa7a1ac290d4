"""Many tensors for one launch: a table of their addresses and sizes on the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGN = 16  # bytes of an address, and elements: what the widest loads need


class Table:
    """entries [tensors, fields] int64: addresses, then the first program of each tensor, then its numbers. owner
    [programs] int32: the tensor that a program is for."""

    def __init__(self, programs: Sequence[int], numbers: Sequence[Sequence[int]], device: torch.device):
        """programs: how many each tensor takes. numbers: of each tensor, the same count for all."""
        self.device, self.programs = device, sum(programs)
        firsts = accumulate(programs, initial=0)
        self.numbers = torch.tensor([[first, *mine] for first, mine in zip(firsts, numbers, strict=False)])
        owner = torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32), torch.tensor(programs))
        self.owner = self._sent(owner)
        self.addresses: list[int] = []
        self.entries: Tensor | None = None
        self.aligned = False  # whether every address is a multiple of ALIGN

    def point_to(self, *tensors: Sequence[Tensor | None]) -> None:
        """Sets the addresses, a sequence for each field of them, 0 for None. Copies nothing if none moved, and else
        without a wait of the host."""
        addresses = [0 if x is None else x.data_ptr() for field in tensors for x in field]
        if addresses == self.addresses:
            return
        self.addresses, self.aligned = addresses, not any(address % ALIGN for address in addresses)
        there = torch.tensor(addresses).view(len(tensors), -1)
        self.entries = self._sent(torch.cat([there.T, self.numbers], 1).contiguous())

    def _sent(self, x: Tensor) -> Tensor:
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x


@triton.jit
def pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer to elements of TYPE. ALIGNED: the address is a multiple of 16."""
    found = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found
