"""One process or several that torchrun started: who each is, its device, and sums over all of them."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int
    world: int
    device: torch.device

    @property
    def writes(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0


def device_of_this_process() -> torch.device:
    """The GPU of its local rank under torchrun, the first one alone, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def alone() -> Processes:
    """A process that works by itself."""
    return Processes(0, 1, device_of_this_process())


def start_processes() -> Processes:
    """Join the processes that torchrun started, or be alone.

    Source: torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.
    """
    world, device = int(os.environ.get("WORLD_SIZE", "1")), device_of_this_process()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(int(os.environ.get("RANK", "0")), world, device)


def end_processes() -> None:
    """Wait for the others, which may still read or write, and part."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def wait_for_all(processes: Processes) -> None:
    """Go on when all processes have come here."""
    if processes.world > 1:
        dist.barrier()


def sum_over(value: Tensor) -> Tensor:
    """The sum over processes of a number that each has a part of."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_of(flag: bool, processes: Processes) -> bool:
    """Whether it is so on some process; all must ask."""
    if processes.world == 1:
        return flag
    return bool(sum_over(torch.tensor(float(flag), device=processes.device)).item())


def least_of_all(number: int, processes: Processes) -> int:
    """The smallest of the processes' numbers; all must ask."""
    if processes.world == 1:
        return number
    value = torch.tensor(number, device=processes.device)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return int(value.item())
