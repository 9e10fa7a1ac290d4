"""LoRA layers in one forward and backward, beside PEFT's own."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
from strop.kernels.integrations.peft import fuse_adapters  # noqa: E402

# Views and allocations launch nothing.
FREE = {"t", "transpose", "view", "_unsafe_view", "reshape", "expand", "detach", "empty", "new_empty", "alias"}


def adapted(dtype=torch.float32, bias: bool = False, inside: int = 24, out: int = 40, **options) -> nn.Module:
    """A linear layer with an adapter that is not zero."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=["0"], **options)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(inside, out, bias=bias)).to(dtype), config,
                                autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model.train()


def gradients(model: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad] + [x] * x.requires_grad
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out, trained, upstream.to(out.dtype))]


def pair(dtype=torch.float32, **options) -> tuple[nn.Module, nn.Module]:
    """PEFT's and the same, fused."""
    plain = adapted(dtype, **options)
    fused = copy.deepcopy(plain)
    assert fuse_adapters(fused) == 1
    return fused, plain


@settings(max_examples=10, deadline=None)
@given(shape=st.sampled_from([(7,), (2, 3), (1, 5, 2), (1, 1)]), bias=st.booleans(), needs_x=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), frozen=st.sampled_from(["", "lora_A", "lora_B"]))
def test_error_is_at_most_that_of_peft(shape, bias: bool, needs_x: bool, dtype: torch.dtype, frozen: str):
    fused, plain = pair(dtype, bias=bias)
    for model in (fused, plain):
        for name, p in model.named_parameters():
            if frozen and frozen in name:
                p.requires_grad_(False)
    x, upstream = torch.randn(*shape, 24).to(dtype), torch.randn(*shape, 40).to(dtype)
    exact = gradients(copy.deepcopy(plain).double(), x.double().requires_grad_(needs_x), upstream.double())
    ours, theirs = (gradients(model, x.clone().requires_grad_(needs_x), upstream) for model in (fused, plain))
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - c).norm() <= 1.5 * (b - c).norm() + torch.finfo(dtype).eps * c.norm()


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.found[function.overloadpacket.__name__] += function.overloadpacket.__name__ not in FREE
        return function(*arguments, **(options or {}))


def test_launches_and_saved_bytes():
    found = {}
    for name, model in zip(("fused", "plain"), pair(torch.bfloat16), strict=True):
        x = torch.randn(1, 6, 24, dtype=torch.bfloat16, requires_grad=True)
        weights, saved = {p.data_ptr() for p in model.parameters()}, {}

        def keep(tensor, saved=saved, weights=weights):
            if tensor.data_ptr() not in weights:
                saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        counts = [Counts(), Counts()]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counts[0]:
            out = model(x)
        with counts[1]:
            out.sum().backward()
        for one in counts:
            for kind in ("sum", "ones_like", "expand"):  # of the loss
                del one.found[kind]
        found[name] = [+one.found for one in counts], sum(saved.values())
    (forward, backward), saved = found["fused"]
    assert forward == {"mm": 2, "addmm_": 1}
    assert backward == {"mm": 2, "addmm": 2, "addmm_": 1}
    assert saved == 2 * 6 * (24 + 4), "x and x A^T"
    (forward, backward), saved = found["plain"]
    assert sum(forward.values()) == 5 and sum(backward.values()) >= 7 and saved == 2 * 6 * (24 + 4)


def test_what_a_fused_layer_leaves_to_peft(monkeypatch):
    def never(*_):
        raise AssertionError

    x = torch.randn(3, 24)
    fused, plain = pair(lora_dropout=0.5)
    monkeypatch.setattr("strop.kernels.integrations.peft._LoraLinear.apply", never)
    for model in (fused, plain):
        torch.manual_seed(3)
        model.found = model(x)
    assert torch.equal(fused.found, plain.found), "dropout in training"
    with pytest.raises(AssertionError):
        fused.eval()(x)
    fused, plain = pair()
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(x), plain(x))
    layer = next(m for m in fused.modules() if hasattr(m, "lora_A"))
    layer.base_layer.weight.ds_id = 1  # as DeepSpeed marks weights that it may have cut
    assert torch.equal(fused(x), plain(x))
    del layer.base_layer.weight.ds_id
    fused.merge_adapter(), plain.merge_adapter()
    assert torch.equal(fused(x), plain(x))


def test_layers_of_other_kinds_stay():
    assert fuse_adapters(adapted(use_dora=True)) == 0
    assert fuse_adapters(adapted(bias=True, lora_bias=True)) == 0
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    assert fuse_adapters(model) == 0
    wide = adapted(torch.bfloat16)
    for name, p in wide.named_parameters():
        p.data = p.data.float() if "lora_" in name else p.data
    assert fuse_adapters(wide) == 0


def test_only_this_model_changes_and_it_merges_and_copies():
    fused, plain = pair()
    layers = [next(m for m in model.modules() if hasattr(m, "lora_A")) for model in (fused, plain)]
    assert isinstance(layers[0], type(layers[1])) and type(layers[1]) is peft.tuners.lora.Linear
    assert fuse_adapters(fused) == 0, "it is fused already"
    x = torch.randn(3, 24)
    expected, copied = plain(x), copy.deepcopy(fused)
    torch.testing.assert_close(copied(x), expected)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(fused.merge_and_unload()(x), expected)


def test_activation_checkpointing():
    fused, plain = pair()
    x = torch.randn(3, 24, requires_grad=True)
    upstream = torch.randn(3, 40)
    ours = gradients(lambda_of(fused), x, upstream)
    for a, b in zip(ours, gradients(plain, x, upstream), strict=True):
        torch.testing.assert_close(a, b)


def lambda_of(model: nn.Module) -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return checkpoint(self.model, x, use_reentrant=False)

    return Checkpointed()
