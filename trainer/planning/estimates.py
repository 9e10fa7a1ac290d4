"""What the stages of a plan need: memory, time and disk of each, and the cheapest setting that fits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from strop.trainer.config import Dpo, Part, Recipe, Reward, Train
from strop.trainer.engines import Evaluating, InProcess, Revising, Sampling, Vllm
from strop.trainer.errors import UserError
from strop.trainer.planning import memory, speed
from strop.trainer.planning.hardware import GB, USABLE, Hardware
from strop.trainer.planning.memory import Memory, Setting
from strop.trainer.planning.shape import Shape
from strop.trainer.sharding import deepspeed_fault

PROMPT = 200  # tokens of a prompt: assumed
OF_LIMIT = 0.5  # of max_new_tokens that a completion takes: assumed
READY = 400  # tokens of a ready-made completion: assumed
LONGEST_PROMPT = 512  # tokens, for the sampler's cache: assumed
ROW_BYTES, TOKEN_BYTES = 200, 10  # on disk, of a completion and of each of its tokens with its text: assumed
VLLM_SHARE, VLLM_CACHE = 0.85, 2 * GB  # of a device; and the least that its cache needs
LORA = 16  # rank that is proposed
LEAST_TOKENS = 512  # of a microbatch, that is proposed
OFFLOADS = ((2, False), (3, False), (3, True))  # of DeepSpeed: ZeRO's stage, and whether weights are on the host, too


@dataclass(frozen=True)
class Estimate:
    """What a stage needs. memory: of a rank. seconds, disk: None if unknown. fits: None if unknown. remedy: keys that
    make it fit, the cheapest; empty if none do or none are needed. why: what is unknown, and why."""

    stage: str
    memory: Memory | None = None
    seconds: float | None = None
    disk: int | None = None
    scratch: int = 0
    fits: bool | None = None
    remedy: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Asked:
    """A stage of the plan, with the sections that it gets."""

    name: str
    kind: str
    round: int | None
    config: dict = field(default_factory=dict)

    @property
    def section(self):
        """The section that says how it runs; None if it has none."""
        return self._found()[1]

    @property
    def key(self) -> str:
        """The name of that section."""
        return self._found()[0]

    def _found(self) -> tuple:
        for key, value in self.config.items():
            if isinstance(value, Part) and isinstance(value._section, Sampling):  # of one of several writers
                return key, value._section
            if isinstance(value, Train | Sampling | Evaluating | Revising):
                return key, value
        return "", None


def estimates(recipe: Recipe, stages: list[Asked], shape: Shape, on: Hardware) -> list[Estimate]:
    """An estimate of every stage that runs a model or writes one, in the plan's order. Raises UserError if the ranks
    cannot be divided as engine.sequence_parallel says."""
    if on.ranks % (shared := engine_of(recipe)["sequence"]):
        raise UserError(f"engine.sequence_parallel={shared}: {on.ranks} rank(s) cannot be divided into groups of "
                        f"{shared}")
    width = 4 if recipe.dtype == "float32" else 2
    found = []
    for asked in stages:
        section = asked.section
        if isinstance(section, Train):
            found.append(_training(recipe, asked, shape, on, width))
        elif asked.kind == "log-probs" and "dpo" in asked.config:
            found.append(_reference(recipe, asked, shape, on, width))
        elif isinstance(section, Sampling | Evaluating | Revising):
            found.append(_sampling(recipe, asked, shape, on, width))
        elif asked.kind in ("weights", "model"):
            found.append(Estimate(asked.name, Memory({}, {"process": memory.PROCESS}), None, width * shape.parameters,
                                  fits=True))
    return found


# -- engines ----------------------------------------------------------------------------------------------------------


def engine_of(recipe: Recipe) -> dict:
    """The training engine that the recipe asks for, as keywords of Setting; "auto" is settled by `settled`."""
    section = getattr(recipe, "engine", None)
    kind, offload = getattr(section, "kind", "local"), getattr(section, "offload_optimizer", "none")
    if getattr(section, "cpu_offload", False):
        offload = "cpu"
    return {"engine": kind, "zero": getattr(section, "zero_stage", 3), "offload": "" if offload == "none" else offload,
            "offload_weights": getattr(section, "offload_param", "none") != "none",
            "gathers_all": not getattr(section, "reshard_after_forward", True),
            "sums_all": not getattr(section, "sync_each_microbatch", True),
            "sequence": getattr(section, "sequence_parallel", 1)}


def ways(setting: Setting, there: Sequence[str], section: Train | None = None) -> list[Setting]:
    """What engine "auto" chooses from, the cheapest first: local, fsdp; these in the smallest microbatches, since one
    that does not fit is halved; on a GPU state on the host, by DeepSpeed, which sends less for a microbatch, then by
    fsdp, which takes least. there: the engines that a recipe can ask for. section: leaves out engines that cannot train
    it."""
    def can(engine: str) -> bool:
        return engine in there and shards(setting, engine) and (section is None or not section.unfit(engine, "auto"))

    def smallest(found: list[Setting]) -> list[Setting]:
        return [replace(s, max_tokens=min(s.max_tokens, LEAST_TOKENS), several=True) for s in found]

    plain, away = [replace(setting, engine="local")], []
    if setting.ranks > 1 and can("fsdp"):
        plain.append(replace(setting, engine="fsdp"))
    if setting.device != "cpu" and setting.sequence == 1 and can("deepspeed"):
        away += [replace(setting, engine="deepspeed", zero=zero, offload="cpu", offload_weights=weights)
                 for zero, weights in OFFLOADS]
    if setting.device != "cpu" and can("fsdp"):
        away.append(replace(setting, engine="fsdp", offload="cpu"))
    return [*plain, *smallest(plain), *away, *smallest(away)]


def first_fit(shape: Shape, found: Sequence[Setting], on: Hardware) -> int:
    """The index of the first setting that fits; of the last one if none does."""
    return next((i for i, s in enumerate(found) if fits_on(memory.training(shape, s), on)), len(found) - 1)


def settled(shape: Shape, setting: Setting, on: Hardware, section: Train | None = None) -> Setting:
    """The setting with engine "auto" resolved, for `section`, as a run on this hardware does."""
    if setting.engine != "auto":
        return setting
    found = ways(setting, engines(), section)
    chosen = found[first_fit(shape, found, on)]
    return replace(chosen, max_tokens=setting.max_tokens, several=setting.several)


def shards(setting: Setting, engine: str) -> bool:
    """Whether a sharded engine can train with the setting's form of the optimizer."""
    return not (setting.split or setting.muon) and (engine == "fsdp" or setting.moments == "float32")


def engines() -> list[str]:
    """The training engines that a recipe can ask for on this machine."""
    return [e for e in memory.ENGINES if e != "deepspeed" or deepspeed_fault() is None]


def engine_keys(setting: Setting) -> list[str]:
    """The keys of the recipe that ask for the setting's engine."""
    offload = setting.offload or "none"
    if setting.engine == "deepspeed":
        return ["engine.kind=deepspeed", f"engine.zero_stage={setting.zero}",
                *([f"engine.offload_optimizer={offload}"] if setting.offload else []),
                *([f"engine.offload_param={offload}"] if setting.offload_weights else [])]
    return [f"engine.kind={setting.engine}", *(["engine.cpu_offload=true"] if setting.offload else [])]


# -- training ---------------------------------------------------------------------------------------------------------


def setting_of(section: Train, shape: Shape, *, ranks: int, device: str, width: int, lora_rank: int = 0,
               sequence: int = 1, **more) -> Setting:
    """How a section trains on `ranks` devices; a microbatch is full. more: further keywords of Setting."""
    share = -(-section.batch_size * sequence // ranks)
    longest = min(section.max_tokens, section.max_length or shape.context, shape.context)
    most = share * longest * (1 + isinstance(section, Dpo))
    return Setting(
        ranks=ranks, device=device, width=width, max_tokens=min(section.max_tokens, most), lora_rank=lora_rank,
        several=most > section.max_tokens, checkpointing=section.activation_checkpointing, sequence=sequence,
        offload_activations=section.activation_offload, moments=section.moments, split=section.masters == "split",
        muon=section.optimizer == "muon", averages=2 if section.bema else int(section.ema_decay > 0),
        scores=isinstance(section, Reward), **more)


def fits(shape: Shape, section: Train, ranks: int, free: int, *, device: str = "cuda", width: int = 2,
         lora_rank: int = 0, **engine) -> bool:
    """Whether a section's training fits into `free` bytes of every rank's device, for an engine that is chosen when a
    run starts. width: bytes of a number in compute. engine: keywords engine, zero and offload of Setting, by default a
    local engine."""
    setting = setting_of(section, shape, ranks=ranks, device=device, width=width, lora_rank=lora_rank, **engine)
    return memory.training(shape, setting).on_device <= free


def _training(recipe: Recipe, asked: Asked, shape: Shape, on: Hardware, width: int) -> Estimate:
    section, key = asked.section, asked.key
    rows, completions, lengths = _rows(recipe, asked)
    steps = -(-rows * section.epochs // section.batch_size) if rows else 0
    checks = getattr(section, "eval_prompts", 0) if 0 < getattr(section, "eval_steps", 0) <= steps else 0
    setting = setting_of(section, shape, ranks=on.ranks, device=on.device, width=width, lora_rank=recipe.lora.rank,
                         kept=on.kept, checks=checks, new_tokens=recipe.evaluate.max_new_tokens,
                         points=steps > section.checkpoint_steps, **engine_of(recipe))
    if asked.kind == "online" and setting.engine == "auto":
        setting = replace(setting, engine="local")
    setting = settled(shape, setting, on, section)
    need = memory.training(shape, setting)
    does_fit, remedy = fits_on(need, on), ()
    if not does_fit:
        least = PROMPT + (2 if completions == 2 else 1) * recipe.sample.max_new_tokens
        least = max(least, min(section.max_length or 0, setting.max_tokens))  # rows that the recipe wants
        remedy = cheapest(shape, setting, on, key, least)
        if section.compile and any(k.startswith(("engine.", f"{key}.activation_offload")) for k in remedy):
            remedy = (*remedy, f"{key}.compile=false")  # which these refuse
    trained = shape.adapters(setting.lora_rank) if setting.lora_rank else shape.parameters
    kept = width * shape.parameters * (1 + section.snapshots + (setting.averages > 0))
    scratch = 2 * memory.resume_point(shape, setting) if steps > section.checkpoint_steps else 0
    scratch += 2 * width * shape.parameters if checks else 0
    seconds, why = None, _no_rate(on)
    if not why and not rows:
        why = "the number of rows is not known before they are read"
    elif not why:
        flops = speed.step_flops(shape, section.batch_size, completions, lengths, lora=setting.lora_rank > 0,
                                 checkpointing=setting.checkpointing, scores=setting.scores)
        shards = 1 if setting.engine == "local" else on.ranks
        state = speed.state_bytes(trained, memory.of_moments(shape, setting, trained), setting.split)
        seconds = steps * speed.step_seconds(on, flops, trained, state, offload=bool(setting.offload), shards=shards)
        if setting.muon:  # on every rank
            seconds += steps * speed.muon_flops(shape, setting.lora_rank) / (speed.OF_FLOPS * on.flops)
    return Estimate(asked.name, need, seconds, kept, scratch, does_fit, remedy, why)


def _rows(recipe: Recipe, asked: Asked) -> tuple[int, int, speed.Lengths]:
    """(rows or pairs at most, completions of each, expected tokens): sampled ones of all rounds that count, if every
    prompt gives what select may take, and the ready-made ones of files that are there."""
    section = asked.section
    pairs = isinstance(section, Dpo | Reward)
    ready = recipe.data.preferences if pairs else recipe.data.sft
    count = sum(int(_count(entry.path) * entry.weight) for entry in ready
                if entry.rounds == "all" or asked.round in entry.rounds)
    if not recipe.data.sources:
        return count, 2 if pairs else 1, speed.Lengths(PROMPT, READY)
    each = recipe.select.pairs_per_prompt if pairs else recipe.select.sft_per_prompt
    completions, rounds = 2 if pairs else 1, 1 + (asked.round or 0) if recipe.select.accumulate else 1
    if isinstance(section, Reward) and section.pairs == "all":
        each, completions = 1, recipe.sample.k
    lengths = speed.Lengths(PROMPT, max(1, round(OF_LIMIT * recipe.sample.max_new_tokens)))
    return count + recipe.sample.prompts * each * rounds, completions, lengths


def _count(path: str) -> int:
    """Rows of a local file; 0 if it is not there or is read otherwise."""
    file = Path(path).expanduser()
    if file.suffix == ".jsonl" and file.is_file():
        with open(file, "rb") as f:
            return sum(1 for line in f if line.strip())
    if file.suffix == ".parquet" and file.is_file():
        import pyarrow.parquet as pq

        return pq.read_metadata(file).num_rows
    return 0


def _reference(recipe: Recipe, asked: Asked, shape: Shape, on: Hardware, width: int) -> Estimate:
    dpo = asked.config["dpo"]
    asks = engine_of(recipe)
    setting = Setting(ranks=on.ranks, device=on.device, width=width, max_tokens=min(dpo.max_tokens, 2 * shape.context),
                      kept=on.kept, **asks | {"offload": "", "offload_weights": False, "engine": "local"})
    sharded = replace(setting, engine="fsdp")
    if asks["engine"] == "fsdp" or (asks["engine"] != "local" and on.ranks > 1
                                    and not fits_on(memory.scoring(shape, setting), on)):
        setting = sharded
    need = memory.scoring(shape, setting)
    does_fit, remedy = fits_on(need, on), ()
    if not does_fit and fits_on(memory.scoring(shape, sharded), on):
        remedy = tuple(engine_keys(sharded))
    rows, completions, lengths = _rows(recipe, replace(asked, config={"dpo": recipe.dpo}))
    seconds, why = None, _no_rate(on)
    if not why:
        flops = speed.step_flops(shape, rows, completions, lengths, checkpointing=False, lora=False, scores=False) / 3
        seconds = flops / on.ranks / (speed.OF_FLOPS * on.flops)
    return Estimate(asked.name, need, seconds, int(rows * completions * lengths.completion * 4), 0, does_fit, remedy,
                    why)


def fits_on(need: Memory, on: Hardware) -> bool:
    """Whether every rank has the memory, on its device and, where that is known, on the host."""
    return need.on_device <= on.usable and (on.host is None or on.on_node(need) <= USABLE * on.host)


def cheapest(shape: Shape, asked: Setting, on: Hardware, key: str, least_tokens: int) -> tuple[str, ...]:
    """The keys to change so that training fits, the cheapest first in this order: engine, activation checkpointing,
    smaller microbatches, its offload, ranks that share them, offload, LoRA; empty if nothing does. least_tokens: what a
    microbatch must hold."""
    for setting in candidates(asked, max(LEAST_TOKENS, least_tokens), engines()):
        if shape.heads % setting.sequence == 0 and fits_on(memory.training(shape, setting), on):
            return changes(asked, setting, key)
    return ()


def candidates(asked: Setting, least_tokens: int, there: Sequence[str]) -> Iterator[Setting]:
    """Settings in the order of what they cost, from the asked one. there: the engines to choose from."""
    sizes, shared = [asked.max_tokens], [asked.sequence]
    while sizes[-1] // 2 >= least_tokens:
        sizes.append(sizes[-1] // 2)
    while asked.ranks % (2 * shared[-1]) == 0:
        shared.append(2 * shared[-1])
    aways = dict.fromkeys((asked.offload_activations, asked.offload_activations or asked.device != "cpu"))
    own = asked.engine, asked.zero, asked.offload, asked.offload_weights
    plain = [(engine, 3, "", False) for engine in there if engine != "local"]
    away = [("deepspeed", zero, "cpu", weights) for zero, weights in OFFLOADS if "deepspeed" in there]
    away += [("fsdp", 3, "cpu", False)] if "fsdp" in there else []
    if asked.device == "cpu":  # offload saves nothing, parts of one rank some
        away = plain
    tiers = [[own, *away]] if asked.offload else [[own, *(plain if asked.ranks > 1 else ())], away]
    for rank, places in product(dict.fromkeys((asked.lora_rank, asked.lora_rank or LORA)), tiers):
        for sequence, hosted, tokens in product(shared, aways, sizes):
            for checkpointing, place in product(dict.fromkeys((asked.checkpointing or hosted, True)),
                                                dict.fromkeys(places)):
                engine, zero, offload, weights = place
                form = asked if engine == "local" or shards(asked, engine) else replace(
                    asked, split=False, muon=False, moments=asked.moments if engine == "fsdp" else "float32")
                if sequence == 1 or engine != "deepspeed":
                    yield replace(form, engine=engine, zero=zero, offload=offload, offload_weights=weights,
                                  lora_rank=rank, max_tokens=tokens, sequence=sequence, checkpointing=checkpointing,
                                  several=asked.several or tokens < asked.max_tokens, offload_activations=hosted)


def changes(asked: Setting, other: Setting, key: str) -> tuple[str, ...]:
    """The keys of the recipe that make `asked` the other setting."""
    found = []
    if engine_keys(asked) != engine_keys(other):
        found += engine_keys(other)
    for name, before, after in (("masters", asked.split, other.split), ("optimizer", asked.muon, other.muon),
                                ("moments", asked.moments, other.moments)):
        if before != after:
            found.append(f"{key}.{name}={Train.model_fields[name].default}")
    if asked.sequence != other.sequence:
        found.append(f"engine.sequence_parallel={other.sequence}")
    if asked.checkpointing != other.checkpointing:
        found.append(f"{key}.activation_checkpointing=true")
    if asked.offload_activations != other.offload_activations:
        found.append(f"{key}.activation_offload=true")
    if asked.max_tokens != other.max_tokens:
        found.append(f"{key}.max_tokens={other.max_tokens}")
    if asked.lora_rank != other.lora_rank:
        found.append(f"lora.rank={other.lora_rank}")
    return tuple(found)


# -- sampling ---------------------------------------------------------------------------------------------------------


def _sampling(recipe: Recipe, asked: Asked, shape: Shape, on: Hardware, width: int) -> Estimate:
    section, writer = asked.section, asked.config.get("writer") or asked.section
    key = asked.key
    if getattr(writer, "path", None):
        return Estimate(asked.name, why="another model writes")
    evaluates = isinstance(section, Evaluating)
    k = 1 if evaluates else asked.config.get("k") or getattr(section, "k", 1)
    prompts = recipe.data.validation + recipe.data.test if evaluates else getattr(section, "prompts", 0)
    if not prompts:
        return Estimate(asked.name, why="the number of prompts is not known before")
    copies = max(1, len(asked.config.get("candidates", ()))) if evaluates else 1
    tokens = prompts * k * max(1, round(OF_LIMIT * section.max_new_tokens))
    disk = prompts * k * ROW_BYTES + tokens * TOKEN_BYTES
    compares = evaluates and getattr(section, "kl_prompts", 0) > 0
    if isinstance(writer, InProcess):
        wanted = _in_process(shape, section, writer.batch_size, prompts, k, on, width)
        need = memory.comparing(shape, wanted, width) if compares else wanted
    elif isinstance(writer, Vllm):
        if on.device == "cpu":
            return Estimate(asked.name, disk=disk, why="vLLM's speed on a CPU is not known")
        share = writer.memory or VLLM_SHARE
        need = Memory({"vLLM": int(share * on.memory)}, {"process": 4 * memory.PROCESS})
    else:
        return Estimate(asked.name, Memory({}, {"process": memory.PROCESS}), None, disk, fits=True,
                        why="a server writes")
    does_fit = fits_on(need, on) if isinstance(writer, InProcess) else _vllm_fits(shape, writer, on, width, compares)
    remedy = () if does_fit else _sampler(shape, section, writer, key, prompts, k, on, width, compares)
    seconds, why = None, _no_rate(on)
    if not why:
        parallel = getattr(writer, "tensor_parallel_size", 1)
        rows = min(writer.batch_size, getattr(section, "shard_prompts", prompts) * k) if isinstance(
            writer, InProcess) else 256
        lengths = speed.Lengths(PROMPT, max(1, round(OF_LIMIT * section.max_new_tokens)))
        seconds = copies * speed.sampling_seconds(
            shape, on, prompts=prompts, k=k, rows=rows, lengths=lengths, width=width,
            replicas=max(1, on.ranks // parallel))
    return Estimate(asked.name, need, seconds, disk, 0, does_fit, remedy, why)


def _in_process(shape: Shape, section, batch_size: int, prompts: int, k: int, on: Hardware, width: int) -> Memory:
    return memory.sampling(
        shape, device=on.device, width=width, prompts=getattr(section, "shard_prompts", prompts), k=k,
        batch_size=batch_size, prompt=min(LONGEST_PROMPT, shape.context), new_tokens=section.max_new_tokens,
        temperature=getattr(section, "temperature", 0.0), top_p=getattr(section, "top_p", 1.0))


def _vllm_fits(shape: Shape, writer: Vllm, on: Hardware, width: int, compares: bool) -> bool:
    share = writer.memory or VLLM_SHARE
    whole = width * shape.parameters
    alone = memory.comparing(shape, Memory({"context": memory.CONTEXT}), width) if compares else Memory()
    return (whole / writer.tensor_parallel_size + VLLM_CACHE <= share * on.memory and fits_on(alone, on)
            and writer.tensor_parallel_size <= on.per_node)


def _sampler(shape: Shape, section, writer, key: str, prompts: int, k: int, on: Hardware, width: int, compares: bool
             ) -> tuple[str, ...]:
    """The keys that make sampling fit: fewer completions at a time, else vLLM over several devices."""
    extra = ()
    alone = memory.comparing(shape, Memory({"context": memory.CONTEXT}), width)
    if compares and not fits_on(alone, on):
        extra, compares = (f"{key}.kl_prompts=0",), False
    if isinstance(writer, InProcess):
        size = writer.batch_size
        while size >= 8:
            if fits_on(_in_process(shape, section, size, prompts, k, on, width), on):
                return (*((f"{key}.batch_size={size}",) if size != writer.batch_size else ()), *extra)
            size //= 2
    for parallel in (1, 2, 4, 8, 16):
        asked = Vllm(tensor_parallel_size=parallel)
        if on.device == "cuda" and parallel <= on.per_node and _vllm_fits(shape, asked, on, width, compares):
            return (f"{key}.engine=vllm", f"{key}.tensor_parallel_size={parallel}", *extra)
    return ()


def _no_rate(on: Hardware) -> str:
    return "" if on.flops and on.bandwidth else f"{on.name} names no GPU whose speed is listed, e.g. 8xH100"


def totals(found: list[Estimate]) -> tuple[float | None, int, int]:
    """(seconds, bytes of the run directory at the end, bytes that come on top on the way)"""
    seconds = [e.seconds for e in found if e.seconds is not None]
    return (sum(seconds) if seconds else None, sum(e.disk or 0 for e in found),
            max((e.scratch for e in found), default=0))
