"""Work spread over processes of this machine, with progress; workers never outlive the one that started them."""

import ctypes
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.queues import SimpleQueue
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from threadpoolctl import threadpool_limits

from configs.errors import UserError

T = TypeVar("T")
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # names of glibc's malloc.h
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1}
RETURN = {M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**27}


def leave_with_parent() -> None:
    """Have this process end when the one that asked for it is gone, even by kill -9: a restart finds no lock held."""

    def wait_for_end() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


def _set_allocator(settings: dict[int, int]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # absent from musl
            for name, value in settings.items():
                libc.mallopt(name, value)


def use_threads(threads: int) -> None:
    """Compute with `threads` threads, of torch and of NumPy's BLAS; glibc keeps freed blocks for the next step.

    Giving blocks back costs half of a training step's time.
    """
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    os.environ |= dict.fromkeys(POOLS, str(threads))  # read by libraries that are loaded later
    _set_allocator(KEEP)


@contextmanager
def little_memory() -> Iterator[None]:
    """Give freed blocks of 32 MiB and more back to the system at once, and of smaller ones all but 128 MiB."""
    _set_allocator(RETURN)
    try:
        yield
    finally:
        _set_allocator(KEEP)


def gpus_of_workers(workers: int, gpus: int, visible: str | None) -> list[str]:
    """The GPU that each worker may see, in turn, by its name in CUDA_VISIBLE_DEVICES; empty where there is one or none.

    >>> gpus_of_workers(3, 2, "4,6"), gpus_of_workers(2, 1, None)
    (['4', '6', '4'], [])
    """
    if gpus < 2:
        return []
    names = visible.split(",") if visible else [str(i) for i in range(gpus)]
    return [names[i % gpus] for i in range(workers)]


def _start(threads: int, gpus: "SimpleQueue[str] | None") -> None:
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()  # read when CUDA is first used, which is later
    use_threads(threads)
    leave_with_parent()


@lru_cache(maxsize=1)
def _pool(workers: int, threads: int) -> ProcessPoolExecutor:
    """Started once and used by all stages of a command, since each process imports torch for seconds."""
    context = multiprocessing.get_context("spawn")
    names = gpus_of_workers(workers, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES"))
    gpus: SimpleQueue[str] | None = context.SimpleQueue() if names else None
    for name in names:
        assert gpus is not None
        gpus.put(name)
    return ProcessPoolExecutor(workers, context, initializer=_start, initargs=(threads, gpus))


def spread(
    title: str,
    calls: Sequence[Callable[[], T]],
    *,
    workers: int,
    threads: int,
    units: int,
    done_units: Callable[[], int],
    report: Callable[[T], str] | None,
    console: Console,
) -> list[T]:
    """Run picklable calls, such as `partial(train_row, config, 3)`, on worker processes; results in their order.

    The bar counts `done_units()`, read from the files that workers write, up to `units`; `report` makes a line of each
    result.

    Raises:
        UserError: a call's own, or a worker that was killed. Calls already running finish first.
    """
    if not calls:
        return []
    if torch.cuda.is_initialized():  # give back what this process holds of a GPU's memory, before others compute on it
        gc.collect()  # networks that refer to themselves
        torch.cuda.empty_cache()
    pool = _pool(workers, threads)
    left = TimeRemainingColumn(elapsed_when_finished=False)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), "left", left)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=units, completed=done_units())
        futures = [pool.submit(call) for call in calls]
        pending = set(futures)
        try:
            while pending:
                finished, pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    result = future.result()
                    if report is not None:
                        bar.console.print(report(result))
                bar.update(task, completed=done_units())
        except BaseException as error:
            _pool.cache_clear()
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise UserError(
                    f"{title}: a worker process was killed, perhaps for memory; fewer cluster.workers need less. "
                    "Run the same command again to continue"
                ) from None
            raise
    return [future.result() for future in futures]
