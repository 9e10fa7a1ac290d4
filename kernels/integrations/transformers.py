"""Packed attention for transformers models, through its AttentionInterface."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention import prefix_attention
from ..layout import PackedGroups

NAME = "strop"

# What transformers hands down to every attention function and what has no bearing on packed attention's values.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


def register(model: nn.Module | None = None) -> str:
    """Make `attn_implementation="strop"` known to transformers; returns that name. Calling it again changes nothing.

    The model is then called as `model(input_ids=g.input_ids[None], position_ids=g.position_ids[None], groups=g,
    use_cache=False)` with g a PackedGroups. A model given here raises ValueError where groups come with a mask. Our
    attention sees 4-D masks only: transformers drops a 2-D one before, without a word.
    """
    AttentionInterface.register(NAME, attention_forward)
    if model is not None:
        for module in {model, getattr(model, "base_model", model)}:
            module.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
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
    out = prefix_attention(query, key, value, groups, scale=scaling, sliding_window=sliding_window, softcap=softcap)
    return out.transpose(1, 2), None
