"""Continuous batching for a GPU: the state of the rows is on the device, and a decode step is one captured graph.

A step draws a token for every row, records it, and marks the rows that end. The host reads the tokens one step late,
while the next step runs, and then gives the places of ended rows to other completions. What it does depends on the
tokens alone, never on the time they took, so completions are a pure function of the batch's arguments.
"""

from __future__ import annotations

import heapq
import warnings
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from strop.kernels.attention.paged import PAGE, SPLIT, Tables, tile_members
from strop.kernels.sampling import advance_rows, sample_tokens
from strop.trainer.sampling.base import Completion
from strop.trainer.sampling.kv_cache import LOOK_AHEAD, Held, fill_places, onto
from strop.trainer.sampling.pages import PagedDecode, PagedPrefill, PagedPrompt, Pool, pages_of

FEWEST_ROWS = 16
PREFILL_TOKENS = 8192  # per prefill
SPARE_GROUPS = 32  # prompts prefilled ahead of need, so that prefills are large


@dataclass(eq=False)
class DeviceRow:
    """An unfinished completion: number `sample` of prompt `prompt`, whose KV are in `group`. drawn: tokens that are
    drawn or will be by a step that was launched, had the row not ended before. pages: of its own KV."""

    prompt: int
    sample: int
    group: int
    key: int
    completion: Completion = field(default_factory=Completion)
    drawn: int = 1
    pages: list[int] = field(default_factory=list)


@dataclass
class Drawn:
    """Tokens on their way to the host: `values` [2, n] in pinned memory, complete after `event`."""

    rows: list[tuple[int, int, DeviceRow]]  # (column of values, place in the batch, row)
    values: Tensor
    event: torch.cuda.Event | None


class Graphs:
    """Replays a step by its shape. A shape's first step runs eagerly, which compiles its kernels; its second is
    captured. Where nothing can be captured, every step runs eagerly."""

    def __init__(self, device: torch.device):
        self.capturing = device.type == "cuda"
        self.seen: set[tuple] = set()
        self.drop()

    def drop(self) -> None:
        """Forgets the graphs: they read memory that has moved."""
        self.pool = None  # memory that the graphs share; its handle is gone with the last of them
        self.held: dict[tuple, torch.cuda.CUDAGraph] = {}

    def clear(self) -> None:
        """Forgets everything: other kernels may run."""
        self.drop()
        self.seen.clear()

    def run(self, shape: tuple, step: Callable[[], None]) -> None:
        if self.capturing and shape in self.seen and shape not in self.held:
            self._capture(shape, step)
        if shape in self.held:
            self.held[shape].replay()
        else:
            self.seen.add(shape)
            step()

    def _capture(self, shape: tuple, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as e:  # the step read a value on the host
            if isinstance(e, torch.OutOfMemoryError):
                raise
            self.capturing = False
            warnings.warn(f"the decode step cannot be captured and is launched kernel by kernel ({e})", stacklevel=2)
        else:
            self.held[shape] = graph


class Arena:
    """What the steps of batches of up to `rows` rows read and write on the device, at addresses that stay.

    state, length and out are those of strop.kernels.sampling.advance_rows. control: the tables that the host writes,
    copied at once.
    """

    def __init__(self, device: torch.device, rows: int, groups: int, prompt_width: int, own_width: int, members: int):
        self.device, self.shape = device, (rows, groups, prompt_width, own_width, members)
        shapes = {"prompt_pages": (groups, prompt_width), "own_pages": (rows, own_width), "prompt_length": (groups,),
                  "group": (rows,), "tiles": (rows, members)}
        self.host = np.zeros(sum(int(np.prod(shape)) for shape in shapes.values()), dtype=np.int32)
        self.control = torch.zeros(len(self.host), dtype=torch.int32, device=device)
        sizes = [int(np.prod(shape)) for shape in shapes.values()]
        parts = np.split(self.host, np.cumsum(sizes)[:-1]), self.control.split(sizes)
        self.on_host, self.on_device = (
            {name: x.reshape(shape) for x, (name, shape) in zip(of, shapes.items(), strict=True)} for of in parts)
        self.state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.length = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.out = torch.zeros(2, rows, dtype=torch.float32, device=device)

    def upload(self) -> None:
        """Copies the tables to the device. The host does not wait and may write to them at once."""
        copy = torch.from_numpy(self.host)
        copy = copy.pin_memory() if self.device.type == "cuda" else copy
        self.control.copy_(copy, non_blocking=True)

    def tables(self, rows: int) -> Tables:
        there = {name: x if name.startswith("prompt") else x[:rows] for name, x in self.on_device.items()}
        return Tables(length=self.length[:rows], **there)

    def fits(self, shape: tuple[int, ...]) -> bool:
        return shape[-1] == self.shape[-1] and all(need <= there for need, there in zip(shape, self.shape, strict=True))


class DeviceEngine:
    """Memory and graphs that outlive a call of the generator."""

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.pool, self.graphs, self.arena = Pool(), Graphs(device), None
        rope = str(getattr(model.config.get_text_config(), "rope_parameters", None))
        if "dynamic" in rope or "longrope" in rope:  # transformers reads the largest position on the host
            self.graphs.capturing = False
        self.longest_prompt = 0  # that a step has room for, so far
        self.coming: DeviceBatch | None = None  # of which some prompts may be prefilled
        self.captured, self.version = (), 0  # settings and version of the pool that the graphs were captured with

    def prepare(self, shape: tuple[int, ...], captured: tuple) -> Arena:
        """An arena for (rows, groups, pages of a prompt, pages of a completion, rows of a tile)."""
        if self.arena is None or not self.arena.fits(shape):
            if self.arena is not None:  # calls of different sizes soon fit
                shape = (*(max(sizes) for sizes in zip(shape[:-1], self.arena.shape[:-1], strict=True)), shape[-1])
            self.graphs.clear()
            self.arena = None  # frees the old one first
            self.arena = Arena(self.device, *shape)
        self.arena.length.fill_(-1)
        self.arena.host[:] = 0
        self.keep_graphs(captured)
        return self.arena

    def keep_graphs(self, captured: tuple) -> None:
        """Forgets the graphs if they were captured with other settings or other memory."""
        if captured != self.captured:
            self.graphs.clear()
        elif self.pool.version != self.version:
            self.graphs.drop()
        self.captured, self.version = captured, self.pool.version


class DeviceBatch:
    """A call of the generator. keys: for each prompt the random key of each of its completions.

    While the last rows of a call end, the first prompts of the next one, `engine.coming`, are prefilled. No rows of two
    calls run in one step, and every prefill has the prompts that it would have had: the completions are the same.
    """

    def __init__(self, engine: DeviceEngine, prompts: list[list[int]], keys: list[list[int]], max_new_tokens: int,
                 sampling: dict, stop: Collection[int], batch_size: int):
        self.call = prompts, keys, max_new_tokens, sampling, frozenset(stop), batch_size
        self.engine, self.device, self.pool = engine, engine.device, engine.pool
        self.prompts, self.keys, self.k = prompts, keys, len(keys[0])
        self.max_new_tokens, self.sampling, self.stop = max_new_tokens, sampling, frozenset(stop)
        groups = min(len(prompts), -(-batch_size // self.k) + SPARE_GROUPS)
        batch_size = min(batch_size, len(prompts) * self.k)
        self.longest = longest = max(map(len, prompts))
        heads = engine.model.config.get_text_config()
        rep = heads.num_attention_heads // (getattr(heads, "num_key_value_heads", None) or heads.num_attention_heads)
        self.shape = (_bucket(batch_size), groups, _power(pages_of(longest)), _power(pages_of(max_new_tokens)),
                      tile_members(self.k, rep))
        self.arena: Arena | None = None  # once it runs
        self.rows: list[DeviceRow | None] = [None] * batch_size
        self.finished: list[DeviceRow] = []
        self.free_groups, self.group_left = list(range(groups)), [0] * groups
        self.group_pages: list[list[int]] = [[] for _ in range(groups)]
        self.held = Held(groups, longest)
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
        self.ready: deque[DeviceRow] = deque()
        self.group_logits: Tensor | None = None
        self.underway: deque[Drawn] = deque()
        self.is_stale = False  # the tables on the device

    def run(self, on_progress: Callable[[int, int], None] | None = None) -> list[DeviceRow]:
        """All completions."""
        self.begin(on_progress)
        while self.waiting or self.ready or any(self.rows):
            self.admit()
            launched = self.step()
            if launched and self.engine.coming and not self.waiting and not self.ready:
                self.engine.coming.prepare(self.still_needed())
            self.collect(1 if launched else 0)
        for pages in self.group_pages:
            self.pool.release(pages)
        return self.finished

    def begin(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Takes over the arena."""
        self.on_progress = on_progress or (lambda *_: None)
        engine, longest = self.engine, _power(-(-self.longest // SPLIT)) * SPLIT
        self.longest_prompt = engine.longest_prompt = max(engine.longest_prompt, longest)
        self.settings = (*self.sampling.values(), self.max_new_tokens, tuple(sorted(self.stop)), self.longest_prompt)
        self.arena = engine.prepare(self.shape, self.settings)
        self.stops, = onto(self.device, sorted(self.stop))
        if engine.graphs.held:
            self.stops = engine.stops  # the graphs read them there
        engine.stops = self.stops
        for row in self.ready:
            self.write_group(row.group, len(self.prompts[row.prompt]))

    def still_needed(self) -> int:
        """Pages that unfinished rows may still take."""
        return sum(pages_of(self.max_new_tokens) - len(row.pages) for row in self.rows if row)

    def prepare(self, reserved: int) -> None:
        """Before it begins, and while another batch runs: one of the prefills that `admit` will begin with, if there is
        one left and the pool has room for it beside `reserved` pages. Gives up where memory is short."""
        if not self.waiting or not self.free_groups or len(self.ready) >= len(self.rows):
            return
        whole = sum(pages_of(len(self.prompts[i])) for i in self.waiting)
        most = pages_of(PREFILL_TOKENS) + len(self.free_groups) + pages_of(self.longest)
        if min(whole, most) > len(self.pool.free) - reserved:
            return
        try:
            self.prefill()
        except torch.OutOfMemoryError:
            for pages in self.group_pages:
                self.pool.release(pages)
            self.engine.coming = None

    def write_group(self, g: int, length: int) -> None:
        self.arena.on_host["prompt_pages"][g, : len(self.group_pages[g])] = self.group_pages[g]
        self.arena.on_host["prompt_length"][g] = length

    def admit(self) -> None:
        """Gives free places to waiting completions, and draws their first tokens."""
        fresh = [(i, r, self.rows[r]) for i, r in enumerate(fill_places(self))]
        if not fresh:
            return
        for _, r, row in fresh:
            self.arena.on_host["group"][r] = row.group
        place, group, position, key = onto(
            self.device, [r for _, r, _ in fresh], [row.group for *_, row in fresh],
            [len(self.prompts[row.prompt]) for *_, row in fresh], [row.key for *_, row in fresh])
        token, logp = sample_tokens(self.group_logits[group], key, torch.zeros_like(key), **self.sampling)
        out = torch.empty(2, len(fresh), dtype=torch.float32, device=self.device)
        advance_rows(self.arena.state, self.arena.length, out, token, logp, self.stops, self.max_new_tokens, place,
                     position, key)
        self.is_stale = True
        self.read(fresh, out)

    def prefill(self) -> None:
        """Prefills some of the waiting prompts, each after the pages that it shares with a prompt in the cache. Prompts
        that share more with another prompt of this prefill wait for the next one."""
        chosen: list[PagedPrompt] = []
        later: list[int] = []
        running: list[int] = []  # groups
        tokens = 0
        while self.waiting and self.free_groups and len(later) < LOOK_AHEAD:
            prompt = self.prompts[self.waiting[0]]
            common = self.held.common(prompt) // PAGE * PAGE
            coming, common[running] = max(common[running], default=0), 0
            source = int(common.argmax())
            cached = int(common[source])
            if coming - cached >= max(PAGE, len(prompt) / 8):
                later.append(self.waiting.popleft())
                continue
            if chosen and tokens + len(prompt) - cached > PREFILL_TOKENS:
                break
            tokens += len(prompt) - cached
            i, g = self.waiting.popleft(), heapq.heappop(self.free_groups)
            shared = self.pool.share(self.group_pages[source][: pages_of(cached)])
            self.pool.release(self.group_pages[g])
            self.group_pages[g] = shared + self.pool.take(pages_of(len(prompt)) - len(shared))
            if self.arena:
                self.write_group(g, len(prompt))
            chosen.append(PagedPrompt(prompt, self.group_pages[g], cached))
            running.append(g)
            self.held.put(g, prompt)
            self.group_left[g] = self.k
            self.ready.extend(DeviceRow(i, s, g, key) for s, key in enumerate(self.keys[i]))
        self.waiting.extendleft(reversed(later))
        step = PagedPrefill(self.pool, chosen, self.device)
        logits = self.forward(step, step.tokens, step.positions, logits_to_keep=step.last)
        if self.group_logits is None:
            self.group_logits = logits.new_zeros(len(self.group_left), logits.shape[-1])
        self.group_logits[onto(self.device, running)[0]] = logits

    def forward(self, step: PagedPrefill | PagedDecode, tokens: Tensor, positions: Tensor, **options) -> Tensor:
        """Logits [positions, V]."""
        return self.engine.model(input_ids=tokens, position_ids=positions, use_cache=False, kv_step=step,
                                 **options).logits[0]

    def step(self) -> bool:
        """Launches a decode step, if there is a row that has not drawn max_new_tokens."""
        self.compact()
        live = [(r, r, row) for r, row in enumerate(self.rows) if row and row.drawn < self.max_new_tokens]
        if not live:
            return False
        for _, r, row in live:
            if row.drawn > len(row.pages) * PAGE:  # the step stores the KV of the token drawn last
                row.pages += self.pool.take(1)
                self.arena.on_host["own_pages"][r, len(row.pages) - 1] = row.pages[-1]
                self.is_stale = True
        if self.is_stale:
            self.write_tiles()
            self.arena.upload()
            self.is_stale = False
        self.engine.keep_graphs(self.settings)
        rows = _bucket(live[-1][1] + 1)
        reach = _power(-(-max(row.drawn for *_, row in live) // SPLIT)) * SPLIT
        self.engine.graphs.run((rows, reach), lambda: self.decode(rows, reach))
        for *_, row in live:
            row.drawn += 1
        self.read(live, self.arena.out)
        return True

    def decode(self, rows: int, reach: int) -> None:
        """What is captured: nothing here may read a value of the device or depend on the host's state."""
        arena = self.arena
        step = PagedDecode(self.pool, arena.tables(rows), self.longest_prompt, reach)
        token, position, drawn, key = arena.state[:, :rows]
        logits = self.forward(step, token[None], position[None])
        advance_rows(arena.state, arena.length, arena.out, *sample_tokens(logits, key, drawn, **self.sampling),
                     self.stops, self.max_new_tokens)

    def read(self, rows: list[tuple[int, int, DeviceRow]], out: Tensor) -> None:
        """Starts the copy of the tokens just drawn to the host."""
        event = None
        if self.device.type == "cuda":
            values = torch.empty(out.shape, dtype=out.dtype, pin_memory=True).copy_(out, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            values = out.clone()
        self.underway.append(Drawn(rows, values, event))

    def collect(self, keep: int) -> None:
        """Takes over the tokens of all but the last `keep` draws, and retires the rows that ended."""
        while len(self.underway) > keep:
            drawn = self.underway.popleft()
            if drawn.event:
                drawn.event.synchronize()  # the only wait of a step
            tokens, logps = drawn.values.tolist()
            ended = count = 0
            for column, r, row in drawn.rows:
                completion = row.completion
                if completion.finish:  # ended before this step, which the host did not know when it launched it
                    continue
                count += 1
                if completion.take(int(tokens[column]), logps[column], self.stop, self.max_new_tokens):
                    self.retire(r, row)
                    ended += 1
            self.on_progress(ended, count)

    def retire(self, r: int, row: DeviceRow) -> None:
        """Frees the row's place and pages. A step underway skips it; later ones store what takes its place."""
        self.rows[r] = None
        self.finished.append(row)
        self.pool.release(row.pages)
        self.is_stale = True
        self.group_left[row.group] -= 1
        if not self.group_left[row.group]:
            heapq.heappush(self.free_groups, row.group)  # its pages are kept for prompts that begin alike
            if not self.waiting:
                self.pool.release(self.group_pages[row.group])
                self.group_pages[row.group] = []

    def write_tiles(self) -> None:
        tiles, members = self.arena.on_host["tiles"], self.arena.shape[-1]
        tiles[:] = -1
        of_group: dict[int, list[int]] = {}
        for r, row in enumerate(self.rows):
            if row:
                of_group.setdefault(row.group, []).append(r)
        parts = [rows[i : i + members] for _, rows in sorted(of_group.items()) for i in range(0, len(rows), members)]
        for tile, part in zip(tiles, parts, strict=False):
            tile[: len(part)] = part

    def compact(self) -> None:
        """Once nothing waits, moves rows into free places below them when a step of fewer rows then suffices."""
        if self.waiting or self.ready:
            return
        places = [r for r, row in enumerate(self.rows) if row]
        if not places or _bucket(len(places)) >= _bucket(places[-1] + 1):
            return
        self.collect(0)
        places = [r for r, row in enumerate(self.rows) if row]
        holes = [r for r in range(len(places)) if self.rows[r] is None]
        last = [r for r in places if r >= len(places)]
        if not holes:
            return
        sources, targets = onto(self.device, last, holes)
        self.arena.state[:, targets] = self.arena.state[:, sources]
        self.arena.length[targets] = self.arena.length[sources]
        self.arena.length[sources] = -1
        for name in ("group", "own_pages"):
            self.arena.on_host[name][holes] = self.arena.on_host[name][last]
        for source, target in zip(last, holes, strict=True):
            self.rows[target], self.rows[source] = self.rows[source], None
        self.is_stale = True


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def _bucket(rows: int) -> int:
    """Rows of a step: few shapes, so few graphs, and whole tiles of matrix products."""
    return max(FEWEST_ROWS, _power(rows)) if rows <= 128 else -(-rows // 128) * 128
