"""Host time of our launches in a training step, without a GPU: Triton compiles for sm_90, and a driver of ours launches
nothing.

    python -m benchmarks.host_time

Prints microseconds of each, and the share of a launch that goes through all of Triton (`kernel[grid](...)`). What
PyTorch and the driver do on a GPU comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from strop.kernels import Group, PackedGroups, _triton, optimizer
from strop.kernels._triton import adamw, attention_launch
from strop.kernels.attention import prefix
from strop.kernels.optimizer import many


class Driver(DriverBase):
    """An H100 that launches nothing. With `keep`, launches: (the number of the kernel, grid, arguments) of each."""

    def __init__(self, keep: bool = False):
        self.keep, self.launches, self.utils, self.loaded = keep, [], self, 0
        self.launcher_cls = self.launcher

    def launcher(self, source, metadata) -> Callable:
        def launch(x, y, z, stream, function, metadata, about, enter, leave, *arguments):
            if self.keep:
                self.launches.append((function, (x, y, z), arguments))

        return launch

    def load_binary(self, name: str, binary: bytes, *_) -> tuple:
        self.loaded += 1
        return self, self.loaded, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> None:
        return None

    @staticmethod
    def is_active() -> bool:
        return True


@contextmanager
def without_gpu(keep: bool = False):
    """Launches of tensors on the CPU take the way of those on a GPU, to a Driver."""
    usual = [(module, name, getattr(module, name)) for module, name in (
        (attention_launch, "launch"), (adamw, "launch"), (many, "on_gpu"))]
    before, found = driver._active, Driver(keep)
    driver.set_active(found)
    for module in (attention_launch, adamw):
        module.launch = lambda kernel, grid, *rest, **options: _triton.launch_again(kernel, grid, rest, options)
    many.on_gpu = lambda x: True
    try:
        yield found
    finally:
        driver.set_active(before)
        for module, name, value in usual:
            setattr(module, name, value)


def microseconds(run: Callable[[], object], rounds: int = 7, calls: int = 100) -> float:
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - started) / calls)
    return best * 1e6


def attention() -> Callable[[], object]:
    """Forward and backward of a layer of Llama-3.2-1B, through autograd."""
    groups = PackedGroups.pack([Group(list(range(5, 133)), [[7] * 32, [8] * 32])] * 2)
    q, k, v = (torch.randn(1, groups.num_tokens, heads, 64).bfloat16().transpose(1, 2).requires_grad_()
               for heads in (32, 8, 8))
    layout = (groups.segments, groups.tiles, groups.readers_end, groups.position_ids)
    upstream = torch.randn_like(q)

    def run() -> None:
        out, _ = prefix._op(q, k, v, *layout, 0.125, 0, 0.0, True)
        torch.autograd.grad(out, (q, k, v), upstream)

    return run


def update(at_once: bool) -> Callable[[], object]:
    """AdamW on 146 tensors, as many as Llama-3.2-1B has."""
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 1}
    factor, states = torch.ones(()), []
    for i in range(146):
        weight = torch.zeros(64, 32, dtype=torch.bfloat16)
        states.append(optimizer.State(torch.zeros(64, 32), torch.zeros(64, 32), torch.zeros(64, 32), weight, number=i))
    grads = [torch.zeros_like(state.weight) for state in states]
    if at_once:
        together = optimizer.AdamW(states)
        return lambda: together.step(grads, factor, **options)
    lr, betas, eps, decay, step = options.values()

    def run() -> None:
        for s, grad in zip(states, grads, strict=True):
            adamw.adamw_(s.master, grad, s.exp_avg, s.exp_avg_sq, s.weight, factor, None, lr, *betas, eps, decay, step,
                         0, 0)

    return run


def main() -> None:
    torch.set_num_threads(1)
    cases = {"attention of a layer, forward and backward": (attention(), 100),
             "AdamW, a launch for each of 146 tensors": (update(False), 3),
             "AdamW, a launch for all of them": (update(True), 30)}
    print(f"{'':45}{'us':>10}{'of Triton alone':>18}")
    with without_gpu():
        for name, (run, calls) in cases.items():
            found = []
            for again in (_triton.launch_again, lambda kernel, grid, x, options: kernel[grid](*x, **options)):
                usual, _triton.launch_again = _triton.launch_again, again
                run()
                found.append(microseconds(run, calls=calls))
                _triton.launch_again = usual
            print(f"{name:45}{found[0]:10.1f}{found[0] / found[1]:18.2f}", flush=True)


if __name__ == "__main__":
    main()
