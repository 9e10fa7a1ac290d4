"""The ahead-of-time check: it compiles without a GPU and reports failures."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def _python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_kernel_compiles_for_every_target():
    done = _python("-m", "benchmarks.aot", "--only", "gather bf16 4096")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 compiled, 0 failed" in done.stdout


# each check in turn, in one process: it takes seconds to start
CHECKS = """
import contextlib, dataclasses, io, json
from benchmarks import aot
from strop.kernels._triton.attention_launch import SM90, Blocks
found = {}
def check(name, case):
    aot.cases = lambda: [case]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        found[name] = [aot.main(["--targets", "90"]), out.getvalue()]
limits, aot.SHARED_LIMIT = aot.SHARED_LIMIT, aot.SHARED_LIMIT | {"90": 8}
case = next(case for case in aot.cases() if case.name == "gather bf16 4096")
check("without a dot", dataclasses.replace(case, has_dot=True))
aot.SHARED_LIMIT = limits
SM90["forward"] = (Blocks(32, 32, 4, 2),) * 3  # too few rows for wgmma
case = next(case for case in aot.attention_cases("90") if case.name == "attention forward bf16 64")
check("slow", case)
aot.NOT_YET = {(case.name, "90")}
check("not yet", case)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def checked():
    """Check to its exit status and what it printed."""
    done = _python("-c", CHECKS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_fails_on_shared_memory_and_on_a_missing_tensor_core(checked):
    status, out = checked["without a dot"]
    assert status == 1
    assert "FAILED: shared memory 32 over 8" in out
    assert "FAILED: a dot without a tensor-core instruction" in out


def test_it_fails_on_slow_tensor_core_instructions(checked):
    """Once as a failure, once as one that NOT_YET lists."""
    status, out = checked["slow"]
    assert status == 1
    assert re.search(r"FAILED: \d+ tensor-core instructions are not wgmma", out)
    status, out = checked["not yet"]
    assert status == 0, out
    assert re.search(r"NOT YET: \d+ tensor-core instructions are not wgmma", out)


@pytest.mark.slow
def test_every_kernel_compiles():
    done = _python("-m", "benchmarks.aot")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_every_candidate_of_the_sweep_compiles():
    """With wgmma, and with TMA where it asks for it."""
    done = _python("-m", "benchmarks.gpu.tiles", "--list")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "True)" in done.stdout
