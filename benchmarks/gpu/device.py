"""Print what machine this is, and build csrc's CUDA library where the carried one does not load.

    python -m benchmarks.gpu.device [--dry-run]
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
import time
from pathlib import Path

import torch

from strop.kernels.head import cuda

LIBRARY = Path(cuda.__file__).parents[1] / "_csrc.so"


def library() -> str:
    """Loads csrc's library, compiled here for sm_90a if need be; says what happened."""
    if LIBRARY.exists():
        try:
            torch.ops.load_library(LIBRARY)
            return "csrc loads"
        except OSError as error:
            print(f"the carried csrc does not load: {error}")
    setup = runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"))
    if not setup["find_nvcc"]():
        return "csrc left out: no nvcc"
    setup["compile_csrc"](LIBRARY, ("90a",))
    torch.ops.load_library(LIBRARY)
    return "csrc compiled here"


def main() -> int:
    started = time.perf_counter()
    for name in ("torch", "triton", "transformers", "trl", "liger-kernel", "flash-attn", "peft", "pydantic"):
        try:
            print(f"{name} {importlib.metadata.version(name)}", end="  ")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} missing", end="  ")
    print()
    if "--dry-run" in sys.argv:
        print("dry run: no GPU needed")
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    x = torch.ones(8, device="cuda").sum().item()
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    try:
        state = library()
    except Exception as error:  # the rest does not need it
        state = f"csrc: {type(error).__name__}: {str(error)[:300]}"
    print(f"{name}, {memory / 2**30:.0f} GiB, sum {x:g}; {state}; {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
