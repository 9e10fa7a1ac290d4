"""What a plan's stages need on this machine or on named hardware, as `--plan` prints it."""

import shutil
from pathlib import Path

from strop.trainer.config import Model, Recipe
from strop.trainer.errors import UserError
from strop.trainer.models.folders import Base, find_base
from strop.trainer.models.loading import DTYPES
from strop.trainer.planning import estimates as planning
from strop.trainer.planning.estimates import Asked, Estimate
from strop.trainer.planning.hardware import GB, USABLE, Hardware
from strop.trainer.planning.models import known_shape
from strop.trainer.planning.shape import Shape, read_shape
from strop.trainer.run.console import Console, duration
from strop.trainer.run.store import Store
from strop.trainer.training.machine import this_machine


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is or would be."""
    there = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    return shutil.disk_usage(there).free


def find_shape(model: Model, base: Base) -> Shape:
    """The shape of the start weights, which need not be there: from config.json, the GGUF's header, a config.json in
    Hugging Face's cache, or the list of known models. Raises UserError if none says."""
    if (base.path / "config.json").exists():
        return read_shape(base.path)
    if base.gguf is not None:
        return read_shape(base.gguf)
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = model.path.partition("@")
    cached = try_to_load_from_cache(repo, "config.json", revision=revision or None)
    if isinstance(cached, str):
        return read_shape(Path(cached).parent)
    if known := known_shape(model.path):
        return known
    raise UserError(f"model.path={model.path}: memory and time are unknown before its config.json is there; "
                    "download that one file")


def needs(recipe: Recipe, store: Store, on: Hardware | None) -> dict[str, dict]:
    """What strop.plan says of each stage that needs something; empty if the model's size is unknown."""
    try:
        found = forecast(recipe, store, on or this_machine(store.world, DTYPES[recipe.dtype]))
    except UserError:
        return {}
    return {e.stage: {"device_bytes": e.memory.on_device if e.memory else None,
                      "host_bytes": e.memory.on_host if e.memory else None, "disk_bytes": e.disk, "seconds": e.seconds,
                      "fits": e.fits, "remedy": list(e.remedy)} for e in found}


def forecast(recipe: Recipe, store: Store, on: Hardware) -> list[Estimate]:
    """An estimate of every stage of the plan that needs one. Raises UserError if the model's size is unknown."""
    asked = [Asked(e["stage"], e["kind"], e["round"], store.asked[e["stage"]]) for e in store.plan
             if e["state"] != "done"]
    base = find_base(recipe.model, Console(enabled=False), convert=False)
    return planning.estimates(recipe, asked, find_shape(recipe.model, base), on)


def show(console: Console, recipe: Recipe, store: Store, on: Hardware | None) -> None:
    """Prints the estimates, what does not fit with what would, and what is assumed. on: None for this machine."""
    here, on = on is None, on or this_machine(store.world, DTYPES[recipe.dtype])
    try:
        found = forecast(recipe, store, on)
    except UserError as e:
        console.line(f"needs: unknown: {e}")
        return
    if not found:
        return
    groups: dict[str, list[Estimate]] = {}
    for estimate in found:
        groups.setdefault(over_rounds(estimate.stage), []).append(estimate)
    console.table(f"needs on {on.name} (a rank may fill {on.usable / GB:.1f} GB)",
                  ["stage", "times", "GB", "most of it", "host GB", "time", "disk GB", "fits"],
                  [row(name, group) for name, group in groups.items()])
    for name, group in groups.items():
        worst = next((e for e in group if e.fits is False), None)
        if worst:
            size = f"{worst.memory.on_device / GB:.1f} GB"
            if on.host and (wanted := on.on_node(worst.memory)) > USABLE * on.host:
                size += f" and a node {wanted / GB:.0f} GB of host memory"
            advice = f"the cheapest setting that fits: {' '.join(worst.remedy)}" if worst.remedy else \
                "no setting of this stage fits; name more or larger devices, or a smaller model"
            console.warn(f"{name} does not fit: a rank needs {size}; {advice}")
    seconds, kept, scratch = planning.totals(found)
    free = free_disk(store.run_dir) if here else None
    console.line(f"total: {'time unknown' if seconds is None else 'about ' + duration(seconds)}, "
                 f"{kept / GB:.1f} GB on disk and up to {scratch / GB:.1f} GB more on the way"
                 + (f" ({free / GB:.0f} GB are free)" if free is not None else ""))
    if free is not None and kept + scratch > free:
        console.warn(f"{store.run_dir}: {(kept + scratch) / GB:.1f} GB are needed there, {free / GB:.1f} GB are free; "
                     "set another output_dir")
    for why in dict.fromkeys(e.why for e in found if e.why and e.seconds is None):
        console.line(f"unknown: {why}")
    console.line(assumed(found))


def assumed(found: list[Estimate]) -> str:
    speed = planning.speed
    text = ("assumed: full microbatches; every prompt gives what select may take; prompts of "
            f"{planning.PROMPT} tokens, at most {planning.LONGEST_PROMPT}; completions of {planning.OF_LIMIT:.0%} of "
            "their limit")
    if any(e.seconds is not None for e in found):
        text += (f"; {speed.OF_FLOPS:.0%} of the FLOP/s and {speed.OF_BANDWIDTH:.0%} of the bandwidth; launches, "
                 "communication, scorers and checks in training take no time; a CPU is measured now, beside its "
                 "other work")
    return text + " (docs/memory.md)"


def over_rounds(stage: str) -> str:
    """round-00/sft -> round-*/sft"""
    first, _, rest = stage.partition("/")
    return f"round-*/{rest}" if rest else first


def row(name: str, group: list[Estimate]) -> list[str]:
    """The largest memory of the stages of a name, their time and disk together."""
    worst = max(group, key=lambda e: e.memory.on_device if e.memory else -1)
    memory, seconds = worst.memory, [e.seconds for e in group]
    parts = sorted(memory.device.items(), key=lambda part: -part[1])[:2] if memory else []
    return [name, str(len(group)), f"{memory.on_device / GB:.1f}" if memory else "-",
            ", ".join(f"{part} {size / GB:.1f}" for part, size in parts) or "-",
            f"{memory.on_host / GB:.1f}" if memory and memory.on_host else "-",
            duration(sum(seconds)) if None not in seconds else "unknown" if worst.why else "-",
            f"{sum(e.disk or 0 for e in group) / GB:.1f}",
            {True: "yes", False: "no", None: "unknown"}[min((e.fits for e in group), key=lambda f: {
                False: 0, None: 1, True: 2}[f])]]
