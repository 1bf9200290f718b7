"""Processes that torchrun started: each scores its part of the candidates, and all take the same decisions."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from soups.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=7)  # one rank may evaluate for hours while the others wait


def start() -> None:
    """Begin torch.distributed where torchrun started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} stands in the environment without {', '.join(missing)}: start "
            "several processes by torchrun --nproc-per-node=N -m soups ..., or one after unset WORLD_SIZE"
        )
    import torch  # noqa: PLC0415  # seconds, which one process that scores by a command need not wait for
    import torch.distributed as dist  # noqa: PLC0415

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)


def this_rank() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed, which is not loaded to see."""
    dist = sys.modules.get("torch.distributed")
    return (dist.get_rank(), dist.get_world_size()) if dist is not None and dist.is_initialized() else (0, 1)


def end() -> None:
    """Take leave of the other processes."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: "Tensor") -> "Tensor":
    """The tensor itself, after it was summed in place over all ranks."""
    if this_rank()[1] > 1:
        sys.modules["torch.distributed"].all_reduce(tensor)
    return tensor


def from_first(value: Any) -> Any:
    """What rank 0 has."""
    if this_rank()[1] == 1:
        return value
    import torch.distributed as dist  # noqa: PLC0415

    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def spread(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """`work` on each item, of which rank r does every W-th; every rank gets all answers, in order.

    Raises:
        UserError: what `work` raised on any rank, on all of them.
    """
    rank, world = this_rank()
    if world == 1:
        return [work(item) for item in items]
    import torch.distributed as dist  # noqa: PLC0415

    mine: list[Any] = []
    problem: str | None = None
    try:
        mine = [work(item) for item in items[rank::world]]
    except UserError as error:
        problem = str(error)  # told to the others, who would wait for this rank for days
    shared: list[tuple[list[Any], str | None]] = [([], None)] * world
    dist.all_gather_object(shared, (mine, problem))
    problems = [found for _, found in shared if found is not None]
    if problems:
        raise UserError(problems[0])
    return [shared[i % world][0][i // world] for i in range(len(items))]
