"""Two processes that live long and train one row after another, for tests; torchrun for each would take minutes.

    RANK=0 WORLD_SIZE=2 python -m tests.pair FOLDER [float64]      (see `start_pair`)

FOLDER/jobs.jsonl is read as it grows, up to an empty line. FOLDER/<name>/rank<i>.json says how a job ended there.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import open_clip
import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_pre_hook

import finetune.train
import models.hub
from configs.schema import CONFIGS, Experiment, checked, dump
from finetune.train import fine_tune
from models.classifier import Classifier
from soups.files.atomic import read_json, write_json
from store.processes import end_processes
from store.workers import use_threads
from tests.commands import python


@dataclass(frozen=True)
class Pair:
    """The processes, and the folder through which they get their jobs."""

    folder: Path
    processes: list

    def train(self, config, row=1, *, stop=None, kill=False, timeout=60, slow=0):
        """Train a row under the name of its runs' folder, and stop after some steps, whose state is on disk then.

        Args:
            config: of the experiment.
            row: which.
            stop: steps; None: to the end.
            kill: stop by SIGKILL, which ends the pair.
            timeout: seconds that one process waits for another in a sum of gradients.
            slow: seconds that each forward pass of evaluation takes.
        """
        job = {"name": config.paths.runs.name, "settings": dump(config), "row": row, "stop": stop, "kill": kill}
        with (self.folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps(job | {"timeout": timeout, "slow": slow}) + "\n")

    def outcomes(self, config):
        """How a job ended in each process: "ended", "stopped" or a traceback; waits for it."""
        files = [self.folder / config.paths.runs.name / f"rank{rank}.json" for rank in range(len(self.processes))]
        while not all(file.exists() for file in files):
            if all(process.poll() is not None for process in self.processes):
                return [f"exit status {process.returncode}" for process in self.processes]
            time.sleep(0.05)
        return [read_json(file)["outcome"] for file in files]


@contextmanager
def start_pair(folder, *words):
    """As many processes as there are GPUs, else two."""
    (folder / "jobs.jsonl").touch()
    (folder / "open_clip").mkdir()
    world = torch.cuda.device_count() or 2
    processes = []
    for rank in range(world):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        call = [python(), "-m", "tests.pair", str(folder), *words]
        processes.append(subprocess.Popen(call, cwd=CONFIGS.parent, env=os.environ | own))
    try:
        yield Pair(folder, processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def in_float64():
    """Weights, activations and reductions in float64, by another meaning of float; cached logits in float32."""

    def double(*model, **named):
        return network(*model, **named).double()

    before, network = (torch.get_default_dtype(), torch.Tensor.float), models.hub.load_network
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float, models.hub.load_network = torch.Tensor.double, double
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.Tensor.float, models.hub.load_network = before[1], network


class StoppedError(Exception):
    """The job's steps are done, and its state is on disk."""


def stop_after(job, step):
    """End the job, or this process, when its steps are done."""
    if step == job["stop"] and job["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == job["stop"]:
        raise StoppedError


def train(job, place):
    """Train a row in a group of processes of its own, as `python -m finetune` does under torchrun."""
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(kind, f"file://{place / 'meeting'}", timedelta(seconds=job["timeout"]), world, rank)
    finetune.train.fine_tune = partial(fine_tune, after_step=partial(stop_after, job))
    slowed = register_module_forward_pre_hook(partial(wait_in_evaluation, job["slow"]))
    try:
        finetune.train.train_row(checked(Experiment, job["settings"]), job["row"])
    finally:
        slowed.remove()
    end_processes()


def wait_in_evaluation(seconds, module, inputs):
    """A network is as slow as a large one, whose scoring takes longer than processes wait for each other."""
    if isinstance(module, Classifier) and not module.training:
        time.sleep(seconds)


def jobs(path):
    """The lines of a file that another process still writes."""
    with path.open() as file:
        while (line := file.readline()) != "\n":
            if line:
                yield json.loads(line)
            else:
                time.sleep(0.05)


def main(folder):
    """Do the jobs of a folder."""
    use_threads(1)
    for job in jobs(folder / "jobs.jsonl"):
        open_clip.add_model_config(folder / "open_clip")  # networks that it knows from here on, if there are any
        place, outcome = folder / job["name"], "ended"
        try:
            train(job, place)
        except StoppedError:
            outcome = "stopped"
        except Exception:
            outcome = traceback.format_exc()
        finally:
            if dist.is_initialized():  # so that the other process does not wait for this one
                dist.destroy_process_group()
        write_json(place / f"rank{os.environ['RANK']}.json", {"outcome": outcome})


if __name__ == "__main__":
    if "float64" in sys.argv[2:]:
        with in_float64():
            main(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]))
