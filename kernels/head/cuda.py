"""gather_logprob's passes in CUDA C++ (csrc/gather.cu), for GPUs on which they are measured to beat Triton's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Passes measured to be faster than Triton's, by compute capability, e.g. {(9, 0): {"gather_forward"}}. None so far.
FASTER: dict[tuple[int, int], set[str]] = {}

# For benchmarks and tests: True uses the library and raises if it is missing, False avoids it, None follows FASTER.
prefer: bool | None = None


@cache
def load() -> bool:
    """Load the library, once; False if it was not built. It links to PyTorch's CUDA libraries."""
    path = Path(__file__).parents[1] / "_csrc.so"
    if not path.is_file():
        return False
    torch.ops.load_library(path)
    return True


def takes(name: str, logits: Tensor) -> bool:
    """Whether the library runs the pass `name` on these logits. Raises RuntimeError if preferred but not built."""
    if prefer is False or not logits.is_cuda or logits.dtype not in DTYPES:
        return False
    if prefer:
        if not load():
            raise RuntimeError("csrc was not built: install with STROP_BUILD_CSRC=1 where nvcc is")
        return True
    return bool(FASTER) and name in FASTER.get(torch.cuda.get_device_capability(logits.device), ()) and load()


def gather_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """passes.gather_forward, except that sums is 0 in dead rows, which are not read."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    logp = logits.new_empty(logits.shape[0], dtype=torch.float32)
    sums = logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    torch.ops.strop.cuda_gather_forward(logits, target, logp, sums)
    return logp, sums


def gather_backward(grad: Tensor, logits: Tensor, target: Tensor, at_target: Tensor, sums: Tensor, out: Tensor) -> None:
    """passes.gather_backward; the columns of logits and out are contiguous."""
    torch.ops.strop.cuda_gather_backward(grad.float().contiguous(), logits, target, at_target, sums, out)
