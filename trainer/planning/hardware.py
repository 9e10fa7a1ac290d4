"""The hardware that a plan is for: this machine, or what `--on` names."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from strop.trainer.errors import UserError
from strop.trainer.planning.memory import Memory

GB = 10**9
USABLE = 0.9  # of a device's memory; the rest is for the allocator's gaps and for what the formulas do not know
MOST = 1 << 20  # devices


# Dense bf16 FLOP/s from the vendors' data sheets, by a pattern of the device's name; the first that matches counts. The
# PCIe and NVL boards of a chip have fewer multiprocessors or a lower clock than the SXM ones.
PEAKS = {
    r"H[12]00 NVL": 835e12, r"H100.*(PCIe|HBM2e)": 756e12, r"\bG?H[12]00\b|H800": 989e12, r"\bH20\b": 148e12,
    r"\bG?B[23]00\b": 2250e12, r"\bA[18]00\b": 312e12, r"\bA30\b": 165e12, r"\bA40\b": 150e12, r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12, r"\bL40\b": 181e12, r"\bL4\b": 121e12, r"MI300X|MI325X": 1307e12,
}


def data_sheet(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU of that name, None if it is not listed."""
    return next((value for pattern, value in PEAKS.items() if re.search(pattern, name)), None)


class Gpu(NamedTuple):
    """From the vendor's data sheet: bytes, bytes/s of its memory, dense bf16 FLOP/s."""

    memory: int
    bandwidth: float
    flops: float | None


GPUS = {name: Gpu(memory * GB, bandwidth * 1e12, flops * 1e12 if flops else data_sheet(name))
        for name, memory, bandwidth, flops in (
            ("H100", 80, 3.35, 0), ("H200", 141, 4.8, 0), ("H20", 96, 4.0, 0), ("B200", 180, 7.7, 0),
            ("A100", 80, 2.0, 0), ("A100-40GB", 40, 1.55, 0), ("A40", 48, 0.7, 0), ("A30", 24, 0.93, 0),
            ("A10", 24, 0.6, 0), ("L40S", 48, 0.86, 0), ("L4", 24, 0.3, 0), ("MI300X", 192, 5.3, 0),
            ("RTX3090", 24, 0.94, 71), ("RTX4090", 24, 1.01, 165), ("RTX5090", 32, 1.79, 209))}


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
