"""Maps the top-level folders to the import package `strop` (see docs/decisions.md for why they are top level)."""

from pathlib import Path

from setuptools import setup

FOLDERS = {"strop.kernels": "kernels", "strop.trainer": "trainer"}
HERE = Path(__file__).parent

# every folder with an __init__.py below the mapped ones is a package of its own
PACKAGE_DIR = {
    ".".join([name, *init.parent.relative_to(HERE / folder).parts]): init.parent.relative_to(HERE).as_posix()
    for name, folder in FOLDERS.items()
    for init in sorted((HERE / folder).rglob("__init__.py"))
}

setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"strop.trainer": ["recipes/*.yaml", "templates/*"]},
)
