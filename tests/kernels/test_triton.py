"""The Triton kernels under Triton's interpreter, in a subprocess, because the interpreter is selected at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = ("triton_cases.py", "triton_attention_cases.py", "triton_decode_cases.py")


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(chosen: str):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    files = [str(Path(__file__).with_name(name)) for name in CASES]
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
