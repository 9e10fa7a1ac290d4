"""Head, gather and attention beside their peers, at the shapes of an 8B model.

    python -m benchmarks.gpu.kernels [--out FOLDER] [--dry-run]

Writes OUT/<date>.json, in the form of `python -m benchmarks`. --dry-run gives each contender tensors that have the
device "cuda" but no values (FakeTensorMode): it runs whole where all its operators can, else up to its first launch. A
CPU build of PyTorch cannot, and runs them on the CPU.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from strop.kernels import PackedGroups

from .. import attention, gather, head, measure, suite
from ..shapes import LLAMA_8B, WIDE, Head
from ..suite import Case
from . import cases

TOKENS = 8192
# Compiling each of these takes longer than all the rest of its case.
SLOW = {"head": "torch.compile|exact", "gather": "torch.compile", "attention": "mask too"}


def chosen() -> list[tuple[ModuleType, Case, list[str]]]:
    """Family, case and contenders, the most important first."""
    wanted = [
        (attention, Case("attention", attention.LLAMA_8B, attention.SHARED, attention._tokens(attention.SHARED))),
        (attention, Case("attention", attention.LLAMA_1B, attention.PAIRS, attention._tokens(attention.PAIRS))),
        (gather, Case("gather", WIDE, gather.BOTH, TOKENS)),
        (head, Case("head", WIDE, head.TRAINED, TOKENS)),
        (gather, Case("gather", WIDE, gather.FORWARD, TOKENS)),
        (head, Case("head", LLAMA_8B, head.FROZEN, TOKENS)),
    ]
    return [(family, case, [name for name in family.CONTENDERS if not re.search(SLOW[family.NAME], name)])
            for family, case in wanted]


def timed(family: ModuleType, case: Case, names: list[str], rates: dict[str, float], path: Path) -> str:
    device = torch.device("cuda")
    record = suite.measure_case(family, case, names, device, rates, rounds=5, seconds=0.8, first_call=25)
    suite.merge(path, measure.environment(device), {case.name: record})
    lines = [f"floor {record['floor']['seconds'] * 1e3:.2f} ms"]
    for name, found in record["contenders"].items():
        lines.append(
            f"    {name:28} {found['failed']}" if "failed" in found else
            f"    {name:28} {found['seconds'] * 1e3:9.2f} ms {found['fraction_of_floor']:5.0%} "
            f"{found['peak_bytes'] / 2**20:9,.0f} MiB"
        )
    return "\n".join(lines)


def small(case: Case) -> Case:
    """The case with few tokens and a narrow head, for inputs made on the CPU."""
    if case.family == "attention":
        tokens = attention._tokens(attention.FEW_PAIRS)
        return replace(case, head=attention.SMOLLM2, variant=attention.FEW_PAIRS, tokens=tokens)
    return replace(case, head=Head(case.head.name, 64, 512), tokens=32)


def fake(value, mode: FakeTensorMode):
    """The same with every tensor on device "cuda" and without values; what PackedGroups keeps on the host stays."""
    if isinstance(value, Tensor):
        with mode:
            found = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        return found.requires_grad_(value.requires_grad)
    if isinstance(value, PackedGroups):
        tensors = {f.name: fake(getattr(value, f.name), mode) for f in fields(value)
                   if isinstance(getattr(value, f.name), Tensor) and f.name != "segments"}
        return replace(value, **tensors, segments=mode.from_tensor(value.segments))
    if isinstance(value, list):
        return [fake(x, mode) for x in value]
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: fake(x, mode) for name, x in vars(value).items()})
    return value


def dry(family: ModuleType, case: Case, name: str) -> str:
    case = small(case)
    inputs, mode, kind = family.inputs(case, torch.device("cpu")), contextlib.nullcontext(), "the CPU"
    if torch.version.cuda:  # else device "cuda" ends the process
        mode, kind = FakeTensorMode(allow_non_fake_inputs=True), "tensors without values"
        inputs = fake(inputs, mode)
    compile = torch.compile
    torch.compile = lambda function=None, **_: function if function else lambda f: f  # what it generates wants a driver
    try:
        with mode:
            result = family.flat(family.CONTENDERS[name](case, inputs)(), inputs)
    except (suite.Unavailable, ImportError) as reason:
        return f"left out: {reason}"
    finally:
        torch.compile = compile
    return f"ran on {kind}, results {[list(x.shape) for x in result]}"


def main(arguments: list[str] | None = None) -> int:
    options = cases.parser(__doc__).parse_args(arguments)
    running = cases.Cases(options.dry_run)
    if options.dry_run:
        cases.wait_for_turn(options)
        for family, case, names in chosen():
            for name in names:
                running.run(f"{case.name}: {name}", lambda f=family, c=case, n=name: dry(f, c, n))
        return 1 if running.failed else 0
    with contextlib.suppress(ImportError):  # take their time before our turn
        import liger_kernel.transformers  # noqa: F401
        import trl.kernels  # noqa: F401
    cases.wait_for_turn(options)
    rates = measure.rates(torch.device("cuda"))
    print(", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in rates.items()), flush=True)
    path = options.out / f"{time.strftime('%Y-%m-%d')}.json"
    for family, case, names in chosen():
        running.run(case.name, lambda f=family, c=case, n=names: timed(f, c, n, rates, path), seconds=6)
        cases.free()
    return 1 if running.failed else 0


if __name__ == "__main__":
    sys.exit(main())
