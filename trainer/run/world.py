"""The ranks of a run: who am I, how many are we, where do tensors live, and how to wait for one another."""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from strop.kernels.layers import available
from strop.trainer.errors import UserError


@dataclass(frozen=True)
class World:
    """One process's place in the run. `World()` is a run of one rank on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device has instructions for products of bf16; a CPU without them is slower in bf16 than in fp32
        by as much as fivefold."""
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def settle_dtype(self, recipe):
        """The recipe with what dtype=auto means here, the same on every rank."""
        if recipe.dtype != "auto":
            return recipe
        return recipe.model_copy(update={"dtype": self.share("bfloat16" if self.multiplies_bf16 else "float32")})

    @property
    def hardware(self) -> str:
        """The kind of device and, where they lack, that a CPU's kernels were not built."""
        if self.device.type != "cpu" or available(torch.empty(0)):
            return self.device.type
        return "cpu, without csrc/cpu.cpp: training is slower (with g++ installed, install Strop again)"

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, value):
        """What rank 0 passes in, on every rank (a small picklable Python value made by this program)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Adds every tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent goes, so that no orphaned worker writes on."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the parent went before the request was in place
            os.kill(os.getpid(), signal.SIGKILL)


def keep_freed_memory() -> None:
    """Asks the C library to keep freed memory for the next step: mapping it anew costs a step on the CPU a tenth."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_threshold, 32 << 20)  # larger ones, weights and their gradients, would break the heap up


def speak_later() -> None:
    """Lets this rank wait before it shows a traceback: most likely rank 0 has said why it ended, this is only the
    connection to it that broke, and torchrun ends this process meanwhile."""
    show = sys.excepthook

    def wait_and_show(*error) -> None:
        time.sleep(2)
        show(*error)

    sys.excepthook = wait_and_show


def join(device: str, threads: int) -> World:
    """Joins the ranks that torchrun started. `device` is auto, cpu or cuda; `threads` a rank, 0 shares the cores."""
    die_with_parent()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device; use device=cpu or device=auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if not use_cuda:
        keep_freed_memory()
    where = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    if size > 1:
        # a stage that only rank 0 runs keeps the others waiting at a barrier for as long as it takes
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(days=7))
        if rank:
            speak_later()
    return World(rank, size, where)
