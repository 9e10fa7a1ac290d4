"""Packed attention for transformers models, through its AttentionInterface."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention import prefix_attention
from ..layers import rms_norm, swiglu_linear
from ..layout import PackedGroups

NAME = "strop"

# What transformers hands down to every attention function and what has no bearing on packed attention's values.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


def register(model: nn.Module | None = None, backend: str | None = None) -> str:
    """Make `attn_implementation="strop"` known to transformers; returns that name. Calling it again changes nothing.

    The model is then called as `model(input_ids=g.input_ids[None], position_ids=g.position_ids[None], groups=g,
    use_cache=False)` with g a PackedGroups. A model given here raises ValueError where groups come with a mask. Our
    attention sees 4-D masks only: transformers drops a 2-D one before, without a word. backend: the one this model is
    to take, as in prefix_attention.
    """
    AttentionInterface.register(NAME, attention_forward)
    if model is not None:
        for module in {model, getattr(model, "base_model", model)}:
            module.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
        for module in model.modules():
            module.strop_backend = backend
    return NAME


def _refuse_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
    # the mask is the second positional argument of every causal LM and decoder
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if kwargs.get("groups") is not None and mask is not None:
        raise ValueError(f"{type(module).__name__}: the groups are the mask; attention_mask must be None")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    groups: PackedGroups | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature over strop.kernels.prefix_attention.

    query: [1, H, T, D]; key, value: [1, Hkv, T, D]. Returns ([1, T, H, D], None). Raises ValueError on missing groups,
    a mask, dropout, non-causal attention and any keyword that could change the result: nothing is ignored silently.
    """
    where = f"strop attention in {type(module).__name__}"
    if groups is None:
        raise ValueError(f"{where}: groups=PackedGroups must be passed to the model's forward")
    if attention_mask is not None:
        raise ValueError(f"{where}: the groups are the mask; attention_mask must be None")
    if dropout > 0.0:
        raise ValueError(f"{where}: attention dropout {dropout} is not supported; set it to 0 in the model's config")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise ValueError(f"{where}: only causal attention can run packed")
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise ValueError(f"{where}: unsupported keywords {unknown}")
    options = {"scale": scaling, "sliding_window": sliding_window, "softcap": softcap}
    out = prefix_attention(query, key, value, groups, **options, backend=getattr(module, "strop_backend", None))
    return out.transpose(1, 2), None


def fuse_layers(model: nn.Module) -> dict[str, int]:
    """Let the model's RMSNorms and SwiGLU blocks run fused, in place; values stay, time and memory shrink.

    On a GPU this is Liger's doing (RoPE included), where it is installed and knows the model. On the CPU every module
    that computes what strop.kernels.layers does is found by trying it on random rows. Returns how many were found,
    by kind.
    """
    if next(model.parameters()).is_cuda:
        return _fuse_with_liger(model)
    found = {"rms_norm": 0, "swiglu": 0}
    for module in model.modules():
        if _same(module, _norm_forward, getattr(module, "weight", None), "variance_epsilon"):
            module.forward = MethodType(_norm_forward, module)
            found["rms_norm"] += 1
        elif _same(module, _swiglu_forward, getattr(getattr(module, "gate_proj", None), "weight", None), "act_fn"):
            module.forward = MethodType(_swiglu_forward, module)
            found["swiglu"] += 1
    return found


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _swiglu_forward(module: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    if type(down) is nn.Linear and down.bias is None:
        return swiglu_linear(gate, up, down.weight)
    return down(module.act_fn(gate) * up)  # an adapter, or a bias


@torch.no_grad()
def _same(module: nn.Module, forward, weight: Tensor | None, attribute: str) -> bool:
    """Whether the module has what `forward` needs and gives the same bits on random rows."""
    if not isinstance(weight, Tensor) or weight.dim() not in (1, 2) or not hasattr(module, attribute):
        return False
    rows = torch.randn(3, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        return torch.equal(module(rows), forward(module, rows))
    except (AttributeError, TypeError, RuntimeError):
        return False


def _fuse_with_liger(model: nn.Module) -> dict[str, int]:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        return {}
    known = model.config.model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if known:
        monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return {"liger": int(known)}
