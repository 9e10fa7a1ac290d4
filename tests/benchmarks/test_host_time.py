"""Launches without a GPU: what goes past Triton's look-up launches what Triton would."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from benchmarks import host_time
from strop.kernels import _triton


@triton.jit
def scale_kernel(x_ptr, out_ptr, count, stride, scale, BLOCK: tl.constexpr, TWICE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < count, other=0.0) * scale
    tl.store(out_ptr + at, x * 2 if TWICE else x, mask=at < count)


def test_a_launch_like_one_before_is_what_triton_launches(monkeypatch):
    """Integers that are 1 or a multiple of 16, alignment, dtypes, floats that change, and constants."""
    x = torch.zeros(256)
    usual = {"x": x, "count": 64, "stride": 2, "scale": 0.5, "BLOCK": 64, "TWICE": False}
    variants = [{}, {"scale": 2.0}, {"count": 63}, {"count": 48}, {"stride": 1}, {"x": x[1:]}, {"x": x.half()},
                {"TWICE": True}, {"count": 1 << 33}]
    monkeypatch.setattr(_triton, "_compiled", {})
    found, full = {}, []
    run = type(scale_kernel).run
    monkeypatch.setattr(type(scale_kernel), "run", lambda *a, **k: (full.append(1), run(*a, **k))[1])
    with host_time.without_gpu(keep=True) as gpu:
        for again in (False, True, True):
            for i, change in enumerate(variants):
                case = usual | change
                arguments = [case[name] for name in ("x", "x", "count", "stride", "scale")]
                options = {"BLOCK": case["BLOCK"], "TWICE": case["TWICE"], "num_warps": 2}
                if again:
                    _triton.launch_again(scale_kernel, (3, 2), tuple(arguments), options)
                else:
                    scale_kernel[(3, 2)](*arguments, **options)
                function, grid, given = gpu.launches[-1]
                assert grid == (3, 2, 1) and [*given] == [*arguments, case["BLOCK"], case["TWICE"]]
                assert found.setdefault(i, function) == function, change
    assert len(full) == 2 * len(variants) - 1, "each once by itself and once to be remembered, but for another float"
    assert found[0] == found[1] == found[3] and len({*found.values()}) == 7
    assert len(_triton._compiled) == len(variants) - 1


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(_triton, "_compiled", {})
    monkeypatch.setattr(_triton, "MOST", 3)
    x = torch.zeros(64)
    with host_time.without_gpu(keep=True) as gpu:
        for count in (*range(40, 50), *range(40, 50)):
            _triton.launch_again(scale_kernel, (1,), (x, x, count, 2, 1.0), {"BLOCK": 64, "TWICE": False})
            assert gpu.launches[-1][2][2] == count and len(_triton._compiled) <= 3


def test_on_amd_nothing_is_remembered(monkeypatch):
    monkeypatch.setattr(_triton, "_compiled", {})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with host_time.without_gpu():
        x = torch.zeros(64)
        _triton.launch_again(scale_kernel, (1,), (x, x, 40, 2, 1.0), {"BLOCK": 64, "TWICE": False})
    assert not _triton._compiled


def test_a_launch_with_tensor_descriptors_goes_by_triton(monkeypatch):
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    monkeypatch.setattr(_triton, "_compiled", {})
    x = torch.zeros(64, 64)
    given = {"X_TMA": descriptor(x, [64, 64], [64, 1], [16, 64]), "BLOCK": 64}
    launched = []
    _triton.launch_again({(1,): lambda *a, **options: launched.append((a, options))}, (1,), (x,), given)
    assert launched == [((x,), given)] and not _triton._compiled


@pytest.mark.slow
def test_it_prints_every_case(capsys, monkeypatch):
    monkeypatch.setattr(host_time, "microseconds", lambda run, calls: (run(), 2.0)[1])
    host_time.main()
    assert capsys.readouterr().out.count("1.00") == 3
