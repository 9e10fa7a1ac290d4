"""Maps the top-level folders to the import package `strop` (see docs/decisions.md for why they are top level) and
compiles csrc/ where that can be of use: cpu*.cpp with any C++ compiler, the rest with nvcc and a PyTorch of the same
CUDA. STROP_BUILD_CSRC=0 compiles nothing, STROP_BUILD_CSRC=1 all of it, and fails where it cannot.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDERS = {"strop": "trainer/api", "strop.kernels": "kernels", "strop.trainer": "trainer"}
HERE = Path(__file__).parent

# every folder with an __init__.py below the mapped ones is a package of its own
PACKAGE_DIR = {
    ".".join([name, *init.parent.relative_to(HERE / folder).parts]): init.parent.relative_to(HERE).as_posix()
    for name, folder in FOLDERS.items()
    for init in sorted((HERE / folder).rglob("__init__.py"))
    if folder == FOLDERS["strop"] or init.parent != HERE / FOLDERS["strop"]
}

# sm_80 also runs on 8.6 and 8.9; what ends in "a" runs on that very architecture
ARCHITECTURES = ("80", "90a", "100a")
SOURCES = ("csrc/gather.cu", "csrc/ops.cpp")

# compiled once for each set of instructions; by the names that PyTorch has for them, so that it can choose
CPU_SOURCES = tuple(f"csrc/{name}.cpp" for name in ("cpu", "cpu_adamw", "cpu_attention", "cpu_cached", "cpu_decoder"))
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")
CPU_FLAGS = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
if platform.machine() not in ("x86_64", "AMD64"):
    CPU_FLAGS = {"default": ()}  # NEON is part of every aarch64


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = os.pathsep.join([*(os.path.join(home, "bin") for home in homes), os.environ.get("PATH", "")])
    return shutil.which("nvcc", path=os.pathsep.join([folders, "/usr/local/cuda/bin"]))


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")


def find_torch() -> Path | None:
    """The folder of the installed PyTorch, which is not imported. pip builds in an environment of its own, without
    PyTorch, but with the Python that the package is meant for; so look where that one keeps its packages, too."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return next(
        (found for place in places if (found := Path(place, "torch")) and (found / "version.py").is_file()), None
    )


def cuda_major(nvcc: str, torch: Path) -> tuple[str | None, str | None]:
    """The major versions of CUDA that nvcc and PyTorch are of; None for a PyTorch without CUDA."""
    of_nvcc = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    of_torch = re.search(r"^cuda\b[^=]*= *['\"](\d+)", (torch / "version.py").read_text(), re.MULTILINE)
    return of_nvcc and of_nvcc[1], of_torch and of_torch[1]


def extensions() -> list[Extension]:
    wish = os.environ.get("STROP_BUILD_CSRC", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"STROP_BUILD_CSRC must be 0 or 1, got {wish!r}")
    nvcc, torch, compiler = find_nvcc(), find_torch(), find_compiler()
    if wish == "1":
        needed = {
            "no nvcc on PATH or in CUDA_HOME": nvcc,
            "no C++ compiler on PATH or in CXX": compiler,
            "no PyTorch to compile against; install it first": torch,
        }
        for missing, found in needed.items():
            if not found:
                sys.exit(f"STROP_BUILD_CSRC=1: {missing}")
    if wish == "0" or not torch:
        return []
    # optional: an install that did not ask for it goes on without it when the compiler fails
    optional = wish == ""
    names = CPU_FLAGS if compiler else ()
    found = [Extension(f"strop.kernels._cpu_{name}", list(CPU_SOURCES), optional=optional) for name in names]
    of_nvcc, of_torch = cuda_major(nvcc, torch) if nvcc else (None, None)
    if nvcc and (wish == "1" or (of_torch is not None and of_nvcc == of_torch)):
        found.append(Extension("strop.kernels._csrc", list(SOURCES), optional=optional))
    return found


# the interface of PyTorch 2.11, which later ones keep
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def compile_cpu(name: str, out: Path) -> None:
    """The CPU's library for the instructions `name`. Raises CompileError with what the compiler said."""
    torch = find_torch()
    # loops as the sources mark them become vectors, without OpenMP: threads are PyTorch's own
    command = [find_compiler(), "-shared", "-fPIC", "-O3", "-std=c++17", "-fvisibility=hidden", "-fopenmp-simd"]
    command += ["-fno-math-errno", "-fno-trapping-math", *CPU_FLAGS[name], STABLE, f"-I{torch / 'include'}"]
    command += [str(HERE / source) for source in CPU_SOURCES]
    command += [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-o", str(out)]
    _run(command)


def compile_csrc(out: Path, architectures: Sequence[str] = ARCHITECTURES) -> None:
    """One call of nvcc makes the library. Raises CompileError with what it said."""
    torch = find_torch()
    command = [find_nvcc(), "-shared", "-O3", "-std=c++17", "--threads", "2"]
    command += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    # a CPU build's libtorch has no CUDA part, so only libtorch is named, and what it links to holds all symbols
    # wherever the library is loaded
    command += ["-DUSE_CUDA", STABLE, "-Xcompiler=-fPIC,-fvisibility=hidden"]
    command += [f"-I{torch / 'include'}", *(str(HERE / source) for source in SOURCES), f"-L{torch / 'lib'}"]
    command += ["-Xlinker=--no-as-needed,--exclude-libs,ALL", "-ltorch", "-o", str(out)]
    _run(command)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"csrc does not compile: {' '.join(command)}\n{done.stdout}{done.stderr}")


class BuildCsrc(build_ext):
    """compile_cpu and compile_csrc in place of setuptools' compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        # no Python module: torch.ops.load_library takes it, whatever the version of Python
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        out = Path(self.get_ext_fullpath(extension.name))
        out.parent.mkdir(parents=True, exist_ok=True)
        if "_cpu_" in extension.name:
            compile_cpu(extension.name.rpartition("_cpu_")[2], out)
        else:
            compile_csrc(out)


if __name__ == "__main__":
    # not in this folder: another environment's Python that runs here would take it for an installed Strop
    (HERE / "build").mkdir(exist_ok=True)
    setup(
        packages=list(PACKAGE_DIR),
        package_dir=PACKAGE_DIR,
        package_data={"strop.trainer": ["recipes/*.yaml", "recipes/*.jsonl"], "strop.trainer.reports": ["templates/*"]},
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildCsrc},
        # a wheel with the library serves every Python from 3.11 on; libraries are compiled side by side
        options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"parallel": True},
                 "egg_info": {"egg_base": "build"}},
    )
