"""A GPU's whole sampler under Triton's interpreter; test_on_device.py runs this file with TRITON_INTERPRET=1."""

import copy

import pytest
import torch
from test_generate import STOP, flat, make_prompts, tiny

from strop.kernels import layers, sampling
from strop.kernels._triton import decode_attention
from strop.kernels._triton import layers as layer_kernels
from strop.kernels._triton import sampling as sampling_kernels
from strop.kernels.attention import paged
from strop.kernels.integrations.transformers import fuse_layers, merge_projections
from strop.trainer.sampling import on_device
from strop.trainer.sampling.in_process import Generator
from strop.trainer.sampling.on_device import DeviceEngine


@pytest.mark.parametrize("sampling_keys", [{"temperature": 0.0}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9}])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_completions_equal_those_of_the_host(family, sampling_keys, monkeypatch):
    calls = []

    def counted(function):
        return lambda *arguments: (calls.append(function.__name__), function(*arguments))[1]

    model, how = tiny(family), {"k": 3, "max_new_tokens": 10, "stop_ids": STOP, "batch_size": 5, **sampling_keys}
    prompts = make_prompts(40, 3, 33)
    prompts.append(prompts[0][:36])
    expected = Generator(copy.deepcopy(model)).generate(prompts, **how)
    monkeypatch.setattr(on_device, "FEWEST_ROWS", 4)
    monkeypatch.setattr(paged, "_op", counted(decode_attention.decode_attention))
    monkeypatch.setattr(sampling, "_advance", counted(sampling_kernels.advance_rows))
    draw = counted(sampling_kernels.sample_tokens)
    monkeypatch.setattr(on_device, "sample_tokens", lambda *tensors, temperature, top_k, top_p: draw(
        *tensors, temperature, top_k, top_p))
    library = torch.library.Library("strop", "IMPL")
    for name in ("rms_norm", "swiglu", "rotary"):
        library.impl(name, counted(getattr(layer_kernels, name)), "CPU")
    monkeypatch.setattr(layers, "infers", lambda *_: not torch.is_grad_enabled())
    fuse_layers(model, inference=True)
    merge_projections(model)
    calls.clear()  # of layers that were tried
    generator = Generator(model)
    generator.engine = DeviceEngine(model, torch.device("cpu"))
    found = generator.generate(prompts, **how)
    library._destroy()
    assert flat(found) == flat(expected)
    kernels = {"decode_attention", "advance_rows", "sample_tokens", "rotary"}
    assert set(calls) == kernels | ({"rms_norm", "swiglu"} if family == "Llama" else set())
