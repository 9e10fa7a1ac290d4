"""Peak memory of stages: formulas of plain numbers. docs/memory.md derives them.

All sizes are bytes of one rank. `device` is where the model computes; on a CPU that is host memory, too.
"""

from dataclasses import dataclass, field, replace
from math import lcm

from strop.trainer.planning.shape import Shape

ENGINES = ("local", "fsdp", "deepspeed")
FP32 = 4
# kernels/optimizer/formats.py: elements of a row that share a scale, and the width from which rows have any
STATE_BLOCK, STATE_WIDTH = 256, 32
# beyond the tensors: Python, libraries and their caches; on a GPU its context, workspaces and, over ranks, NCCL's
# buffers. The CPU's is measured (benchmarks/memory.py); the GPU's is assumed.
PROCESS, CONTEXT, NCCL = 700 << 20, 1 << 30, 1 << 30
# Gaps between tensors in malloc's heap, which keeps freed memory, as measured: of all bytes, and on top of the
# activations under LoRA, whose small adapter outputs are saved between large temporaries.
GAPS, LORA_GAPS = 0.15, 0.57
# kernels/head/chunked.py: elements of a scratch chunk, and bytes up to which all logits are kept
SCRATCH = {"cpu": 4 << 20, "cuda": 64 << 20}
KEPT = {"cpu": 64 << 20, "cuda": 512 << 20}
NARROWEST = 1024  # columns of a chunk
BUCKET, SPARE_GROUPS, PREFILL, CHUNK = 16, 16, 1024, 32  # of the sampler, trainer/sampling/
KL_ROWS = 256  # distributions in memory at once, trainer/models/kl.py
BUCKETS = 1_000_000_000  # elements of DeepSpeed's buckets, and of the parameters that ZeRO 3 keeps gathered


@dataclass(frozen=True)
class Setting:
    """How a stage runs.

    engine: one of ENGINES. zero: DeepSpeed's stage, 1 to 3. offload: where masters and moments live, "" on the
    device, or "cpu"; offload_weights: the weights, too. gathers_all and sums_all: FSDP keeps all gathered
    weights, or whole fp32 sums of gradients, through a step. width: bytes of a number in compute. max_tokens: of a
    microbatch. sequence: ranks that share it. targets: predicted tokens in it, None for all. kept: bytes up to which
    the head keeps all logits, None for KEPT. several: a step has several microbatches. offload_activations: what
    checkpointing saves goes to the host. moments, split, muon: the keys moments, masters and optimizer of the section.
    averages: fp32 copies of the weights, 1 for an EMA, 2 for BEMA. scores: a reward model, which has no vocabulary.
    checks: completions that are sampled in training, of new_tokens. points: resume points are written on the way.
    fused: the layers are."""

    engine: str = "local"
    ranks: int = 1
    zero: int = 3
    offload: str = ""
    offload_weights: bool = False
    gathers_all: bool = False
    sums_all: bool = False
    device: str = "cuda"
    width: int = 2
    max_tokens: int = 8192
    sequence: int = 1
    targets: int | None = None
    kept: int | None = None
    several: bool = True
    checkpointing: bool = False
    offload_activations: bool = False
    lora_rank: int = 0
    moments: str = "float32"
    split: bool = False
    muon: bool = False
    averages: int = 0
    scores: bool = False
    checks: int = 0
    new_tokens: int = 64
    points: bool = False
    fused: bool = True

    @property
    def tokens(self) -> int:
        """Of a microbatch, on a rank."""
        return -(-self.max_tokens // self.sequence)

    @property
    def predicted(self) -> int:
        """Tokens of them that the head predicts."""
        return self.tokens if self.targets is None else min(self.targets, self.tokens)

    @property
    def inputs_on_host(self) -> bool:
        """Whether the inputs of checkpointed layers are in another memory than the rest."""
        return self.checkpointing and self.offload_activations and self.device != "cpu"


@dataclass(frozen=True)
class Memory:
    """Peak bytes of a rank by what takes them. once: host bytes that only the first rank needs."""

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    once: int = 0

    @property
    def on_device(self) -> int:
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())


# -- training ---------------------------------------------------------------------------------------------------------


def states(shape: Shape, s: Setting) -> tuple[dict[str, int], dict[str, int]]:
    """(bytes on the device, on the host) of weights, masters, moments, sums of gradients and averages: what is
    there in every step. The gradients that a backward pass leaves are in `gradients`."""
    total = shape.parameters - (shape.embedding if s.scores and not shape.tied else 0)
    frozen, trained = (total, shape.adapters(s.lora_rank)) if s.lora_rank else (0, total)
    shard = -(-trained // s.ranks) if s.engine != "local" else trained
    apart = s.width != FP32 or s.engine == "deepspeed"  # fp32 parameters are their own masters
    sums = FP32 * shard if s.engine != "local" or (apart and (s.several or s.ranks > 1)) else 0
    masters = (2 if s.split else FP32) * shard * apart
    moments = of_moments(shape, s, trained)
    device = {"weights": s.width * (trained + frozen), "masters": masters,
              "moments": moments if s.engine == "local" else -(-moments // s.ranks),
              "gradient sums": sums, "averages": s.averages * FP32 * shard}
    if s.engine == "fsdp":  # what is trained is sharded in fp32
        device |= {"weights": -(-s.width * frozen // s.ranks), "masters": FP32 * shard,
                   "gradient sums": FP32 * trained if s.sums_all else sums}
    elif s.engine == "deepspeed" and s.zero == 1 and s.width != FP32 and not s.offload:
        device["gradient sums"] = FP32 * trained
    elif s.engine == "deepspeed" and s.zero == 3:
        device["weights"] = -(-s.width * (trained + frozen) // s.ranks)
    names = ("masters", "moments", "gradient sums", "averages") if s.offload else ()
    frozen_away = s.engine == "fsdp" and s.offload  # FSDP moves all that it shards
    away = {name: device.pop(name) for name in (*names, *(("weights",) if s.offload_weights or frozen_away else ()))}
    return device, away


def trained_of(shape: Shape, s: Setting) -> int:
    """How many parameters are trained; a reward model has no head of the vocabulary, which is not taken off here."""
    return shape.adapters(s.lora_rank) if s.lora_rank else shape.parameters


def of_moments(shape: Shape, s: Setting, trained: int) -> int:
    """Bytes of the optimizer's moments of `trained` parameters, over all ranks: of narrow matrices, and of what is no
    matrix, two fp32 ones; of a matrix that Muon trains one."""
    layers, ends = [(out, inside) for inside, out in shape.matrices], []
    if s.lora_rank:
        layers = [m for out, inside in layers for m in ((s.lora_rank, inside), (out, s.lora_rank))]
    else:
        ends = [(shape.vocab, shape.hidden)] * (1 if shape.tied or s.scores else 2)

    def one(rows: int, width: int) -> int:
        if s.moments == "float32" or width < STATE_WIDTH:
            return 2 * FP32 * rows * width
        return 2 * rows * (2 * width if s.moments == "bfloat16" else width + FP32 * -(-width // STATE_BLOCK))

    matrices = shape.layers * sum(FP32 * r * w if s.muon else one(r, w) for r, w in layers) + sum(one(*m) for m in ends)
    rest = trained - shape.layers * sum(r * w for r, w in layers) - sum(r * w for r, w in ends)
    return matrices + 2 * FP32 * rest


def resume_point(shape: Shape, s: Setting) -> int:
    """Bytes of a resume point: masters, moments and averages."""
    trained = shape.adapters(s.lora_rank) if s.lora_rank else shape.parameters
    return (1 + s.averages) * FP32 * trained + of_moments(shape, s, trained)


def gathered(shape: Shape, s: Setting) -> int:
    """Bytes of weights and gradients that a sharded engine holds whole for a while: two layers, the embedding and the
    head; DeepSpeed's buckets."""
    if s.engine == "local":
        return 0
    trained = trained_of(shape, s)
    buckets = (s.width + FP32) * min(BUCKETS // 2, trained)  # of DeepSpeed: as they come, and in fp32 to send
    if s.engine == "deepspeed" and s.zero < 3:
        return buckets
    ends, layers = shape.embedding * (1 if shape.tied or s.scores else 2), 2 * shape.layer
    if s.engine == "deepspeed":
        return s.width * max(layers + ends, min(BUCKETS, shape.parameters)) + buckets
    if s.gathers_all:
        layers = shape.layers * shape.layer
    return s.width * (layers + ends) + (0 if s.lora_rank else (s.width + FP32) * max(shape.layer, ends))


def gradients(shape: Shape, s: Setting) -> int:
    """Bytes of all gradients as the backward pass leaves them; a tied embedding has two for a moment."""
    trained = trained_of(shape, s)
    if s.engine == "fsdp" or (s.engine == "deepspeed" and s.zero > 1):
        return 0  # reduced layer by layer into the sums
    twice = shape.tied and not (s.lora_rank or s.scores)
    return s.width * (trained + twice * shape.embedding)


def layer_token(shape: Shape, s: Setting) -> int:
    """Bytes that a layer saves of a token for its backward pass.

    The inputs of both norms, of q, k, v and of the MLP; q, k, v and attention's output with its log-sum-exp; gate and
    up, and on a GPU or under LoRA their product. Ranks that share a row have attention's output by heads and by tokens,
    and at least a key head each. Unfused layers also keep the norms in fp32 and rounded, and silu."""
    d, f, q = shape.hidden, shape.ffn, shape.heads * shape.head_size
    kv = lcm(shape.kv_heads, s.sequence) * shape.head_size
    saved = 4 * d + 2 * q + 2 * kv + 2 * f + q * (s.sequence > 1)
    if s.device != "cpu" or s.lora_rank or not s.fused:
        saved += f
    lse = (8 if s.device == "cpu" and s.width == FP32 else FP32) * shape.heads + 2 * FP32
    unfused = 0 if s.fused else 2 * FP32 * d + s.width * (2 * d + f)
    return s.width * (saved + 7 * s.lora_rank) + lse + unfused


def activations(shape: Shape, s: Setting) -> int:
    """Bytes saved for the backward pass of a full microbatch: every layer, or with checkpointing the input of every
    layer, of which two are left where they go to the host, and one layer; the final norm and its output."""
    ends = 2 * s.width * shape.hidden
    if s.checkpointing:
        inputs = min(2, shape.layers) if s.inputs_on_host else shape.layers
        per_token = inputs * s.width * shape.hidden + layer_token(shape, s)
    else:
        per_token = shape.layers * layer_token(shape, s)
    return s.tokens * (per_token + ends)


def chunk(shape: Shape, s: Setting, targets: int) -> int:
    """Bytes of the head's scratch: a chunk of the vocabulary for every predicted token."""
    columns = min(shape.vocab, max(NARROWEST, SCRATCH[s.device] // max(1, targets)),
                  max(1, (s.kept or KEPT[s.device]) // max(1, targets * s.width)))
    return targets * columns * s.width


def head(shape: Shape, s: Setting) -> int:
    """Bytes of the head's backward pass: hidden states and their fp32 gradient, a scratch chunk and, if they fit, the
    kept logits."""
    if s.scores:
        return 0
    targets = s.predicted
    logits = targets * shape.vocab * s.width
    kept = logits if logits <= (s.kept or KEPT[s.device]) and not s.lora_rank else 0
    return targets * shape.hidden * (FP32 + 3 * s.width) + chunk(shape, s, targets) + kept


def training(shape: Shape, s: Setting) -> Memory:
    """The peak of a training stage: the highest of the backward pass's start, where all activations live, its end,
    where all gradients do, and the checks of completions on the way."""
    device, host = states(shape, s)
    whole, left = gathered(shape, s), gradients(shape, s)
    of_head = 0 if s.lora_rank or s.scores or s.engine == "fsdp" else s.width * shape.embedding
    if s.width == FP32 and s.several and s.engine == "local":  # autograd accumulates them over microbatches
        of_head += gradients(shape, s)
    mlp = s.tokens * s.width * (4 * shape.ffn + 2 * shape.hidden)  # temporaries of its backward pass
    saved = activations(shape, s)
    start = {"activations": saved, "gradients": of_head, "head and temporaries": max(head(shape, s), mlp)}
    layer = s.tokens * (layer_token(shape, s) + 2 * s.width * shape.hidden)
    end = {"activations": layer, "gradients": left, "head and temporaries": mlp}
    moments = [start, end]
    if s.checks:
        moments.append({"checks in training": _checks(shape, s)})
    if s.lora_rank and s.device == "cpu":
        moments.append({"merged weights": s.width * shape.linear})
    device |= {"gathered": whole} | max(moments, key=lambda parts: sum(parts.values()))
    if s.device == "cpu":
        if s.points:  # a copy, which is written while training goes on
            device["resume point"] = (3 + s.averages) * FP32 * (trained_of(shape, s) // (
                1 if s.engine == "local" else s.ranks))
        device, host, once = on_cpu(device | host, LORA_GAPS * saved if s.lora_rank else 0.0), {}, 0
    else:
        device["context"] = CONTEXT + (NCCL if s.ranks > 1 else 0)
        own, once = _saving(shape, s)
        host |= {"process": 2 * PROCESS, "resume point": own}
        if s.inputs_on_host:
            block = s.tokens * s.width * shape.hidden  # pinned memory comes in powers of two
            host["activations"] = shape.layers * (1 << (block - 1).bit_length())
    return Memory({k: v for k, v in device.items() if v}, {k: v for k, v in host.items() if v}, once)


def _checks(shape: Shape, s: Setting) -> int:
    """Greedy completions and their KL: the sampler's cache, and the head in fp32."""
    packed = s.width * shape.linear if s.device == "cpu" and not s.lora_rank else 0
    cache = kv_cache(shape, s.width, prompts=s.checks, k=1, rows=s.checks, prompt=PREFILL, new_tokens=s.new_tokens)
    return max(packed + cache, FP32 * (shape.embedding + 3 * KL_ROWS * shape.vocab))


def _saving(shape: Shape, s: Setting) -> tuple[int, int]:
    """Host bytes of (a resume point's masters, moments and averages on every rank, what only the first rank copies
    from its GPU: the whole resume point of a local engine, or the weights)."""
    point, weights = resume_point(shape, s), s.width * shape.parameters
    if s.engine == "local":
        return 0, max(point, weights)
    return 0 if s.offload and not s.points else -(-point // s.ranks), weights


def scoring(shape: Shape, s: Setting) -> Memory:
    """The peak of log-probs without gradients, as the reference needs: the weights, a layer's temporaries, the head's
    scratch."""
    weights = s.width * shape.parameters
    if s.engine == "fsdp" or (s.engine == "deepspeed" and s.zero == 3):
        weights = -(-weights // s.ranks)
    forward = s.tokens * s.width * (3 * shape.ffn + 4 * shape.hidden)
    of_head = 0 if s.scores else s.predicted * shape.hidden * s.width + chunk(shape, s, s.predicted)
    device = {"weights": weights, "gathered": gathered(shape, replace(s, lora_rank=1)),
              "activations": max(forward, of_head + 2 * s.tokens * s.width * shape.hidden)}
    return _with_process(device, s.device, s.ranks)


# -- sampling ---------------------------------------------------------------------------------------------------------


def _bucket(n: int) -> int:
    return -(-n // BUCKET) * BUCKET


def kv_cache(shape: Shape, width: int, *, prompts: int, k: int, rows: int, prompt: int, new_tokens: int) -> int:
    """Bytes of the in-process sampler's cache: the KV of each group's prompt once, and of each row's completion, in
    chunks of which only the reached ones are there. prompt: tokens of the longest one."""
    token = 2 * shape.kv_heads * shape.head_size * width
    groups, rows = min(prompts, -(-rows // k) + SPARE_GROUPS), _bucket(min(rows, prompts * k))
    length, reached = _bucket(new_tokens), CHUNK
    while reached < length:
        reached *= 2
    reached = min(reached, max(length, 1))
    growing = token * rows * reached  # a layer's buffers are copied when they grow
    return shape.layers * token * (groups * _bucket(prompt) + rows * reached) + growing


def sampling(shape: Shape, *, device: str, width: int, prompts: int, k: int, batch_size: int, prompt: int,
             new_tokens: int, packs: bool = True, top_p: float = 1.0, temperature: float = 1.0) -> Memory:
    """The peak of the in-process sampler. packs: on a CPU the linear layers are copied into another layout, a tied head
    too; the bf16 file that they were mapped from stays in memory."""
    weights = width * shape.parameters
    if device == "cpu" and packs:
        weights += width * (shape.linear * (width == 2) + shape.embedding * (shape.tied or width == 2))
    rows = _bucket(min(batch_size, prompts * k))
    groups = min(prompts, -(-batch_size // k) + SPARE_GROUPS)
    wide = FP32 * (3 if top_p < 1 else 1 + (temperature not in (0, 1)))
    logits = shape.vocab * (groups * width + rows * (width + wide))
    prefill = max(PREFILL, prompt) * width * (3 * shape.ffn + 4 * shape.hidden)
    cache = kv_cache(shape, width, prompts=prompts, k=k, rows=batch_size, prompt=prompt, new_tokens=new_tokens)
    return _with_process({"weights": weights, "KV cache": cache, "logits": logits, "activations": prefill}, device, 1)


def comparing(shape: Shape, sampler: Memory, width: int) -> Memory:
    """The peak of an evaluation: its sampler, or the KL to the start weights with both heads in fp32."""
    parts = {"weights": width * shape.parameters, "heads": 2 * FP32 * shape.embedding,
             "logits": 5 * FP32 * KL_ROWS * shape.vocab}
    context = sampler.device.get("context")
    other = Memory(parts | {"context": context} if context else on_cpu(parts), sampler.host)
    return max(sampler, other, key=lambda memory: memory.on_device)


def on_cpu(parts: dict[str, int], gaps: float = 0.0) -> dict[str, int]:
    """The bytes of tensors with what the process adds. gaps: further bytes of gaps in the heap."""
    return parts | {"heap's gaps": int(GAPS * sum(parts.values()) + gaps), "process": PROCESS}


def _with_process(device: dict[str, int], kind: str, ranks: int) -> Memory:
    device = {name: size for name, size in device.items() if size}
    if kind == "cpu":
        return Memory(on_cpu(device))
    return Memory(device | {"context": CONTEXT + (NCCL if ranks > 1 else 0)}, {"process": 2 * PROCESS})
