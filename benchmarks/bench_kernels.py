"""The kernels' benchmarks for pytest-benchmark: `pytest benchmarks -k "dpo and SmolLM2"`.

The contenders of a case are timed by turns in one go, on a GPU by its own clock. pytest-benchmark, which times one test
after the other by the host's clock, is shown those samples, for its tables, comparisons and storage.
"""

from __future__ import annotations

from itertools import zip_longest

import pytest
import torch

from . import attention, dpo, gather, head, preference

FAMILIES = (head, gather, dpo, attention, preference)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Replay:
    """A clock that advances by the given samples."""

    def __init__(self) -> None:
        self.time, self.samples = 0.0, iter(())

    def now(self) -> float:
        return self.time

    def step(self) -> None:
        self.time += next(self.samples)


REPLAY = Replay()
# Every family's first case, then every second one, so that a time limit cuts the least important cases.
CASES = [
    pair
    for row in zip_longest(*([(family, case) for case in family.cases(DEVICE)] for family in FAMILIES))
    for pair in row
    if pair
]
PARAMETERS = [
    pytest.param(family, case, contender, id=f"{case.name}: {contender}")
    for family, case in CASES
    for contender in family.CONTENDERS
]


@pytest.mark.benchmark(timer=REPLAY.now)
@pytest.mark.parametrize(("family", "case", "contender"), PARAMETERS)
def test_kernel(family, case, contender, benchmark, record_of):
    record = record_of(family, case)
    found = record["contenders"][contender]
    if "failed" in found:
        pytest.skip(found["failed"])
    benchmark.group = case.name
    benchmark.extra_info |= {key: found[key] for key in ("peak_bytes", "fraction_of_floor", "errors")}
    REPLAY.samples = iter(found["samples"])
    benchmark.pedantic(REPLAY.step, rounds=len(found["samples"]))
