"""Packed attention for transformers models, through its AttentionInterface."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import AttentionInterface

from ..attention import prefix_attention
from ..layout import PackedGroups

NAME = "strop"

# What transformers hands down to every attention function and what has no bearing on packed attention's values.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


def register() -> str:
    """Make `attn_implementation="strop"` known to transformers; returns that name. Calling it again changes nothing.

    The model is then called as `model(input_ids=g.input_ids[None], position_ids=g.position_ids[None], groups=g,
    use_cache=False)` with g a PackedGroups.
    """
    AttentionInterface.register(NAME, attention_forward)
    return NAME


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
