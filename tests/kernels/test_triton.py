"""The Triton kernels under Triton's interpreter, in a subprocess, because the interpreter is selected at import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = {"training": ("triton_cases.py", "triton_attention_cases.py"), "decoding": ("triton_decode_cases.py",)}


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", CASES.values(), ids=CASES)
def test_kernels_under_the_interpreter(chosen: str, names: tuple[str, ...]):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    files = [str(Path(__file__).with_name(name)) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
