"""The folder `kernels` must not shadow Hugging Face's package of that name, even from the repository root."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FAKE = """
__version__ = "{version}"
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return self
    def __class_getitem__(cls, item): return cls
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""


def _python(code: str, *paths: Path) -> str:
    """Run code from the repository root with the root first on sys.path, as `python -c` does, then `paths`."""
    code = f"import sys; sys.path[1:1] = {[str(p) for p in paths]!r}; assert sys.path[0] == ''\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def installed_kernels(tmp_path: Path) -> Path:
    """A directory with a distribution `kernels` of a version that transformers accepts."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    package, info = tmp_path / "kernels", tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(FAKE.format(version=KERNELS_MIN_VERSION))
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    (info / "RECORD").write_text("kernels/__init__.py,,\n")
    return tmp_path


ORDERS = ["import strop.kernels, transformers", "import transformers, strop.kernels"]
USE = "from transformers.models.llama import modeling_llama; from transformers.utils import is_kernels_available\n"


@pytest.mark.parametrize("order", ORDERS)
def test_without_the_package(order: str):
    out = _python(f"{order}\n{USE}import strop.kernels as k; print(is_kernels_available(), k.PackedGroups.__module__)")
    assert out.split() == ["False", "strop.kernels.layout"]


@pytest.mark.parametrize("order", ORDERS)
def test_with_the_package(order: str, installed_kernels: Path):
    code = f"{order}\n{USE}import kernels; print(is_kernels_available(), kernels.__file__)"
    available, file = _python(code, installed_kernels).split()
    assert available == "True"
    assert Path(file).is_relative_to(installed_kernels)


def test_the_bare_name_offers_nothing():
    out = _python("import kernels\nprint(hasattr(kernels, 'PackedGroups'), hasattr(kernels, '__version__'))")
    assert out.split() == ["False", "False"]


def test_importing_the_ops_does_not_import_transformers():
    assert _python("import sys, strop.kernels\nprint('transformers' in sys.modules)").strip() == "False"
