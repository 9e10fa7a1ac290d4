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
    batch = DeviceBatch(engine, PROMPTS, keys, 60, SAMPLING, (), 9)
    batch.begin()
    return batch


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


@pytest.mark.parametrize("room", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_call_prefills_for_the_next_one(monkeypatch, room):
    """While its last rows end, if the pool has pages for it. No step and no prefill has rows or prompts of two calls,
    and what is drawn is what a call alone draws."""
    calls = [(make_prompts(5, 40, 3, 12, 70, 5), ["a", "b", "c", "d", "e", "f"]), (mixed_prompts(), list("klmnopqrst")),
             (make_prompts(40, 40), ["x", "y"])]
    how = {"k": 3, "seed": 5, "max_new_tokens": 20, "stop_ids": STOP, "batch_size": 8}
    model = tiny("Llama")
    alone = [on_the_device(model).generate(prompts, ids=ids, **how) for prompts, ids in calls]
    generator, events = on_the_device(model), []
    with_graphs(monkeypatch, generator)
    generator.engine.pool.grow(300)
    prefill, step, begin = DeviceBatch.prefill, DeviceBatch.step, DeviceBatch.begin
    names = {}

    def noted(kind, function):
        def call(batch, *rest):
            name = names.setdefault(len(batch.prompts), len(names))
            events.append((kind, name))
            return function(batch, *rest)
        return call

    for kind, function in (("prefill", prefill), ("step", step), ("begin", begin)):
        monkeypatch.setattr(DeviceBatch, kind, noted(kind, function))
    found = []
    for i, (prompts, ids) in enumerate(calls):
        if i + 1 < len(calls):
            generator.expect(calls[i + 1][0], ids=calls[i + 1][1], **how)
        if not room:
            monkeypatch.setattr(DeviceBatch, "still_needed", lambda batch: 1 << 30)
        found.append(generator.generate(prompts, ids=ids, **how))
        assert len(generator.engine.pool.free) + sum(
            len(pages) for pages in (generator.engine.coming.group_pages if generator.engine.coming else ())
        ) == generator.engine.pool.size, "the pages of a call are free when it ends"
    assert found == alone
    begins = [i for i, (kind, *_) in enumerate(events) if kind == "begin"]
    for call, at in enumerate(begins):
        early = ("prefill", call) in events[:at]
        assert early == (room and call > 0), events
        if early:
            assert events[at + 1] == ("step", call), "it begins with a step"
            assert events[at - 1] == ("step", call - 1), "the last call had rows when it was prefilled"


def test_what_was_expected_is_forgotten_if_another_call_comes(llama, monkeypatch):
    how = {"k": 2, "max_new_tokens": 30, "stop_ids": STOP, "batch_size": 4}
    first, second, third = make_prompts(5, 9, 20), make_prompts(40, 33), make_prompts(7, 50)
    alone = [llama.generate(prompts, **how) for prompts in (first, third)]
    llama.engine.pool.grow(300)
    llama.expect(second, **how)
    assert llama.generate(first, **how) == alone[0] and llama.engine.coming.group_logits is not None
    assert llama.generate(third, **how) == alone[1] and llama.engine.coming is None
    llama.expect(second, **how)
    with monkeypatch.context() as patch:
        patch.setattr(DeviceBatch, "retire", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llama.generate(first, **how)
    assert llama.engine.coming is None and llama.generate(third, **how) == alone[1]


def test_a_prefill_ahead_that_finds_no_memory_is_left_out(monkeypatch):
    generator, how = on_the_device(tiny("Llama")), {"k": 2, "max_new_tokens": 30, "stop_ids": STOP, "batch_size": 4}
    first, second = make_prompts(5, 9, 20), make_prompts(40, 33)
    alone = generator.generate(second, **how)
    forward = DeviceBatch.forward

    def small(batch, step, *rest, **options):
        if batch is generator.engine.coming:
            raise torch.OutOfMemoryError("no room")
        return forward(batch, step, *rest, **options)

    monkeypatch.setattr(DeviceBatch, "forward", small)
    generator.engine.pool.grow(300)
    generator.expect(second, **how)
    generator.generate(first, **how)
    assert generator.engine.coming is None and len(generator.engine.pool.free) == generator.engine.pool.size
    assert generator.generate(second, **how) == alone


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
