"""Worker processes: each has a GPU of its own where there are several."""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

from store.workers import _start, gpus_of_workers


def seen(folder):
    """What a process sees, told when the other one is there too."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_workers_take_gpus_in_turn_by_the_names_that_this_process_sees():
    assert gpus_of_workers(2, 4, None) == ["0", "1"]
    assert gpus_of_workers(4, 2, "GPU-a,GPU-b") == ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]
    assert gpus_of_workers(4, 1, "3") == gpus_of_workers(2, 0, None) == []


def test_each_of_two_worker_processes_sees_one_of_two_gpus(tmp_path):
    context = multiprocessing.get_context("spawn")
    gpus = context.SimpleQueue()
    for name in ("4", "6"):
        gpus.put(name)
    with ProcessPoolExecutor(2, context, initializer=_start, initargs=(os.getpid(), 1, gpus)) as pool:
        assert sorted(pool.map(seen, [tmp_path, tmp_path])) == ["4", "6"]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") not in ("4", "6")
