"""The custom ops under opcheck and torch.compile, and that nothing synchronizes with the device."""

import pytest
import torch
from torch.library import opcheck

from strop.kernels import gather_logprob, linear_logprob, preference_loss, sampling
from strop.kernels.attention import paged
from strop.kernels.head import chunked
from strop.kernels.head.logprob import (
    _gather_logprob,
    _gather_logprob_backward,
    _linear_logprob,
    _linear_logprob_backward,
)
from strop.kernels.preference.segment_sum import segment_sum, segment_sum_backward


def _inputs(dtype: torch.dtype = torch.float32, seed: int = 0, needs: tuple[bool, bool, bool] = (True, True, True)):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((6, 5), (40, 5), (40,)))
    for x, need in zip((hidden, weight, bias), needs, strict=True):
        x.requires_grad_(need)
    return hidden, weight, torch.tensor([3, 39, -100, 0, 7, 7]), bias


@pytest.mark.parametrize("mode", [chunked.RECOMPUTE, chunked.KEEP, chunked.FROZEN])
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck_of_linear_logprob(mode: int, with_bias: bool):
    frozen = mode == chunked.FROZEN
    hidden, weight, target, bias = _inputs(needs=(True, not frozen, not frozen))
    bias = bias if with_bias else None
    numbers = (0.5, 1.5, 4.0, -100)
    opcheck(_linear_logprob, (hidden, weight, target, bias, *numbers, 0b10110, mode, 1 << 20))
    if frozen:
        return
    with torch.no_grad():
        outputs = _linear_logprob(hidden, weight, target, bias, *numbers, 0, mode, 1 << 20)
        inputs = [None if x is None else x.detach() for x in (hidden, weight, target, bias)]
        opcheck(
            _linear_logprob_backward,
            (torch.ones(6), *inputs, *outputs[:2], outputs[7], *numbers, [True, True, with_bias], 1 << 20),
        )


def test_opcheck_of_gather_logprob():
    logits, target = torch.randn(4, 9, requires_grad=True), torch.tensor([1, -100, 8, 0])
    opcheck(_gather_logprob, (logits, target, -100))
    logp, lse = _gather_logprob(logits.detach(), target, -100)
    opcheck(_gather_logprob_backward, (torch.ones(4), logits.detach(), target, logp, lse, -100))


def test_opcheck_of_segment_sum():
    offsets = torch.tensor([0, 2, 2, 6])
    opcheck(segment_sum, (torch.randn(6, requires_grad=True), offsets))
    opcheck(segment_sum_backward, (torch.randn(3), offsets, 6))


def test_opcheck_of_the_decode_step():
    numbers = ([[0]], [[1], [2]], [3], [0, 0], [2, -1], [[0, 1]])
    tables = paged.Tables(*(torch.tensor(x, dtype=torch.int32) for x in numbers))
    q, k, v = (torch.randn(2, n, 8) for n in (4, 2, 2))
    pages = [torch.randn(3, 2, paged.PAGE, 8) for _ in range(2)]
    opcheck(paged._op, (q, k, v, *pages, *tables, 1, 1, paged.SPLIT, 0.3, 0.0, 0))
    state, length, out = torch.zeros(4, 3, dtype=torch.int64), tables.length.clone(), torch.zeros(2, 2)
    drawn = (torch.tensor([5, 6]), torch.tensor([-1.0, -2.0]), torch.tensor([6]), 9)
    opcheck(sampling._advance, (state, length, out, *drawn, None, None, None))


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_compiled_in_one_graph(needs: tuple[bool, bool, bool]):
    def step(hidden, weight, target, bias, ref):
        logp, stats = linear_logprob(hidden, weight, target, bias, softcap=5.0, stats=("entropy",))
        loss, metrics = preference_loss(logp, ref, target_bounds=((0, 1), (1, 3), (3, 5), (5, 6)), nll_weight=0.1)
        return loss + gather_logprob(hidden, target[:6] % 5).sum(), metrics, stats["entropy"]

    def run(function):
        inputs = _inputs(needs=needs)
        outputs = function(*inputs, torch.linspace(-3, -1, 6))
        wanted = [x for x, need in zip((inputs[0], inputs[1], inputs[3]), needs, strict=True) if need]
        return outputs, torch.autograd.grad(outputs[0], wanted)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(step))


def test_preference_loss_does_not_synchronize():
    """On fake tensors of a GPU whatever needs a value on the host raises. No gradients: a build of PyTorch without CUDA
    aborts on those."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        logp = torch.empty(12, device="cuda")
        ref, segments = torch.empty(12, device="cuda"), torch.empty(12, dtype=torch.int32, device="cuda")
        mask = torch.empty(12, dtype=torch.bool, device="cuda")
        for masks in ({}, {"loss_mask": mask, "nll_mask": mask}):
            loss, metrics = preference_loss(logp, ref, segments=segments, num_segments=4, nll_weight=0.2, ld_alpha=0.5,
                                            **masks)
        assert loss.device.type == metrics.device.type == "cuda"
