"""This machine as a plan sees it: its ranks, the memory that is free, and measured rates."""

import functools
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from strop.trainer.planning.hardware import GB, Hardware
from strop.trainer.planning.memory import CONTEXT
from strop.trainer.run.world import World
from strop.trainer.training.flops import peak_flops

COPIED = 1 << 26  # bytes of the copy that measures a device's bandwidth


def ranks_here(world: World) -> Hardware:
    """The ranks of this run, and what they may fill of their devices and of the host: what is free, and on a GPU what
    this process has. Rates are unknown."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    host, is_cuda = host_memory(), world.device.type == "cuda"
    if is_cuda:
        free, memory = torch.cuda.mem_get_info(world.device)
        memory = min(memory, free + torch.cuda.memory_reserved(world.device) + CONTEXT)
        what = torch.cuda.get_device_name(world.device)
    else:
        memory = host or 1 << 60
        what = f"rank of this CPU, {memory / GB:.1f} GB free"
    return Hardware(f"{world.size} x {what}", world.device.type, max(1, world.size // per_node), per_node, memory,
                    host if is_cuda else None)


def this_machine(world: World, dtype: torch.dtype) -> Hardware:
    """The same with measured rates (a GPU's FLOP/s from its data sheet, if it is listed)."""
    return replace(ranks_here(world), flops=peak_flops(world.device, dtype), bandwidth=copy_rate(world.device))


def host_memory() -> int | None:
    """Bytes of the host's memory that are available; None if the system does not say."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy, read and written bytes both counted; measured once a process."""
    source, seconds = torch.ones(COPIED // 4, device=device), []
    target = torch.empty_like(source)
    for _ in range(4):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * COPIED / min(seconds)
