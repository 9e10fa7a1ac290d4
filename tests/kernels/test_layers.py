"""RMSNorm, SwiGLU and rotary embeddings on the CPU: transformers' values, at most twice PyTorch's error against fp64,
with csrc/cpu.cpp and without it."""

import copy
import gc
import math
import weakref
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from strop.kernels import _cpu, layers
from strop.kernels.integrations.transformers import (
    _fuse_with_liger,
    _global,
    _norm_forward,
    _swiglu_forward,
    fuse_layers,
    merge_projections,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FUSED = {"rms_norm": 5, "swiglu": 2, "rotary": 2}


def plain_norm(x, weight, eps):
    if x.dtype == torch.float64:  # transformers' own computes in fp32 whatever comes in
        return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    norm = LlamaRMSNorm(x.shape[-1], eps).to(x.dtype)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def plain_swiglu(gate, up, weight):
    return F.linear(F.silu(gate) * up, weight)


def plain_rotary(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def results(function, inputs, upstream, *rest):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    with torch.no_grad():
        assert torch.equal(function(*inputs, *rest), out)
    return [out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))]


def compare(ours, plain, inputs, upstream, *rest):
    truths = results(plain, [x.double() for x in inputs], upstream.double(), *[_double(x) for x in rest])
    for mine, theirs, truth in zip(
        results(ours, inputs, upstream, *rest), results(plain, inputs, upstream, *rest), truths, strict=True
    ):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        allowed = 2 * (theirs.double() - truth).norm() + 1e-7 * truth.norm()
        assert (mine.double() - truth).norm() <= allowed


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 1, 576), (2, 600, 576), (1, 5, 3, 64), (4, 3), (1, 0, 8)])
def test_rms_norm(csrc, dtype, shape):
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape).to(dtype)
    compare(layers.rms_norm, plain_norm, (x, weight), upstream, 1e-5)
    rows, grad = x.transpose(0, -2), upstream.transpose(0, -2)  # not contiguous
    compare(layers.rms_norm, plain_norm, (rows, weight), grad, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7, 24), (1, 1, 1536), (2, 300, 96), (5, 1), (1, 0, 8)])
def test_swiglu_linear(csrc, dtype, shape):
    torch.manual_seed(0)
    gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    weight, upstream = torch.randn(16, shape[-1]).to(dtype), torch.randn(*shape[:-1], 16).to(dtype)
    compare(layers.swiglu_linear, plain_swiglu, (gate, up, weight), upstream)
    compare(layers.swiglu, lambda gate, up: F.silu(gate) * up, (gate, up), gate)
    compare(layers.swiglu, lambda gate, up: F.silu(gate) * up, (gate.mT.contiguous().mT, up), gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 9, 300, 64), (1, 1, 1, 2), (1, 3, 7, 10), (1, 2, 0, 8)])
def test_rotary(csrc, dtype, shape):
    """cos and sin of the two halves differ, unlike in any model: the backward must transpose all such maps."""
    torch.manual_seed(0)
    by_token = torch.randn(shape).transpose(1, 2).contiguous().transpose(1, 2).to(dtype)
    cos, sin = (torch.randn(1, *shape[2:]).to(dtype) for _ in range(2))
    for x in (by_token, by_token.contiguous(), by_token.mT.contiguous().mT):
        compare(lambda x: layers.rotary(x, cos, sin), lambda x: plain_rotary(x, cos.to(x), sin.to(x)), (x,), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_is_transformers_own(dtype):
    x, weight = torch.randn(3, 24).to(dtype), torch.randn(24).to(dtype)
    assert torch.equal(layers.rms_norm_reference(x, weight, 1e-5), plain_norm(x, weight, 1e-5))
    q, cos, sin = torch.randn(1, 3, 5, 8).to(dtype), torch.randn(1, 5, 8).to(dtype), torch.randn(1, 5, 8).to(dtype)
    assert torch.equal(layers.rotary_reference(q, cos, sin), modeling_llama.apply_rotary_pos_emb(q, q, cos, sin)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite_stay_so(library, dtype):
    values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-40, 0.0, -0.0, 88.5, -88.5, 104.0, -104.0])
    gate = values.to(dtype)
    product = torch.empty_like(gate)
    torch.ops.strop.cpu_silu_mul(gate, torch.ones_like(gate), product)
    torch.testing.assert_close(product, F.silu(gate), equal_nan=True)
    rows = torch.stack([values, torch.ones(12), torch.full((12,), 1e30)]).to(dtype)
    weight = torch.ones(12, dtype=dtype)
    torch.testing.assert_close(layers.rms_norm(rows, weight, 1e-5), plain_norm(rows, weight, 1e-5), equal_nan=True)


def test_the_exponential_is_exact_to_two_units_in_the_last_place(library):
    """Over the range of a softmax: the weights of scores x and 0 have the ratio e^x, up to one more rounding."""
    x = torch.cat([torch.linspace(-87, 0, 100_000), torch.linspace(-1e-3, 0, 1000), torch.tensor([-87.5, -1e4])])
    weights = torch.stack([x, torch.zeros_like(x)], 1)
    torch.ops.strop.cpu_causal_softmax_backward(weights, torch.zeros_like(weights), 1, 1.0)
    truth = x.double().exp()
    found = weights[:, 0].double() / weights[:, 1].double()
    assert ((found - truth).abs() <= 2.5 * 2**-23 * truth + 1.2e-38).all()


def test_bits_do_not_depend_on_the_number_of_threads(library):
    torch.manual_seed(0)
    x, weight, upstream = torch.randn(700, 96).bfloat16(), torch.randn(96).bfloat16(), torch.randn(700, 96).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(layers.rms_norm, (x, weight), upstream, 1e-5))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("silu_mul", (torch.ones(4), torch.ones(5), torch.ones(4)), "up has the wrong"),
        ("silu_mul", (torch.ones(4), torch.ones(4).half(), torch.ones(4)), "up has the wrong"),
        ("silu_mul", (torch.ones(4), torch.ones(4), torch.ones(4, 2)[:, 0]), "product has the wrong"),
        ("silu_mul", (torch.ones(4).double(),) * 3, "bf16 or fp32"),
        ("rms_norm", (torch.ones(2, 3), torch.ones(3), 1e-5, torch.ones(2, 3), torch.ones(3)), "inverse has the wrong"),
        ("rotate", (torch.ones(1, 2, 3), torch.ones(2, 3), torch.ones(2, 3), False, torch.ones(1, 2, 3)), "even"),
    ],
)
def test_what_does_not_fit_raises(library, name, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.strop, f"cpu_{name}")(*arguments)


def test_frozen_inputs_get_no_gradient(csrc):
    x, weight = torch.randn(3, 8), torch.randn(8, requires_grad=True)
    layers.rms_norm(x, weight, 1e-5).sum().backward()
    assert weight.grad is not None and x.grad is None
    gate, frozen = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8)
    layers.swiglu_linear(gate, torch.randn(3, 8), frozen).sum().backward()
    assert gate.grad is not None and frozen.grad is None


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 40}


def tiny_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fused_model_gives_the_same_values_and_gradients(library, dtype):
    model, ids = tiny_llama().to(dtype), torch.randint(40, (1, 9))

    def run():
        model.zero_grad()
        logits = model(ids).logits
        logits.float().square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = run()
    assert fuse_layers(model) == FUSED
    tolerance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for found, value in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance * value.abs().max().item())


def test_without_the_library_a_model_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(_cpu, "load", lambda: False)
    model = tiny_llama()
    assert fuse_layers(model) == {}
    assert not any("forward" in vars(module) or type(module).forward in OURS for module in model.modules())


OURS = (_norm_forward, _swiglu_forward)


def test_another_model_of_the_same_class_is_untouched(library):
    other, plain = tiny_llama(), dict(vars(modeling_llama))
    assert fuse_layers(tiny_llama()) == FUSED
    assert vars(modeling_llama) == plain
    for model in (other, tiny_llama()):
        assert all(getattr(modeling_llama, type(module).__name__, type(module)) is type(module)
                   for module in model.modules())  # fmt: skip


def test_a_fused_model_is_freed_by_reference_counting(library):
    model, ids = tiny_llama(), torch.randint(40, (1, 9))
    gc.collect()
    gc.disable()
    try:
        fuse_layers(model)
        model(ids).logits.sum().backward()
        weights = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


@pytest.mark.parametrize("biases", [False, True])
def test_merged_projections_compute_the_same(library, biases):
    model, ids = LlamaForCausalLM(LlamaConfig(**TINY, attention_bias=biases)).eval(), torch.randint(40, (1, 9))
    weights = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():  # biases too
            p.add_(0.1 * torch.randn_like(p))
        expected = model(ids).logits
        fuse_layers(model, inference=True)
        layers = model.config.num_hidden_layers
        assert merge_projections(model) == {"swiglu": layers, "attention": layers}
        assert sum(p.numel() for p in model.parameters()) == weights
        for _ in range(2):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert all(m.x is None and not m.products for m in model.modules() if type(m).__name__ == "_Merged")
        assert merge_projections(model) == {"swiglu": 0, "attention": 0}


def test_a_fused_model_can_be_copied(library):
    model, ids = tiny_llama(), torch.randint(40, (1, 9))
    fuse_layers(model)
    copied = copy.deepcopy(model)
    expected = model(ids).logits
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert torch.equal(copied(ids).logits, expected)
    assert fuse_layers(copied) == FUSED, "fused once, found again"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_running_out_of_memory_is_not_taken_for_another_layer(library, error):
    class Norm(LlamaRMSNorm):
        def forward(self, hidden_states):
            raise error

    with pytest.raises(RuntimeError, match="memory"):
        fuse_layers(nn.ModuleList([Norm(8)]))


def test_a_model_in_fp16_stays_as_it_is(library):
    assert fuse_layers(tiny_llama().half()) == {}


def test_rotary_embeddings_of_several_rows_are_transformers_own(library):
    plain, model = modeling_llama.apply_rotary_pos_emb, tiny_llama()
    assert fuse_layers(model) == FUSED and fuse_layers(model) == FUSED
    fused = _global(type(model.model.layers[0].self_attn).forward, "apply_rotary_pos_emb")
    assert fused.__wrapped__ is plain, "wrapped once"
    q, k, cos = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 5, 8)
    for found, value in zip(fused(q, k, cos, cos), plain(q, k, cos, cos), strict=True):
        assert torch.equal(found, value)


def test_a_compiled_model_runs_fused(library):
    model, ids = tiny_llama(), torch.randint(40, (1, 9))
    fuse_layers(model)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_computes_something_else_is_left_alone(library):
    class Gemma(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 2

    class Gated(LlamaRMSNorm):
        def forward(self, hidden_states, gate):
            return super().forward(hidden_states) * gate

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

    class Other(Biased):
        def forward(self, x):
            return super().forward(x) * 1.02

    others = nn.ModuleList([Gemma(8), Gated(8), Gelu(), Other(), nn.LayerNorm(8)])
    assert fuse_layers(others) == {"rms_norm": 0, "swiglu": 0, "rotary": 0}
    assert fuse_layers(others.bfloat16()) == {"rms_norm": 0, "swiglu": 0, "rotary": 0}
    biased, x = Biased(), torch.randn(2, 8)
    expected = biased(x)
    assert fuse_layers(nn.ModuleList([biased])) == {"rms_norm": 0, "swiglu": 1, "rotary": 0}
    torch.testing.assert_close(biased(x), expected)


def test_ligers_layers_reach_one_model_only(monkeypatch):
    """Liger's kernels need a GPU; plain operations that count their calls replace them here."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import monkey_patch, rms_norm, swiglu

    calls = []

    def norm(x, weight, eps, offset, *_):
        calls.append("norm")
        return layers.rms_norm_reference(x, weight + offset, eps)

    def rotary(q, k, cos, sin, *_):
        calls.append("rotary")
        return layers.rotary_reference(q, cos, sin), layers.rotary_reference(k, cos, sin)

    def product(gate, up, *_):
        calls.append("swiglu")
        return F.silu(gate) * up

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", SimpleNamespace(apply=norm))
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SimpleNamespace(apply=product))
    monkeypatch.setattr(monkey_patch, "liger_rotary_pos_emb", rotary)
    plain, other = dict(vars(modeling_llama)), tiny_llama()
    model, ids = tiny_llama(), torch.randint(40, (1, 9))
    expected = model(ids).logits
    assert _fuse_with_liger(model) == {"liger": sum(FUSED.values())}
    assert vars(modeling_llama) == plain
    found = model(ids).logits
    torch.testing.assert_close(found, expected)
    assert {name: calls.count(name) for name in ("norm", "swiglu", "rotary")} == {"norm": 5, "swiglu": 2, "rotary": 2}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    calls.clear()
    for untouched in (other, tiny_llama()):
        assert torch.equal(untouched(ids).logits, expected)
    assert not calls
    assert not any(isinstance(value, MethodType) for module in model.modules() for value in vars(module).values())
