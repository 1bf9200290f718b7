"""One of two processes that make rows together, watched:  RANK=0 WORLD_SIZE=2 MASTER_PORT=... python -m tests.rank DIR

The second process may read no file of a row and ask for none, may hold no whole weights, has less memory than the
first, and may not wait for it in a collective while it works alone. DIR/rank<i>.json says what was seen.
"""

import os
import shutil
import sys
import time
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import eval.forward
import finetune.start
import finetune.state
import finetune.train
from configs.schema import load
from finetune.sweep import train_together
from soups.files.atomic import read_json, write_json
from store.processes import end_processes, start_processes
from store.workers import use_threads

RANK = int(os.environ.get("RANK", "0"))
ROW = ["sweep.rows=1", "~sweep.draw.optim.epochs", "~sweep.draw.optim.lr", "~sweep.draw.optim.mixup"]
ROW += ["optim.lr=1e-4", "tracking.every=1", "optim.steps=6", "optim.evaluate_every=3", "optim.keep=best"]
ROW += ["regularizer.ema=[0.9]", "compute.save_every=2", "compute.eval_batch=null", "task.classes=10"]
FITS = {0: 64, 1: 16}  # examples in the memory of each process
AGREED = 8  # of them at once, half of the smaller, as room for what else is there
COLLECTIVES = ("all_reduce", "broadcast", "broadcast_object_list", "barrier", "gather", "scatter", "gather_object")
WORKS = (  # that the first process does alone
    (finetune.start, "pretrained_network"),
    (finetune.train, "save_trained"),
    (finetune.state, "_write"),
)


class StoppedError(Exception):
    """As if the process had been killed."""


class Largest(TorchDispatchMode):
    """How many numbers the largest floating-point tensor has that is made or used while the block lasts."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does to its local part comes here too
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((out, args)):
            # Neither sharded ones, which say they are whole, nor those without memory, by which DTensor knows shapes.
            real = type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_meta
            if real and tensor.is_floating_point():
                Largest.numbers = max(Largest.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


def counted(module, name):
    """Count what a function of a module holds."""
    function = getattr(module, name)

    @wraps(function)
    def wrapped(*args, **kwargs):
        with Largest():
            return function(*args, **kwargs)

    setattr(module, name, wrapped)


def noted(name, folder):
    """Write down which collective this process enters: one of the group that has patience, or of the other."""
    function = getattr(dist, name)

    @wraps(function)
    def wrapped(*args, **kwargs):
        (folder / "waits").write_text("patient" if kwargs.get("group") is not None else name)
        return function(*args, **kwargs)

    setattr(dist, name, wrapped)


def alone(module, name, folder, waited):
    """Let a work of the first process last until the second one waits for it, and note how."""
    function = getattr(module, name)

    @wraps(function)
    def wrapped(*args, **kwargs):
        deadline, how = time.monotonic() + 20, ""
        while how != "patient" and time.monotonic() < deadline:
            time.sleep(0.01)
            how = (folder / "waits").read_text() if (folder / "waits").exists() else ""
        waited[name] = how
        return function(*args, **kwargs)

    setattr(module, name, wrapped)


def forbidden(*args, **kwargs):
    raise AssertionError("this must not happen here")


def searched(evaluate, example, device):
    """The search on a GPU whose memory holds FITS[RANK] examples."""

    def attempt(examples):
        if examples > FITS[RANK]:
            raise torch.OutOfMemoryError
        evaluate(example.repeat(examples, *[1] * (example.ndim - 1)))

    return eval.forward.largest_that_fits(attempt)


def stop(*args, **kwargs):
    raise StoppedError


def stopped_when_saved():
    """Let a training stop when its first state is on disk."""
    save = finetune.state.State.save
    return patch.object(finetune.state.State, "save", lambda *state: (save(*state), stop()))


def sweep(runs, processes):
    """What ended the training of all rows in a folder, empty where nothing did."""
    network = read_json(runs.parent / "network.json")
    config = load("demo_tiny", *ROW, *network, f"paths.runs={runs}", "compute.strategy=fsdp")
    try:
        train_together(config, processes, Console(quiet=True))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def saved_again(file):
    """Let a state that was loaded be written to another file at once."""
    load_state = finetune.state.State.load

    def both(state, path):
        load_state(state, path)
        state.save(file)

    return patch.object(finetune.state.State, "load", both)


def main(folder):
    use_threads(1)
    waited, seen = {}, {}
    eval.forward.found_batch_size = searched
    counted(finetune.train, "wrap")
    counted(finetune.train, "gathered")
    counted(finetune.state.State, "load")
    counted(finetune.state.State, "save")
    if RANK == 1:
        for name in COLLECTIVES:
            noted(name, folder)
        finetune.start.finished = finetune.train.finished = forbidden
        finetune.train.load_weights = finetune.start.load_weights = finetune.start.pretrained_network = forbidden
        torch.load = finetune.state._read_into = eval.forward.load_weights = forbidden
    else:
        for module, name in WORKS:
            alone(module, name, folder, waited)
    processes = start_processes()

    # All rows from nothing, until the first state is written; then until row 1 is trained; then it is only scored.
    with stopped_when_saved():
        seen["first"] = sweep(folder / "two", processes)
    if processes.is_main:
        shutil.copytree(folder / "two", folder / "begun")
    score = finetune.start.score
    with patch.object(finetune.start, "score", lambda *a: score(*a) if a[2]["row"] != 1 else stop()):
        seen["second"] = sweep(folder / "two", processes)
    seen["unscored"] = sorted(path.name for path in (folder / "two/demo_tiny/ingredients/001").iterdir())
    with patch.object(finetune.train, "fine_tune", forbidden):
        seen["third"] = sweep(folder / "two", processes)
    # A state that one process wrote, and one that is damaged.
    with saved_again(folder / "again.pt"):
        seen["from one"] = sweep(folder / "one", processes)
    seen["damaged"] = sweep(folder / "damaged", processes)
    write_json(folder / f"rank{RANK}.json", seen | {"waited": waited, "largest": Largest.numbers})
    end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
