import pytest

from strop.kernels import _cpu


@pytest.fixture
def library() -> None:
    """csrc/cpu.cpp, built for this processor."""
    if not _cpu.load():
        pytest.skip("csrc/cpu.cpp was not built for this processor")


@pytest.fixture(params=["csrc", "plain"])
def csrc(request, monkeypatch) -> None:
    """With csrc/cpu.cpp's operators and without."""
    if request.param == "plain":
        monkeypatch.setattr(_cpu, "load", lambda: False)
    else:
        request.getfixturevalue("library")
