"""One process or several: who takes which images, how gradients meet, and states that do not depend on how many."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from configs.errors import UserError
from configs.training import Compute
from eval.forward import DTYPES
from models.classifier import Classifier, Network, batch_norms
from store.processes import Processes

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def share(indices: Tensor, processes: Processes) -> Tensor:
    """The part of a batch that is this process's: every W-th image of the first half, and their partners.

    Mixup pairs image i of a batch of B with image B - 1 - i. Each process gets whole pairs, in an order in which its
    part pairs them in the same way, so that all processes together see the very batch that one alone would see.

    Args:
        indices: (B,), B even.
        processes: this one among W.

    >>> share(torch.arange(6), Processes(1, 2, torch.device("cpu")))
    tensor([1, 4])
    """
    first = torch.arange(processes.rank, len(indices) // 2, processes.world)
    return indices[torch.cat([first, len(indices) - 1 - first.flip(0)])]


def prepare(model: Network, compute: Compute, processes: Processes) -> nn.Module:
    """The network whose forward pass trains `model`: on its device, copied or sharded over processes, compiled.

    Raises:
        UserError: sharding without several processes, or settings that this network or device has not.
    """
    model.channels_last(compute.channels_last).to(processes.device)
    if compute.gradient_checkpointing:
        for block in blocks(model):
            checkpoint(block)
    if processes.world > 1 and isinstance(model, Classifier) and not model.frozen_batch_norm and batch_norms(model):
        if processes.device.type == "cpu":
            raise UserError("model.frozen_batch_norm=false on several processes needs GPUs, which alone can share it")
        model.tower = convert_sync_batchnorm(model.tower)
    network: nn.Module = model
    if compute.strategy == "fsdp":
        if not dist.is_initialized():
            raise UserError("compute.strategy=fsdp shards over several processes: start with torchrun, or choose ddp")
        kind = DTYPES[compute.precision]
        model.to(memory_format=torch.contiguous_format)  # no other can be sharded
        policy = MixedPrecisionPolicy(kind, torch.float32) if compute.precision != "fp32" else MixedPrecisionPolicy()
        for block in blocks(model):
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    if compute.compile:
        network = torch.compile(network)  # type: ignore[assignment]  # torch types it as a callable
    if compute.strategy == "ddp" and processes.world > 1:
        network = DistributedDataParallel(network)
    return network


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, gathered or computed again one at a time: the members of its longest lists."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    longest = max((len(module) for module in lists), default=0)
    return [block for module in lists if len(module) == longest and longest > 2 for block in module.children()]


@contextmanager
def synchronised(network: nn.Module, on: bool) -> Iterator[None]:
    """Whether backward passes inside sum gradients over processes; the last one of a step does."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(on)
        yield
        return
    with nullcontext() if on or not isinstance(network, DistributedDataParallel) else network.no_sync():
        yield


def reshard(model: nn.Module) -> None:
    """Give up gathered parameters. FSDP keeps those of the root after a forward pass and would use them in the next,
    although the shards were changed in between.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """On the CPU, whole where they are sharded; all processes must ask, and those that do not keep get none."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.detach().cpu()
    return found


def spread_like(tensor: Tensor, target: Tensor) -> Tensor:
    """A whole tensor as another is: on its device, sharded where that is."""
    if isinstance(target, DTensor):
        return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    return tensor.to(target.device)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights by name, whatever the number of processes."""
    if not dist.is_initialized():
        return model.state_dict()
    return {name: torch.as_tensor(tensor) for name, tensor in get_model_state_dict(model, options=WHOLE).items()}


def load_model_state(model: nn.Module, state: dict[str, Any]) -> None:
    """The inverse of `model_state`."""
    if dist.is_initialized():
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state)


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole moments by the names of the parameters."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `optimizer_state`."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
