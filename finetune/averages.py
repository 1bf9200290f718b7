"""Averages of a model over its own training: exponential ones at several decays at once, and SWA."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.training import Regularizer

SWA = "swa"
FINEST_FLOAT32 = 1e-5  # a share of the weights below this drowns in float32's rounding of the average


class Averages:
    """Copies of a model's weights, one for each decay, and their float64 sum for SWA.

    A copy is float32, or float64 where a step's share of it would be lost in float32: 1e-7 x (weights - average) is
    less than half of a last place, and the average would never move. All start as the initial weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], regularizer: Regularizer, steps: int):
        self.regularizer, self.steps = regularizer, steps
        self.decays = {f"ema_{decay}": decay for decay in regularizer.ema}  # by the name of the weights they lead to
        self.ema = {
            name: {key: _copy(tensor, wide=1 - decay < FINEST_FLOAT32) for key, tensor in tensors.items()}
            for name, decay in self.decays.items()
        }
        self.total: dict[str, Tensor] = {}
        if regularizer.swa is not None:
            self.total = {
                key: torch.zeros_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor.clone()
                for key, tensor in tensors.items()
            }
        self.taken = 0  # models in `total`

    def due(self, step: int) -> bool:
        """Whether the weights after a step, counted from 0, belong in some average."""
        return bool(self.decays) or self._swa_is_due(step)

    def _swa_is_due(self, step: int) -> bool:
        swa = self.regularizer.swa
        since = step - int(swa.start * self.steps) if swa is not None else -1
        return swa is not None and since >= 0 and since % swa.every == 0

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after a step, counted from 0. Integer tensors are the latest.

        EMA: average <- decay x average + (1 - decay) x weights, where a ramp holds the decay of step t = 1, 2, ...
        below (1 + t) / (10 + t).
        """
        for name, full in self.decays.items():
            decay = min(full, (step + 2) / (step + 11)) if self.regularizer.ema_ramp else full
            averages, weights = [], []  # those of one precision move together, in a few kernels
            for key, average in self.ema[name].items():
                if not average.is_floating_point():
                    average.copy_(tensors[key])
                elif average.dtype == tensors[key].dtype:
                    averages.append(local_part(average))
                    weights.append(local_part(tensors[key]))
                else:  # one at a time, since each needs a wide copy of the weights
                    average.lerp_(tensors[key].detach().to(average.dtype), 1 - decay)
            if averages:
                torch._foreach_lerp_(averages, weights, 1 - decay)
        if self._swa_is_due(step):
            self.taken += 1
            for key, total in self.total.items():
                if total.is_floating_point():
                    total.add_(tensors[key].detach())
                else:
                    total.copy_(tensors[key])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Each average as a state dict, by name; SWA from its first model on."""
        found = {
            name: {key: tensor.float() if tensor.dtype == torch.float64 else tensor for key, tensor in tensors.items()}
            for name, tensors in self.ema.items()
        }
        if self.taken:
            found[SWA] = {
                key: (total / self.taken).float() if total.is_floating_point() else total.clone()
                for key, total in self.total.items()
            }
        return found

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All tensors that change, which is what a restart needs beside `taken`."""
        return self.ema | ({SWA: self.total} if self.total else {})


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, without its gradient."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def _copy(tensor: Tensor, *, wide: bool) -> Tensor:
    return tensor.detach().to(torch.float64 if wide and tensor.is_floating_point() else tensor.dtype, copy=True)


@contextmanager
@torch.no_grad()
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model have other weights while the block lasts; sharded ones where it is sharded."""
    own = model.state_dict()
    kept = {name: own[name].clone() for name in weights}
    try:
        for name, tensor in weights.items():
            own[name].copy_(tensor)
        yield
    finally:
        for name, tensor in kept.items():
            own[name].copy_(tensor)
