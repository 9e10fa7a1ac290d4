"""How the ranks of a training divide it: data x sequence. The ranks of a sequence group, `engine.sequence_parallel`
consecutive ones, share every microbatch; the groups have different ones."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist

from strop.trainer.config import Train
from strop.trainer.errors import UserError
from strop.trainer.models.loading import ModelFolder
from strop.trainer.models.sequence import Sequence
from strop.trainer.run.world import World
from strop.trainer.sharding import Trainer

BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that look at the longest position of the whole row


@dataclass(frozen=True)
class Mesh:
    """rank: this rank's group, whose microbatches it computes. size: the number of groups. sequence: this rank's place
    in its group; None if every rank is a group of its own."""

    world: World
    rank: int
    size: int
    sequence: Sequence | None = None
    group: dist.ProcessGroup | None = None  # the ranks at this place in every group

    @property
    def speaks(self) -> bool:
        """Whether this rank writes what all ranks of its group have."""
        return self.sequence is None or self.sequence.rank == 0

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Sums every tensor over the groups, in place. All ranks of a group have the same values."""
        if self.sequence is None:
            self.world.sum_(tensors)
        elif self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.group)


def size_of(options: Trainer) -> int:
    """The ranks that share a microbatch; 1 for an engine without that key."""
    return getattr(options, "sequence_parallel", 1)


def mesh_of(world: World, options: Trainer, waits: AbstractContextManager | None = None) -> Mesh:
    """The mesh of the section engine. waits: around what the ranks of a group wait for each other. Every rank calls
    it."""
    size = size_of(options)
    if size == 1:
        return Mesh(world, world.rank, world.size)
    mine, across = world.grid(options.timeout, size)
    sequence = Sequence(world.rank % size, size, mine, waits or nullcontext())
    return Mesh(world, world.rank // size, world.size // size, sequence, across)


def check_sequence(options: Trainer, folder: ModelFolder, ranks: int | None, sections: dict[str, Train]) -> None:
    """Raises UserError, before anything runs, if `ranks` (None: not known yet) or the model of `folder`, where it is
    there, cannot be divided by engine.sequence_parallel, and if one of the training `sections` compiles layers, which
    would have to exchange slices."""
    size = size_of(options)
    if size == 1:
        return
    key = f"engine.sequence_parallel={size}"
    if ranks is not None and ranks % size:
        raise UserError(f"{key}: {ranks} rank(s) cannot be divided into groups of {size}; start a multiple of {size} "
                        f"ranks (torchrun --nproc-per-node={size}), or set a divisor of {ranks}")
    if name := next((name for name, section in sections.items() if section.enabled and section.compile), None):
        raise UserError(f"{key}: the layers that {name}.compile=true compiles would have to exchange slices; set "
                        f"{name}.compile=false")
    if not (folder.path / "config.json").exists():
        return
    config = folder.config().get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or heads % size:
        raise UserError(f"{key}: {folder.path} has {heads or 'no'} attention heads, which {size} ranks cannot divide "
                        "among them; set a divisor of that number")
    if kind := next((kind for kind in rope_types(config.to_dict()) if kind in BY_LENGTH), None):
        raise UserError(f"{key}: {folder.path} has rotary embeddings of rope_type={kind}, which depend on the longest "
                        "position of the whole row, and a rank has a slice of it; set engine.sequence_parallel=1")


def rope_types(config: dict) -> list[str]:
    """The types of rotary embeddings in a config.json, one for all layers or by type of layer."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += rope_types(value)
        elif key == "rope_type":
            found.append(value)
    return found
