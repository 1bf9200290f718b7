"""Batches that other processes make before they are asked for."""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.slurm import SIGNALS
from store.workers import leave_with_parent, use_threads

T = TypeVar("T")
PER_WORKER = 2  # batches that each worker makes before they are asked for
SHARED = Path("/dev/shm")  # where workers put them


@dataclass(frozen=True)
class _Caught(Dataset[T | UserError], Generic[T]):
    """What is made; a user's mistake is a value, since DataLoader would wrap it in a worker's traceback."""

    make: Callable[[Any], T]
    of: Sequence[Any]

    def __getitem__(self, index: int) -> T | UserError:
        try:
            return self.make(self.of[index])
        except UserError as error:
            return error

    def __len__(self) -> int:
        return len(self.of)


def _default_next_time(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)


def _start_worker(worker: int) -> None:
    """Images are freed and asked for again all the time, in a worker too.

    A signal that asks the training for an end may be sent to all of its processes; it still needs its workers for the
    step that it is in. A second SIGTERM is DataLoader's, which wants the worker gone.
    """
    use_threads(1)
    leave_with_parent()  # which uses the batches; DataLoader watches the one that forks
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _default_next_time)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals come when the block is over; processes that are started in it have them wait until `_start_worker`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def refuse_little_shared_memory(needed: int) -> None:
    """Refuse batches of `needed` bytes for one process, of all that torchrun started here, that do not fit in /dev/shm.

    They would end a worker by a bus error in the middle of its work.
    """
    if not SHARED.exists():  # on other systems than Linux
        return
    needed, free = needed * int(os.environ.get("LOCAL_WORLD_SIZE", "1")), shutil.disk_usage(SHARED).free
    if needed > free:
        raise UserError(
            f"decoded batches need {needed / 1e9:.2f} GB of shared memory, and {SHARED} has {free / 1e9:.2f} GB left: "
            "start the container with more (--shm-size=16g or --ipc=host), or type a smaller compute.loader_workers"
        )


def prefetch(make: Callable[[Any], T], of: Sequence[Any], workers: int, bytes_each: int = 0) -> Iterator[T]:
    """Batches, or what else is made, in order.

    Args:
        make: makes one; picklable, as what it is called with.
        of: what it is called with.
        workers: processes that make them, two each before they are asked for; 0 makes them here.
        bytes_each: bytes of a batch in shared memory, where it is known.

    Raises:
        UserError: as `make` raises it, whoever calls it; too little shared memory.
    """
    if workers == 0:
        yield from map(make, of)
        return
    refuse_little_shared_memory(PER_WORKER * workers * bytes_each)
    # Not forked from here, since a copy of a process with torch threads may wait for them for ever; but all from one
    # process that has loaded what the batches need and does nothing else, so that they share its memory. With a
    # generator of its own, since DataLoader draws a seed, which must not move the caller's chance.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(make, "func", make).__module__, __name__])
    loader = DataLoader(
        _Caught(make, of),
        batch_size=None,
        num_workers=min(workers, max(1, len(of))),
        prefetch_factor=PER_WORKER,
        multiprocessing_context=context,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_start_worker,
    )
    with _signals_wait():
        made = iter(loader)
    for batch in made:
        if isinstance(batch, UserError):
            raise batch
        yield batch
