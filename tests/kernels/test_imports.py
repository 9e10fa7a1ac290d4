"""The folder `kernels` must not shadow Hugging Face's package of that name, even from the repository root."""

import json
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

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


# Run from the repository root, with the root first on sys.path, as `python -c` does. Loaded before is only what takes
# seconds and knows neither of the two. A line of stdin is [code, more paths], its answer [status, output].
SERVER = """
import json, os, sys, tempfile, traceback
import huggingface_hub, torch, torch._dynamo, torch.distributed.fsdp, torch.distributed.tensor
for line in sys.stdin:
    code, paths = json.loads(line)
    with tempfile.TemporaryFile() as out:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            sys.path[1:1] = paths
            status = 1
            try:
                assert sys.path[0] == "" and not {"transformers", "strop.kernels", "kernels"} & set(sys.modules)
                exec(code, {})
                status = 0
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
            os._exit(status)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        print(json.dumps([status, out.read().decode()]), flush=True)
"""


@pytest.fixture(scope="module")
def python():
    """python(code, *paths) runs code in a process of its own and returns what it printed."""
    with subprocess.Popen([sys.executable, "-c", SERVER], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True) as server:

        def run(code: str, *paths: Path) -> str:
            print(json.dumps([code, [str(p) for p in paths]]), file=server.stdin, flush=True)
            status, out = json.loads(server.stdout.readline())
            assert status == 0, out[-3000:]
            return out

        yield run
        server.stdin.close()


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
def test_without_the_package(order: str, python):
    out = python(f"{order}\n{USE}import strop.kernels as k; print(is_kernels_available(), k.PackedGroups.__module__)")
    assert out.split() == ["False", "strop.kernels.layout"]


@pytest.mark.parametrize("order", ORDERS)
def test_with_the_package(order: str, installed_kernels: Path, python):
    code = f"{order}\n{USE}import kernels; print(is_kernels_available(), kernels.__file__)"
    available, file = python(code, installed_kernels).split()
    assert available == "True"
    assert Path(file).is_relative_to(installed_kernels)


def test_the_bare_name_offers_nothing(python):
    out = python("import kernels\nprint(hasattr(kernels, 'PackedGroups'), hasattr(kernels, '__version__'))")
    assert out.split() == ["False", "False"]


def test_importing_the_ops_does_not_import_transformers(python):
    assert python("import sys, strop.kernels\nprint('transformers' in sys.modules)").strip() == "False"
