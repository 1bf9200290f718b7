"""Training over one process or several: parameters are copied or sharded, gradients and losses meet.

No process but the first, which has whole tensors as files do, ever holds more than its part of a sharded tensor.
"""

import math
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configs.errors import UserError
from configs.training import Compute
from eval.forward import DTYPES
from finetune.averages import local_part
from models.classifier import Classifier, Network, batch_norms, speed_up_depthwise
from store.processes import Processes, send_tensors, sum_over

K = TypeVar("K", bound=Hashable)


def wrap(model: Network, compute: Compute, processes: Processes) -> nn.Module:
    """The network whose forward pass trains `model`: on its device, copied or sharded over processes, compiled.

    All processes get the weights of the first one; with sharding, the models of the others may be on the meta device.

    Raises:
        UserError: sharding without several processes, or settings that this network or device has not.
    """
    model.channels_last(compute.channels_last)
    if compute.strategy != "fsdp":
        model.to(processes.device)
    if processes.device.type == "cpu":
        speed_up_depthwise(model)
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
        _shard(model, compute, processes)
    if compute.compile:
        network = torch.compile(network)  # type: ignore[assignment]  # torch types it as a callable
    if compute.strategy == "ddp" and processes.world > 1:
        network = DistributedDataParallel(network)
    return network


def _shard(model: Network, compute: Compute, processes: Processes) -> None:
    """Shard a model block by block.

    Weights are gathered in the low precision of autocast, and gradients summed in float32. Inputs are not cast, so that
    images are normalised in float32. Networks with batch norms, whose float32 statistics fit no low-precision weights,
    are gathered as they are, and so are those that are evaluated in another precision.
    """
    model.to(memory_format=torch.contiguous_format)  # no other can be sharded
    whole = {name: tensor.detach() for name, tensor in all_tensors(model).items()} if processes.is_main else {}
    as_they_are = compute.precision == "fp32" or compute.evaluates_in != compute.precision or batch_norms(model)
    low, full = (None, None) if as_they_are else (DTYPES[compute.precision], torch.float32)
    policy = MixedPrecisionPolicy(low, full, cast_forward_inputs=False)
    for block in blocks(model):
        fully_shard(block, mp_policy=policy, reshard_after_forward=True)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)
    give_memory(model, processes.device)
    spread(whole, all_tensors(model), processes)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of a network's longest lists of modules of one kind, none inside another: gathered one at a time."""
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len({type(member) for member in module}) == 1
    ]
    longest = max((len(module) for module in lists), default=0)
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in lists:
        if len(module) == longest > 1 and module not in inside:
            found += module.children()
            inside |= set(module.modules())
    return found


@contextmanager
def synchronised(network: nn.Module, on: bool) -> Iterator[None]:
    """Whether backward passes inside sum gradients over processes; the last one of a step does."""
    inner = getattr(network, "_orig_mod", network)  # where torch.compile has wrapped it
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(on)
    with network.no_sync() if isinstance(network, DistributedDataParallel) and not on else nullcontext():
        yield


def reshard(model: nn.Module) -> None:
    """Give up gathered parameters: FSDP would use the root's in the next pass, though shards changed in between."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, including buffers that are no weights; a tied tensor once."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Put what is on the meta device onto a real one, with any values; unlike `to_empty`, keeps ties."""
    given: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in given:
                    empty = torch.empty_like(tensor, device=device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    given[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                tensors[name] = given[tensor]  # type: ignore[assignment]  # a parameter among parameters


@torch.no_grad()
def gathered(tensors: Mapping[K, Tensor], *, keep: bool) -> dict[K, Tensor]:
    """Whole or sharded tensors, whole on the CPU of the first process (`keep`), none on the others; all must ask."""
    found = {}
    for name, tensor in tensors.items():
        whole = _joined(tensor) if isinstance(tensor, DTensor) and _is_cut(tensor) else local_part(tensor)
        if keep:
            assert whole is not None
            found[name] = whole.detach().cpu()
    return found


@torch.no_grad()
def spread(whole: Mapping[K, Tensor], targets: Mapping[K, Tensor], processes: Processes) -> None:
    """Copy the first process's whole tensors into those of all, each its part where they are sharded; all must ask."""
    for name, target in targets.items():
        own = whole[name] if processes.is_main else None
        if isinstance(target, DTensor) and _is_cut(target):
            _scatter(own, target)
            continue
        if own is not None:
            local_part(target).copy_(own)
        send_tensors([local_part(target)], processes)


def _is_cut(tensor: DTensor) -> bool:
    """Whether each process has some rows of a tensor, as FSDP2 shards parameters, and not all of it."""
    return tensor.placements[0].is_shard(0)


def _room(tensor: DTensor) -> Tensor:
    """Zeros for a process's rows: as many as the first has, since collectives want all parts alike."""
    rows = -(-len(tensor) // tensor.device_mesh.size())
    return tensor.to_local().new_zeros(rows, *tensor.shape[1:])


def _joined(tensor: DTensor) -> Tensor | None:
    part, local, mesh = _room(tensor), tensor.to_local(), tensor.device_mesh
    part[: len(local)] = local
    parts = [torch.empty_like(part) for _ in range(mesh.size())] if mesh.get_rank() == 0 else None
    dist.gather(part, parts, dst=0, group=mesh.get_group())
    return None if parts is None else torch.cat(parts)[: len(tensor)]


def _scatter(whole: Tensor | None, target: DTensor) -> None:
    part, parts, local, mesh = _room(target), None, target.to_local(), target.device_mesh
    if whole is not None:
        padded = torch.cat([part] * mesh.size())
        padded[: len(whole)] = whole
        parts = list(padded.split(len(part)))
    dist.scatter(part, parts, src=0, group=mesh.get_group())
    local.copy_(part[: len(local)])


class DivergedError(ArithmeticError):
    """The training's loss, logits or weights are no numbers any more."""


@dataclass
class LateLosses:
    """Losses and requests to stop, summed over processes and read one step late, so that no GPU waits for the CPU."""

    unread: list[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=list)

    def add(self, loss: Tensor, *, stop: bool) -> None:
        """This process's part of a step's loss, and whether it is asked to stop; all processes must call it."""
        sums = sum_over(torch.stack([loss, torch.full_like(loss, float(stop))]))
        ready = None
        if sums.is_cuda:
            sums, ready = sums.to("cpu", non_blocking=True), torch.cuda.Event()
            ready.record()
        self.unread.append((sums, ready))

    def read(self, *, newest: bool) -> list[tuple[float, bool]]:
        """Loss and whether any process is asked to stop, of each unread step, the newest only where wanted.

        Raises:
            DivergedError: a loss is not a number, or infinite.
        """
        n = len(self.unread) - (not newest)
        taken, self.unread = self.unread[:n], self.unread[n:]
        found = []
        for sums, ready in taken:
            if ready is not None:
                ready.synchronize()
            loss, stop = sums.tolist()
            if not math.isfinite(loss):
                raise DivergedError
            found.append((loss, stop > 0))
        return found
