"""strop.kernels.decoder for models of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .. import decoder
from ..decoder import Decoder, Layer

# They compute what the decoder does, and nothing else; other models differ in norms, scales or biases.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def decoder_of(model: nn.Module, *, take: bool = False) -> Decoder | None:
    """A Decoder with the weights of a causal LM, None for models and processors that it does not support. take: the
    model's linear layers lose their weights, one layer at a time, so that there are not two copies."""
    if not supports(model):
        return None
    config, body, attention = model.config, model.model, model.model.layers[0].self_attn
    made = Decoder(
        body.embed_tokens.weight.detach(), _layers(model, take), len(body.layers), body.norm.weight.detach(),
        model.lm_head.weight.detach(), heads=config.num_attention_heads, key_heads=config.num_key_value_heads,
        size=attention.head_dim, hidden=config.intermediate_size, eps=body.norm.variance_epsilon,
        scale=attention.scaling)
    if take:
        _empty(model.lm_head)
    return made


def supports(model: nn.Module) -> bool:
    config = model.config
    if config.model_type not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        return False
    if not decoder.available() or any(x.device.type != "cpu" or x.dtype != torch.bfloat16 for x in model.parameters()):
        return False
    attentions, mlps = ([getattr(layer, name) for layer in model.model.layers] for name in ("self_attn", "mlp"))
    first = [x for a in attentions for x in (a.q_proj, a.k_proj, a.v_proj)]
    others = [a.o_proj for a in attentions] + [x for m in mlps for x in (m.gate_proj, m.up_proj, m.down_proj)]
    others.append(model.lm_head)
    return (all(type(x) is nn.Linear for x in first + others)  # not quantized, and without adapters
            and len({x.bias is None for x in first}) == 1 and all(x.bias is None for x in others)
            and model.lm_head.weight.shape == model.model.embed_tokens.weight.shape
            and config.hidden_act == "silu" and attentions[0].head_dim in decoder.HEAD_SIZES)


def _layers(model: nn.Module, take: bool) -> Iterator[Layer]:
    window = model.config.sliding_window if model.config.model_type == "mistral" else None
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        yield Layer(
            layer.input_layernorm.weight.detach(), *(x.weight.detach() for x in (q, k, v)),
            None if q.bias is None else torch.cat([x.bias.detach() for x in (q, k, v)]),
            *(None if norm is None else norm.weight.detach() for norm in norms), out.weight.detach(),
            layer.post_attention_layernorm.weight.detach(),
            *(x.weight.detach() for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
            window=getattr(attention, "sliding_window", None) or window)
        if take:
            for linear in (q, k, v, out, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                _empty(linear)


def _empty(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
