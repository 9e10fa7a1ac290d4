"""AdamW on the parameters of Llama-3.2-1B in every form of its state: time on the device and on the host.

    python -m benchmarks.gpu.optimizer [--out FOLDER] [--dry-run]

Beside one launch for all tensors: a launch for each, and PyTorch's fused AdamW with copies of gradients and weights.
Writes OUT/optimizer.json. --dry-run updates small parameters on the CPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from strop.kernels import optimizer

from .. import measure
from ..step_sides import MODELS
from . import cases

OPTIONS = {"lr": 1e-6, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
# form of the moments, whether masters are split; bytes that an update reads and writes for a parameter, in bf16
FORMS = {("float32", False): 30, ("float32", True): 28, ("bfloat16", False): 22, ("int8", True): 16}


def shapes(name: str) -> list[tuple[int, ...]]:
    hidden, layers, heads, key_heads, size, wide, vocab = MODELS[name]
    layer = [(heads * size, hidden), (key_heads * size, hidden), (key_heads * size, hidden), (hidden, heads * size),
             (wide, hidden), (wide, hidden), (hidden, wide), (hidden,), (hidden,)]
    return [(vocab, hidden), *layers * layer, (hidden,)]


def parameters(name: str, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """bf16 weights and gradients."""
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes(name)]
    return weights, [torch.randn_like(weight) * 1e-3 for weight in weights]


def ours(name: str, device: torch.device, kind: str, is_split: bool, at_once: bool) -> Callable[[int], object]:
    weights, grads = parameters(name, device)
    states = []
    for i, weight in enumerate(weights):
        mean, square, *scales = optimizer.new_moments(weight, kind).values()
        master = torch.zeros_like(weight, dtype=torch.int16) if is_split else weight.float()
        states.append(optimizer.State(master, mean, square, weight, tuple(scales) or None, number=i))
    factor = torch.ones((), device=device)
    together = optimizer.AdamW(states)
    alone = [optimizer.AdamW([state]) for state in states]

    def step(number: int) -> None:
        if at_once:
            together.step(grads, factor, step=number, **OPTIONS)
            return
        for one, grad in zip(alone, grads, strict=True):
            one.step([grad], factor, step=number, **OPTIONS)

    return step


def pytorch(name: str, device: torch.device) -> Callable[[int], object]:
    weights, grads = parameters(name, device)
    masters = [torch.nn.Parameter(weight.float()) for weight in weights]
    for master in masters:
        master.grad = torch.empty_like(master)
    fused = torch.optim.AdamW(masters, fused=True, **OPTIONS)

    def step(number: int) -> None:
        torch._foreach_copy_([master.grad for master in masters], grads)
        fused.step()
        torch._foreach_copy_(weights, [master.detach() for master in masters])

    return step


def timed(make: Callable[[], Callable[[int], object]], device: torch.device, moved: float, copy_rate: float,
          record: dict) -> str:
    """moved: bytes of an update."""
    step = make()
    for number in (1, 2):  # compiles
        step(number)
    host, whole = [], []
    for number in range(3, 10):
        measure.synchronize(device)
        started = time.perf_counter()
        step(number)
        host.append(time.perf_counter() - started)
        measure.synchronize(device)
        whole.append(time.perf_counter() - started)
    record |= {"host_seconds": sorted(host)[3], "seconds": sorted(whole)[3], "bytes": moved, "copy_rate": copy_rate}
    return (f"{record['seconds'] * 1e3:.2f} ms, host {record['host_seconds'] * 1e3:.2f} ms, "
            f"{moved / record['seconds'] / copy_rate:.0%} of a copy's rate")


def main(arguments: list[str] | None = None) -> int:
    options = cases.parser(__doc__).parse_args(arguments)
    device = torch.device("cpu" if options.dry_run else "cuda")
    name = "tiny" if options.dry_run else "Llama-3.2-1B"
    cases.wait_for_turn(options)
    count = sum(torch.Size(shape).numel() for shape in shapes(name))
    copy_rate = measure.copy_rate(device)
    running, found, path = cases.Cases(options.dry_run), {}, options.out / "optimizer.json"
    wanted = {f"{kind}{', split' if is_split else ''}": (
        lambda k=kind, s=is_split: ours(name, device, k, s, True), each) for (kind, is_split), each in FORMS.items()}
    wanted["float32, a launch for each tensor"] = lambda: ours(name, device, "float32", False, False), 30
    wanted["PyTorch, fused"] = lambda: pytorch(name, device), 40
    for label, (make, each) in wanted.items():
        found[label] = {}
        running.run(label, lambda m=make, e=each, r=found[label]: timed(m, device, e * count, copy_rate, r), seconds=1)
        cases.free()
        written = {"environment": measure.environment(device), "model": name, "forms": found}
        path.write_text(json.dumps(written, indent=1) + "\n")
    return 1 if running.failed else 0


if __name__ == "__main__":
    sys.exit(main())
