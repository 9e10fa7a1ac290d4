"""Checks a loaded model before its first step: packed rows and our head against separate rows and the model's logits.

Models that keep state outside attention, drop keyword arguments, or scale their logits in an unknown way would silently
train on wrong numbers.
"""

import torch
from torch import nn

from strop.kernels import Group, PackedGroups
from strop.trainer.errors import UserError, is_out_of_memory
from strop.trainer.models.loading import run_separately
from strop.trainer.models.sequence import Sequence, SlicedGroups
from strop.trainer.training.logprobs import Scorer, separate_rows

# mean difference of per-token log-probs due to rounding, by compute dtype, in addition to what the model itself shows
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


@torch.no_grad()
def probe(model: nn.Module, console, sequence: Sequence | None = None) -> bool:
    """True if `model` runs packed, False if it must run one completion per row. Raises UserError if neither is correct,
    and if `sequence`, the ranks that are to share packed rows, give other numbers than one; an out-of-memory error is
    re-raised."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    name, dtype, device = type(base).__name__, base.dtype, next(base.parameters()).device
    vocab = base.get_input_embeddings().weight.shape[0]
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab, (24,), generator=draw).tolist()
    prompt, first, second, other = ids[:8], ids[8:14], ids[14:19], ids[19:24] + ids[:1]
    training = base.training
    base.eval()
    try:
        groups = PackedGroups.pack([Group(prompt, [first, second])])
        slices = sequence and SlicedGroups.of(groups, sequence).to(device)
        groups = groups.to(device)
        attention = base.config._attn_implementation
        base.set_attn_implementation("eager")
        eager = by_logits(base, groups)
        run_separately(base)
        truth = by_logits(base, groups)
        # two correct ways to compute the same numbers show this model's rounding
        tolerance = TOLERANCE[dtype] + 4 * (eager - truth).abs().mean().item()
        same(Scorer(base, packed=False)(groups), truth, tolerance, f"{name}: our head and its logits differ (an "
             "unknown logit scale, cap or bias); this model cannot be trained")
        base.set_attn_implementation(attention)
        try:
            packed = Scorer(base)(groups)
            same(packed, truth, tolerance, "packed rows differ from separate rows")
            changed = PackedGroups.pack([Group(prompt, [other, second])]).to(device)
            # the same shapes with other tokens in a sibling: a difference is a leak, not rounding
            leak = Scorer(base)(changed)[len(first):] - packed[len(first):]
            if leak.abs().max().item() > TOLERANCE[dtype] * 2e-3:
                raise UserError("a completion sees its sibling")
            if slices:
                same(Scorer(base)(slices), packed, TOLERANCE[dtype], "slices of a packed row differ from the whole")
            return True
        except (ValueError, TypeError, RuntimeError) as e:
            if is_out_of_memory(e):
                raise
            if sequence:
                raise UserError(f"engine.sequence_parallel={sequence.size}: {name} does not run in slices of a packed "
                                f"row ({str(e).splitlines()[0]}); set engine.sequence_parallel=1") from e
            run_separately(base)
            console.warn(f"{name} does not run packed ({str(e).splitlines()[0]}): one completion per row, slower")
            return False
    finally:
        base.train(training)


def by_logits(base: nn.Module, groups: PackedGroups) -> torch.Tensor:
    """Log-probs from the model's own logits, on separate rows."""
    return torch.cat([base(input_ids=row, use_cache=False).logits[0, index].float().log_softmax(-1)
                      .gather(1, target[:, None])[:, 0] for row, index, target in separate_rows(groups)])


def same(ours: torch.Tensor, truth: torch.Tensor, tolerance: float, what: str) -> None:
    mean = (ours - truth).abs().mean().item()
    if not mean <= tolerance:  # NaN fails too
        raise UserError(f"{what}: per-token log-probs differ by {mean:.2g} on average, rounding is {tolerance:.2g}")
