"""Packed attention for transformers models, through its AttentionInterface."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from types import MethodType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from .. import layers
from ..attention import prefix_attention
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
    """Let the model's RMSNorms, SwiGLU blocks and rotary embeddings run fused, in place; values stay, time and memory
    shrink.

    On a GPU this is Liger's doing, where it is installed and knows the model. On the CPU, where csrc/cpu.cpp was
    built, every module that computes what strop.kernels.layers does is found by trying it on random rows. Rotary
    embeddings are a function of the model's Python module, which all its models then share. Returns how many were
    found, by kind.
    """
    if next(model.parameters()).is_cuda:
        return _fuse_with_liger(model)
    if not layers.available(next(model.parameters())):
        return {}
    found = {"rms_norm": 0, "swiglu": 0, "rotary": 0}
    for module in model.modules():
        if _found(_is_rms_norm, module):
            module.forward = MethodType(_norm_forward, module)
            found["rms_norm"] += 1
        elif _found(_is_swiglu, module):
            module.forward = MethodType(_swiglu_forward, module)
            found["swiglu"] += 1
    for name in {type(module).__module__ for module in model.modules()}:
        found["rotary"] += _fuse_rotary(sys.modules[name])
    return found


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    return layers.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _swiglu_forward(module: nn.Module, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    if type(down) is nn.Linear and down.bias is None:
        return layers.swiglu_linear(gate, up, down.weight)
    return down(layers.swiglu(gate, up))  # an adapter, a bias, or a weight that lies otherwise


@torch.no_grad()
def _found(check: Callable[[nn.Module], bool], module: nn.Module) -> bool:
    try:
        return check(module)
    except (AttributeError, TypeError, RuntimeError):  # one that wants other inputs
        return False


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it gives the same bits. The rows are small whole numbers: no order of adding squares rounds them."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not hasattr(module, "variance_epsilon"):
        return False
    rows = torch.randint(-8, 9, (3, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return torch.equal(module(rows), _norm_forward(module, rows))


def _is_swiglu(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts) or not isinstance(parts[0], nn.Linear):
        return False
    weight, act = parts[0].weight, parts[3]
    rows = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    return torch.equal(act(4 * rows), F.silu(4 * rows)) and _close(_swiglu_forward(module, rows), module(rows))


def _fuse_rotary(home: ModuleType) -> bool:
    """Put layers.rotary into a module's apply_rotary_pos_emb; whether it is there. What it cannot do goes on to the
    function that was there."""
    plain = getattr(home, "apply_rotary_pos_emb", None)
    if plain is None or hasattr(plain, "is_fused"):
        return plain is not None

    @wraps(plain)
    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **options):
        fits = q.dim() == 4 and q.shape[0] == k.shape[0] == 1 and cos.shape == sin.shape == (1, *q.shape[2:])
        if fits and q.shape[2:] == k.shape[2:] and not rest and not options and layers.available(q, k, cos, sin):
            return layers.rotary(q, cos, sin), layers.rotary(k, cos, sin)
        return plain(q, k, cos, sin, *rest, **options)

    fused.is_fused = True
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 5, 16), (1, 2, 5, 16), (1, 5, 16), (1, 5, 16)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    try:
        same = all(_close(a, b) for a, b in zip(fused(*tensors), plain(*tensors), strict=True))
    except (TypeError, ValueError, RuntimeError):  # another signature
        return False
    if same:
        home.apply_rotary_pos_emb = fused
    return same


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by rounding."""
    return a.shape == b.shape and bool((a - b).norm() <= torch.finfo(b.dtype).eps * b.norm())


def _fuse_with_liger(model: nn.Module) -> dict[str, int]:
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        return {}
    known = model.config.model_type in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if known:
        monkey_patch._apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    return {"liger": int(known)}
