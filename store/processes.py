"""One process or several that torchrun started: who each is, its device, and how they agree."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from configs.training import Compute

T = TypeVar("T")
# Between the first and the last process that comes to a sum of gradients: compilation, a slow file, a save.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# While the first process works and the others wait for its answer: a linear probe, a download, another job's row. No
# one is left waiting for a dead process: its connections close, and torchrun ends the others.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0


def device_of_this_process() -> torch.device:
    """The GPU of its local rank under torchrun, the first one alone, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def single_process() -> Processes:
    """This process, working by itself."""
    return Processes(0, 1, device_of_this_process())


def started_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_processes() -> Processes:
    """Join the processes that torchrun started, or be alone."""
    world, device = started_processes(), device_of_this_process()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", timeout=COLLECTIVE_TIMEOUT, device_id=device if on_gpu else None
        )
        _cpu_group()
    return Processes(int(os.environ.get("RANK", "0")), world, device)


def use_kernels(compute: Compute, device: torch.device) -> None:
    """Let a GPU compute as the settings say; a CPU's kernels give the same bits each time anyway.

    With `deterministic` an operation without a deterministic kernel is an error; it must be asked for before the first
    product, since cuBLAS reads its setting once. Without, cuDNN tries which kernel is the fastest for each shape.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = compute.tf32
    torch.backends.cudnn.benchmark = not compute.deterministic
    torch.use_deterministic_algorithms(compute.deterministic)
    if compute.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _cpu_group() -> dist.ProcessGroup:
    """The group in which processes exchange what lies on no GPU: NCCL's watchdog would end one that waits long."""
    return _made_beside(dist.group.WORLD)


@cache
def _made_beside(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # a number where this process is not in it
    return group


def end_processes() -> None:
    """Wait for the others, which may still read or write, and part."""
    if dist.is_initialized():
        dist.barrier(group=_cpu_group())
        dist.destroy_process_group()


def wait_for_all(processes: Processes) -> None:
    """Go on when all processes have come here, however long one works."""
    if processes.world > 1:
        dist.barrier(group=_cpu_group())


def first_decides(decide: Callable[[], T], processes: Processes) -> T:
    """The answer of the first process, which alone reads or works; the others wait for it, however long that takes.

    File systems show files late to other nodes, and processes that disagree on what is there wait for each other for
    ever. The answer must be small, and picklable.

    Raises:
        UserError: as the first process's `decide` raises it, in all.
    """
    if processes.world == 1:
        return decide()
    answer: list[Any] = [None, None]
    if processes.is_main:
        try:
            answer[0] = decide()
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0, group=_cpu_group())
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def on_the_first(own: Tensor, processes: Processes) -> list[Tensor]:
    """The tensors of all processes in their order, on the CPU of the first one; none elsewhere."""
    parts: list[Any] | None = [None] * processes.world if processes.is_main else None
    dist.gather_object(own, parts, dst=0, group=_cpu_group())
    return parts or []


def from_the_first(whole: Sequence[Tensor], shape: tuple[int, ...], processes: Processes) -> Tensor:
    """The one float32 tensor in the first process's list, on the CPU of all; those of the others are empty."""
    found = whole[0].to(torch.float32).contiguous() if processes.is_main else torch.empty(shape, dtype=torch.float32)
    dist.broadcast(found, src=0, group=_cpu_group())
    return found


def send_tensors(tensors: Iterable[Tensor], processes: Processes) -> None:
    """Let the tensors of all processes, which must be alike, have the values of the first one's."""
    for tensor in tensors if processes.world > 1 else ():
        # Through the device, since NCCL takes nothing else, and row by row, since it knows no memory format.
        buffer = tensor.detach().to(processes.device, memory_format=torch.contiguous_format)
        dist.broadcast(buffer, src=0)
        tensor.detach().copy_(buffer)


def sum_over(value: Tensor) -> Tensor:
    """The sum over processes of a number that each has a part of."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_of(flag: bool, processes: Processes) -> bool:
    """Whether it is so on some process; all must ask."""
    return least_of_all(not flag, processes) == 0


def least_of_all(number: int, processes: Processes) -> int:
    """The smallest of the processes' numbers; all must ask, however long one takes to know its own."""
    if processes.world == 1:
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MIN, group=_cpu_group())
    return int(value.item())
