"""Worker processes: each has a GPU of its own where there are several."""

import importlib
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from threadpoolctl import threadpool_info

from store.workers import _start, gpus_of_workers, spread


def seen(folder):
    """What a process sees, told when the other one is there too."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def pools(_):
    """Threads of torch, and of each library's pool, SciPy's among them, which is loaded last."""
    np.ones((2, 2)) @ np.ones((2, 2))
    importlib.import_module("scipy.linalg")
    return torch.get_num_threads(), {pool["filepath"]: pool["num_threads"] for pool in threadpool_info()}


@pytest.mark.slow
def test_a_worker_computes_with_the_threads_it_is_given(monkeypatch):
    # A new interpreter, which loads SciPy last; it reads this file, so that what takes seconds is imported below.
    monkeypatch.setattr(multiprocessing.spawn, "get_executable", lambda: os.fsencode(sys.executable))
    context = multiprocessing.get_context("spawn")
    for threads in (1, 2):
        with ProcessPoolExecutor(1, context, initializer=_start, initargs=(threads, None)) as pool:
            of_torch, found = pool.submit(pools, None).result()
        assert of_torch == threads
        assert len(found) >= 3  # torch's OpenMP, and an OpenBLAS each of NumPy and SciPy
        assert set(found.values()) == {threads}, found


def test_a_process_gives_back_a_gpus_memory_before_workers_take_it(monkeypatch):
    from tests.pools import Here  # which loads libraries

    done = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: done.append("freed"))
    monkeypatch.setattr("store.workers._pool", lambda workers, threads: pytest.fail("started") if not done else Here())
    show = Console(quiet=True)
    numbers = {"workers": 1, "threads": 1, "units": 1, "done_units": lambda: 0, "report": str, "console": show}
    assert spread("title", [partial(int, 3)], **numbers) == [3]
    assert done == ["freed"]


def test_workers_take_gpus_in_turn_by_the_names_that_this_process_sees():
    assert gpus_of_workers(2, 4, None) == ["0", "1"]
    assert gpus_of_workers(4, 2, "GPU-a,GPU-b") == ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]
    assert gpus_of_workers(4, 1, "3") == gpus_of_workers(2, 0, None) == []


def test_each_of_two_worker_processes_sees_one_of_two_gpus(tmp_path):
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for name in ("4", "6"):
        gpus.put(name)
    with ProcessPoolExecutor(2, context, initializer=_start, initargs=(1, gpus)) as pool:
        assert sorted(pool.map(seen, [tmp_path, tmp_path])) == ["4", "6"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in ("4", "6")
