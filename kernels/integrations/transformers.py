"""Packed attention, the head's arithmetic and fused layers for transformers models. Importing this module does not
import transformers; `register` does."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import layers
from ..attention import prefix_attention
from ..layout import PackedGroups

NAME = "strop"

# Keywords that transformers passes to every attention function and that do not change packed attention's values.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict"}


class Exchange(Protocol):
    """Ranks that hold slices of a packed row's tokens, and in attention slices of its heads over all tokens."""

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """From [1, heads, own tokens, D] to [1, own heads, tokens, D]; differentiable."""

    def to_tokens(self, out: Tensor) -> Tensor:
        """Back: from [1, own heads, tokens, D] to [1, heads, own tokens, D]; differentiable."""


def register(model: nn.Module | None = None, backend: str | None = None) -> str:
    """Register `attn_implementation="strop"` with transformers; returns that name. Idempotent.

    Call the model as `model(input_ids=g.input_ids[None], position_ids=g.position_ids[None], groups=g,
    use_cache=False)` with g a PackedGroups. A model given here raises ValueError when called with groups and a mask;
    attention alone sees 4-D masks only, because transformers silently drops a 2-D one first. backend is the
    prefix_attention backend of this model.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    if model is not None:
        for module in {model, getattr(model, "base_model", model)}:
            module.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
        for module in model.modules():
            module.strop_backend = backend
    return NAME


def _refuse_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
    # The mask is the second positional argument of every causal LM and decoder.
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if kwargs.get("groups") is not None and mask is not None:
        raise ValueError(f"{type(module).__name__}: the groups are the mask; attention_mask must be None")


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    groups: PackedGroups | None = None, is_causal: bool | None = None, exchange: Exchange | None = None, **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature over strop.kernels.prefix_attention.

    query: [1, H, T, D]; key, value: [1, Hkv, T, D]. Returns ([1, T, H, D], None). With an exchange T are this rank's
    tokens of the groups. Raises ValueError on missing groups, a mask, dropout, non-causal attention and any keyword
    that could change the result: nothing is ignored silently.
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
    if exchange is not None:
        query, key, value = exchange.to_heads(query, key, value, groups.num_tokens)
    out = prefix_attention(query, key, value, groups, **options, backend=getattr(module, "strop_backend", None))
    if exchange is not None:
        out = exchange.to_tokens(out)
    return out.transpose(1, 2), None


@dataclass(frozen=True)
class Head:
    """A causal LM's output layer, with linear_logprob's meaning of scale and softcap: the logits are
    x = scale * (hidden @ weight.T + bias), under a softcap softcap * tanh(x / softcap).

    weight [V, D], bias [V] or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None


# Config attributes by what a model does with its logits: Cohere, Falcon-H1 and Muse multiply; Granite and MiniCPM3 (as
# logits_scaling) and Inkling divide; Gemma, RecurrentGemma and xLSTM cap.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: nn.Module) -> Head:
    """The output layer of a causal LM, with the scale and softcap of its config; under PEFT's modules_to_save the
    active copy of the layer.

    Raises ValueError if the layer computes anything but hidden @ weight.T + bias, as an adapter on it does.
    """
    layer = plain = model.get_output_embeddings()
    if type(layer).__name__ == "ModulesToSaveWrapper":
        plain = layer.original_module  # the wrapper's own attributes are those of the active copy
    if not isinstance(plain, nn.Linear) or type(plain).forward is not nn.Linear.forward:
        raise ValueError(
            f"{type(model).__name__}: its head is a {type(plain).__name__}, not a plain linear layer; an adapter on it "
            "would be ignored: take 'lm_head' out of target_modules, or train it whole with modules_to_save"
        )
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in (*_MULTIPLIERS, *_DIVISORS, *_SOFTCAPS)}
    if config.model_type == "mpt":  # its config has a logit_scale that transformers does not apply
        values["logit_scale"] = None
    if config.model_type == "hyperclovax":  # it multiplies by what Granite divides by
        values["logit_scale"] = values.pop("logits_scaling")
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= values[name] if values[name] is not None else 1.0
    for name in _DIVISORS:
        scale /= values.get(name) or 1.0
    softcap = next((values[name] for name in _SOFTCAPS if values[name]), None)
    return Head(layer.weight, layer.bias, float(scale), softcap)


def fuse_layers(model: nn.Module, *, inference: bool = False, device: torch.device | None = None) -> dict[str, int]:
    """Run the model's RMSNorms, SwiGLU blocks and rotary embeddings fused, in place; values stay the same to rounding.

    On a GPU these are Liger's kernels, if Liger is installed and supports the model. On the CPU, if csrc/cpu.cpp was
    built, and for `inference` on a GPU, if Triton is installed, every module that computes what strop.kernels.layers
    computes is found by trying it on random rows. Only this model changes: its modules get subclasses of their classes.
    device: where it will run, by default where it is. Returns how many modules changed, by kind.
    """
    weight = next(model.parameters())
    if (device or weight.device).type == "cuda" and not inference:
        return _fuse_with_liger(model)
    with torch.no_grad():
        if not (layers.available(weight) or layers.infers(weight)):
            return {}
    found = {"rms_norm": 0, "swiglu": 0, "rotary": 0}
    for module in model.modules():
        forward = type(module).forward
        if _passes(_is_rms_norm, module):
            kind, forward = "rms_norm", _norm_forward
        elif _passes(_is_swiglu, module):
            kind, forward = "swiglu", _swiglu_forward
        elif rebound := _with_fused_rotary(forward):
            kind, forward = "rotary", rebound
        else:
            continue
        _set_forward(module, forward)
        found[kind] += 1
    return found


def _set_forward(module: nn.Module, forward: FunctionType) -> None:
    """Give one module another forward by way of its class: a bound method in the module would be a reference cycle."""
    if type(module).forward is not forward:
        module.__class__ = _subclass(type(module), forward)


@functools.cache
def _subclass(cls: type[nn.Module], forward: FunctionType) -> type[nn.Module]:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), {**names, "forward": forward})


def _norm_forward(module: nn.Module, hidden_states: Tensor) -> Tensor:
    return layers.rms_norm(hidden_states, module.weight, module.variance_epsilon)


def merge_projections(model: nn.Module) -> dict[str, int]:
    """Compute projections of one input in one product, for inference on a GPU, where a decode step's products are too
    small to fill it: gate and up of fused SwiGLU blocks; query, key and value of attention that norms none of them.
    Returns how many modules changed, by kind."""
    merged = {"swiglu": 0, "attention": 0}
    for module in list(model.modules()):
        is_swiglu = type(module).forward is _swiglu_forward
        names = ("gate_proj", "up_proj") if is_swiglu else ("q_proj", "k_proj", "v_proj")
        parts = [getattr(module, name, None) for name in names]
        if _mergeable(parts) and not hasattr(module, "q_norm"):
            product = _Merged(parts)
            for i, name in enumerate(names):
                setattr(module, name, _Part(product, i))
            merged["swiglu" if is_swiglu else "attention"] += 1
    return merged


def _mergeable(parts: list[nn.Module | None]) -> bool:
    return all(type(part) is nn.Linear and part.in_features == parts[0].in_features
               and (part.bias is None) == (parts[0].bias is None) for part in parts)


class _Merged(nn.Module):
    """Several linear layers as one. The products of an input are kept until each was asked for once."""

    def __init__(self, layers: list[nn.Linear]):
        super().__init__()
        self.sizes = [layer.out_features for layer in layers]
        self.weight, self.bias = (
            None if x[0] is None else nn.Parameter(torch.cat([p.detach() for p in x]), requires_grad=False)
            for x in ([layer.weight for layer in layers], [layer.bias for layer in layers])
        )
        self.x, self.products = None, {}

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.weight, self.bias).split(self.sizes, -1)

    def one(self, x: Tensor, part: int) -> Tensor:
        if self.x is not x or part not in self.products:
            self.x, self.products = x, dict(enumerate(self(x)))
        found = self.products.pop(part)
        if not self.products:
            self.x = None
        return found


class _Part(nn.Module):
    def __init__(self, merged: _Merged, part: int):
        super().__init__()
        self.merged, self.part = merged, part

    def forward(self, x: Tensor) -> Tensor:
        return self.merged.one(x, self.part)


def _swiglu_forward(module: nn.Module, x: Tensor) -> Tensor:
    if type(module.gate_proj) is _Part:
        gate, up = module.gate_proj.merged(x)
    else:
        gate, up = module.gate_proj(x), module.up_proj(x)
    down = module.down_proj
    if type(down) is nn.Linear and down.bias is None:
        return layers.swiglu_linear(gate, up, down.weight)
    return down(layers.swiglu(gate, up))  # an adapter, a bias or a quantized weight


@torch.no_grad()
def _passes(check: Callable[..., bool], *arguments) -> bool:
    """Whether check(*arguments) is true; False if it fails because the module takes other inputs."""
    try:
        return check(*arguments)
    except (AttributeError, TypeError, ValueError, RuntimeError) as e:
        if is_out_of_memory(e):
            raise
        return False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU or the CPU ran out of memory. PyTorch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether it gives the same bits. The rows are small integers: their squares add up exactly in any order."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not hasattr(module, "variance_epsilon"):
        return False
    rows = torch.randint(-8, 9, (3, len(weight)), generator=torch.Generator().manual_seed(0)).to(weight)
    # A GPU's kernel rounds 1 / sqrt(x) differently.
    fused = functools.partial(layers.rms_norm_reference, weight=weight, eps=module.variance_epsilon)
    return torch.equal(module(rows), fused(rows) if rows.is_cuda else _norm_forward(module, rows))


def _is_swiglu(module: nn.Module) -> bool:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts) or not isinstance(parts[0], nn.Linear):
        return False
    weight, act = parts[0].weight, parts[3]
    rows = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    fused = parts[2](act(parts[0](rows)) * parts[1](rows)) if rows.is_cuda else _swiglu_forward(module, rows)
    return torch.equal(act(4 * rows), F.silu(4 * rows)) and _close(fused, module(rows))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by rounding."""
    return a.shape == b.shape and bool((a - b).norm() <= torch.finfo(b.dtype).eps * b.norm())


_ROTARY = "apply_rotary_pos_emb"


@functools.cache
def _with_fused_rotary(forward: Callable) -> FunctionType | None:
    """An attention's forward on layers.rotary; None if it does not call the usual apply_rotary_pos_emb."""
    plain = _global(forward, _ROTARY)
    if hasattr(plain, "is_fused"):
        return forward
    if plain is None or not _passes(_is_rotary, plain):
        return None
    return _rebound(forward, _ROTARY, _fused_rotary(plain))


def _fused_rotary(plain: Callable) -> Callable:
    """`plain`, on layers.rotary_pair for inputs that it takes."""

    @functools.wraps(plain)
    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest, **options):
        fits = q.dim() == 4 and q.shape[0] == k.shape[0] == 1 and cos.shape == sin.shape == (1, *q.shape[2:])
        fits = fits and q.shape[2:] == k.shape[2:] and not rest and not options
        if fits and (layers.available(q, k, cos, sin) or layers.infers(q, k, cos, sin)):
            return layers.rotary_pair(q, k, cos, sin)
        return plain(q, k, cos, sin, *rest, **options)

    fused.is_fused = True
    return fused


def _is_rotary(plain: Callable) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 5, 16), (1, 2, 5, 16), (1, 5, 16), (1, 5, 16)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return all(_close(a, b) for a, b in zip(_fused_rotary(plain)(*tensors), plain(*tensors), strict=True))


def _global(function: Callable, name: str) -> Callable | None:
    """The global that a function, or the function that a decorator wraps, reads under this name."""
    while function is not None:
        if isinstance(function, FunctionType) and name in function.__code__.co_names:
            return function.__globals__.get(name)
        function = getattr(function, "__wrapped__", None)
    return None


@functools.cache
def _rebound(function: FunctionType, name: str, value: Callable) -> FunctionType:
    """A copy of a function, within copies of its decorators, that reads `value` under a global's name."""
    scope, cells, inner = function.__globals__, function.__closure__, getattr(function, "__wrapped__", None)
    if name in function.__code__.co_names:
        # Without __name__, or torch.compile would look the global up in the module of that name.
        scope = {key: x for key, x in scope.items() if key != "__name__"} | {name: value}
    else:
        copy = _rebound(inner, name, value)
        cells = tuple(type(cell)(copy) if cell.cell_contents is inner else cell for cell in cells)
        inner = copy
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    if inner is None:
        del copy.__wrapped__
    else:
        copy.__wrapped__ = inner
    return copy


def _fuse_with_liger(model: nn.Module) -> dict[str, int]:
    """Liger patches modules of transformers and binds methods into the model's modules. This undoes both and gives the
    model's modules subclasses with the same effect, so that no other model changes."""
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError:
        return {}
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if patch is None or not type(model).__module__.startswith("transformers.models."):
        return {"liger": 0}
    flags = [name for name, p in inspect.signature(patch).parameters.items() if isinstance(p.default, bool)]
    patch(**dict.fromkeys(flags, False))  # patches nothing, but imports every module that it can patch
    homes = [module for name, module in sys.modules.items() if name.startswith("transformers.models.")]
    before = [dict(vars(home)) for home in homes]
    patch(model=model, **{name: False for name in flags if "cross_entropy" in name})
    replaced = []
    for home, names in zip(homes, before, strict=True):
        for name, plain in names.items():
            if (fused := getattr(home, name, plain)) is not plain:
                replaced.append((name, plain, fused))
                setattr(home, name, plain)
    count = 0
    for module in model.modules():
        bound = {name: value for name, value in vars(module).items() if isinstance(value, MethodType)}
        bound = {name: value.__func__ for name, value in bound.items() if value.__module__.startswith("liger_kernel")}
        for name in bound:
            del vars(module)[name]
        forward = bound.get("forward", type(module).forward)
        for name, plain, fused in replaced:
            if isinstance(plain, FunctionType) and _global(forward, name) is plain:
                forward = _rebound(forward, name, fused)
        count += type(module).forward is not forward
        _set_forward(module, forward)
    return {"liger": count}
