"""A sweep over block sizes of the attention kernels on this GPU.

    python -m benchmarks.gpu.tiles [--compile] [--list] [--out FOLDER] [--dry-run]

Times forward, grad_q and grad_kv of one layer with each of CANDIDATES and writes OUT/tiles.json. The fastest belong
into kernels/_triton/attention_launch.py. --compile fills Triton's cache on all cores and times nothing; --list compiles
for sm_90 without a GPU and prints registers, spills and shared memory. --dry-run does what --list does, for one
candidate of each kernel.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

import torch

from strop.kernels._triton import attention_launch
from strop.kernels._triton.attention_launch import Blocks

from .. import aot, attention, measure
from ..suite import Case
from . import cases

# For sm_90 by kernel and head size; the first is what attention_launch takes. All compile without a spill (--list).
CANDIDATES: dict[tuple[str, int], tuple[Blocks, ...]] = {
    ("forward", 128): (Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2, 32, True),
                       Blocks(128, 64, 8, 3, 32, True), Blocks(128, 128, 8, 2, 32, True)),
    ("grad_q", 128): (Blocks(64, 32, 4, 3), Blocks(64, 64, 4, 3, 32, True), Blocks(128, 64, 8, 3, 32, True),
                      Blocks(128, 128, 8, 2, 32, True)),
    ("grad_kv", 128): (Blocks(32, 128, 8, 3), Blocks(32, 128, 8, 3, 0, True), Blocks(64, 64, 4, 2, 32, True),
                       Blocks(64, 128, 8, 2, 32, True)),
    ("forward", 64): (Blocks(128, 64, 4, 3), Blocks(128, 128, 8, 3), Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 3)),
    ("grad_q", 64): (Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 3), Blocks(128, 128, 8, 2), Blocks(128, 64, 8, 2)),
    ("grad_kv", 64): (Blocks(64, 64, 4, 3), Blocks(64, 128, 8, 3), Blocks(64, 128, 8, 2), Blocks(32, 128, 8, 3)),
}
SHAPES = {
    128: (Case("attention", attention.LLAMA_8B, attention.SHARED, attention._tokens(attention.SHARED)),
          Case("attention", attention.LLAMA_8B, attention.PAIRS, attention._tokens(attention.PAIRS))),
    64: (Case("attention", attention.LLAMA_1B, attention.PAIRS, attention._tokens(attention.PAIRS)),),
}


def every() -> list[tuple[str, int, Blocks]]:
    return [(kernel, size, blocks) for (kernel, size), found in CANDIDATES.items() for blocks in found]


def calls(case: Case) -> dict[str, Callable[[], object]]:
    """The launches of each kernel on the case's tensors. grad_kv runs with grad_q, which writes what it reads."""
    device = torch.device("cuda")
    x = attention.inputs(case, device)
    q, k, v = (tensor.detach() for tensor in x.qkv)
    layout = (x.groups.tiles, x.groups.readers_end, x.groups.position_ids, q.shape[-1] ** -0.5, 0, 0.0)
    out, lse = attention_launch.forward(q, k, v, *layout)
    backward = partial(attention_launch.backward, x.upstream, q, k, v, out, lse, *layout)
    return {"forward": lambda: attention_launch.forward(q, k, v, *layout), "grad_q": backward, "grad_kv": backward}


def with_blocks(kernel: str, blocks: Blocks, call: Callable[[], object]) -> Callable[[], object]:
    """The call with these block sizes for `kernel` and the usual ones for the others."""
    usual = attention_launch.blocks

    def run() -> object:
        attention_launch.blocks = lambda name, *rest: blocks if name == kernel else usual(name, *rest)
        try:
            return call()
        finally:
            attention_launch.blocks = usual

    return run


def compile_one(kernel: str, size: int, blocks: Blocks) -> None:
    """Runs the kernel on few tokens, which compiles it into Triton's cache."""
    small = replace(SHAPES[size][0], variant=attention.FEW_PAIRS, tokens=attention._tokens(attention.FEW_PAIRS))
    with_blocks(kernel, blocks, calls(small)[kernel])()
    torch.cuda.synchronize()


def compile_all() -> None:
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for candidate, done in [(c, pool.submit(compile_one, *c)) for c in every()]:
            error = done.exception()
            print(candidate, "compiled" if error is None else f"{type(error).__name__}: {error}", flush=True)


def ahead_of_time(chosen: list[tuple[str, int, Blocks]]) -> int:
    """Compiles for sm_90 and prints what aot.py prints; the number of candidates that spill or do not fit."""
    found = []
    for kernel, size, blocks in chosen:
        case = with_blocks(kernel, blocks, lambda kernel=kernel, size=size: aot.attention_case(
            kernel, "bf16", size, "90"))()
        found.append((replace(case, name=f"{kernel} {size} {tuple(blocks)}"), "90"))
    return len(aot.report(aot.compile_all(found)))


def timed(kernel: str, size: int, blocks: Blocks, launches: list[dict], found: dict) -> str:
    """Raises ValueError where the numbers are not those of the usual block sizes."""
    import triton.testing

    seconds = []
    for case, launch in zip(SHAPES[size], launches, strict=True):
        run = with_blocks(kernel, blocks, launch[kernel])
        for ours, usual in zip(run(), launch[kernel](), strict=True):
            if not (apart := float((ours.float() - usual.float()).norm() / usual.float().norm())) < 1e-2:
                raise ValueError(f"{case.variant}: results are {apart:.1e} apart")
        seconds.append(triton.testing.do_bench(run, warmup=10, rep=60, return_mode="median") / 1e3)
        found.setdefault(f"{kernel} {size} {case.variant}", {})[str(tuple(blocks))] = seconds[-1]
    return ", ".join(f"{s * 1e3:.3f} ms" for s in seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = cases.parser(__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.compile:
        if not options.dry_run:
            compile_all()
        return 0
    cases.wait_for_turn(options)
    if options.list or options.dry_run:
        seconds = [(kernel, size, found[1]) for (kernel, size), found in CANDIDATES.items()]
        return 1 if ahead_of_time(every() if options.list else seconds) else 0
    running, found, path = cases.Cases(False), {}, options.out / "tiles.json"
    for size, shapes in SHAPES.items():
        launches = [calls(case) for case in shapes]
        for kernel in ("forward", "grad_q", "grad_kv"):
            for blocks in CANDIDATES[kernel, size]:
                name = f"{kernel} {size} {tuple(blocks)}"
                running.run(name, lambda k=kernel, s=size, b=blocks, x=launches: timed(k, s, b, x, found), seconds=1)
                environment = measure.environment(torch.device("cuda"))
                path.write_text(json.dumps({"environment": environment, "seconds": found}, indent=1) + "\n")
    for name, times in found.items():
        best = min(times, key=times.get)
        print(f"{name}: {best}, {min(times.values()) / next(iter(times.values())):.2f} of the present one's time")
    return 1 if running.failed else 0


if __name__ == "__main__":
    sys.exit(main())
