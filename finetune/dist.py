"""Training over one process or several: parameters are copied or sharded, gradients and losses meet.

A tensor is whole on the first process, as files have it, and sharded or copied on all, as training has it. Of a sharded
tensor no process but the first ever holds more than its own part.
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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from configs.errors import UserError
from configs.training import Compute
from eval.forward import DTYPES
from models.classifier import Classifier, Network, batch_norms
from store.processes import Processes, any_of, send_tensors, sum_over

K = TypeVar("K", bound=Hashable)


def wrap(model: Network, compute: Compute, processes: Processes) -> nn.Module:
    """The network whose forward pass trains `model`: on its device, copied or sharded over processes, compiled.

    All processes get the weights of the first one, by DDP itself or as shards. Sharded, the models of the others may be
    without memory, on the meta device.

    Raises:
        UserError: sharding without several processes, or settings that this network or device has not.
    """
    model.channels_last(compute.channels_last)
    if compute.strategy != "fsdp":
        model.to(processes.device)
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
        model.to(memory_format=torch.contiguous_format)  # no other can be sharded
        whole = {name: tensor.detach() for name, tensor in all_tensors(model).items()} if processes.is_main else {}
        policy = sharding_policy(model, compute)
        for block in blocks(model):
            fully_shard(block, mp_policy=policy, reshard_after_forward=True)
        fully_shard(model, mp_policy=policy, reshard_after_forward=False)
        give_memory(model, processes.device)
        spread(whole, all_tensors(model), processes)
    if compute.compile:
        network = torch.compile(network)  # type: ignore[assignment]  # torch types it as a callable
    if compute.strategy == "ddp" and processes.world > 1:
        network = DistributedDataParallel(network)
    return network


def sharding_policy(model: nn.Module, compute: Compute) -> MixedPrecisionPolicy:
    """In which precision sharded weights are gathered; their gradients are summed in their own, float32.

    Autocast says what is computed in low precision, as it does without sharding; so no input is rounded on its way in,
    and images are normalised as the float32 that they are. Weights come in the low precision to halve what is sent.
    Batch norms keep float32 statistics, beside which no kernel takes other weights: networks with some are gathered as
    they are, and so are those that are evaluated on held-out in another precision.
    """
    if compute.precision == "fp32" or compute.evaluates_in != compute.precision or batch_norms(model):
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(DTYPES[compute.precision], torch.float32, cast_forward_inputs=False)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, gathered or computed again one at a time.

    They are the members of its longest lists of modules of one kind; none of them is inside another.
    """
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


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, those buffers too that are no weights; a tied tensor once."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Put what is on the meta device onto a real one, with any values; what is tied stays tied."""
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
    """Whole on the CPU of the first process, none on the others; all must ask for the same in the same order.

    Args:
        tensors: whole or sharded.
        keep: whether this is the first process.
    """
    found = {}
    for name, tensor in tensors.items():
        whole = _joined(tensor) if isinstance(tensor, DTensor) else tensor
        if keep:
            assert whole is not None
            found[name] = whole.detach().cpu()
    return found


@torch.no_grad()
def spread(whole: Mapping[K, Tensor], targets: Mapping[K, Tensor], processes: Processes) -> None:
    """Copy the first process's whole tensors into those of all, each its part where they are sharded.

    Args:
        whole: by the names of `targets`; those of the other processes are ignored.
        targets: the same names in the same order on all processes.
        processes: all of which must ask.
    """
    for name, target in targets.items():
        own = whole[name] if processes.is_main else None
        if isinstance(target, DTensor):
            _cut(own, target)
        else:
            if own is not None:
                target.copy_(own)
            send_tensors([target], processes)


def _shard_of(tensor: DTensor) -> int | None:
    """The dimension that a tensor is cut along, None where each process has all of it."""
    match tensor.placements:
        case (Shard() as shard,):
            return shard.dim
        case (Replicate(),):
            return None
    raise NotImplementedError(f"a tensor that is {tensor.placements} is neither cut along one dimension nor copied")


def _joined(tensor: DTensor) -> Tensor | None:
    """The whole tensor on the first process, None on the others."""
    dim, local, mesh = _shard_of(tensor), tensor.to_local(), tensor.device_mesh
    if dim is None:
        return local
    # Parts are as large as the first, though the last ones may be smaller or empty: gather wants them alike.
    size = [*local.shape[:dim], -(-tensor.shape[dim] // mesh.size()), *local.shape[dim + 1 :]]
    part = local.new_zeros(size)
    part.narrow(dim, 0, local.shape[dim]).copy_(local)
    parts = [torch.empty_like(part) for _ in range(mesh.size())] if mesh.get_rank() == 0 else None
    dist.gather(part, parts, dst=0, group=mesh.get_group())
    return None if parts is None else torch.cat(parts, dim).narrow(dim, 0, tensor.shape[dim])


def _cut(whole: Tensor | None, target: DTensor) -> None:
    """Copy each process's part of the first one's tensor into it."""
    dim, local, mesh = _shard_of(target), target.to_local(), target.device_mesh
    if dim is None:
        if whole is not None:
            local.copy_(whole)
        dist.broadcast(local, src=0, group=mesh.get_group())
        return
    size = [*local.shape[:dim], -(-target.shape[dim] // mesh.size()), *local.shape[dim + 1 :]]
    part, parts = local.new_empty(size), None
    if whole is not None:
        padded = local.new_zeros([*size[:dim], size[dim] * mesh.size(), *size[dim + 1 :]])
        padded.narrow(dim, 0, whole.shape[dim]).copy_(whole)
        parts = [each.contiguous() for each in padded.chunk(mesh.size(), dim)]
    dist.scatter(part, parts, src=0, group=mesh.get_group())
    local.copy_(part.narrow(dim, 0, local.shape[dim]))


class DivergedError(ArithmeticError):
    """The training's loss, logits or weights are no numbers any more."""


@dataclass
class LateLosses:
    """Losses and requests to stop, summed over processes and read one step late, so that no GPU waits for the CPU."""

    processes: Processes
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
        """Loss over all processes, and whether one is asked to stop, of each step not read yet.

        The newest step is left for the next call unless it is wanted.

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


def is_finite(tensors: Mapping[str, Tensor], processes: Processes) -> bool:
    """Whether all numbers of a state dict are finite, in all shards; all processes must ask."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    return not any_of(not all(bool(part.isfinite().all()) for part in parts), processes)
