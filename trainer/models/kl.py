"""KL divergence of a model's next-token distributions from those of the start weights."""

import torch
from torch import Tensor, nn

from strop.kernels.head.reference import linear_logits
from strop.trainer.models.head import Head, head_of
from strop.trainer.models.loading import ModelFolder

CHUNK = 256  # positions whose [V] distributions are in memory at once
BUDGET = 4096  # tokens per batch, with padding

Row = tuple[list[int], list[int]]  # prompt and completion tokens


def drift(candidates: dict[str, ModelFolder], rows: dict[str, list[Row]], start: ModelFolder, dtype: torch.dtype,
          device: torch.device) -> dict[str, dict]:
    """For each candidate: `kl` in nats per token, its `stderr`, and the numbers of `prompts` and `tokens`.

    rows: each candidate's own completions. KL(candidate || start) is exact at every token: summed over the vocabulary,
    at temperature 1. `kl` is its mean over tokens; `stderr` is that of a ratio of means over prompts, None for a single
    prompt.
    """
    return {name: ratio(*found) for name, found in summed(candidates, rows, start, dtype, device).items()}


@torch.no_grad()
def summed(candidates: dict[str, ModelFolder], rows: dict[str, list[Row]], start: ModelFolder, dtype: torch.dtype,
           device: torch.device) -> dict[str, tuple[list[float], list[int]]]:
    """For each candidate and each of its rows the sum over the completion's tokens of the KL(candidate || start) there,
    and the number of tokens. Over completions that the candidate samples at temperature 1, the mean of the sums is the
    KL of whole completions. One model is in memory at a time."""
    model = start.load(dtype, device, "sdpa")
    before, head, found = {name: hidden_states(model, rows[name]) for name in candidates}, exact(head_of(model)), {}
    del model
    for name, folder in candidates.items():
        model = folder.load(dtype, device, "sdpa")
        after, own = hidden_states(model, rows[name]), exact(head_of(model))
        lengths = [len(completion) for _, completion in rows[name]]
        parts = token_kl(torch.cat(after), own, torch.cat(before[name]), head).split(lengths)
        found[name] = [part.sum().item() for part in parts], lengths
        del model, own
    return found


def hidden_states(model: nn.Module, rows: list[Row]) -> list[Tensor]:
    """Per row the hidden states [completion tokens, D] that predict its completion. Rows are padded on the right, which
    needs no mask in a causal model."""
    found, body = {}, model.get_decoder()
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    left = sorted(range(len(rows)), key=lambda i: -lengths[i])
    while left:
        longest = lengths[left[0]]
        n = max(1, BUDGET // longest)
        indices, left = left[:n], left[n:]
        tokens = torch.zeros(len(indices), longest, dtype=torch.int64)
        for line, i in enumerate(indices):
            row = [*rows[i][0], *rows[i][1]]
            tokens[line, :len(row)] = torch.tensor(row)
        states = body(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state
        for line, i in enumerate(indices):
            found[i] = states[line, len(rows[i][0]) - 1:lengths[i] - 1].clone()
    return [found[i] for i in range(len(rows))]


def exact(head: Head) -> Head:
    """The head in fp32: logits rounded to bf16 would show up as a KL of about 0.001 nats."""
    return Head(head.weight.float(), None if head.bias is None else head.bias.float(), head.scale, head.softcap)


def token_kl(hidden: Tensor, head: Head, other_hidden: Tensor, other_head: Head) -> Tensor:
    """fp32 [N]: KL(p || q) of the distributions of two fp32 heads [V, D] at hidden states [N, D]."""
    parts = [torch.zeros(0, device=hidden.device)]
    for a, b in zip(hidden.split(CHUNK), other_hidden.split(CHUNK), strict=True):
        p, q = log_probs(a, head), log_probs(b, other_head)
        parts.append(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def log_probs(hidden: Tensor, head: Head) -> Tensor:
    logits = linear_logits(hidden.float(), head.weight, head.bias, logit_scale=head.scale, softcap=head.softcap)
    return logits.log_softmax(-1)


def ratio(sums: list[float], counts: list[int]) -> dict:
    """Mean per token, from the sum and the number of tokens of each completion."""
    n, tokens = len(sums), sum(counts)
    mean = sum(sums) / max(1, tokens)
    spread = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    stderr = (spread / (n * (n - 1))) ** 0.5 / (tokens / n) if n > 1 and tokens else None
    return {"kl": mean, "stderr": stderr, "prompts": n, "tokens": tokens}
