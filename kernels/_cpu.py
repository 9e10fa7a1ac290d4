"""The operators of csrc/cpu*.cpp, `torch.ops.strop.cpu_*`: where they were built and the processor has what it needs.

They write into tensors that their caller has made, so that all they have to say to torch.compile is that they return
nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)
OPERATORS = (
    "rms_norm",
    "rms_norm_backward",
    "silu_mul",
    "silu_mul_backward",
    "rotate",
    "causal_softmax_backward",
    "prefix_attention",
    "prefix_attention_backward",
    "cached_attention",
    "scan_logits",
    "softmax_of",
    "square_sums",
    "adamw",
)


def _load() -> str:
    """The instructions that the library which was loaded is for, or nothing."""
    # "default" is what aarch64 has, whatever PyTorch calls its vectors; x86 has none of that name
    names = [torch.backends.cpu.get_cpu_capability().lower(), "default"]
    if names[0] == "avx512" and torch.cpu._is_avx512_bf16_supported():
        names.insert(0, "avx512_bf16")
    paths = {name: Path(__file__).with_name(f"_cpu_{name}.so") for name in names}
    found = next((name for name, path in paths.items() if path.is_file()), "")
    if not found:
        return found
    torch.ops.load_library(paths[found])
    for name in OPERATORS:
        torch.library.register_fake(f"strop::cpu_{name}", lambda *_: None)
    return found


# all here, where torch.compile does not look; telling it not to look would import all of it into every process
_loaded = _load()
# Intel's AMX, on which products of bf16 are several times as fast as everything around them
HAS_MATRIX_UNIT: bool = torch.cpu._is_amx_tile_supported()


def load() -> bool:
    """Whether the library is there; False where none was built for this processor."""
    return bool(_loaded)


def takes(*tensors: Tensor) -> bool:
    """Whether the library has operators for these: on the CPU, all bf16 or all fp32."""
    first = tensors[0].dtype
    return first in DTYPES and all(x.device.type == "cpu" and x.dtype == first for x in tensors) and load()


def multiplies(*tensors: Tensor) -> bool:
    """Whether the library's small products are of these, rows of 32 to 256 numbers in steps of 16: bf16, and fp32 where
    the processor does not multiply bf16."""
    if not takes(*tensors) or any(x.shape[-1] not in range(32, 257, 16) for x in tensors):
        return False
    return tensors[0].dtype == torch.bfloat16 or _loaded != "avx512_bf16"


def dense_rows(x: Tensor) -> Tensor:
    """x, copied if the elements of its rows do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
