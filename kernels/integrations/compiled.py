"""torch.compile for the decoder layers of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def compile_layers(model: nn.Module) -> int:
    """Compile each decoder layer, in place; returns their number, 0 for a model without transformers' layer class.

    All layers of one kind share one graph with lengths left open, so that a step's tokens and tiles may change without
    compiling again. It is compiled in the first forward and backward pass; a layer that cannot be traced as a whole
    raises there. Values stay the same to rounding. Do not fuse the layers (`fuse_layers`) before: the compiler fuses
    their norms, rotary embeddings and SwiGLU with what is around them.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True, fullgraph=True)
    return len(layers)


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run the model's modules uncompiled. For a few calls with another attention, or without gradients, where a layer
    would be compiled again."""
    held = [(module, module._compiled_call_impl) for module in model.modules() if module._compiled_call_impl]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in held:
            module._compiled_call_impl = compiled
