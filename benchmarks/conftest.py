"""Options of the suite, and one measurement per case for all tests of its contenders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from . import measure, suite
from .suite import Case

RATES = pytest.StashKey[dict[str, float]]()
MEASURED = pytest.StashKey[dict[str, dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("strop benchmarks")
    group.addoption("--results", type=Path, help="merge what is measured into this JSON file")
    group.addoption("--cases", default="", help="only cases whose name this regular expression finds, whole ones")
    group.addoption("--rounds", type=int, default=None, help="rounds of each case (default 9, on a GPU 15)")
    group.addoption("--case-seconds", type=float, default=5.0, help="about how long a case's rounds may take together")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("cases"):
        return
    wanted = [item for item in items if re.search(config.getoption("cases"), item.callspec.params["case"].name)]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = wanted


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def record_of(request: pytest.FixtureRequest, device: torch.device) -> Callable[[object, Case], dict]:
    """The record of a case, measured with all selected contenders on first use."""
    config = request.config
    done = config.stash.setdefault(MEASURED, {})

    def record(family, case: Case) -> dict:
        if case.name in done:
            return done[case.name]
        if RATES not in config.stash:
            config.stash[RATES] = measure.rates(device)
        params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
        names = [p["contender"] for p in params if p.get("case") == case]
        rounds = config.getoption("rounds") or (15 if device.type == "cuda" else 9)
        seconds = config.getoption("case_seconds")
        done[case.name] = suite.measure_case(family, case, names, device, config.stash[RATES], rounds, seconds)
        if path := config.getoption("results"):
            # After each case, so that a time limit loses no finished measurement.
            suite.merge(path, measure.environment(device), {case.name: done[case.name]})
        return done[case.name]

    return record
