"""Gradient sums over the ranks, in flat fp32 buckets that are reduced while the backward pass still runs."""

import torch
import torch.distributed as dist

from strop.trainer.training.waits import Waits

BYTES = 32 << 20  # of a bucket: large enough for the network, small enough that the first one leaves early
ALIGN = 64  # elements


class Buckets:
    """sums: an fp32 view into a bucket for each parameter. Buckets hold the parameters in reverse order, roughly as the
    backward pass completes them, and are reduced in one order on every rank."""

    def __init__(self, params: list[torch.Tensor], group: dist.ProcessGroup, waits: Waits):
        self.group, self.waits = group, waits
        self.is_last = False  # whether the backward pass that runs is the step's last one
        members: list[list[int]] = [[]]
        room = BYTES
        for i in reversed(range(len(params))):
            need = 4 * self._room(params[i])
            if members[-1] and need > room:
                members.append([])
                room = BYTES
            members[-1].append(i)
            room -= need
        self.flat, self.sums, self.bucket_of = [], [None] * len(params), [0] * len(params)
        for b, bucket in enumerate(members):
            flat = torch.zeros(sum(self._room(params[i]) for i in bucket), device=params[0].device)
            at = 0
            for i in bucket:
                self.sums[i], self.bucket_of[i] = flat[at:at + params[i].numel()].view_as(params[i]), b
                at += self._room(params[i])
            self.flat.append(flat)
        self.sizes = [len(bucket) for bucket in members]
        self.reset()

    @staticmethod
    def _room(param: torch.Tensor) -> int:
        return -(-param.numel() // ALIGN) * ALIGN

    def reset(self) -> None:
        """Begins a step, or begins it anew if nothing was reduced."""
        self.left, self.works, self.is_last = list(self.sizes), [], False

    def complete(self, i: int) -> None:
        """The sum of parameter i has all gradients of the step: reduces its bucket if it is full and those before it
        have left."""
        self.left[self.bucket_of[i]] -= 1
        while len(self.works) < len(self.flat) and not self.left[len(self.works)]:
            self._send()

    def _send(self) -> None:
        self.works.append(dist.all_reduce(self.flat[len(self.works)], group=self.group, async_op=True))

    def finish(self) -> None:
        """Reduces what is left, and waits for all."""
        while len(self.works) < len(self.flat):
            self._send()
        with self.waits:
            for work in self.works:
                work.wait()
        self.reset()
