"""Time, peak memory, and this machine's peak rates to compare them with."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "quack-kernels",
    "transformers",
    "flash-attn",
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LIBC = ctypes.CDLL(None)
# Calls shorter than this are timed several at a time: reading the clock or recording an event costs microseconds.
_SHORTEST_SAMPLE = 1e-2
# Two samples suffice for a contender that takes over a second and this many times as long as the fastest.
_FAR_BEHIND = 4.0


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over rounds, the interquartile range, and each round's time."""

    seconds: float
    iqr: float
    samples: tuple[float, ...]

    @property
    def fastest(self) -> float:
        return min(self.samples)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sample(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds per call: between two CUDA events on a GPU, by the clock on a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def interleaved(
    contenders: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 5,
    warmup: int = 1,
    seconds: float | None = None,
    once: dict[str, float] | None = None,
) -> dict[str, Timing]:
    """Time the contenders alternately, so that a temporary slowdown of the machine affects all of them.

    Each contender is called `warmup` times first; compilation happens there. `seconds` bounds the time of all rounds
    together: fewer are run, never under three, when the calls are too slow for all of them. `once` may hold what one
    call of each is known to take about, to save the call that finds out.
    """
    for call in contenders.values():
        for _ in range(warmup):
            call()
    once = once or {name: sample(call, device) for name, call in contenders.items()}
    calls = {name: max(1, round(_SHORTEST_SAMPLE / max(took, 1e-7))) for name, took in once.items()}
    behind = {name for name, took in once.items() if took > max(1.0, _FAR_BEHIND * min(once.values()))}
    if seconds is not None:
        each = sum(took * calls[name] for name, took in once.items() if name not in behind)
        rounds = max(3, min(rounds, int(seconds / max(each, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            # Every other round in reverse, so that no contender always follows the same one.
            for name in names if turn % 2 == 0 else reversed(names):
                if name in behind and turn > 1:
                    continue
                samples[name].append(sample(contenders[name], device, calls[name]))
    finally:
        gc.enable()
    return {name: summary(found) for name, found in samples.items()}


def summary(samples: list[float]) -> Timing:
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Timing(statistics.median(samples), high - low, tuple(samples))


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE).group(1)) << 10


def _map_blocks_from(size: int) -> None:
    """Set malloc's mmap threshold to that many bytes, and its trim threshold to twice as much."""
    trim_threshold, mmap_threshold = -1, -3
    _LIBC.mallopt(mmap_threshold, size)
    _LIBC.mallopt(trim_threshold, 2 * size)


def start_peak(device: torch.device) -> int:
    """Reset the peak; returns the bytes in use now, an argument of `peak_since`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Freed memory still held by the allocator would hide new use, and holes in its heap would count as use.
    _map_blocks_from(1 << 20)
    _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_since(start: int, device: torch.device) -> int:
    """Peak bytes in use since `start_peak`, minus those in use then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    peak = max(0, _status_bytes("VmHWM") - start)
    # glibc's dynamic threshold in a process that frees large blocks.
    _map_blocks_from(32 << 20)
    return peak


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that one call allocates beyond those in use before, results included. Warm it up first."""
    start = start_peak(device)
    call()
    return peak_since(start, device)


def matmul_rate(device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int, int]] = ()) -> float:
    """FLOP/s of the fastest [m, k] @ [k, n] among a large square product and `shapes` (m, k, n)."""
    size = 8192 if device.type == "cuda" else 2048
    best = 0.0
    for m, k, n in ((size, size, size), *shapes):
        a, b = (torch.randn(rows, columns, device=device).to(dtype) for rows, columns in ((m, k), (n, k)))
        out = torch.empty(m, n, device=device, dtype=dtype)
        timing = interleaved({"mm": lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out)}, device, warmup=2)["mm"]
        best = max(best, 2 * m * k * n / timing.fastest)
    return best


def copy_rate(device: torch.device) -> float:
    """Bytes/s of a copy much larger than any cache, read and written bytes both counted."""
    count = (1 << 30 if device.type == "cuda" else 1 << 28) // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=9, warmup=2)["copy"]
    return 2 * 4 * count / timing.fastest


def rates(device: torch.device, dtypes: Iterable[str] = ("bf16", "fp32")) -> dict[str, float]:
    """{"copy": bytes/s, "bf16": FLOP/s, ...}, measured now."""
    return {"copy": copy_rate(device)} | {name: matmul_rate(device, _DTYPES[name]) for name in dtypes}


def floor_seconds(rates: dict[str, float], *, flops: float = 0.0, bytes: float = 0.0, dtype: str = "bf16") -> float:
    """The roofline time: that many FLOPs of GEMMs in dtype or bytes moved, whichever takes longer."""
    return max(flops / rates[dtype] if flops else 0.0, bytes / rates["copy"])


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its matrix instructions and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    name = re.sub(r"\((?:R|TM|tm)\)", "", found.group(1)) if found else platform.machine()
    # A virtual machine may hide the processor's generation.
    has = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    best = next((f"{instructions}, " for instructions, there in has.items() if there), "")
    return f"{name}, {best}{torch.get_num_threads()} threads"


def results_folder(device: torch.device, root: Path | None = None) -> Path:
    """benchmarks/results/<device> (or <root>/<device>), the name in letters, digits and dashes."""
    return (root or RESULTS) / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def keep_cases(file: str, device: torch.device, cases: dict, *, add: bool = False) -> None:
    """Write cases with the date and the machine to `file` in the device's results. add: keep its other cases."""
    path = results_folder(device) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if add and path.exists():
        cases = json.loads(path.read_text())["cases"] | cases
    result = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "environment": environment(device)}
    path.write_text(json.dumps(result | {"cases": cases}, indent=1) + "\n")


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers depend on: machine, versions, commit."""
    found: dict[str, str | int] = {
        "device": device_name(device),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["compute_capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"commit": commit()}


def commit() -> str:
    """The checked-out commit, with a plus sign where tracked files differ from it. Without git what STROP_COMMIT says,
    or "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "--short=12", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "../kernels", "../csrc", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("STROP_COMMIT") or "unknown"
    return head + ("+" if changed else "")
