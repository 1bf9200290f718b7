"""Work in new processes, alone or in a pair as torchrun starts them.

Not in forks of the tests' own process: once a test there has made autograd start threads, no fork of it can train.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from typing import Any


def exits(work: Callable[..., Any], *words: Any, processes: int = 1, **settings: Any) -> list[int]:
    """Exit statuses of processes that do the work together; a wait for each other that has no end is one of SIGALRM."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    context, started = multiprocessing.get_context("spawn"), []
    for rank in range(processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(context.Process(target=_worked, args=(environment, work, words, settings)))
        started[-1].start()
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def _worked(environment, work, words, settings):
    import torch

    torch.set_num_threads(1)  # which is one order of sums
    signal.alarm(300)
    os.environ |= environment
    work(*words, **settings)
