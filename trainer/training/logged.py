"""Rows of metrics on their way from the device, while the host launches the next step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from strop.trainer.training.batch import Packing
from strop.trainer.training.engine import Training
from strop.trainer.training.waits import Waits


class Readback:
    """A tensor on the host, as it is when the device comes here. x must not change afterwards."""

    def __init__(self, x: Tensor):
        self.event, self.host = None, None
        if x.device.type == "cuda":
            self.host = torch.empty(x.shape, dtype=x.dtype).pin_memory()
            self.host.copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = x.cpu()

    @property
    def is_late(self) -> bool:
        return self.event is not None

    def wait(self) -> Tensor:
        """Waits for what was launched before, and for nothing later."""
        if self.event:
            self.event.synchronize()
        return self.host


@dataclass
class Interval:
    """The steps since the last row: what the host knows of them, and the numbers that the device has.

    last: the last one, from 1. waits [2, ranks]: seconds per step that a rank waited for its data and for others; None
    where they are on their way too. peak_memory: bytes, of a GPU.
    """

    last: int
    steps: int
    names: int
    packing: Packing
    readback: Readback
    waits: Tensor | None
    peak_memory: int | None

    @classmethod
    def end(cls, engine: Training, sums: Tensor, seen: list[Tensor], packing: Packing, data: Waits) -> Interval:
        """Sums [names] over the ranks, with loss and gradient norm of each step in `seen`, and starts their way to the
        host. data: the times that this rank waited for its data. Every rank calls it."""
        world, steps = engine.world, len(seen)
        packed = torch.cat([sums, *seen])
        engine.mesh.sum_([packed])  # the only reduction of the interval, but for the times
        waits = torch.zeros(2, world.size)
        waits[:, world.rank] = torch.tensor([data.take() / steps, engine.waits.take() / steps])
        is_cuda = world.device.type == "cuda"
        if world.size > 1:
            there = (waits.pin_memory() if is_cuda else waits).to(world.device, non_blocking=True)
            world.sum_([there])
            packed, waits = torch.cat([packed, there.flatten()]), None
        peak = torch.cuda.max_memory_allocated() if is_cuda else None
        return cls(engine.step_index, steps, len(sums), packing, Readback(packed), waits, peak)

    def read(self) -> None:
        """Waits for the numbers: sums [names] and seen [2 * steps]. time: when they came, in seconds."""
        host = self.readback.wait()
        self.time = time.perf_counter()
        self.sums, self.seen, waits = host.tensor_split([self.names, self.names + 2 * self.steps])
        self.waits = waits.view(2, -1) if self.waits is None else self.waits

    def waited(self) -> dict[str, float]:
        """Seconds per step that a rank waited for its data and for other ranks: the mean over the ranks, and the
        longest."""
        values = {}
        for name, seconds in zip(("data", "ranks"), self.waits, strict=True):
            values |= {f"wait/{name}": seconds.mean().item(), f"wait/{name}_max": seconds.max().item()}
        return values
