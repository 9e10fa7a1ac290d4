"""The ranks of a run: rank, world size, device, and the few collectives that stages use."""

import ctypes
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist

from strop.kernels.layers import available
from strop.trainer.errors import UserError
from strop.trainer.run import nodes, restart

WAIT = timedelta(days=7)  # ranks wait at a barrier for as long as a stage that only rank 0 runs takes
_groups: dict[tuple, dist.ProcessGroup] = {}  # made by World.group


@dataclass(frozen=True)
class World:
    """The rank of this process. `World()` is a run of one rank on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def multiplies_bf16(self) -> bool:
        """Whether the device has bf16 matrix instructions; a CPU without them is up to 5x slower in bf16 than fp32."""
        if self.device.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()

    def settle_dtype(self, recipe):
        """The recipe with dtype=auto resolved, the same on every rank."""
        if recipe.dtype != "auto":
            return recipe
        return recipe.model_copy(update={"dtype": self.share("bfloat16" if self.multiplies_bf16 else "float32")})

    @property
    def hardware(self) -> str:
        """The device type, and a hint if fused kernels of the layers are missing."""
        if self.device.type == "cuda" and find_spec("liger_kernel") is None:
            return "cuda, without liger-kernel: training is slower (pip install 'strop[gpu]')"
        if self.device.type != "cpu" or available(torch.empty(0)):
            return self.device.type
        return "cpu, without csrc/cpu.cpp: training is slower (install g++ and reinstall Strop)"

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def share(self, value):
        """Rank 0's `value`, on every rank (a small picklable Python value)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value) -> list:
        """Every rank's `value` (a small picklable Python value), by rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def group(self, seconds: float, backend: str | None = None, use: str = "") -> dist.ProcessGroup:
        """A process group of all ranks whose collectives fail after so many seconds; also for a run of one rank.
        backend: by default that of the device. use: the same arguments give the same group; threads need their own."""
        if not dist.is_initialized():
            default = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(default, store=dist.HashStore(), rank=0, world_size=1)
        key = seconds, backend, use
        if key not in _groups:
            _groups[key] = dist.new_group(timeout=timedelta(seconds=seconds), backend=backend)
        return _groups[key]

    def grid(self, seconds: float, size: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
        """Process groups whose collectives fail after so many seconds: this rank's `size` consecutive ranks, and the
        ranks at its place in every such row. `size` divides the number of ranks."""
        if (seconds, size, "row") not in _groups:
            ranks = torch.arange(self.size).view(-1, size)
            for name, members in (("row", ranks), ("column", ranks.T)):
                _groups[seconds, size, name], _ = dist.new_subgroups_by_enumeration(
                    members.tolist(), timeout=timedelta(seconds=seconds))
        return _groups[seconds, size, "row"], _groups[seconds, size, "column"]

    @contextmanager
    def within(self, seconds: float, what: str):
        """Makes a time-out of a group(seconds) a UserError that says `what` was going on."""
        try:
            yield
        except RuntimeError as e:
            if self.size == 1 or not re.search(r"tim(ed|e) ?out", str(e), re.IGNORECASE):
                raise
            raise UserError(f"{what}: rank {self.rank} waited more than engine.timeout={seconds} s for another rank, "
                            "which hangs, failed or is slower than that; see its output, or raise engine.timeout; the "
                            "same command resumes the run") from e

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sums every tensor over the ranks, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def close(self) -> None:
        _groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


def die_with_parent() -> None:
    """Makes the kernel kill this process when torchrun dies, so that no orphaned worker keeps writing."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os.kill(os.getpid(), signal.SIGKILL)


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next step: mapping it again costs 10 % of a training step on the CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_threshold, 32 << 20)  # larger blocks (weights, gradients) would fragment the heap


def delay_tracebacks() -> None:
    """Waits before a traceback is printed: most likely rank 0 failed first and has printed the cause, only the
    connection to it broke here, and torchrun ends this process meanwhile."""
    show = sys.excepthook

    def wait_and_show(*error) -> None:
        time.sleep(2)
        show(*error)

    sys.excepthook = wait_and_show


def join(device: str, threads: int) -> World:
    """Joins the ranks that torchrun started. device: auto, cpu or cuda; threads: per rank, 0 shares the cores.

    Raises UserError if device is cuda and there is none, and if there are fewer GPUs than ranks."""
    die_with_parent()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch finds no CUDA device; use device=cpu or device=auto")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    if use_cuda and (found := torch.cuda.device_count()) < local_size:
        raise UserError(f"{local_size} ranks on this machine, but torch finds {found} CUDA device(s); start a rank per "
                        f"GPU (torchrun --nproc-per-node={found}, make run NPROC={found}), or set device=cpu")
    where = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(where)
    else:
        keep_freed_memory()
    if size > 1:
        backend, how = "nccl" if use_cuda else "gloo", {}
        if restart.count():
            store, *_ = next(dist.rendezvous("env://", timeout=WAIT))
            how = {"store": dist.PrefixStore(restart.name(), store), "rank": rank, "world_size": size}
        dist.init_process_group(backend, timeout=WAIT, **how)
        nodes.watch(rank)
        if rank:
            delay_tracebacks()
    return World(rank, size, where)
