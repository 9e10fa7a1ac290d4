"""RMSNorm and SwiGLU of the CPU: transformers' own values, gradients no further from fp64 than PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from strop.kernels.integrations.transformers import fuse_layers
from strop.kernels.layers import rms_norm, swiglu_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain_norm(x, weight, eps):
    norm = LlamaRMSNorm(x.shape[-1], eps).to(x.dtype)
    norm.weight = nn.Parameter(weight)
    if x.dtype == torch.float64:  # transformers' own computes in fp32 whatever comes in
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def plain_swiglu(gate, up, weight):
    return F.linear(F.silu(gate) * up, weight)


def gradients(function, inputs, upstream, *rest):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    return out.detach(), torch.autograd.grad(out, inputs, upstream.to(out.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 1, 576), (2, 600, 576), (1, 5, 3, 64), (1, 0, 8)])
def test_rms_norm(dtype, shape):
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    compare(rms_norm, plain_norm, (x, weight), upstream, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 1, 1536), (2, 300, 96), (1, 0, 8)])
def test_swiglu_linear(dtype, shape):
    torch.manual_seed(0)
    gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight, upstream = torch.randn(16, shape[-1]).to(dtype), torch.randn(*shape[:-1], 16).to(dtype)
    compare(swiglu_linear, plain_swiglu, (gate, up, weight), upstream)


def compare(ours, plain, inputs, upstream, *rest):
    out, found = gradients(ours, inputs, upstream, *rest)
    plain_out, plain_found = gradients(plain, inputs, upstream, *rest)
    truth = gradients(plain, [x.double() for x in inputs], upstream.double(), *rest)[1]
    assert torch.equal(out, plain_out)
    for mine, theirs, exact in zip(found, plain_found, truth, strict=True):
        allowed = 2 * (theirs.double() - exact).norm() + 1e-7 * exact.norm()
        assert (mine.double() - exact).norm() <= allowed


def test_frozen_inputs_get_no_gradient():
    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and x.grad is None
    gate, frozen = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    swiglu_linear(gate, torch.randn(3, 8), frozen).sum().backward()
    assert gate.grad is not None and frozen.grad is None


def test_a_fused_model_gives_the_same_bits_and_gradients():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
    )
    model = LlamaForCausalLM(config)
    ids = torch.randint(40, (1, 9))

    def run():
        model.zero_grad()
        logits = model(ids).logits
        logits.square().sum().backward()
        return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    logits, grads = run()
    assert fuse_layers(model) == {"rms_norm": 5, "swiglu": 2}
    fused_logits, fused_grads = run()
    assert torch.equal(logits, fused_logits)
    for name, grad in grads.items():
        torch.testing.assert_close(fused_grads[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_what_computes_something_else_is_left_alone():
    class Gemma(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    class Gelu(nn.Module):
        def __init__(self, bias=False):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8, bias=bias)
            self.act_fn = nn.GELU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    class Biased(Gelu):
        def __init__(self):
            super().__init__(bias=True)
            self.act_fn = nn.SiLU()

    assert fuse_layers(nn.ModuleList([Gemma(8), Gelu(), nn.LayerNorm(8)])) == {"rms_norm": 0, "swiglu": 0}
    biased, x = Biased(), torch.randn(2, 8)
    expected = biased(x)
    assert fuse_layers(nn.ModuleList([biased])) == {"rms_norm": 0, "swiglu": 1}
    assert torch.equal(biased(x), expected)
