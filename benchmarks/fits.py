"""The table of docs/memory.md that says which models fit which hardware, from the formulas.

    python -m benchmarks.fits           # writes the table into docs/memory.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from strop.trainer.planning import estimates, memory
from strop.trainer.planning.hardware import GB, hardware_of
from strop.trainer.planning.memory import Setting
from strop.trainer.planning.models import known_shape

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
MODELS = {"1B": "meta-llama/Llama-3.2-1B", "3B": "meta-llama/Llama-3.2-3B", "8B": "meta-llama/Llama-3.1-8B",
          "14B": "Qwen/Qwen2.5-14B", "32B": "Qwen/Qwen2.5-32B", "70B": "meta-llama/Llama-3.1-70B"}
HARDWARE = ("1x24GB", "1x80GB", "8x80GB")
MARKS = "<!-- begin fits -->\n", "<!-- end fits -->"
TOKENS = 4096  # of a microbatch


def cell(name: str, text: str, lora: int) -> str:
    """The cheapest setting in which the model trains, with what a rank takes of its device and a node of its host."""
    shape, on = known_shape(name), hardware_of(text)
    asked = Setting(ranks=on.ranks, max_tokens=TOKENS, lora_rank=lora)
    for setting in estimates.candidates(asked, TOKENS, memory.ENGINES):
        if setting.lora_rank == lora and estimates.fits_on(need := memory.training(shape, setting), on):
            how = setting.engine + (f", {setting.offload.upper()} offload" if setting.offload else "")
            how += ", checkpointing" if setting.checkpointing else ""
            host = f" + {on.on_node(need) / GB:,.0f} host" if setting.offload else ""
            disk = f" + {on.per_node * need.nvme / GB:,.0f} NVMe" if need.nvme else ""
            return f"{how}: {need.on_device / GB:.0f}{host}{disk}"
    return "no"


def table() -> str:
    head = ["", *(f"{text.replace('x', ' x ').replace('GB', ' GB')}, {how}" for text in HARDWARE
                  for how in ("full", "LoRA"))]
    lines = [head, ["---"] * len(head)]
    for size, name in MODELS.items():
        lines.append([f"{size} ({name.split('/')[1]})", *(cell(name, text, lora) for text in HARDWARE
                                                          for lora in (0, 16))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    begin, end = MARKS
    made = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{table()}\n{end}", text, flags=re.S)
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE}: {len(MODELS)} models on {', '.join(HARDWARE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
