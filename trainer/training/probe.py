"""Asks a loaded model, before its first step, whether packed groups mean for it what they mean for us.

Models that keep state outside attention, drop keyword arguments on the way down, or scale their logits in a way we do
not know would train on wrong numbers without a word. So one group of two completions is run packed and separately.
"""

import torch
from torch import nn

from strop.kernels import Group, PackedGroups
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.training.logprobs import Scorer

# Mean difference of per-token log-probs that rounding explains, by compute dtype, on top of what a model itself shows.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


@torch.no_grad()
def probe(model: nn.Module, console) -> bool:
    """True if `model` runs packed, False if it must run one completion a row. Raises UserError if neither is right;
    running out of memory tells neither, and is raised as it is."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, dtype, device = type(base).__name__, base.dtype, next(base.parameters()).device
    vocab = base.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (24,), generator=draw).tolist()
    prompt, first, second, other = ids[:8], ids[8:14], ids[14:19], ids[19:24] + ids[:1]
    training = base.training
    base.eval()
    try:
        groups = PackedGroups.pack([Group(prompt, [first, second])]).to(device)
        attention = base.config._attn_implementation
        base.set_attn_implementation("eager")
        eager = by_logits(base, groups)
        run_separately(base)
        truth = by_logits(base, groups)
        # two right ways to compute the same numbers tell how much rounding this model shows
        tolerance = TOLERANCE[dtype] + 4 * (eager - truth).abs().mean().item()
        same(Scorer(base, packed=False)(groups), truth, tolerance, f"{name}: our head and its logits differ (a logit "
             "scale, cap or bias that is not known here); this model cannot be trained")
        base.set_attn_implementation(attention)
        try:
            packed = Scorer(base)(groups)
            same(packed, truth, tolerance, "packed rows differ from separate rows")
            changed = PackedGroups.pack([Group(prompt, [other, second])]).to(device)
            # the same shapes and a sibling's other tokens: what differs now is a leak, not rounding
            leak = Scorer(base)(changed)[len(first):] - packed[len(first):]
            if leak.abs().max().item() > TOLERANCE[dtype] * 2e-3:
                raise UserError("a completion sees its sibling")
            return True
        except (ValueError, TypeError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            run_separately(base)
            console.warn(f"{name} does not run packed ({str(e).splitlines()[0]}); one completion a row instead, slower")
            return False
    finally:
        base.train(training)


def run_separately(base: nn.Module) -> None:
    """Gives the model the attention that transformers has for it, to run one completion a row."""
    try:
        base.set_attn_implementation("sdpa")
    except ValueError:
        base.set_attn_implementation("eager")


def by_logits(base: nn.Module, groups: PackedGroups) -> torch.Tensor:
    """Log-probs by the model's own forward and log_softmax, separate rows."""
    parts = []
    for (start, end), g, (first, last) in zip(groups.completion_bounds, groups.completion_group, groups.target_bounds,
                                              strict=True):
        p0, p1 = groups.prompt_bounds[g]
        row = torch.cat([groups.input_ids[p0:p1], groups.input_ids[start:end]])[None]
        logits = base(input_ids=row, use_cache=False).logits[0].float()
        index = groups.position_ids[groups.pred_index[first:last]]
        parts.append(logits[index].log_softmax(-1).gather(1, groups.target[first:last, None])[:, 0])
    return torch.cat(parts)


def same(ours: torch.Tensor, truth: torch.Tensor, tolerance: float, what: str) -> None:
    mean = (ours - truth).abs().mean().item()
    if not mean <= tolerance:  # NaN fails too
        raise UserError(f"{what}: per-token log-probs differ by {mean:.2g} on average, {tolerance:.2g} is rounding")
