"""The engine that keeps everything on every rank, and sums gradients over the ranks once a step."""

from collections.abc import Iterable, Sequence

import torch

from strop.trainer.config import Lora, Part, Train
from strop.trainer.models.loading import ModelFolder
from strop.trainer.run.store import Stage
from strop.trainer.sharding import Local
from strop.trainer.training.buckets import Buckets
from strop.trainer.training.engine import Training
from strop.trainer.training.masters import Masters
from strop.trainer.training.policy import layers_of, merged_weights


class Engine(Training):
    """bf16 compute over fp32 masters, moments and accumulated gradients, replicated on every rank."""

    def __init__(self, folder: ModelFolder, section: Train, stage: Stage, steps: int, *, compute: Part, lora: Lora,
                 seed: int, reward: bool = False, options: Local | None = None):
        super().__init__(folder, section, stage, steps, compute=compute, lora=lora, seed=seed, reward=reward,
                         options=options or Local())
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        self.names, params = [n for n, _ in trained], [p for _, p in trained]
        self.buckets = None
        if self.world.size > 1:
            self.buckets = Buckets(params, self.world.group(self.timeout), self.waits)
        # Muon is for matrices of layers: embedding, head and score head are not
        inside = {id(p) for layer in layers_of(self.base) for p in layer.parameters() if p.dim() == 2}
        self.weights = Masters(params, section, stage.world, self.buckets, matrices=[id(p) in inside for p in params])
        self._begin_averages()

    @property
    def masters(self) -> Sequence[torch.Tensor]:
        return self.weights.masters

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        if self.buckets:
            self.buckets.is_last = last
        loss.backward()
        if not last:
            self.weights.fold()

    def discard(self) -> bool:
        if self.mesh.sequence or (self.buckets and self.buckets.works):
            return False
        self.weights.discard()
        if self.buckets:
            self.buckets.reset()
        return True

    def _update(self, number: int, lr: float) -> torch.Tensor:
        return self.weights.step(number, lr)

    def _set_weights(self, values: Iterable[torch.Tensor]) -> None:
        self.weights.set(values)

    def _moments(self) -> list[dict[str, torch.Tensor]]:
        return self.weights.moments()

    def _set_moments(self, moments: list[dict[str, torch.Tensor]]) -> None:
        self.weights.set_moments(moments, self.step_index)

    def _weights(self):
        return merged_weights(self.model) if self.lora.rank else None, None
