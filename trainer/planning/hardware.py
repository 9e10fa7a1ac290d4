"""The hardware that a plan is for: this machine, or what `--on` names."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from strop.trainer.errors import UserError
from strop.trainer.planning.memory import Memory

GB = 10**9
USABLE = 0.9  # of a device's memory; the rest is for the allocator's gaps and for what the formulas do not know
MOST = 1 << 20  # devices


class Gpu(NamedTuple):
    """From the vendor's data sheet: bytes, dense bf16 FLOP/s, bytes/s of its memory."""

    memory: int
    flops: float
    bandwidth: float


GPUS = {
    "H100": Gpu(80 * GB, 989e12, 3.35e12), "H200": Gpu(141 * GB, 989e12, 4.8e12), "H20": Gpu(96 * GB, 148e12, 4e12),
    "B200": Gpu(180 * GB, 2250e12, 7.7e12), "A100": Gpu(80 * GB, 312e12, 2.0e12),
    "A100-40GB": Gpu(40 * GB, 312e12, 1.55e12), "A40": Gpu(48 * GB, 150e12, 0.7e12),
    "A30": Gpu(24 * GB, 165e12, 0.93e12), "A10": Gpu(24 * GB, 125e12, 0.6e12), "L40S": Gpu(48 * GB, 362e12, 0.86e12),
    "L4": Gpu(24 * GB, 121e12, 0.3e12),
    "MI300X": Gpu(192 * GB, 1307e12, 5.3e12), "RTX3090": Gpu(24 * GB, 71e12, 0.94e12),
    "RTX4090": Gpu(24 * GB, 165e12, 1.01e12), "RTX5090": Gpu(32 * GB, 209e12, 1.79e12),
}


@dataclass(frozen=True)
class Hardware:
    """`nodes` machines with `per_node` devices each, a rank a device.

    memory: bytes of a device; for "cpu" all ranks of a machine share it. host: bytes of a machine, None if unknown.
    flops and bandwidth: of a device, in the compute dtype; None if unknown. kept: bytes up to which the head keeps all
    logits, None for the default of the device."""

    name: str
    device: str
    nodes: int
    per_node: int
    memory: int
    host: int | None = None
    flops: float | None = None
    bandwidth: float | None = None
    kept: int | None = None

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def usable(self) -> int:
        """Bytes of a device that a rank may fill."""
        return int(USABLE * self.memory / (self.per_node if self.device == "cpu" else 1))

    def on_node(self, need: Memory) -> int:
        """Bytes of host memory that the ranks of a machine need together."""
        return self.per_node * need.on_host + need.once


USE = ("write devices x memory or GPU, e.g. 8x80GB, 1x24GB, 8xH100, for several nodes 8x8x80GB, and with a node's host "
       "memory 8x80GB+1000GB")
SIZE = r"(\d{1,6}(?:\.\d{1,3})?)(GB|GiB|TB|TiB|G|T)"
UNITS = {"G": GB, "GB": GB, "GIB": 1 << 30, "T": 1000 * GB, "TB": 1000 * GB, "TIB": 1 << 40}


def hardware_of(text: str) -> Hardware:
    """The hardware that `--on` names: [NODESx]DEVICESxMEMORY or a GPU's name, [+HOST MEMORY]. Raises UserError."""
    found = re.fullmatch(rf"(?:(\d{{1,7}})x)?(?:(\d{{1,7}})x)?(?:{SIZE}|([A-Z][A-Z0-9-]*?))(?:\+{SIZE})?", text, re.I)
    if not found:
        raise UserError(f"--on {text[:80]}: not hardware that a plan knows; {USE}")
    nodes, per_node, size, unit, name, host, host_unit = found.groups()
    if per_node is None:  # one number is the devices
        nodes, per_node = "1", nodes or "1"
    nodes, per_node = int(nodes), int(per_node)
    if nodes < 1 or per_node < 1 or nodes * per_node > MOST:
        raise UserError(f"--on {text}: {nodes} x {per_node} devices; there must be between 1 and {MOST:,}")
    gpu = None
    if name:
        gpu = next((gpu for known, gpu in GPUS.items() if known.lower() == name.lower().replace("rtx-", "rtx")), None)
        if gpu is None:
            raise UserError(f"--on {text}: the GPU {name} is not listed ({', '.join(GPUS)}); name its memory instead, "
                            "e.g. 8x80GB")
    memory = gpu.memory if gpu else int(float(size) * UNITS[unit.upper()])
    host = int(float(host) * UNITS[host_unit.upper()]) if host else None
    for what, value in (("of a device", memory), ("of the host", host)):
        if value is not None and not GB <= value <= 100_000 * GB:
            raise UserError(f"--on {text}: {value / GB:g} GB {what}; there must be between 1 GB and 100 TB")
    count = f"{nodes} nodes of {per_node}" if nodes > 1 else str(per_node)
    return Hardware(f"{count} x {name or f'{memory / GB:g} GB'}", "cuda", nodes, per_node, memory, host,
                    gpu.flops if gpu else None, gpu.bandwidth if gpu else None)
