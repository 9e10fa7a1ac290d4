"""Maps the top-level folders to the import package `strop` (see docs/decisions.md for why they are top level)."""

from setuptools import setup

PACKAGE_DIR = {
    "strop.kernels": "kernels",
    "strop.kernels.integrations": "kernels/integrations",
    "strop.trainer": "trainer",
    "strop.trainer.stages": "trainer/stages",
}

setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"strop.trainer": ["recipes/*.yaml", "templates/*"]},
)
