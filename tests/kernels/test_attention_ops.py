"""The attention operator under opcheck and torch.compile, the choice of backend, and the backends that gather keys."""

import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn.attention.bias import causal_lower_right

from strop.kernels import Group, PackedGroups, prefix_attention
from strop.kernels.attention import prefix, reference, varlen
from strop.kernels.attention.prefix import _backward_op, _op
from strop.kernels.layout import TILE, Bounds

GROUPS = [Group([1, 2, 3], [[4, 5], [6], [7, 8, 9, 1]]), Group([], [[1, 2], [3]]), Group([1] * 9, [[2] * 4])]


def _qkv(groups: PackedGroups, dtype: torch.dtype = torch.float32, value_size: int = 8) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, groups.num_tokens, n, size) for n, size in ((4, 8), (2, 8), (2, value_size))]
    return [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def _layout(groups: PackedGroups) -> tuple[torch.Tensor, ...]:
    return groups.segments, groups.tiles, groups.readers_end, groups.position_ids


@pytest.mark.parametrize(
    ("window", "cap", "value_size", "contiguous"), [(0, 0.0, 8, False), (4, 2.0, 8, True), (0, 0.0, 4, False)]
)
def test_opcheck(window: int, cap: float, value_size: int, contiguous: bool):
    groups = PackedGroups.pack(GROUPS)
    qkv = _qkv(groups, value_size=value_size)
    if contiguous:
        qkv = [x.detach().contiguous().requires_grad_() for x in qkv]
    rest = (*_layout(groups), 0.3, window, cap, False)
    opcheck(_op, (*qkv, *rest))
    qkv = [x.detach() for x in qkv]
    out, lse = _op(*qkv, *rest)
    opcheck(_backward_op, (torch.ones_like(out), *qkv, out, lse, *rest))


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4, "softcap": 2.0}], ids=str)
def test_compiled_in_one_graph_for_batches_of_any_layout(options: dict):
    def attend(q, k, v, groups):
        return prefix_attention(q, k, v, groups, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    others = [Group([5] * 20, [[6] * n]) for n in (1, 2)], GROUPS[::-1], GROUPS[1:]
    for groups in (GROUPS, [*GROUPS, *GROUPS[:2], Group([1] * 200, [[2]])], *others):
        groups = PackedGroups.pack(groups)
        qkv = _qkv(groups)
        results = []
        for function in (attend, compiled):
            out = function(*qkv, groups)
            results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
        torch.testing.assert_close(*results)
    # The second sees that sizes vary; no later one compiles anything.
    assert counter.frame_count <= 2


def test_equals_separate_rows():
    """The same completions with the prompt repeated before each, by PyTorch's attention on padded rows."""
    torch.manual_seed(0)
    groups = PackedGroups.pack([Group([1] * 150, [[2] * n for n in (3, 70, 200)]), *GROUPS])
    qkv = _qkv(groups)
    packed = prefix_attention(*qkv, groups)
    for (start, end), group in zip(groups.completion_bounds, groups.completion_group, strict=True):
        prompt = groups.prompt_bounds[group]
        rows = torch.cat([torch.arange(*prompt), torch.arange(start, end)])
        q, k, v = (x[:, :, rows] for x in qkv)
        separate = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(packed[:, :, start:end], separate[:, :, start - end :], rtol=1e-5, atol=1e-5)


def test_autocast_decides_the_dtype():
    groups = PackedGroups.pack(GROUPS)
    q, k, v = _qkv(groups)
    with torch.autocast("cpu", torch.bfloat16):
        assert prefix_attention(q, k.bfloat16(), v, groups).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="one dtype"):
        prefix_attention(q, k.bfloat16(), v, groups)


def test_what_a_backend_cannot_take_raises():
    groups = PackedGroups.pack(GROUPS)
    qkv = _qkv(groups)
    for backend in ("triton", "varlen"):
        with pytest.raises(ValueError, match=f"{backend}: it takes"):
            prefix_attention(*qkv, groups, backend=backend)
    with pytest.raises(ValueError, match="unknown backend 'cudnn'"):
        prefix_attention(*qkv, groups, backend="cudnn")
    torch.testing.assert_close(prefix_attention(*qkv, groups, backend="sdpa"), prefix_attention(*qkv, groups))
    for wrong in ({"scale": -1.0}, {"sliding_window": 0}, {"sliding_window": -3}, {"softcap": -2.0}):
        with pytest.raises(ValueError, match="above 0"):
            prefix_attention(*qkv, groups, **wrong)
    with pytest.raises(ValueError, match="the groups are on meta"):
        prefix_attention(*qkv, groups.to("meta"))


@pytest.mark.parametrize(
    ("backend", "window"), [(None, None), ("triton", 4), ("varlen", None), ("varlen", 4), ("sdpa", 4)]
)
def test_no_backend_synchronizes(backend: str | None, window: int | None):
    """On fake GPU tensors, reading a value on the host raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    groups = PackedGroups.pack(GROUPS)
    with FakeTensorMode() as mode, torch.no_grad():
        q, k, moved = _on_fake_gpu(groups, mode)
        out = prefix_attention(q, k, k, moved, sliding_window=window, backend=backend)
        assert out.shape == q.shape
        assert out.device.type == "cuda"


def test_a_table_entry_chooses_a_faster_backend(monkeypatch):
    """Where it is installed and supports the inputs; else the usual one."""
    q, wide = (torch.empty(1, 4, 3, size, dtype=torch.bfloat16, device="meta") for size in (64, 256))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(prefix, "_capability", lambda _: 9)
    assert prefix._choose(None, q, q, 0.0) == "triton"
    monkeypatch.setitem(prefix.FASTER, 9, "flash_attn_4")
    monkeypatch.setitem(varlen.INSTALLED, "flash_attn_4", False)
    assert prefix._choose(None, q, q, 0.0) == "triton"
    with pytest.raises(ValueError, match="flash_attn_4: flash-attn-4 is not installed"):
        prefix._choose("flash_attn_4", q, q, 0.0)
    monkeypatch.setitem(varlen.INSTALLED, "flash_attn_4", True)
    assert prefix._choose(None, q, q, 0.0) == "flash_attn_4"
    assert prefix._choose(None, wide, wide, 0.0) == prefix._choose(None, q, q, 2.0) == "triton"
    assert prefix._choose(None, q.float(), q.float(), 0.0) == "triton"
    monkeypatch.setattr(prefix, "_capability", lambda _: 8)
    assert prefix._choose(None, q, q, 0.0) == "triton"


def _on_fake_gpu(groups: PackedGroups, mode) -> tuple[torch.Tensor, torch.Tensor, PackedGroups]:
    """q, k and the groups as fake tensors of a GPU."""
    moved = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda") for n, x in groups._tensors().items()}
    q, k = (torch.empty(1, n, groups.num_tokens, 16, device="cuda", dtype=torch.bfloat16) for n in (4, 2))
    return q, k, replace(groups, **moved, segments=mode.from_tensor(groups.segments))


@pytest.mark.parametrize("backend", [None, "triton", "varlen"])
def test_the_choice_of_a_backend_on_a_gpu_is_not_traced(backend: str | None, recwarn: pytest.WarningsRecorder):
    """Dynamo warns where it traces through functools.cache, and older releases then fail in importlib or torch.cuda."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch._dynamo.reset()
    torch._dynamo.utils.warn_once_cache.clear()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    groups = PackedGroups.pack(GROUPS)
    with FakeTensorMode() as mode, torch.no_grad():
        q, k, groups = _on_fake_gpu(groups, mode)
        compiled = torch.compile(partial(prefix_attention, backend=backend), fullgraph=True, backend=keep)
        assert compiled(q, k, k, groups).device.type == "cuda"
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]
    triton = [node.args[-1] for node in graphs[0].graph.nodes if node.target is _op]
    assert triton == ([] if backend == "varlen" else [True])


def test_segments_stay_on_the_host():
    groups = PackedGroups.pack(GROUPS).to("meta")
    assert Bounds.of(groups.segments) == (groups.prompt_bounds, groups.completion_bounds, groups.completion_group)
    assert groups.tiles.device.type == groups.key_index.device.type == "meta"


def test_tiles_cover_every_row_once_and_no_two_groups():
    groups = PackedGroups.pack([Group([1] * 300, [[2] * 5, [3] * 100]), *GROUPS, Group([], [[1] * TILE])])
    rows = []
    for start, end, group_start, prompt_end, _, _ in groups.tiles.tolist():
        (group,) = (g for g, bounds in enumerate(groups.prompt_bounds) if bounds == (group_start, prompt_end))
        last = max(
            end for (_, end), g in zip(groups.completion_bounds, groups.completion_group, strict=True) if g == group
        )
        assert group_start <= start < end <= min(last, start + TILE)
        rows += range(start, end)
    assert rows == list(range(groups.num_tokens))


def test_tiles_with_the_most_work_come_first():
    groups = PackedGroups.pack([Group([1] * 300, [[2] * 5, [3] * 300]), *GROUPS, Group([], [[1] * TILE])])
    row = torch.arange(groups.num_tokens)
    seen = (row[None] <= row[:, None]) & (row[:, None] < groups.readers_end[None])
    tiles = groups.tiles.tolist()
    rows = [slice(start, end) for start, end, *_ in tiles]
    for column, reach in ((4, [seen[r].any(0).sum() for r in rows]), (5, [seen[:, r].any(1).sum() for r in rows])):
        order = [tile[column] for tile in tiles]
        assert sorted(order) == list(range(len(tiles)))
        assert [int(reach[i]) for i in order] == sorted(map(int, reach), reverse=True)


def test_readers_end_is_the_mask():
    groups = PackedGroups.pack(GROUPS)
    row = torch.arange(groups.num_tokens)
    seen = (row[None] <= row[:, None]) & (row[:, None] < groups.readers_end[None])
    v = torch.eye(groups.num_tokens, dtype=torch.float64)[None, None]
    weights = reference.prefix_attention(torch.zeros_like(v), torch.zeros_like(v), v, groups)[0, 0]
    assert torch.equal(weights > 0, seen)


def _varlen_twin(q, k, v, query_offsets, key_offsets, max_q, max_k, *, scale, window, cap):
    """The contract of both kernels, sequence by sequence."""
    outs = []
    queries, keys = (list(pairwise(x.tolist())) for x in (query_offsets, key_offsets))
    for (q_start, q_end), (k_start, k_end) in zip(queries, keys, strict=True):
        assert q_end - q_start <= max_q and k_end - k_start <= max_k
        q_rows, k_rows, v_rows = (
            x.transpose(0, 1)[None] for x in (q[q_start:q_end], k[k_start:k_end], v[k_start:k_end])
        )
        if window[0] < 0 and not cap:
            bias = causal_lower_right(q_end - q_start, k_end - k_start)
            out = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, bias, scale=scale, enable_gqa=True)
        else:
            position = torch.arange(k_end - k_start)
            visible = reference.attention_mask(
                position[q_start - q_end :], position, window[0] + 1 if window[0] >= 0 else None
            )
            repeat = q.shape[1] // k.shape[1]
            scores = q_rows @ k_rows.repeat_interleave(repeat, 1).mT * scale
            scores = torch.tanh(scores / cap) * cap if cap else scores
            out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v_rows.repeat_interleave(repeat, 1)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize(("window", "cap"), [(0, 0.0), (4, 0.0), (0, 2.0)])
@pytest.mark.parametrize("backend", ["varlen", "flash_attn", "flash_attn_4"])
def test_gathered_keys(backend: str, window: int, cap: float, monkeypatch):
    """The kernels need a GPU; plain PyTorch replaces them here."""
    groups = PackedGroups.pack(GROUPS)
    qkv = _qkv(groups, torch.float64)
    if backend == "varlen":
        if cap:
            pytest.skip("no soft-cap")

        def varlen_attn(*tensors, scale, window_size, **grouped):
            assert grouped == ({"enable_gqa": True} if torch.__version__ >= (2, 12) else {}) and window_size[1] == 0
            return _varlen_twin(*tensors, scale=scale, window=window_size, cap=0.0)

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
        out = varlen.varlen(*qkv, groups, 0.3, window)
    elif backend == "flash_attn_4":
        if cap:
            pytest.skip("no soft-cap")

        def flash_attn_varlen_func(
            q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
            min_seqlen_k=None, softmax_scale=None, causal=False, window_size=(None, None), deterministic=False,
        ):
            """The signature of 4.0.0b36, as far as it is used; it returns the log-sum-exp too."""
            assert causal and deterministic and window_size in ((None, None), (window - 1, 0))
            lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            sides = (window - 1, 0) if window else (-1, -1)
            return _varlen_twin(q, k, v, *lengths, scale=softmax_scale, window=sides, cap=0.0), None

        module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(cute=module))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
        out = varlen.flash_attn_4(*qkv, groups, 0.3, window)
    else:

        def flash_attn_varlen_func(*tensors, softmax_scale, causal, window_size, softcap, deterministic):
            assert causal and deterministic
            return _varlen_twin(*tensors, scale=softmax_scale, window=window_size, cap=softcap)

        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
        out = varlen.flash_attn(*qkv, groups, 0.3, window, cap)
    expected = reference.prefix_attention(*qkv, groups, scale=0.3, sliding_window=window or None, softcap=cap or None)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    gradients = torch.autograd.grad(out, qkv, upstream)
    # The copies' gradients are summed in fp32.
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, qkv, upstream), rtol=1e-5, atol=1e-5)
