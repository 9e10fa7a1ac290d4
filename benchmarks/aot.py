"""Compile every Triton kernel ahead of time, without a GPU, and check what the compiler made of it.

    python -m benchmarks.aot [--targets 80,90,100,gfx942] [--only NAME] [--json FILE]

Prints per kernel, variant and target: registers and bytes of local memory per thread, spill instructions, shared
memory against what one block may have, 16-byte global loads and stores, tensor-core instructions. Exits with 1 on a
spill, on shared memory over the limit, on a tensor descriptor without TMA and on a dot without tensor-core
instructions, of the full rate where an architecture has several (FULL_RATE). NOT_YET lists the kernels known to miss
the full rate; they print NOT YET. A successful compilation alone proves none of this: a kernel that asks for too much
shared memory compiles and then cannot be launched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from strop.kernels._triton import (
    adamw,
    attention,
    attention_launch,
    decode_attention,
    layers,
    logprob,
    sampling,
    segment_sum,
    sums,
)
from strop.kernels.attention import paged
from strop.kernels.layout import TILE
from strop.kernels.optimizer.formats import BLOCK

# Shared memory one block may have, in bytes: CUDA programming guide, technical specifications per compute capability.
SHARED_LIMIT = {"80": 163 << 10, "86": 99 << 10, "90": 227 << 10, "100": 227 << 10, "gfx942": 64 << 10}
TENSOR_CORE = re.compile(r"\b(?:HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|UTC\w*MMA)\b")
# Hopper and Blackwell run every other tensor-core instruction at a fraction of the rate of these.
FULL_RATE = {"90": ("wgmma", re.compile(r"\bHGMMA\b")), "100": ("tcgen05", re.compile(r"\bUTC\w*MMA\b"))}
# Known not to reach it yet, as (name, target).
NOT_YET: set[tuple[str, str]] = set()
TMA = re.compile(r"\bUTMALDG\b")
SPILL = re.compile(r"\b(?:STL|LDL)\b")
WIDE_ACCESS = re.compile(r"\b(?:LDG|STG)\.\S*128\b")
_inherited: list[tuple[Case, str]] = []
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """A kernel with the argument types, constants and warps that its launcher uses for some input."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, int | bool | str | None]
    num_warps: int
    has_dot: bool = False
    num_stages: int = 3
    only_for: str | None = None  # the one target whose block sizes these are
    full_rate: bool = True  # reading memory takes a decode step's time, and its tiles have too few rows


@dataclass(frozen=True)
class Row:
    name: str
    target: str
    registers: int | None
    local_bytes: int | None
    spills: int | None
    shared: int
    shared_limit: int
    wide_accesses: int | None
    tensor_core: int | None
    failures: tuple[str, ...]
    not_yet: str | None = None


def cases() -> list[Case]:
    """Every kernel in the variants that real launches have."""
    shared = logprob_cases() + segment_sum_cases() + adamw_cases() + layer_cases() + sampling_cases()
    return shared + [case for target in SHARED_LIMIT for case in attention_cases(target) + decode_cases(target)]


def attention_cases(target: str) -> list[Case]:
    """The block sizes of `target` at every head size; a soft-cap and a window together where that is tightest."""
    cuda = target.isdigit()
    both = {"CAP": True, "WINDOW": True}
    variants = [("bf16", 128, {})]
    if cuda:
        variants += [("bf16", 64, {}), ("bf16", 256, {}), ("bf16", 256, both)]
    if target == "90":
        variants += [("bf16", 80, {}), ("fp32", 64, {})]
    return [
        attention_case(name, dtype, size, target, **flags)
        for dtype, size, flags in variants
        for name in ("forward", "grad_q", *attention_launch.grad_kv_launches(*_launch_of(dtype, size, target)))
    ]


def attention_case(name: str, dtype: str, size: int, target: str, CAP: bool = False, WINDOW: bool = False) -> Case:
    is_grad_kv = name not in ("forward", "grad_q")
    kernel = attention.grad_kv_kernel if is_grad_kv else getattr(attention, f"{name}_kernel")
    blocks = attention_launch.blocks(name, *_launch_of(dtype, size, target))
    constants = {"D": size, "D_PAD": attention_launch.padded(size), "CAP": CAP, "WINDOW": WINDOW, "TILE_ROWS": TILE}
    constants |= {"QUERIES": blocks.queries, "KEYS": blocks.keys, "PRECISION": "ieee"}
    constants |= attention_launch.parts(name) if is_grad_kv else {}
    known = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "tiles_ptr": "*i32", "readers_end_ptr": "*i32"}
    known |= {"position_ptr": "*i64", "scale": "fp32", "cap": "fp32"}
    constants["EDGE"] = attention_launch.edge(blocks, name)
    described = {"grad_out_tma", "q_tma", "k_tma", "v_tma", "stats_tma"} & set(kernel.arg_names)
    rows = blocks.queries if is_grad_kv else blocks.keys
    known |= {n: f"tensordesc<{dtype}[1, {rows}, {constants['D_PAD']}]>" for n in described}
    known |= {"stats_tma": f"tensordesc<fp32[1, {rows}, {attention_launch.STATS}]>", "stats_ptr": "*fp32"}
    constants |= {} if blocks.tma else dict.fromkeys(described | {"stats_ptr"} & set(kernel.arg_names))
    types = {n: known.get(n, f"*{dtype}" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
    label = " ".join(["attention", name, dtype, str(size), *["cap"] * CAP, *["window"] * WINDOW])
    return Case(label, kernel, types, constants, blocks.warps, dtype != "fp32", blocks.stages, target)


def _launch_of(dtype: str, size: int, target: str) -> tuple[int, int, int | None]:
    """Padded head size, bytes of an element, capability: what attention_launch chooses by."""
    capability = int(target) // 10 if target.isdigit() else None
    return attention_launch.padded(size), 4 if dtype == "fp32" else 2, capability


def decode_cases(target: str) -> list[Case]:
    """Query heads per key head, and rows of a tile; a soft-cap and a window together where that is tightest."""
    variants = [("bf16", 128, 4, 8, {}), ("bf16", 64, 1, 1, {}), ("bf16", 128, 8, 8, {}), ("bf16", 256, 2, 8, {})]
    variants += [("bf16", 256, 8, 8, {"CAP": True, "WINDOW": True}), ("bf16", 80, 7, 8, {}), ("fp32", 64, 3, 8, {})]
    found = []
    for dtype, size, rep, members, flags in variants:
        width, element_bytes, capability = _launch_of(dtype, size, target)
        shape = decode_attention.blocks(width, decode_attention.queries(members, rep), element_bytes, capability)
        constants = {"REP": rep, "MEMBERS": members, "D": size, "D_PAD": width, "PAGE": paged.PAGE, "CAP": False}
        constants |= {"SPLIT": paged.SPLIT, "QUERIES": decode_attention.queries(members, rep), "KEYS": shape.keys}
        constants |= {"OWN_QUERIES": decode_attention.queries(1, rep), "WINDOW": False, "PRECISION": "ieee"} | flags
        values = ("q", "k", "v", "k_pages", "v_pages")
        known = {f"{name}_ptr": f"*{dtype}" for name in values} | {"scale": "fp32", "cap": "fp32"}
        known |= {"part_ptr": "*fp32", "stats_ptr": "*fp32"}
        kernel = decode_attention.parts_kernel
        types = {n: known.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
        label = " ".join(["decode", dtype, str(size), f"{members}x{rep}", *map(str.lower, flags)])
        found.append(Case(label, kernel, types, constants, shape.warps, dtype != "fp32", shape.stages, target, False))
        if not flags and rep == 4:
            merge = decode_attention.merge_kernel
            known |= {"out_ptr": f"*{dtype}"}
            types = {n: known.get(n, "*i32" if n.endswith("_ptr") else "i32") for n in merge.arg_names}
            constants = {"D": size, "D_PAD": width, "SPLIT": paged.SPLIT}
            found.append(Case(f"decode merge {dtype} {size}", merge, types, constants, 1, only_for=target))
    return found


def layer_cases() -> list[Case]:
    """Norms of hidden states and of heads, SwiGLU, rotary embeddings."""
    found = []
    for size in (64, 128, 2048, 4096, 8192):
        width, rows, warps = layers.norm_shape(size)
        types = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "out_ptr": "*bf16", "rows": "i32", "x_stride": "i32"}
        types |= {"eps": "fp32"}
        constants = {"D": size, "D_PAD": width, "ROWS": rows}
        found.append(Case(f"layer rms_norm {size}", layers.rms_norm_kernel, types, constants, warps))
    kernel = layers.swiglu_kernel
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    found.append(Case("layer swiglu", kernel, types, {"BLOCK": layers._PRODUCT}, layers._WARPS))
    kernel = layers.rotary_kernel
    types = {n: "*bf16" if n.endswith("_ptr") else "i32" for n in kernel.arg_names}
    for size in (64, 128, 256):
        width, heads = layers.rotary_shape(size)
        found.append(Case(f"layer rotary {size}", kernel, types, {"D": size, "D_PAD": width, "HEADS": heads}, 4))
    return found


def sampling_cases() -> list[Case]:
    known = {"key_ptr": "*i64", "position_ptr": "*i64", "token_ptr": "*i64", "first_ptr": "*i32", "top_p": "fp32"}
    known |= {"stats_ptr": "*fp32", "logp_ptr": "*fp32", "temperature": "fp32", "sub_ptr": "*fp32"}
    known |= {"bound_ptr": "*i32", "count_ptr": "*i32", "candidate_ptr": "*i64"}
    found = []
    for dtype in ("bf16", "fp32"):
        types = known | {"logits_ptr": f"*{dtype}"}
        shift = sampling.SHIFT[{"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]]
        for tempered in (False, True):
            constants = {"CHUNK": sampling.CHUNK, "SUB": sampling.SUB, "TEMPERED": tempered, "TRUNCATED": tempered}
            kernel, label = sampling.scan_kernel, f"sample scan {dtype}{' tempered' if tempered else ''}"
            chosen = {n: types.get(n, "i32") for n in kernel.arg_names}
            found.append(Case(label, kernel, chosen, constants, sampling.SCAN_WARPS))
        for how in ((), ("GREEDY",), ("TEMPERED",), ("TEMPERED", "TOP_P"), ("TEMPERED", "TOP_K", "TOP_P")):
            constants = {"CHUNK": sampling.CHUNK, "CHUNKS": 32, "SHIFT": shift, "CANDIDATES": sampling.CANDIDATES}
            constants |= {flag: flag in how for flag in ("GREEDY", "TEMPERED", "TOP_K", "TOP_P")}
            kernel, label = sampling.draw_kernel, " ".join(["sample draw", dtype, *map(str.lower, how)])
            chosen = {n: types.get(n, "i32") for n in kernel.arg_names}
            found.append(Case(label, kernel, chosen, constants, sampling.DRAW_WARPS))
        for top_k in (False, True):
            kernel, label = sampling.bound_kernel, f"sample bound {dtype}{' top_k' if top_k else ''}"
            constants = {"PER_CHUNK": sampling.CHUNK // sampling.SUB, "SUB": sampling.SUB, "SUBS": 1024, "SHIFT": shift,
                         "TOP_K": top_k}
            chosen = {n: types.get(n, "i32") for n in kernel.arg_names}
            found.append(Case(label, kernel, chosen, constants, sampling.BOUND_WARPS))
        constants = {"CHUNK": sampling.CHUNK, "CANDIDATES": sampling.CANDIDATES, "SHIFT": shift}
        kernel = sampling.collect_kernel
        chosen = {n: types.get(n, "i32") for n in kernel.arg_names}
        found.append(Case(f"sample collect {dtype}", kernel, chosen, constants, sampling.SCAN_WARPS))
    kernel = sampling.advance_kernel
    floats = {"logp_ptr": "*fp32", "out_ptr": "*fp32", "length_ptr": "*i32"}
    types = {n: floats.get(n, "*i64" if n.endswith("_ptr") else "i32") for n in kernel.arg_names}
    for fresh in (False, True):
        constants = {"FRESH": fresh, "ROWS": sampling.ROWS, "STOPS": 2}
        found.append(Case(f"sample advance{' fresh' if fresh else ''}", kernel, types, constants, 1))
    return found


def segment_sum_cases() -> list[Case]:
    types = {f"{name}_ptr": "*fp32" for name in ("values", "grad", "out")} | {"offsets_ptr": "*i64"}
    constants = {"BLOCK": segment_sum.BLOCK}
    kernels = {"segment sum": segment_sum.sum_kernel, "segment sum backward": segment_sum.spread_kernel}
    return [Case(name, kernel, types, constants, segment_sum.WARPS) for name, kernel in kernels.items()]


def adamw_cases() -> list[Case]:
    """Gradient, weight and form of the state."""
    pointers = dict.fromkeys(("factor_ptr", "scale_ptr", "scale_sq_ptr"), "*fp32")
    integers = dict.fromkeys(("count", "width", "key", "first"), "i32")
    numbers = dict.fromkeys(("keep", "step_size", "rest1", "beta2", "rest2", "root2", "eps"), "fp32")
    states = {adamw.FLOAT32: ("*fp32", "*fp32"), adamw.BFLOAT16: ("*i16", "*i16"), adamw.INT8: ("*i8", "*u8")}
    found = []
    for name, grad, weight, moments, split in (
        ("bf16", "bf16", "bf16", adamw.FLOAT32, False), ("fp32 sums", "fp32", "bf16", adamw.FLOAT32, False),
        ("fp32", "fp32", "", adamw.FLOAT32, False), ("split", "bf16", "i16", adamw.FLOAT32, True),
        ("moments bf16", "bf16", "bf16", adamw.BFLOAT16, False), ("moments int8", "bf16", "bf16", adamw.INT8, False),
        ("moments bf16 split", "bf16", "i16", adamw.BFLOAT16, True),
        ("moments int8 split", "bf16", "i16", adamw.INT8, True), ("moments int8 fp32", "fp32", "", adamw.INT8, False),
    ):
        mean, square = states[moments]
        types = pointers | integers | numbers | {"grad_ptr": f"*{grad}", "weight_ptr": f"*{weight or 'fp32'}"}
        types |= {"master_ptr": "*i16" if split else "*fp32", "exp_avg_ptr": mean, "exp_avg_sq_ptr": square}
        constants = {"WEIGHT": bool(weight) and not split, "SPLIT": split, "MOMENTS": moments, "ROWS": adamw.ROWS}
        constants["BLOCK"] = BLOCK if moments == adamw.INT8 else adamw.BLOCK
        found.append(Case(f"adamw {name}", adamw.adamw_kernel, types, constants, adamw.WARPS))
        constants = constants | {"IS_BF16": grad == "bf16", "DIVISIBLE": True, "ALIGNED": True}
        types = numbers | {"entries_ptr": "*i64", "owner_ptr": "*i32", "factor_ptr": "*fp32", "seed": "i32"}
        found.append(Case(f"adamw many {name}", adamw.adamw_many_kernel, types, constants, adamw.WARPS))
    types = {"entries_ptr": "*i64", "owner_ptr": "*i32"}
    constants = {"OVERWRITE": False, "ALIGNED": True, "BLOCK": sums.BLOCK}
    return [*found, Case("add many", sums.add_kernel, types, constants, sums.WARPS)]


def logprob_cases() -> list[Case]:
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        for block in (logprob._BLOCK, 1024) if dtype == "bf16" else (logprob._BLOCK,):
            launch = logprob._launch_shape(block)
            warps = launch.pop("num_warps")
            row = {"product_stride": "i32", "start": "i32", "columns": "i32", "cap": "fp32"}
            pointers = {"product_ptr": f"*{dtype}", "target_ptr": "*i64"}
            sums = ("highest", "total", "decay", "target_logit", "weighted", "plain", "squares")
            scan = pointers | {"weights_ptr": f"*{dtype}"} | {f"{name}_ptr": "*fp32" for name in sums}
            for label, on in {
                "": (),
                "bracket": ("WEIGHTS",),
                "bracket cap": ("WEIGHTS", "CAP"),
                "stats": ("WEIGHTED", "PLAIN", "SQUARES"),
                "all": ("CAP", "WEIGHTS", "WEIGHTED", "PLAIN", "SQUARES"),
            }.items():
                flags = {flag: flag in on for flag in ("CAP", "WEIGHTS", "WEIGHTED", "PLAIN", "SQUARES")}
                name = f"scan {dtype} {block} {label}".strip()
                types = scan | row | {"weights_stride": "i32"}
                found.append(Case(name, logprob.scan_kernel, types, flags | launch, warps))
            out = pointers | {"out_ptr": f"*{dtype}", "at_target_ptr": "*fp32", "lse_ptr": "*fp32", "out_stride": "i32"}
            for cap in (False, True):
                name = f"gradient {dtype} {block}{' cap' if cap else ''}"
                found.append(Case(name, logprob.gradient_kernel, out | row, {"CAP": cap} | launch, warps))
            logits = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64", "sums_ptr": "*fp32"}
            logits |= {"logits_stride": "i32", "columns": "i32"}
            forward = logits | {"logp_ptr": "*fp32"}
            found.append(Case(f"gather {dtype} {block}", logprob.gather_forward_kernel, forward, launch, warps))
            backward = logits | {"out_ptr": f"*{dtype}", "grad_ptr": "*fp32", "at_target_ptr": "*fp32"}
            backward |= {"out_stride": "i32"}
            found.append(
                Case(f"gather backward {dtype} {block}", logprob.gather_backward_kernel, backward, launch, warps)
            )
    return found


def compile_case(case: Case, target: str) -> Row:
    """Compile one case for one target, `80`, `90`, `100` or `gfx942`, and read the machine code."""
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        signature[name] = "constexpr" if name in case.constants else case.types[name]
        # Launches specialise on what 16 divides, and chunk widths and allocations are such.
        if signature[name].startswith("*") or name.endswith(("stride", "columns", "count", "vocab", "width")):
            attributes[(i,)] = [["tt.divisibility", 16]]
    cuda = target.isdigit()
    gpu = GPUTarget("cuda", int(target), 32) if cuda else GPUTarget("hip", target, 64)
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    compiled = triton.compile(source, target=gpu, options={"num_warps": case.num_warps, "num_stages": case.num_stages})
    shared, limit = compiled.metadata.shared, SHARED_LIMIT[target]
    failures = [f"shared memory {shared} over {limit}"] if shared > limit else []
    if not cuda:
        return Row(case.name, target, None, None, None, shared, limit, None, None, tuple(failures))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    registers, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "LOCAL"))
    spills, tensor_core = len(SPILL.findall(sass)), len(TENSOR_CORE.findall(sass))
    if spills or local:
        failures.append(f"{spills} spill instructions, {local} bytes of local memory")
    if any(kind.startswith("tensordesc") for kind in signature.values()) and not TMA.search(sass):
        failures.append("a tensor descriptor without TMA")
    not_yet = None
    if case.has_dot and not tensor_core:
        failures.append("a dot without a tensor-core instruction")
    elif case.has_dot and case.full_rate and target in FULL_RATE:
        rate, pattern = FULL_RATE[target]
        slow, known = tensor_core - len(pattern.findall(sass)), (case.name, target) in NOT_YET
        if slow and known:
            not_yet = f"{slow} tensor-core instructions are not {rate}"
        elif slow:
            failures.append(f"{slow} tensor-core instructions are not {rate}")
        elif known:
            failures.append("at the full rate now: take it off NOT_YET")
    numbers = (registers, local, spills, shared, limit, len(WIDE_ACCESS.findall(sass)), tensor_core)
    return Row(case.name, f"sm_{target}", *numbers, tuple(failures), not_yet)


def compile_all(chosen: list[tuple[Case, str]]) -> Iterator[Row]:
    """compile_case of each, in their order, on all cores."""
    # forked processes inherit what they are to compile: a kernel cannot be pickled
    global _inherited
    _inherited = chosen
    with get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        yield from pool.imap(_compile_inherited, range(len(chosen)))


def _compile_inherited(index: int) -> Row:
    return compile_case(*_inherited[index])


def _cuobjdump(flag: str, path: str) -> str:
    return subprocess.run([CUOBJDUMP, flag, path], check=True, capture_output=True, text=True).stdout


def report(rows: Iterable[Row]) -> list[Row]:
    """Print the rows as they come; return those that failed."""
    print(f"{'kernel':44}{'target':>8}{'regs':>6}{'local':>7}{'spills':>8}{'shared':>16}{'wide':>6}{'mma':>5}")
    failed = []
    for row in rows:
        shared = f"{row.shared}/{row.shared_limit}"
        numbers = (row.registers, row.local_bytes, row.spills, shared, row.wide_accesses, row.tensor_core)
        cells = zip(("-" if n is None else n for n in numbers), (6, 7, 8, 16, 6, 5), strict=True)
        print(f"{row.name:44}{row.target:>8}" + "".join(f"{cell:>{width}}" for cell, width in cells), flush=True)
        for failure in row.failures:
            print(f"    FAILED: {failure}")
        if row.not_yet:
            print(f"    NOT YET: {row.not_yet}")
        failed += [row] if row.failures else []
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default="80,90,100,gfx942", help="comma-separated, of 80, 86, 90, 100, gfx942")
    parser.add_argument("--only", default="", help="compile only kernels whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    targets = options.targets.split(",")
    if unknown := set(targets) - set(SHARED_LIMIT):
        parser.error(f"unknown targets {sorted(unknown)}")
    rows = []
    named = [case for case in cases() if options.only in case.name]
    chosen = [(case, target) for case in named for target in targets if case.only_for in (None, target)]
    failed = report(rows.append(row) or row for row in compile_all(chosen))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(f"{len(rows)} compiled, {len(failed)} failed")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
