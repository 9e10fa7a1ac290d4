"""Benchmark cases, and how their contenders are checked against each other, timed and measured.

A family is a module with NAME, cases(device), inputs(case, device), CONTENDERS (name -> function of case and inputs
that returns the call to time), REFERENCE (the contender whose results the others must have), floor(case) -> (FLOPs,
bytes) and flat(result, inputs), which brings results of different layouts into one. A call returns (loss or log-probs,
*gradients).
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import measure
from .shapes import Head

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# bf16 results of different summation orders: values of means, and gradients by relative Frobenius distance.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 3e-2
# Seconds for a first call, in which contenders compile and tune.
FIRST_CALL = 60


@dataclass(frozen=True)
class Case:
    """One computation at one size. tokens N; rows and columns of what is not a head's are in `extent`."""

    family: str
    head: Head
    variant: str
    tokens: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        return f"{self.family}/{self.head.name}/{self.variant}"


class Unavailable(Exception):
    """A contender that cannot run here, with the reason."""


def errors(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative distance of the first tensor's mean, and the largest of the gradients' relative Frobenius distances."""
    if len(result) != len(truth) or any(a.shape != b.shape for a, b in zip(result, truth, strict=True)):
        raise AssertionError(f"results {[list(x.shape) for x in result]}, not {[list(x.shape) for x in truth]}")
    value, true = (x[0].double().mean().item() for x in (result, truth))
    distances = [torch.zeros(())]
    for a, b in zip(result[1:], truth[1:], strict=True):
        distance, length = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (a - b, b))
        distances.append((distance / length).cpu())
    # amax, unlike max, propagates NaN.
    return {"loss": abs(value - true) / max(abs(true), 1e-6), "gradient": torch.stack(distances).amax().item()}


def check(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    """The errors. Raises AssertionError if they exceed rounding."""
    found = errors(result, truth)
    # "not <=", so that NaN fails.
    if not (found["loss"] <= LOSS_TOLERANCE and found["gradient"] <= GRADIENT_TOLERANCE):
        raise AssertionError(f"wrong result: loss off by {found['loss']:.1e}, gradient by {found['gradient']:.1e}")
    return found


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the body after that many seconds; main thread only."""

    def stop(*_) -> None:
        raise TimeoutError(f"its first call took over {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return (text if isinstance(error, Unavailable) else f"{type(error).__name__}: {text}")[:200]


def measure_case(
    family: ModuleType,
    case: Case,
    names: Iterable[str],
    device: torch.device,
    rates: dict[str, float],
    rounds: int,
    seconds: float,
    first_call: float | None = None,
) -> dict:
    """The record of a case: floor and, by contender, time, peak memory and errors, or the reason it has none.
    first_call: the seconds that a contender may take to compile and tune, by default FIRST_CALL."""
    torch._dynamo.reset()
    inputs = family.inputs(case, device)
    names = list(names)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    contenders: dict[str, dict] = {}
    truth = None
    for name in (family.REFERENCE, *(name for name in names if name != family.REFERENCE)):
        try:
            with time_limit(first_call or FIRST_CALL):
                call = family.CONTENDERS[name](case, inputs)
                result = family.flat(call(), inputs)
                measure.synchronize(device)
            if truth is None:
                truth = result
            contenders[name] = {"errors": check(result, truth)}
            calls[name] = call
        # A peer may raise anything; the reason is its result.
        except Exception as e:
            if name == family.REFERENCE:
                raise
            contenders[name] = {"failed": one_line(e)}
        result = None
    truth = None
    if family.REFERENCE not in names:
        del calls[family.REFERENCE], contenders[family.REFERENCE]
    once = {}
    for name, call in calls.items():
        start = measure.start_peak(device)
        once[name] = measure.sample(call, device)
        contenders[name]["peak_bytes"] = measure.peak_since(start, device)
    flops, moved = family.floor(case)
    floor = measure.floor_seconds(rates, flops=flops, bytes=moved, dtype=case.dtype)
    timings = measure.interleaved(calls, device, rounds=rounds, warmup=0, seconds=seconds, once=once)
    for name, timing in timings.items():
        contenders[name] |= asdict(timing) | {"fraction_of_floor": floor / timing.seconds}
    return {
        "family": case.family,
        "preset": case.head.name,
        "variant": case.variant,
        "dtype": case.dtype,
        "shape": {"N": case.tokens, "D": case.head.hidden, "V": case.head.vocab},
        "floor": {"seconds": floor, "flops": flops, "bytes": moved, "rates": rates},
        "contenders": {name: contenders[name] for name in names},
    }


def merge(path: Path, environment: dict, records: dict[str, dict]) -> None:
    """Merge records into the results at `path`; a case's contenders replace earlier ones of the same name."""
    found = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    found["environment"] = environment
    for name, record in records.items():
        # Contenders that were not measured together are not compared.
        found["cases"][name] = record | {"commit": environment["commit"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(found, indent=1) + "\n")
    written.replace(path)


def results_path(device: torch.device, root: Path | None = None) -> Path:
    """<root>/<device>/<today>.json, root benchmarks/results unless given."""
    return measure.results_folder(device, root) / f"{datetime.now(UTC):%Y-%m-%d}.json"
