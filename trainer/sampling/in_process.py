"""The in-process sampling engine: K completions of many prompts with continuous batching. `Batch` is for the CPU, and
for models whose attention the GPU's kernels do not support; otherwise a GPU's batches are those of on_device.py."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strop.kernels import draw_key, sample_tokens
from strop.kernels.decoder import Decoder
from strop.kernels.integrations.compiled import eagerly
from strop.kernels.integrations.decoder import decoder_of
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder, max_positions
from strop.trainer.run.world import World
from strop.trainer.sampling import kv_cache
from strop.trainer.sampling.base import Completion
from strop.trainer.sampling.kv_cache import CachedPrefix, Decode, Held, Prefill, PromptKV, attend_with_cache, onto
from strop.trainer.sampling.on_device import DeviceBatch, DeviceEngine, DeviceRow
from strop.trainer.sampling.pages import supports

BUCKET = 16  # rows and lengths are rounded up: few shapes, whole matrix tiles
PREFILL_TOKENS = 1024  # per prefill, prompts padded to the longest
SPARE_GROUPS = 16  # prompts prefilled ahead of need, so that prefills are batched too


@dataclass
class Row:
    """An unfinished completion: number `sample` of prompt `prompt`, whose KV are in `group` of the cache."""

    prompt: int
    sample: int
    group: int
    key: int
    completion: Completion


def load_for_generation(folder: ModelFolder, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A causal LM for a `Generator` alone: its layers are fused, or a Decoder has their weights."""
    from strop.kernels.integrations.transformers import fuse_layers, merge_projections  # imports transformers

    model = folder.load(dtype, device, attention="sdpa")
    model.strop_decoder = decoder_of(model, take=True)
    if model.strop_decoder:
        return model
    fuse_layers(model, inference=True)
    if device.type == "cuda":
        merge_projections(model)
    pack_linears(model)
    return model


def pack_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Packs the linear layers of a model on a CPU, where that helps. Returns each as (parent, name, layer), to put it
    back."""
    device, packed = model.device, []
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and (
            model.dtype == torch.float32 or World(device=device).multiplies_bf16):
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.Linear:
                    setattr(parent, name, PackedLinear(child))
                    packed.append((parent, name, child))
    return packed


@contextmanager
def lent(model: nn.Module, pack: bool = True) -> Iterator[Generator]:
    """A Generator on the weights of a model in training, without a copy of them but for packed linear layers on a CPU.
    Afterwards the model has its own layers, attention and mode again. Without `pack`, and with adapters around it, the
    layers stay. Raises UserError as Generator does."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, training = base.config._attn_implementation, model.training
    pack = pack and base is model  # adapters look at the layers' weights
    decoder = decoder_of(model) if pack else None
    packed = pack_linears(base) if pack and not decoder else []
    model.eval()
    try:
        with eagerly(base):
            yield Generator(base, decoder)
    finally:
        base.set_attn_implementation(attention)
        for parent, name, layer in packed:
            setattr(parent, name, layer)
        model.train(training)


class PackedLinear(nn.Module):
    """A linear layer with its weight in oneDNN's blocked layout, so that no call reorders it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 128)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Generator:
    """Samples from a causal LM of transformers, whose attention implementation it replaces. Raises UserError on models
    that keep state outside attention or use attention that the cache does not support. decoder: computes the model's
    steps in its place; by default the one that it was loaded with."""

    def __init__(self, model: nn.Module, decoder: Decoder | None = None):
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise UserError(f"{type(model).__name__} has layers of type {', '.join(sorted(unknown))}: the in-process "
                             "sampler supports full_attention and sliding_attention")
        self.model, self.context = model.eval(), max_positions(model.config)
        self.device = next(model.parameters()).device
        self.decoder = decoder or getattr(model, "strop_decoder", None)
        attend_with_cache(model)
        self.engine = DeviceEngine(model, self.device) if supports(model) else None
        self.expected: tuple | None = None

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], *, k: int = 1, ids: Sequence[str] | None = None,
                 seed: int = 0, max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                 stop_ids: Collection[int] = (), batch_size: int = 128,
                 on_progress: Callable[[int, int], None] | None = None) -> list[list[Completion]]:
        """`k` completions of every prompt, in the prompts' order.

        A pure function of its arguments, the weights and the thread count. ids: seed the draws of each prompt, by
        default its index. temperature 0 is greedy. batch_size: completions decoded together.
        on_progress(completions finished, tokens drawn) is called after every step. Raises ValueError on an empty
        prompt and on one that leaves no room for max_new_tokens in the model's context.
        """
        for i, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new_tokens > self.context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens: it needs at least 1, and with max_new_tokens="
                                 f"{max_new_tokens} at most {self.context - max_new_tokens}")
        if not prompts:
            return []
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        call = batch_of(prompts, k, ids, seed, max_new_tokens, sampling, stop_ids, batch_size)
        if self.engine:
            finished = self._on_device(call, on_progress)
        else:
            batch = Batch(self.model, self.device, *call[:3], batch_size, self.decoder)
            finished = self._on_host(batch, sampling, frozenset(stop_ids), on_progress)
        done: list[list[Completion]] = [[] for _ in prompts]
        for row in sorted(finished, key=lambda row: row.sample):
            done[row.prompt].append(row.completion)
        return done

    def expect(self, prompts: Sequence[Sequence[int]], *, k: int = 1, ids: Sequence[str] | None = None, seed: int = 0,
               max_new_tokens: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
               stop_ids: Collection[int] = (), batch_size: int = 128) -> None:
        """Says what the call of `generate` after the next one gets. On a GPU the next one then prefills its first
        prompts while its own last rows end; the completions do not depend on it."""
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.expected = batch_of(prompts, k, ids, seed, max_new_tokens, sampling, stop_ids, batch_size)

    def _on_device(self, call: tuple, on_progress: Callable[[int, int], None] | None) -> list[DeviceRow]:
        engine, batch = self.engine, self.engine.coming
        if batch is None or batch.call != call:
            engine.pool.reset()
            batch = DeviceBatch(engine, *call)
        engine.coming = DeviceBatch(engine, *self.expected) if self.expected else None
        self.expected = None
        try:
            return batch.run(on_progress)
        except BaseException:
            engine.coming = None  # pages of the batch that failed are taken
            raise

    @staticmethod
    def _on_host(batch: Batch, sampling: dict, stop: frozenset[int],
                 on_progress: Callable[[int, int], None] | None) -> list[Row]:
        def draw(rows: list[int], logits: Tensor) -> None:
            finished = batch.draw(rows, logits, sampling, stop)
            if on_progress:
                on_progress(finished, len(rows))

        while True:
            while fresh := kv_cache.fill_places(batch):
                draw(fresh, batch.first_logits(fresh))
            if not batch.compact():
                break
            draw(list(range(batch.active)), batch.step())
        return batch.finished


def batch_of(prompts: Sequence[Sequence[int]], k: int, ids: Sequence[str] | None, seed: int, max_new_tokens: int,
             sampling: dict, stop: Collection[int], batch_size: int) -> tuple:
    """A call of `generate`, as DeviceBatch takes it."""
    keys = [[draw_key(seed, ids[i] if ids else str(i), s) for s in range(k)] for i in range(len(prompts))]
    return [list(p) for p in prompts], keys, max_new_tokens, sampling, frozenset(stop), batch_size


class Batch:
    """The active rows, their prompts, and the waiting prompts. All state but the cache is on the host. keys: for each
    prompt the random key of each of its completions."""

    def __init__(self, model: nn.Module, device: torch.device, prompts: list[list[int]], keys: list[list[int]],
                 max_new_tokens: int, batch_size: int, decoder: Decoder | None = None):
        self.model, self.device, self.prompts, self.max_new_tokens = model, device, prompts, max_new_tokens
        self.decoder = decoder
        self.keys, self.k = keys, len(keys[0])
        groups = min(len(prompts), -(-batch_size // self.k) + SPARE_GROUPS)
        batch_size = min(batch_size, len(prompts) * self.k)
        self.rows, self.finished = [None] * batch_size, []
        self.free_groups = list(range(groups))
        self.group_prompt: list[int | None] = [None] * groups
        self.group_left = [0] * groups  # unfinished completions of the group
        longest = max(map(len, prompts))
        self.held = Held(groups, longest)
        # longest first: neighbors have similar lengths, and the longest completions do not come last
        self.waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
        self.ready: deque[Row] = deque()
        self.group_logits: Tensor | None = None
        self.cache = PromptKV(groups, _bucket(longest), _bucket(batch_size), _bucket(max_new_tokens), device)

    @property
    def active(self) -> int:
        return sum(row is not None for row in self.rows)

    def prefill(self) -> None:
        """Prefills some of the waiting prompts, each after the longest prefix that the cache holds. Prompts that share
        more with another prompt of this prefill wait for the next one."""
        chosen: list[CachedPrefix] = []
        later: list[int] = []
        running: list[int] = []  # groups
        longest = 0
        while self.waiting and self.free_groups and len(later) < kv_cache.LOOK_AHEAD:
            prompt = self.prompts[self.waiting[0]]
            common = self.held.common(prompt)
            coming, common[running] = max(common[running], default=0), 0
            source = int(common.argmax())
            cached = int(common[source]) if worth_copying(common[source], prompt) else 0
            if worth_copying(coming - cached, prompt):
                later.append(self.waiting.popleft())
                continue
            longest = max(longest, len(prompt) - cached)
            if chosen and longest * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            i, g = self.waiting.popleft(), heapq.heappop(self.free_groups)
            chosen.append(CachedPrefix(prompt, g, cached, source))
            running.append(g)
            self.held.put(g, prompt)
            self.group_prompt[g], self.group_left[g] = i, self.k
            self.ready.extend(Row(i, s, g, key, Completion()) for s, key in enumerate(self.keys[i]))
        self.waiting.extendleft(reversed(later))
        step = Prefill(self.cache, chosen, self.device)
        logits = self.forward(step, logits_to_keep=step.last)
        if self.group_logits is None:
            self.group_logits = logits.new_zeros(len(self.group_prompt), logits.shape[-1])
        self.group_logits[step.groups] = logits

    def forward(self, step: Prefill | Decode, logits_to_keep: Tensor | None = None) -> Tensor:
        """Logits [n, V] of the positions logits_to_keep [n], by default all. The next call may overwrite them."""
        keep = logits_to_keep
        if self.decoder:
            cos, sin = self.model.model.rotary_emb(self.decoder.embedding, step.positions)
            keep = torch.arange(step.tokens.numel()) if keep is None else keep
            return step.decode(self.decoder, cos[0], sin[0], keep)
        return self.model(input_ids=step.tokens, position_ids=step.positions, use_cache=False, kv_step=step,
                          logits_to_keep=0 if keep is None else keep).logits[0]

    def first_logits(self, rows: list[int]) -> Tensor:
        return self.group_logits[onto(self.device, [self.rows[r].group for r in rows])[0]]

    def compact(self) -> int:
        """Moves the last rows into free rows below them; returns the number of active rows."""
        holes = [r for r, row in enumerate(self.rows[: self.active]) if row is None]
        last = [r for r in range(self.active, len(self.rows)) if self.rows[r] is not None]
        if holes:
            self.cache.move(last, holes, max(len(self.rows[r].completion.tokens) for r in last))
            for source, target in zip(last, holes, strict=True):
                self.rows[target], self.rows[source] = self.rows[source], None
        return self.active

    def step(self) -> Tensor:
        """Feeds every active row its last token; logits [active rows, V]."""
        rows = self.rows[: self.active]
        padding = _bucket(len(rows)) - len(rows)
        used = max(row.group for row in rows) + 1
        members = [[0] * self.k for _ in range(used)]
        filled, place = [0] * used, []
        for r, row in enumerate(rows):
            members[row.group][filled[row.group]] = r
            place.append(row.group * self.k + filled[row.group])
            filled[row.group] += 1
        *columns, lengths, members = onto(
            self.device, *(column + [0] * padding for column in (
                [row.completion.tokens[-1] for row in rows], [row.group for row in rows],
                [len(row.completion.tokens) - 1 for row in rows], place)),
            [len(self.prompts[i]) if i is not None else 1 for i in self.group_prompt],
            [r for group in members for r in group])
        tokens, group, length, place = columns
        decode = Decode(self.cache, tokens, group, length, lengths, members.view(used, self.k), place,
                        longest_prompt=_bucket(max(len(self.prompts[row.prompt]) for row in rows)),
                        longest_completion=_bucket(max(len(row.completion.tokens) for row in rows)))
        return self.forward(decode)[: len(rows)]

    def draw(self, rows: list[int], logits: Tensor, sampling: dict, stop: frozenset[int]) -> int:
        """Draws the next token of `rows` and retires finished ones; returns their number."""
        active = [self.rows[r] for r in rows]
        key, position = onto(self.device, [row.key for row in active], [len(row.completion.tokens) for row in active])
        token, logp = sample_tokens(logits, key, position, **sampling)
        tokens, logps = torch.stack((token.double(), logp.double())).tolist()  # the only host sync of the step
        ended = 0
        for r, row, t, lp in zip(rows, active, tokens, logps, strict=True):
            if row.completion.take(int(t), lp, stop, self.max_new_tokens):
                self.retire(r, row)
                ended += 1
        return ended

    def retire(self, r: int, row: Row) -> None:
        self.rows[r] = None
        self.finished.append(row)
        self.group_left[row.group] -= 1
        if not self.group_left[row.group]:
            self.group_prompt[row.group] = None
            heapq.heappush(self.free_groups, row.group)


def worth_copying(tokens: int, prompt: list[int]) -> bool:
    """Whether copying the KV of `tokens` tokens is a gain: it forces a mask on the attention of the remaining ones."""
    return tokens >= max(BUCKET, len(prompt) / 8)


def _bucket(n: int) -> int:
    return -(-n // BUCKET) * BUCKET
