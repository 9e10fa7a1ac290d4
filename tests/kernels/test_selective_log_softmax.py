"""The drop-in for TRL's selective_log_softmax against TRL's own."""

import pytest
import torch

pytest.importorskip("trl")
from trl.trainer import utils as trl_utils

from strop.kernels.integrations.trl import selective_log_softmax


def logits_of(*shape: int, dtype=torch.float32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    return (4 * torch.randn(shape, generator=draw)).to(dtype).requires_grad_()


def index_of(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (6,), (6, 1), (2, 1, 3, 2), (0, 3), (2, 3, 0)], ids=str)
def test_selective_log_softmax_is_trls(shape, temperature):
    rows = shape if shape in ((2, 3), (6,), (0, 3)) else shape[:-1]
    logits, index = logits_of(*rows, 37), index_of(37, *shape)
    if 0 not in rows:
        theirs = trl_utils.selective_log_softmax(logits, index, temperature)
    else:  # on which TRL's fails
        theirs = torch.zeros(shape) * logits.sum()
    found = selective_log_softmax(logits, index, temperature)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    upstream = torch.arange(theirs.numel()).view(shape) - 2.0
    (expected,) = torch.autograd.grad(theirs, logits, upstream)
    (gradient,) = torch.autograd.grad(found, logits, upstream)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)], ids=str)
def test_masked_rows_of_selective_log_softmax_are_zero_whatever_they_hold(shape):
    logits, index, mask = logits_of(2, 3, 37), index_of(37, *shape), torch.ones(shape, dtype=torch.bool)
    mask[0, 1] = mask[1, 2] = False
    theirs = trl_utils.selective_log_softmax(logits, index, row_mask=mask)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    with torch.no_grad():
        logits[0, 1] = float("nan")
        index[1, 2] = 1000
    if len(shape) == 3:
        index[1, 2] = 0  # a gather reads it
    found = selective_log_softmax(logits, index, row_mask=mask)
    torch.testing.assert_close(found, theirs)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (64, 5)], ids=str)
def test_selective_log_softmax_is_as_exact_as_log_softmax(shape, dtype):
    logits = logits_of(64, 1000, dtype=dtype).detach() * 20
    index = index_of(1000, *shape)
    index[0] = logits[0].topk(5).indices if len(shape) == 2 else logits[0].argmax()
    flat = index.view(64, -1)

    def gathered(x):
        return x.log_softmax(-1).gather(-1, flat).view(shape)

    truth = gathered(logits.double())
    error = (selective_log_softmax(logits, index) - truth).abs().max()
    assert error <= 2 * (gathered(logits).double() - truth).abs().max()


def test_extreme_logits_in_selective_log_softmax():
    logits = torch.tensor([[0.0, -torch.inf, 1e4, -1e4], [-torch.inf, -torch.inf, 0.0, 0.0]])
    index = torch.tensor([[0, 1, 2], [0, 1, 2]])
    truth = logits.log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(selective_log_softmax(logits, index), truth)
    torch.testing.assert_close(selective_log_softmax(logits, index[:, 1]), truth[:, 1])
    assert (selective_log_softmax(logits[1:], index[1:, :2]) == -torch.inf).all()
    assert selective_log_softmax(torch.full((1, 4), torch.nan), index[:1]).isnan().all()


def test_selective_log_softmax_refuses_what_does_not_fit():
    logits = logits_of(2, 3, 37)
    for message, index, options in (
        ("neither the rows", index_of(37, 2, 4), {}),
        ("neither the rows", index_of(37, 3), {}),
        ("row_mask", index_of(37, 2, 3), {"row_mask": torch.ones(2)}),
        ("temperature", index_of(37, 2, 3), {"temperature": 0.0}),
        ("outside the vocabulary", torch.full((2, 3), -100), {}),  # of which TRL's knows no special meaning
    ):
        with pytest.raises(ValueError, match=message):
            selective_log_softmax(logits, index, **options)
