"""gather_logprob's passes in CUDA C++ (csrc/), for where the library was built and measured to be the faster one."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# The passes measured to be faster than Triton's, by compute capability, e.g. {(9, 0): {"gather_forward"}}.
# Empty: not yet measured.
FASTER: dict[tuple[int, int], set[str]] = {}

# For benchmarks and tests, which compare: True takes the library and raises where it cannot, False leaves it, None is
# what FASTER says.
prefer: bool | None = None


@cache
def load() -> bool:
    """Load the library, once; False where it was not built. Only a PyTorch for CUDA has all that it links to."""
    path = Path(__file__).parents[1] / "_csrc.so"
    if not path.is_file():
        return False
    torch.ops.load_library(path)
    return True


def takes(name: str, logits: Tensor) -> bool:
    """Whether the pass `name` over these logits is the library's. Raises RuntimeError where it should be and is not."""
    if prefer is False or not logits.is_cuda or logits.dtype not in DTYPES:
        return False
    if prefer:
        if not load():
            raise RuntimeError("csrc was not built: install with STROP_BUILD_CSRC=1 where nvcc is")
        return True
    return bool(FASTER) and name in FASTER.get(torch.cuda.get_device_capability(logits.device), ()) and load()


def gather_forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As passes.gather_forward, but lse is 0 in dead rows, which are not read."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    logp, lse = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(2))
    torch.ops.strop.cuda_gather_forward(logits, target, logp, lse)
    return logp, lse


def gather_backward(grad: Tensor, logits: Tensor, target: Tensor, at_target: Tensor, lse: Tensor, out: Tensor) -> None:
    """As passes.gather_backward; columns of logits and out side by side."""
    torch.ops.strop.cuda_gather_backward(grad.float().contiguous(), logits, target, at_target, lse, out)
