"""What a run says and assumes about its GPU, without one."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from strop.trainer.errors import UserError
from strop.trainer.run import world
from strop.trainer.run.world import World, join
from strop.trainer.training import flops

CUDA = torch.device("cuda", 0)
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H20": 148e12, "NVIDIA H800": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A10": 125e12, "NVIDIA A10G": None, "NVIDIA A1000 Laptop GPU": None, "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2250e12, "NVIDIA L4": 121e12, "NVIDIA L40": 181e12, "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": None, "AMD Instinct MI300X": 1307e12, "Tesla V100-SXM2-32GB": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peak_by_the_name_of_the_gpu(name: str):
    assert flops.data_sheet(name) == PEAKS[name]


@pytest.mark.parametrize(("name", "dtype"), [("NVIDIA A10G", torch.bfloat16), ("NVIDIA H200", torch.float32)], ids=str)
def test_what_no_data_sheet_says_is_measured_beyond_the_launch(name: str, dtype: torch.dtype, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(flops, "measured", lambda *arguments: calls.append(arguments) or 1e12)
    flops.peak_flops.cache_clear()
    assert flops.peak_flops(CUDA, dtype) == 1e12
    ((_, _, rows),) = calls
    assert 2 * rows**3 / 1e15 > 1e-4, "at the rate of the fastest GPU it takes 100 us at least, a launch takes 5"
    flops.peak_flops.cache_clear()


def test_a_cpu_is_measured():
    flops.peak_flops.cache_clear()
    assert 1e8 < flops.peak_flops(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.parametrize("there", [True, False])
def test_a_run_on_a_gpu_says_that_liger_lacks(there: bool, monkeypatch):
    monkeypatch.setattr(world, "find_spec", lambda name: object() if there else None)
    says = World(device=CUDA).hardware
    assert says == "cuda" if there else "without liger-kernel" in says and "strop[gpu]" in says
    assert importlib.util.find_spec("strop")


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_ranks_than_gpus(device: str, monkeypatch):
    monkeypatch.setattr(world, "die_with_parent", lambda: None)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 2))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match=r"4 ranks on this machine, but torch finds 2 CUDA.*--nproc-per-node=2"):
            join(device, 1)
    finally:
        torch.set_num_threads(threads)
