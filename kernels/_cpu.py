"""Loads the operators of csrc/cpu*.cpp, `torch.ops.strop.cpu_*`, if they were built for this processor.

They write into tensors that the caller allocates and return nothing, which is all that torch.compile has to know.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32)
OPERATORS = (
    "rms_norm", "rms_norm_backward", "silu_mul", "silu_mul_backward", "rotate", "causal_softmax_backward",
    "prefix_attention", "prefix_attention_backward", "cached_attention", "scan_logits", "softmax_of", "softmax_sums",
    "square_sums", "adamw", "use_huge_pages", "decoder_step",
)


def _load() -> str:
    """Load the library for this processor; returns the name of its instruction set, "" if there is none."""
    # The only build on aarch64 is called "default", whatever PyTorch calls the instruction set; x86 has none.
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


# At import, so that torch.compile never traces it; torch.compiler.disable would import the compiler into every process.
_loaded = _load()
# Intel's AMX, which multiplies bf16 several times faster than vector instructions do.
HAS_MATRIX_UNIT: bool = torch.cpu._is_amx_tile_supported()


def load() -> bool:
    """Whether the library is loaded; False if none was built for this processor."""
    return bool(_loaded)


def takes(*tensors: Tensor) -> bool:
    """Whether the library supports these tensors: on the CPU, all bf16 or all fp32."""
    first = tensors[0].dtype
    return first in DTYPES and all(x.device.type == "cpu" and x.dtype == first for x in tensors) and load()


def multiplies(*tensors: Tensor) -> bool:
    """Whether the library's attention supports these tensors: head sizes of 32 to 256 in steps of 16, bf16, and fp32 on
    processors that cannot multiply bf16."""
    if not takes(*tensors) or any(x.shape[-1] not in range(32, 257, 16) for x in tensors):
        return False
    return tensors[0].dtype == torch.bfloat16 or _loaded != "avx512_bf16"


def multiplies_bf16() -> bool:
    """Whether the library's products of bf16 run: on processors with instructions for pairs of bf16."""
    return _loaded == "avx512_bf16"


def dense_rows(x: Tensor) -> Tensor:
    """x, made contiguous unless its last dimension already is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
