"""Read the machine code of csrc's kernels, as aot.py does for Triton's; nvcc compiles them, no GPU is needed.

    python -m benchmarks.sass [LIBRARY]

Without LIBRARY csrc is compiled into a temporary folder. Prints per kernel and architecture what aot.py prints. Exits
with 1 on a spill, on a load or store of logits that is not 16 bytes wide where it should be, and on a kernel or an
architecture that is not in the library.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import tempfile
from pathlib import Path

from . import aot

SETUP = Path(__file__).resolve().parents[1] / "setup.py"
ARCHITECTURES = {"sm_80": "80", "sm_90a": "90", "sm_100a": "100"}
DTYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
KERNEL = re.compile(rf"(forward|backward)_kernelI({'|'.join(DTYPES)})E")
WIDE_LOAD = re.compile(r"\bLDG\.\S*128\b")
WIDE_STORE = re.compile(r"\bSTG\.\S*128\b")
BYTE_ACCESS = re.compile(r"\b(?:LDG|STG)\.\S*[US]8\b")
# Unrolled 16-byte loads that are in flight before the first is used.
UNROLL = 4


def compile_csrc(folder: Path) -> Path:
    """csrc as setup.py compiles it."""
    library, setup = folder / "_csrc.so", runpy.run_path(str(SETUP))
    if not setup["find_nvcc"]():
        sys.exit("no nvcc on PATH or in CUDA_HOME; name a compiled library")
    setup["compile_csrc"](library)
    return library


def by_kernel(dump: str) -> dict[tuple[str, str], str]:
    """cuobjdump's output by kernel ("forward bf16") and architecture ("sm_90a")."""
    found = {}
    for section in re.split(r"^arch = ", dump, flags=re.MULTILINE)[1:]:
        architecture = section.split(maxsplit=1)[0]
        for part in re.split(r"^\s*Function\b", section, flags=re.MULTILINE)[1:]:
            name, dtype = KERNEL.search(part).groups()
            found[f"{name} {DTYPES[dtype]}", architecture] = part
    return found


def judge(name: str, architecture: str, usage: str, sass: str) -> aot.Row:
    """One kernel's numbers and failures."""
    registers, local, shared = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "LOCAL", "SHARED"))
    loads, stores, spills = (len(pattern.findall(sass)) for pattern in (WIDE_LOAD, WIDE_STORE, aot.SPILL))
    limit = aot.SHARED_LIMIT[ARCHITECTURES[architecture]]
    failures = [f"{spills} spill instructions, {local} bytes of local memory"] if spills or local else []
    if shared > limit:
        failures.append(f"shared memory {shared} over {limit}")
    if loads < UNROLL:
        failures.append(f"{loads} 16-byte loads, expected at least {UNROLL}")
    if name.startswith("backward") and stores < UNROLL:
        failures.append(f"{stores} 16-byte stores, expected at least {UNROLL}")
    if BYTE_ACCESS.search(sass):
        failures.append("loads or stores single bytes")
    return aot.Row(
        f"csrc {name}", architecture, registers, local, spills, shared, limit, loads + stores, None, tuple(failures)
    )


def inspect(library: Path) -> list[aot.Row]:
    """Every kernel on every architecture. Exits with a line on one that is not in the library."""
    usage, sass = (by_kernel(aot._cuobjdump(flag, str(library))) for flag in ("-res-usage", "-sass"))
    names = [f"{name} {dtype}" for name in ("forward", "backward") for dtype in DTYPES.values()]
    keys = [(name, architecture) for name in names for architecture in ARCHITECTURES]
    if missing := [" on ".join(key) for key in keys if key not in sass]:
        sys.exit(f"{library} lacks {', '.join(missing)}")
    return [judge(*key, usage[key], sass[key]) for key in keys]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", type=Path, help="the compiled library, kernels/_csrc.so of an install")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = inspect(options.library or compile_csrc(Path(folder)))
    failed = aot.report(rows)
    print(f"{len(rows)} inspected, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
