"""Batch-norm statistics of a soup, measured on data: the mean of the ingredients' ones belongs to no model."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from soups.ranks import sum_over_ranks


def recompute_batch_norm(model: nn.Module, loader: Iterable[Any]) -> int:
    """Replace running means and variances by their averages over the batches of a loader (a pass in training mode).

    Every batch weighs the same, as in `torch.optim.swa_utils.update_bn`. Under torch.distributed each rank brings its
    own batches, as many as it has, and every rank ends with what one process would get from all of them. The bare
    module is run, since DistributedDataParallel sends rank 0's buffers at the first batch, and a rank without one would
    not come.

    Args:
        model: the soup; its mode is restored. Dropout is on during the pass, as it was in training.
        loader: batches on the model's device: tensors; dicts, whose entries are the model's arguments by name, but for
            labels; or tuples and lists, whose first element is such a batch.

    Returns:
        The number of batches over all ranks, which `num_batches_tracked` becomes; 0 if the model has no batch norm.

    Raises:
        ValueError: no rank has a batch. Whatever fails, all buffers, modes and momenta are as they were.
    """
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    layers = batch_norms(bare)
    if not layers:
        return 0
    with _restored_on_failure(bare), torch.no_grad():
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over the batches
        bare.train()
        count = 0
        for batch in loader:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            if isinstance(inputs, Mapping):
                bare(**{name: value for name, value in inputs.items() if name != "labels"})
            else:
                bare(inputs)
            count += 1
        place = next(layers[0].buffers()).device
        total = sum_over_ranks(torch.tensor(float(count), dtype=torch.float64, device=place))
        if total == 0:
            raise ValueError("batch norm cannot be recomputed without data: the loader has no batch")
        for layer in layers:
            for statistic in (layer.running_mean, layer.running_var):
                if statistic is not None:
                    statistic.copy_(sum_over_ranks(statistic.double() * count) / total)
            if layer.num_batches_tracked is not None:
                layer.num_batches_tracked.fill_(int(total))
    return int(total)


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The layers of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running statistics and counters of a model's batch norms, by name."""
    kept = {id(buffer) for layer in batch_norms(model) for buffer in layer.buffers()}
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers() if id(buffer) in kept}


@contextmanager
def _restored_on_failure(model: nn.Module) -> Iterator[None]:
    """Put back modes and momenta in any case, and buffers where the block fails."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in batch_norms(model)]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        raise
    finally:
        for module, training in modes:
            module.training = training
        for layer, momentum in momenta:
            layer.momentum = momentum
