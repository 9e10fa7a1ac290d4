"""The ahead-of-time check: it compiles without a GPU and reports failures."""

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


def test_it_fails_on_shared_memory_and_on_a_missing_tensor_core():
    code = """
import dataclasses
from benchmarks import aot
case = next(case for case in aot.cases() if case.name == "gather bf16 4096")
aot.SHARED_LIMIT["90"] = 8
aot.cases = lambda: [dataclasses.replace(case, has_dot=True)]
raise SystemExit(aot.main(["--targets", "90"]))
"""
    done = _python("-c", code)
    assert done.returncode == 1, done.stderr
    assert "FAILED: shared memory 32 over 8" in done.stdout
    assert "FAILED: a dot without a tensor-core instruction" in done.stdout


def test_it_fails_on_slow_tensor_core_instructions():
    """Once as a failure, once as one that NOT_YET lists."""
    code = """
from benchmarks import aot
from strop.kernels._triton.attention_launch import SM90, Blocks
SM90["forward"] = (Blocks(32, 32, 4, 2),) * 3  # too few rows for wgmma
case = next(case for case in aot.attention_cases("90") if case.name == "attention forward bf16 64")
if not {not_yet}:
    aot.NOT_YET = {{(case.name, "90")}}
aot.cases = lambda: [case]
raise SystemExit(aot.main(["--targets", "90"]))
"""
    done = _python("-c", code.format(not_yet=True))
    assert done.returncode == 1, done.stderr
    assert re.search(r"FAILED: \d+ tensor-core instructions are not wgmma", done.stdout)
    done = _python("-c", code.format(not_yet=False))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"NOT YET: \d+ tensor-core instructions are not wgmma", done.stdout)


@pytest.mark.slow
def test_every_kernel_compiles():
    done = _python("-m", "benchmarks.aot")
    assert done.returncode == 0, done.stdout + done.stderr
