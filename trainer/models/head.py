"""The output layer of a causal LM, as `linear_logprob` takes it."""

from dataclasses import dataclass

import torch
from torch import nn

from strop.trainer.errors import UserError


@dataclass(frozen=True)
class Head:
    """logits = softcap(hidden @ weight.T * scale + bias), as `linear_logprob` takes it."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None


def head_of(model: nn.Module) -> Head:
    """The output layer of a causal LM with its scale (Cohere, Granite, Falcon-H1) and soft-cap (Gemma 2)."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if layer is None or not isinstance(layer, nn.Linear):
        raise UserError(f"{type(model).__name__}: its head is {type(layer).__name__}, not a plain linear layer; an "
                         "adapter on the head is not supported (take it out of lora.target_modules)")
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(layer.weight, layer.bias, float(scale), getattr(config, "final_logit_softcapping", None))
