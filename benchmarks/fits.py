"""The tables of docs/memory.md: which models fit which hardware, from the formulas, and predictions beside what
benchmarks/memory.py measured.

    python -m benchmarks.fits           # writes the tables into docs/memory.md
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from strop.trainer.planning import estimates, memory
from strop.trainer.planning.hardware import GB, hardware_of
from strop.trainer.planning.memory import Setting
from strop.trainer.planning.models import known_shape
from strop.trainer.planning.shape import Shape

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "memory.md"
MODELS = {"1B": "meta-llama/Llama-3.2-1B", "3B": "meta-llama/Llama-3.2-3B", "8B": "meta-llama/Llama-3.1-8B",
          "14B": "Qwen/Qwen2.5-14B", "32B": "Qwen/Qwen2.5-32B", "70B": "meta-llama/Llama-3.1-70B"}
HARDWARE = ("1x24GB", "1x80GB", "8x80GB")
TOKENS = 4096  # of a microbatch


def cell(name: str, text: str, lora: int) -> str:
    """The cheapest setting in which the model trains, with what a rank takes of its device and a node of its host."""
    shape, on = known_shape(name), hardware_of(text)
    asked = Setting(ranks=on.ranks, max_tokens=TOKENS, lora_rank=lora)
    for setting in estimates.candidates(asked, TOKENS, memory.ENGINES):
        if setting.lora_rank == lora and estimates.fits_on(need := memory.training(shape, setting), on):
            how = setting.engine + (f", {setting.offload.upper()} offload" if setting.offload else "")
            how += ", checkpointing" if setting.checkpointing else ""
            how += " with offload" if setting.offload_activations else ""
            how += f", sequence {setting.sequence}" if setting.sequence > 1 else ""
            host = f" + {on.on_node(need) / GB:,.0f} host" if setting.offload or setting.offload_activations else ""
            return f"{how}: {need.on_device / GB:.0f}{host}"
    return "no"


def fits() -> str:
    head = ["", *(f"{text.replace('x', ' x ').replace('GB', ' GB')}, {how}" for text in HARDWARE
                  for how in ("full", "LoRA"))]
    lines = [head, ["---"] * len(head)]
    for size, name in MODELS.items():
        lines.append([f"{size} ({name.split('/')[1]})", *(cell(name, text, lora) for text in HARDWARE
                                                          for lora in (0, 16))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured() -> str:
    """The kept results of benchmarks/memory.py, and what the formulas say today."""
    lines = []
    for path in sorted(HERE.glob("results/*/memory.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines += [f"**{found['environment']['device']}**, {found['date']}, MB\n\n",
                  "| stage | measured | predicted | difference |\n", "| --- | ---: | ---: | ---: |\n"]
        for name, case in found["cases"].items():
            real, ours = case["measured"]["growth"], sum(predicted(case).values())
            lines.append(f"| {name} | {real / 1e6:,.0f} | {ours / 1e6:,.0f} | {ours / real - 1:+.0%} |\n")
    return "".join(lines)


def predicted(result: dict) -> dict[str, int]:
    """The formulas' parts of what a case's process takes beyond its imports."""
    shape, case = Shape(**result["shape"]), result["case"]
    width = {"bfloat16": 2, "float32": 4}[case["dtype"]]
    if case["kind"] == "sample":
        need = memory.sampling(shape, device="cpu", width=width, **{name: case[name] for name in (
            "prompts", "k", "batch_size", "prompt", "new_tokens")})
    else:
        setting = Setting(
            device="cpu", width=width, max_tokens=case["max_tokens"], targets=case["max_tokens"] * 3 // 4,
            several=case["microbatches"] > 1, checkpointing=case.get("checkpointing", False),
            lora_rank=case.get("lora", 0), moments=case.get("moments", "float32"), split="masters" in case,
            muon="optimizer" in case, averages=int("ema_decay" in case), scores=case["kind"] == "reward")
        need = (memory.scoring if case["kind"] == "reference" else memory.training)(shape, setting)
    return {name: size for name, size in need.device.items() if name != "process"}


TABLES = {"fits": fits, "measured": measured}


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        text = re.sub(re.escape(begin) + ".*?" + end, lambda _, b=begin, e=end, t=table: f"{b}\n{t()}\n{e}", text,
                      flags=re.S)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {', '.join(TABLES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
