"""Batch-norm statistics of a soup, measured on data: the mean of the ingredients' ones belongs to no model."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn


def recompute_batch_norm(model: nn.Module, loader: Iterable[Any], device: torch.device | None = None) -> int:
    """Replace running means and variances by their averages over the batches of a loader (a pass in training mode).

    Every batch weighs the same, as in `torch.optim.swa_utils.update_bn`. Under torch.distributed each rank brings its
    own batches, as many as it has: the ranks' averages, times their numbers of batches, are summed in float64 over all
    ranks (all-reduce), so that every rank ends with what one process would get from all batches. The bare module is
    run, since DistributedDataParallel sends rank 0's buffers at the first batch, and a rank without one would not come.

    Args:
        model: the soup; its mode is restored. Dropout is on during the pass, as it was in training.
        loader: batches, or tuples whose first element is the batch.
        device: where batches go; None leaves them where they are.

    Returns:
        The number of batches over all ranks, which `num_batches_tracked` becomes; 0 if the model has no batch norm.

    Raises:
        ValueError: no rank has a batch; the statistics are then as they were.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    layers = [m for m in bare.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return 0
    before = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    batches = _Counted(loader)
    update_bn(batches, bare, device)
    total = _over_ranks(torch.tensor(float(batches.count), dtype=torch.float64, device=_place(layers[0])))
    if total == 0:
        for name, buffer in bare.named_buffers():
            buffer.copy_(before[name])
        raise ValueError("batch norm cannot be recomputed without data: the loader has no batch")
    for layer in layers:
        for statistic in (layer.running_mean, layer.running_var):
            if statistic is not None:
                statistic.copy_(_over_ranks(statistic.double() * batches.count) / total)
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(int(total))
    return int(total)


class _Counted:
    """A loader that knows how many batches it gave."""

    def __init__(self, loader: Iterable[Any]):
        self.loader, self.count = loader, 0

    def __iter__(self) -> Any:
        for batch in self.loader:
            self.count += 1
            yield batch


def _place(layer: _BatchNorm) -> torch.device:
    assert layer.running_mean is not None
    return layer.running_mean.device


def _over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
