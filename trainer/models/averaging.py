"""Averages of model folders: formulas on single tensors, in fp32, and a writer that holds one tensor at a time."""

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from strop.trainer.errors import UserError
from strop.trainer.models.folders import finish_folder
from strop.trainer.models.loading import read_object, read_tensors
from strop.trainer.run.files import write_json, writing

PARALLEL = 0.9995  # |cos| above which slerp is linear, as in mergekit: the sine of the angle nears 0
ZERO = 1e-8  # norm up to which a tensor has no direction
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
INDEX = "model.safetensors.index.json"


def linear(members: list[Tensor], weights: list[float]) -> Tensor:
    """sum_i w_i m_i, fp32: model soups, arXiv 2203.05482 section 2, for weights that sum to 1."""
    total = torch.zeros_like(members[0], dtype=torch.float32)
    for member, weight in zip(members, weights, strict=True):
        total.add_(member.float(), alpha=weight)
    return total


def task_arithmetic(start: Tensor, members: list[Tensor], weights: list[float]) -> Tensor:
    """s + sum_i w_i (m_i - s), fp32: task arithmetic, arXiv 2212.04089 section 2; negative weights negate a task."""
    start = start.float()
    total = start.clone()
    for member, weight in zip(members, weights, strict=True):
        total.add_(member.float() - start, alpha=weight)
    return total


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """[sin((1-t) W) a + sin(t W) b] / sin W, fp32, W the angle between a and b as vectors (Shoemake 1985).

    Linear where |cos W| > 0.9995. A zero tensor has no direction and counts as orthogonal.
    """
    a, b = a.float(), b.float()
    norms = [torch.linalg.vector_norm(x).item() for x in (a, b)]
    cos = torch.dot(a.flatten(), b.flatten()).item() / math.prod(norms) if min(norms) > ZERO else 0.0
    if not abs(cos) <= PARALLEL:
        return torch.lerp(a, b, t)
    angle = math.acos(cos)
    return (a * (math.sin((1 - t) * angle) / math.sin(angle))).add_(b, alpha=math.sin(t * angle) / math.sin(angle))


def warp(start: Tensor, a: Tensor, b: Tensor, t: float) -> Tensor:
    """s + slerp(a - s, b - s, t), fp32: WARP's second stage, arXiv 2406.16768 section 3.2, for two policies."""
    start = start.float()
    return slerp(a.float() - start, b.float() - start, t).add_(start)


def toward(start: Tensor, merged: Tensor, share: float) -> Tensor:
    """(1-n) s + n m, fp32: interpolation towards the initialization, WARP's third stage, arXiv 2406.16768
    section 3.3."""
    return torch.lerp(start.float(), merged, share)


def combine(members: list[Path], start: Path, target: Path, formula: Callable[[Tensor | None, list[Tensor]], Tensor],
            uses_start: bool = True) -> None:
    """Writes formula(start's tensor, members' tensors) for every tensor of model folders of one architecture.

    The formula returns fp32, which is rounded once to the dtype that the tensor has in `start`. It gets None in place
    of the start's tensor unless uses_start. Shards, config and tokenizer are those of the first member. Raises
    UserError if the folders do not have the same tensors.
    """
    layout = members[0]
    found = {path: read_tensors(path) for path in [*members, *([start] if uses_start else [])]}
    # a tied head may be saved in some of the folders only
    tied = read_object(layout / "config.json").get("tie_word_embeddings", True)
    if tied and not all("lm_head.weight" in tensors for tensors in found.values()):
        for tensors in found.values():
            tensors.pop("lm_head.weight", None)
    for path, tensors in found.items():
        check_same(path, tensors, layout, found[layout])
    dtypes = {name: tensor.dtype for name, (_, tensor) in read_tensors(start).items()}

    def dtype_of(name: str) -> torch.dtype:
        return dtypes.get(name, found[layout][name][1].dtype)

    def tensor_of(name: str) -> Tensor:
        parts = [found[path][name][1] for path in members]
        if not parts[0].is_floating_point():
            return parts[0]
        return formula(found[start][name][1] if uses_start else None, parts).to(dtype_of(name))

    config = None
    if any(dtype_of(name) != tensor.dtype for name, (_, tensor) in found[layout].items()):
        config, wanted = (read_object(path / "config.json") for path in (layout, start))
        for key in ("dtype", "torch_dtype"):
            config.pop(key, None)
            config |= {key: wanted[key]} if key in wanted else {}
    write_folder(layout, found[layout], dtype_of, tensor_of, target, config)


def copy_folder(source: Path, target: Path) -> None:
    """Writes the weights, config and tokenizer of a model folder to another one."""
    found = read_tensors(source)
    write_folder(source, found, lambda name: found[name][1].dtype, lambda name: found[name][1], target)


def check_same(path: Path, tensors: dict[str, tuple[Path, Tensor]], first: Path, firsts: dict) -> None:
    """Raises UserError if the tensors of two folders differ in name or shape, or integers in value."""
    if odd := sorted(tensors.keys() ^ firsts.keys()):
        raise UserError(f"{path}: does not hold the tensors of {first} ({odd[0]}); they cannot be averaged")
    for name, (_, tensor) in tensors.items():
        other = firsts[name][1]
        if tensor.shape != other.shape:
            raise UserError(f"{path}: {name} has the shape {list(tensor.shape)}, in {first} {list(other.shape)}; they "
                             "cannot be averaged")
        if not (tensor.is_floating_point() and other.is_floating_point()) and not torch.equal(tensor, other):
            raise UserError(f"{path}: {name} holds integers that differ from those of {first}; they cannot be averaged")


def write_folder(layout: Path, files: dict[str, tuple[Path, Tensor]], dtype_of: Callable[[str], torch.dtype],
                 tensor_of: Callable[[str], Tensor], target: Path, config: dict | None = None) -> None:
    """Writes a model folder with the shards, tokenizer and, without another `config`, the config of `layout`, in one
    step. files: what read_tensors found there. Raises UserError if it cannot be written."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    with writing(target, temporary):
        shards = sorted({file for file, _ in files.values()})
        for shard in shards:
            entries = {name: (dtype_of(name), tensor.shape) for name, (file, tensor) in files.items() if file == shard}
            write_tensors(entries, temporary / shard.name, tensor_of)
        if [shard.name for shard in shards] != ["model.safetensors"]:
            size = sum(tensor.numel() * dtype_of(name).itemsize for name, (_, tensor) in files.items())
            write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": {
                name: file.name for name, (file, _) in sorted(files.items())}})
        if config is not None:
            write_json(temporary / "config.json", config)
        elif (layout / "config.json").exists():
            shutil.copyfile(layout / "config.json", temporary / "config.json")
        finish_folder(temporary, layout, target)


def write_tensors(entries: dict[str, tuple[torch.dtype, torch.Size]], file: Path,
                  tensor_of: Callable[[str], Tensor]) -> None:
    """Writes a safetensors file, one tensor in memory at a time. entries: dtype and shape of each name."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))  # keeps every tensor aligned
    for name in names:
        dtype, shape = entries[name]
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            f.write(tensor_of(name).contiguous().flatten().view(torch.uint8).numpy())
