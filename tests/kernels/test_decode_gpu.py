"""The decode step's kernels on a GPU: against fp64 and the CPU, deterministic, without waiting, within a graph."""

import pytest
import torch
import torch.nn.functional as F

from strop.kernels import draw_key, sample_tokens
from strop.kernels import layers as plain
from strop.kernels.attention import paged, reference
from strop.kernels.sampling import advance_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PROMPTS = [700, 1, 64, 513]
# Of groups of eight, one and none that is decoded; lengths within a page, at its end, of several parts.
ROWS = [*((0, n) for n in (0, 1, 31, 32, 300, 777, -1, 5)), (1, 64), (2, -1), *((3, 40 * i) for i in range(11))]


def _case(heads: int, kv_heads: int, size: int, dtype: torch.dtype, members: int = 8):
    draw = torch.Generator().manual_seed(0)
    need = [-(-n // paged.PAGE) for n in PROMPTS] + [max(t, 0) // paged.PAGE + 1 for _, t in ROWS]
    pages = torch.randperm(sum(need), generator=draw).split(need)
    tables = [torch.nn.utils.rnn.pad_sequence(part, batch_first=True).int() for part in
              (pages[: len(PROMPTS)], pages[len(PROMPTS) :])]
    tiles = []
    for g in range(len(PROMPTS)):
        of_group = [r for r, (group, _) in enumerate(ROWS) if group == g]
        tiles += [of_group[i : i + members] for i in range(0, len(of_group), members)]
    tiles = [tile + [-1] * (members - len(tile)) for tile in [*tiles, []]]
    numbers = [torch.tensor(x, dtype=torch.int32) for x in (PROMPTS, [g for g, _ in ROWS], [t for _, t in ROWS], tiles)]
    shapes = [(len(ROWS), heads, size), *[(len(ROWS), kv_heads, size)] * 2,
              *[(sum(need), kv_heads, paged.PAGE, size)] * 2]
    tensors = [torch.randn(shape, generator=draw).to("cuda", dtype) for shape in shapes]
    return tensors, paged.Tables(*(x.to("cuda") for x in (*tables, *numbers)))


def _run(case, dtype: torch.dtype, room: int = 0, **how) -> list[torch.Tensor]:
    tensors = [x.to(dtype, copy=True) for x in case[0]]
    options = {"longest_prompt": 700 + room, "longest_completion": 777 + room, "scale": 0.2}
    return [paged.decode_attention(*tensors, case[1], **options, **how), *tensors[3:]]


def _plain(case, dtype: torch.dtype, **how) -> list[torch.Tensor]:
    tensors = [x.to(dtype, copy=True) for x in case[0]]
    return [reference.decode_attention(*tensors, case[1], scale=0.2, **how), *tensors[3:]]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(8, 2, 128), (14, 2, 64), (4, 4, 80), (8, 1, 256)])
@pytest.mark.parametrize("how", [{}, {"window": 100}, {"softcap": 3.0, "window": 400}], ids=str)
def test_attention_error_is_at_most_twice_that_of_plain_pytorch(heads, kv_heads, size, dtype, how):
    case = _case(heads, kv_heads, size, dtype)
    truth, plainly, ours = _plain(case, torch.float64, **how), _plain(case, dtype, **how), _run(case, dtype, **how)
    assert (ours[0].double() - truth[0]).norm() <= 2 * (plainly[0].double() - truth[0]).norm()
    assert torch.equal(ours[1], plainly[1]) and torch.equal(ours[2], plainly[2])
    assert (ours[0][[6, 9]] == 0).all(), "rows that ended"


def test_attention_of_a_row_is_the_same_bits_whatever_runs_beside_it():
    case = _case(8, 2, 128, BF16)
    whole = _run(case, BF16)[0]
    assert torch.equal(_run(case, BF16, room=2000)[0], whole)
    tensors, tables = case
    for r in (4, 5, 8, 12):
        one = tables._replace(tiles=torch.full_like(tables.tiles[:1], -1), length=torch.full_like(tables.length, -1))
        one.tiles[0, 0], one.length[r] = r, tables.length[r]
        assert torch.equal(_run((tensors, one), BF16)[0][r], whole[r])


HOW = [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 20}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("vocab", [300, 49152, 128256])
def test_tokens_are_those_of_the_cpu(how: dict, vocab: int):
    rows, draw = 64, torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=draw) * torch.linspace(0.5, 4, rows)[:, None]
    key, position = torch.tensor([draw_key(0, "p", i) for i in range(rows)]), torch.arange(rows)
    token, logp = sample_tokens(logits, key, position, **how)
    found = sample_tokens(logits.cuda(), key.cuda(), position.cuda(), **how)
    assert (found[0].cpu() != token).sum() <= 1, "a draw within rounding of the border between two tokens"
    same = found[0].cpu() == token
    torch.testing.assert_close(found[1].cpu()[same], logp[same], rtol=1e-5, atol=1e-5)
    again = sample_tokens(logits.cuda()[5:9], key.cuda()[5:9], position.cuda()[5:9], **how)
    assert torch.equal(again[0], found[0][5:9]) and torch.equal(again[1], found[1][5:9])


def test_draws_from_bf16_logits_follow_the_distribution():
    draws, logits = 1 << 14, (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    key = torch.tensor([draw_key(0, "p", i) for i in range(draws)], device="cuda")
    token, _ = sample_tokens(logits.cuda().expand(draws, -1), key, key, top_p=0.5)
    p, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    p[p.cumsum(0) - p >= 0.5] = 0
    p, counts = p / p.sum(), torch.bincount(token.cpu(), minlength=5000)[order]
    assert counts[p == 0].sum() == 0
    live = p * draws > 20
    assert live.sum() > 3 and ((counts - draws * p).abs()[live] < 4.5 * (draws * p * (1 - p))[live].sqrt()).all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_layers_are_those_of_transformers(dtype: torch.dtype):
    close = {BF16: {"rtol": 1.6e-2, "atol": 1e-2}, FP32: {"rtol": 1e-5, "atol": 1e-5}}[dtype]
    draw = torch.Generator("cuda").manual_seed(0)
    with torch.inference_mode():
        for shape in ((1, 33, 9, 128), (1, 5, 2048), (3, 8192)):
            x, weight = (torch.randn(s, generator=draw, device="cuda").to(dtype) for s in (shape, shape[-1:]))
            found = plain.rms_norm(x, weight, 1e-5)
            torch.testing.assert_close(found, plain.rms_norm_reference(x, weight, 1e-5), **close)
        gate, up = torch.randn(1, 17, 2 * 8200, generator=draw, device="cuda").to(dtype).chunk(2, -1)
        torch.testing.assert_close(plain.swiglu(gate, up), F.silu(gate) * up, **close)
        q, k = (torch.randn(1, 19, n, 80, generator=draw, device="cuda").to(dtype).transpose(1, 2) for n in (14, 2))
        cos, sin = torch.randn(2, 1, 19, 80, generator=draw, device="cuda").to(dtype)
        for a, b in zip(plain.rotary_pair(q, k, cos, sin), (q, k), strict=True):
            torch.testing.assert_close(a, plain.rotary_reference(b, cos, sin), **close)


def test_a_graph_replays_attention_and_draws():
    """With other lengths and keys in the same memory."""
    (q, k, v, *pages), tables = _case(8, 2, 128, BF16)
    rows, stops = len(ROWS), torch.tensor([3], device="cuda")
    state = torch.zeros(4, rows, dtype=torch.int64, device="cuda")
    out, logits = torch.zeros(2, rows, device="cuda"), torch.randn(rows, 5000, device="cuda", dtype=BF16)
    attended = torch.zeros_like(q)

    def step() -> None:
        attended.copy_(paged.decode_attention(q, k, v, *pages, tables, longest_prompt=700, longest_completion=1024,
                                              scale=0.2))
        advance_rows(state, tables.length, out, *sample_tokens(logits, state[3], state[2], top_p=0.9), stops, 2000)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(3):
        state[3] += 77 * i
        before = [x.clone() for x in (state, tables.length, *pages)]
        graph.replay()
        found = [x.clone() for x in (attended, out, state, tables.length, *pages)]
        for x, old in zip((state, tables.length, *pages), before, strict=True):
            x.copy_(old)
        step()
        assert all(torch.equal(a, b) for a, b in zip(found, (attended, out, state, tables.length, *pages), strict=True))
