"""Things made ahead of their use by other processes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError
from configs.slurm import SIGNALS
from store.workers import use_threads

T = TypeVar("T")


@dataclass(frozen=True)
class _Told(Dataset[T | UserError], Generic[T]):
    """The same things; a user's mistake comes as a value, since DataLoader would wrap it in a worker's traceback."""

    things: Dataset[T]

    def __getitem__(self, index: int) -> T | UserError:
        try:
            return self.things[index]
        except UserError as error:
            return error

    def __len__(self) -> int:
        return len(self.things)  # type: ignore[arg-type]


def _once(signum: int, frame: object) -> None:
    signal.signal(signum, signal.SIG_DFL)


def _settle(worker: int) -> None:
    """Images are freed and asked for again all the time, in a worker too.

    A signal that asks the training for an end may be sent to all of its processes; it still needs its workers for the
    step that it is in. A second SIGTERM is DataLoader's, which wants the worker gone.
    """
    use_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Signals come when the block is over; processes that are started in it have them wait until `_settle`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def made_ahead(things: Dataset[T], workers: int) -> Iterator[T]:
    """All of `things`, picklable and with a length, in order.

    Args:
        things: made by `things[i]`, e.g. a whole batch each.
        workers: processes that make them, two each ahead; 0 makes them here.

    Raises:
        UserError: as `things[i]` raises it, whoever makes it.
    """
    n = len(things)  # type: ignore[arg-type]
    if workers == 0:
        for index in range(n):
            yield things[index]
        return
    # Spawned, since a forked copy of a process with torch threads may wait for them for ever. With a generator of its
    # own, since DataLoader draws a seed, which must not move the caller's chance.
    loader = DataLoader(
        _Told(things),
        batch_size=None,
        num_workers=min(workers, max(1, n)),
        multiprocessing_context="spawn",
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
        worker_init_fn=_settle,
    )
    with _signals_wait():
        things_made = iter(loader)
    for thing in things_made:
        if isinstance(thing, UserError):
            raise thing
        yield thing
