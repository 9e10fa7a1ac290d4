"""The GPU's batches, on the CPU: the same completions as the CPU's, graphs that hold all of a step, few launches."""

import contextlib
import os
import subprocess
import sys
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
from test_decode import CONFIG, PROMPTS, HostLists, Waits
from test_generate import FAMILIES, STOP, flat, make_prompts, on_the_device, tiny
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from strop.kernels.attention.paged import PAGE
from strop.trainer.sampling import on_device, pages
from strop.trainer.sampling.in_process import Generator
from strop.trainer.sampling.on_device import DeviceBatch, DeviceEngine
from strop.trainer.sampling.pages import PagedPrefill, Pool

CPU = torch.device("cpu")
SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded(TorchDispatchMode):
    """A CUDA graph for the CPU: records what runs, undoes it, and replays it on the same tensors."""

    replays = 0

    def __init__(self, engine: DeviceEngine):
        super().__init__()
        self.engine, self.calls = engine, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @contextlib.contextmanager
    def capture(self):
        pool, arena = self.engine.pool, self.engine.arena
        held = [arena.state, arena.length, arena.out, *pool.k.values(), *pool.v.values()]
        before = [x.clone() for x in held]
        with self:
            yield
        for x, old in zip(held, before, strict=True):
            x.copy_(old)

    def replay(self):
        Recorded.replays += 1
        with _disable_current_modes():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def with_graphs(monkeypatch, generator: Generator) -> None:
    Recorded.replays = 0
    generator.engine.graphs.capturing = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Recorded(generator.engine))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.capture())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))


def mixed_prompts() -> list[list[int]]:
    """Some that share one or two pages, some shorter than a page, one that is the beginning of another."""
    system, *ends = make_prompts(2 * PAGE + 3, 5, 1, 12, 20)
    return [*(system + end for end in ends), system[:PAGE], system[: 2 * PAGE + 1], *make_prompts(5, 17, 1, 40)]


KINDS = ("Llama", "Gemma2")  # of layers: the others run with -m slow
CASES = [pytest.param(family, graphs, marks=[pytest.mark.slow] * (family not in KINDS or not graphs),
                      id=f"{family}-{'graphs' if graphs else 'eager'}") for family in FAMILIES
         for graphs in (True, False)]


@pytest.mark.parametrize(("family", "graphs"), CASES)
def test_completions_equal_those_of_the_host(family, graphs, monkeypatch):
    monkeypatch.setattr(on_device, "SPLIT", 16)  # several numbers of parts, so several graphs
    monkeypatch.setattr(on_device, "FEWEST_ROWS", 4)
    model = tiny(family)
    how = {"k": 3, "seed": 5, "max_new_tokens": 36, "stop_ids": STOP, "batch_size": 7}
    expected = {}
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9}):
        expected[str(sampling)] = sampling, Generator(model).generate(mixed_prompts(), **how, **sampling)
    generator, prefilled = on_the_device(model), []
    init = PagedPrefill.__init__
    monkeypatch.setattr(PagedPrefill, "__init__", lambda self, pool, prompts, device: (
        prefilled.extend(len(p.prompt) - p.cached for p in prompts), init(self, pool, prompts, device))[1])
    if graphs:
        with_graphs(monkeypatch, generator)
    for sampling, host in expected.values():
        prefilled.clear()
        got = generator.generate(mixed_prompts(), **how, **sampling)
        assert flat(got) == flat(host)
        for ours, theirs in zip(chain(*got), chain(*host), strict=True):
            assert ours.logp == pytest.approx(theirs.logp, abs=1e-3)
            assert ours.logps == pytest.approx(theirs.logps, abs=1e-3)
        assert len(prefilled) == 10 and sum(prefilled) <= sum(map(len, mixed_prompts())) - 4 * PAGE
    assert bool(Recorded.replays) == graphs


@pytest.fixture(scope="module")
def llama() -> Generator:
    return on_the_device(tiny("Llama"))


def test_graphs_of_one_call_serve_the_next(monkeypatch):
    generator = on_the_device(tiny("Llama"))
    with_graphs(monkeypatch, generator)
    how = {"k": 4, "max_new_tokens": 16, "batch_size": 16}
    first = generator.generate(make_prompts(5, 9, 3, 12), stop_ids=STOP, **how)
    graphs = dict(generator.engine.graphs.held)
    assert graphs
    assert generator.generate(make_prompts(5, 9, 3, 12), stop_ids=STOP, **how) == first
    assert generator.engine.graphs.held == graphs
    ends = {c.tokens[0] for samples in first for c in samples}
    again = generator.generate(make_prompts(5, 9, 3, 12), stop_ids=ends, **how)
    assert not set(generator.engine.graphs.held.values()) & set(graphs.values()), "they stop at other tokens"
    assert all(c.finish == "length" or c.tokens[-1] in ends for samples in again for c in samples)


def test_as_many_tokens_as_are_asked_for(llama):
    for n in (1, 2):
        assert {len(c.tokens) for c in chain(*llama.generate(make_prompts(5, 9), k=3, max_new_tokens=n))} == {n}


class Launches(TorchDispatchMode):
    """Counts operators that are a kernel or a copy on a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not is_view and func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        return func(*args, **(kwargs or {}))


def test_launches_outside_graphs(monkeypatch):
    """Of a step and of what rows that ended need before it: tables, first draws, the graph, the tokens' way back."""
    generator, launches, per_step, others = on_the_device(tiny("Llama")), Launches(), [], []
    with_graphs(monkeypatch, generator)
    draw, capture, prefill, collect = (on_device.sample_tokens, on_device.Graphs._capture, DeviceBatch.prefill,
                                       DeviceBatch.collect)

    def drawn(*arguments, **options):
        if others and others[-1] == "capturing":
            return draw(*arguments, **options)
        launches.count += 2  # as a GPU has them
        with _disable_current_modes():
            return draw(*arguments, **options)

    def captured(*arguments):
        others.append("capturing")
        capture(*arguments)
        others.append("captured")

    def counted(batch: DeviceBatch, keep: int) -> None:
        collect(batch, keep)
        if Recorded.replays > counted.replays and not others:
            per_step.append(launches.count + 1)
        others.clear()
        launches.count, counted.replays = 0, Recorded.replays

    counted.replays = 0
    monkeypatch.setattr(on_device, "sample_tokens", drawn)
    monkeypatch.setattr(on_device.Graphs, "_capture", captured)
    monkeypatch.setattr(DeviceBatch, "prefill", lambda batch: others.append("prefill") or prefill(batch))
    monkeypatch.setattr(DeviceBatch, "collect", counted)
    with launches:
        generator.generate(make_prompts(5, 9, 3, 12), k=9, max_new_tokens=80, stop_ids={*STOP, 20, 30}, batch_size=16)
    assert len(per_step) > 20 and 5 < max(per_step) <= 20, per_step


def batch_on_meta(monkeypatch, waits: Waits) -> DeviceBatch:
    """Every token drawn is 5."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    Generator(model)
    tolist = torch.Tensor.tolist

    def read(x: torch.Tensor) -> list:
        if x.device.type != "meta":
            return tolist(x)
        waits.count += 1
        return torch.full(x.shape, 5.0).numpy().tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # not for meta
    keys = [[100 * i + s for s in range(3)] for i in range(len(PROMPTS))]
    engine = DeviceEngine(model, torch.device("meta"))
    return DeviceBatch(engine, PROMPTS, keys, 60, SAMPLING, (), 9, None)


def test_a_step_waits_for_the_tokens_of_the_one_before_alone(monkeypatch):
    waits = Waits()
    batch = batch_on_meta(monkeypatch, waits)
    with torch.no_grad(), waits, HostLists(waits):
        batch.admit()
        assert batch.step() and waits.count == 0, "the first step does not wait for the first tokens"
        for steps in range(1, 40):
            batch.collect(1)
            assert waits.count == steps
            assert batch.step() and len(batch.underway) == 2
        for r in (0, 3, 4):
            batch.collect(0)
            batch.retire(r, batch.rows[r])
        before = waits.count
        batch.admit()
        batch.compact()
        assert waits.count == before and None not in batch.rows


def test_a_step_that_reads_the_device_runs_without_graphs(monkeypatch):
    generator = on_the_device(tiny("Llama"))
    with_graphs(monkeypatch, generator)
    how = {"k": 2, "max_new_tokens": 20}
    expected = on_the_device(tiny("Llama")).generate(make_prompts(5, 9), **how)

    @contextlib.contextmanager
    def refusing(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refusing)
    with pytest.warns(UserWarning, match="cannot be captured and is launched kernel by kernel"):
        assert generator.generate(make_prompts(5, 9), **how) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generator.generate(make_prompts(5, 9), **how) == expected


def test_kv_memory_follows_the_completions(monkeypatch):
    """A limit of 4096 tokens that nobody reaches takes no memory, and pages of ended rows are used again."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"max_position_embeddings": 8192})).eval()
    generator = on_the_device(model)
    generator.generate([PROMPTS[i % 5] for i in range(12)], k=4, max_new_tokens=4096, stop_ids=set(range(150)),
                       batch_size=8)
    pool = generator.engine.pool
    assert pool.size <= 1.5 * (12 * 2 + 8), "two pages of each prompt, one of each row"
    assert pool.nbytes() == 2 * 2 * pool.size * 2 * PAGE * 8 * 4
    short = generator.generate(PROMPTS[:2], k=2, max_new_tokens=100, batch_size=4, ids=["a", "b"])
    again = on_the_device(model).generate(PROMPTS[:2], k=2, max_new_tokens=100, batch_size=4, ids=["a", "b"])
    assert short == again, "the pool's size is not part of the result"


def test_pages_are_freed_by_their_last_holder(monkeypatch):
    pool = Pool()
    first = pool.take(3)
    shared = pool.share(first[:2])
    pool.release(first)
    assert pool.holders[first[0]] == 1 and first[2] in pool.free and first[0] not in pool.free
    pool.release(shared)
    assert sorted(pool.free) == list(range(pool.size)) and not any(pool.holders)
    pool.layer(0, torch.zeros(2, 1, 8), torch.zeros(2, 1, 8))
    pool.k[0][:] = 7.0
    before, version = pool.size, pool.version
    refused = []

    def small(self, size):
        if size > before + 4:
            refused.append(size)
            raise torch.OutOfMemoryError("no room")
        return reallocate(self, size)

    reallocate = Pool._reallocate
    monkeypatch.setattr(Pool, "_reallocate", small)
    monkeypatch.setattr(pages, "GROWTH", 9)
    pool.take(before + 4)
    assert refused and pool.size == before + 4 and pool.version > version and (pool.k[0][:before] == 7.0).all()


@pytest.mark.slow
def test_the_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_engine_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-6000:]
