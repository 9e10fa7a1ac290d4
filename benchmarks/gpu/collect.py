"""Collect what must travel to a machine with a GPU and no network: `make gpu-wheels`.

    python -m benchmarks.gpu.collect [--folder gpu-carried]

The folder gets wheels for Python 3.12 that such a machine lacks beside PyTorch, and csrc's CUDA library for sm_90a.
Exits with 1 if they and the working tree together are over the 64 MiB that may travel.
"""

from __future__ import annotations

import argparse
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 64 << 20
# In the versions of requirements/test.txt. Everything else that these need comes with PyTorch's images.
PACKAGES = (
    "pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection",
    "liger-kernel", "trl", "datasets", "dill", "multiprocess", "cut-cross-entropy",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pins() -> dict[str, str]:
    """{package: version} of the test requirements."""
    text = (ROOT / "requirements" / "test.txt").read_text()
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", text, re.MULTILINE))


def download(folder: Path) -> None:
    versions = pins()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.12", "--implementation", "cp", "--dest", str(folder)]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *(f"{name}=={versions[name]}" for name in PACKAGES)], check=True)


def build_library(folder: Path) -> str:
    """Compile csrc for sm_90a alone; returns what happened. A machine with nvcc builds it where it is missing."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    if not setup["find_nvcc"]():
        return "no nvcc: the library is left out"
    setup["compile_csrc"](folder / "_csrc.so", ("90a",))
    return f"_csrc.so for sm_90a, {(folder / '_csrc.so').stat().st_size / 2**20:.1f} MiB"


def tree_bytes() -> int:
    """Size of the files that git tracks or does not ignore."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
        capture_output=True, text=True,
    ).stdout
    return sum((ROOT / name).stat().st_size for name in names.split("\0") if name and (ROOT / name).is_file())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "gpu-carried")
    folder = parser.parse_args(arguments).folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    download(folder)
    print(build_library(folder))
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    (folder / "commit").write_text(commit.stdout)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name, size in sizes.items():
        print(f"{size / 2**20:7.1f} MiB  {name}")
    total = sum(sizes.values()) + tree_bytes()
    print(f"{total / 2**20:7.1f} MiB  with the working tree, of {LIMIT >> 20}")
    return 0 if total <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
