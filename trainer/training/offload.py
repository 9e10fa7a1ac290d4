"""What activation checkpointing saves, each layer's input, in the host's memory until the backward pass needs it."""

import functools
from collections.abc import Callable
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Kept:
    """A tensor in the host's memory, pinned if it came from a GPU. on_device: the tensor as long as it is there, too.
    before: what was saved before it, and is needed after it. leaving: its last copy went to the host, not back. event:
    of that copy. taken: the backward pass has it."""

    def __init__(self, tensor: Tensor, before: "Kept | None"):
        self.on_device, self.before, self.leaving, self.taken, self.event = tensor, before, True, False, None
        self.on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)


class Offload:
    """Copies on a stream of its own: out while the layer runs forward, back while the layer after it runs backward.

    Events hand the memory over between the streams. `Tensor.record_stream` would keep the allocator from using a
    layer's input again before the GPU has caught up with the host, which runs many layers ahead."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.last: ref[Kept] | None = None  # saved last
        self.moving: Kept | None = None  # its tensor on the device must live until the copy is done

    def around(self, checkpoint: Callable) -> Callable:
        """A layer's checkpoint function that saves its inputs here. What the layer itself saves is not: inside, the
        hooks of the checkpoint come first."""
        @functools.wraps(checkpoint)
        def offloaded(function: Callable, *arguments, **options):
            with saved_tensors_hooks(self.pack, self.unpack):
                return checkpoint(function, *arguments, **options)

        return offloaded

    def pack(self, tensor: Tensor) -> Tensor | Kept:
        if not tensor.is_floating_point() or tensor.device.type != self.device.type:
            return tensor
        self._settle()
        kept = Kept(tensor.detach(), self.last and self.last())
        self._copy(kept, kept.on_host, kept.on_device)
        self.last = ref(kept)
        return kept

    def unpack(self, kept: Tensor | Kept) -> Tensor:
        if not isinstance(kept, Kept):
            return kept
        if kept.on_device is None:
            self._fetch(kept)
        self._settle(kept)
        tensor, kept.on_device, kept.taken = kept.on_device, None, True
        if (before := kept.before) and before.on_device is None and not before.taken:
            self._fetch(before)
        return tensor

    def _fetch(self, kept: Kept) -> None:
        self._settle()
        kept.on_device, kept.leaving = torch.empty_like(kept.on_host, device=self.device), False
        self._copy(kept, kept.on_device, kept.on_host)

    def _copy(self, kept: Kept, target: Tensor, source: Tensor) -> None:
        self.moving = kept
        if self.stream is None:
            target.copy_(source)
            return
        # the source is written there, and the target's memory may still be in use
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            kept.event = self.stream.record_event()

    def _settle(self, wanted: Kept | None = None) -> None:
        """Makes the current stream wait for the copy on its way; what left then goes from the device, unless it is
        wanted there."""
        kept, self.moving = self.moving, None
        if kept is None:
            return
        if kept.event is not None:
            torch.cuda.current_stream(self.device).wait_event(kept.event)
        if kept.leaving and kept is not wanted:
            kept.on_device = None


def offload(model: nn.Module, device: torch.device) -> Offload:
    """Offloads what the checkpointed layers of the model save; activation checkpointing must be on."""
    found = Offload(device)
    wrapped: dict[int, Callable] = {}
    for module in model.modules():
        if checkpoint := getattr(module, "_gradient_checkpointing_func", None):
            module._gradient_checkpointing_func = wrapped.setdefault(id(checkpoint), found.around(checkpoint))
    return found
