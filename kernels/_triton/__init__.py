"""Device code: Triton kernels and their launches."""

from contextlib import nullcontext
from importlib.util import find_spec

import torch

# Looked up once at import: torch.compile must not trace into importlib.
HAS_TRITON = find_spec("triton") is not None


def launch(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """kernel[grid](*arguments, **options) on the GPU of the first argument, a tensor; nothing for an empty grid.

    Triton launches on PyTorch's current device, whatever device the tensors are on.
    """
    if 0 in grid:
        return
    x = arguments[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # under the interpreter there is no GPU
        kernel[grid](*arguments, **options)
