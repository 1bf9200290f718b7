"""Averages of a model over its own training: exponential ones at several decays at once, and SWA."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.training import Regularizer, Swa

SWA = "swa"


@dataclass
class Averages:
    """Copies of a model's float32 weights, one for each decay, and their float64 sum for SWA."""

    swa: Swa | None
    decays: dict[str, float]  # by the name of the weights they lead to, as in ema_0.999
    steps: int  # of the whole training
    ema: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    total: dict[str, Tensor] = field(default_factory=dict)
    taken: int = 0  # models in `total`

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], regularizer: Regularizer, steps: int) -> "Averages":
        """All averages before the first step: an EMA starts as the initial weights.

        Args:
            tensors: the model's state dict.
            regularizer: which averages there are.
            steps: of the whole training.
        """
        decays = {f"ema_{decay}": decay for decay in regularizer.ema}
        ema = {name: {key: tensor.detach().clone() for key, tensor in tensors.items()} for name in decays}
        total = {}
        if regularizer.swa is not None:
            total = {
                key: torch.zeros_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor.clone()
                for key, tensor in tensors.items()
            }
        return cls(regularizer.swa, decays, steps, ema, total)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after a step, counted from 0. Integer tensors are the latest.

        EMA: average <- decay x average + (1 - decay) x weights. SWA: every `every` steps from `start` on.
        """
        for name, decay in self.decays.items():
            for key, average in self.ema[name].items():
                if average.is_floating_point():
                    average.lerp_(tensors[key].detach(), 1 - decay)
                else:
                    average.copy_(tensors[key])
        if self.swa is not None:
            first = int(self.swa.start * self.steps)
            if step >= first and (step - first) % self.swa.every == 0:
                self.taken += 1
                for key, total in self.total.items():
                    if total.is_floating_point():
                        total.add_(tensors[key].detach())
                    else:
                        total.copy_(tensors[key])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Each average as a state dict, by name; SWA from its first model on."""
        found = {name: dict(tensors) for name, tensors in self.ema.items()}
        if self.taken:
            found[SWA] = {
                key: (total / self.taken).float() if total.is_floating_point() else total.clone()
                for key, total in self.total.items()
            }
        return found

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that changes, but for `taken`; what a restart needs."""
        return self.ema | ({SWA: self.total} if self.swa is not None else {})
