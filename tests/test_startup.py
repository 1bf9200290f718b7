"""What is imported before there is work to do: --help, mistyped settings and login nodes would wait for it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.schema import CONFIGS

NETWORKS = {"timm", "open_clip", "transformers"}
STAGES = {f"{stage}.__main__": {"torch", *NETWORKS} for stage in ("finetune", "eval", "soups", "analysis")}
NO_NETWORK = ("slurm.status", "slurm.plan", "analysis.commands", "soups.experiment.soups", "reproduce")
# One process imports all of them in this order, so that what a module may bring in comes after those that may not.
SPARED = STAGES | dict.fromkeys(NO_NETWORK, NETWORKS)
SPARED |= {"finetune.data": {"open_clip", "transformers"}}  # augments images
SPARED |= {"models.classifier": {"transformers.modeling_utils", "sklearn"}}  # of images, and no language models
IMPORTING = """
import importlib, json, sys
for module, names in json.loads(sys.argv[1]).items():
    importlib.import_module(module)
    print(json.dumps([module, sorted(sys.modules.keys() & set(names))]))
"""


@pytest.fixture(scope="module")
def imported():
    """Module -> those of the packages that it is to do without which are imported after it."""
    asked = json.dumps({module: sorted(names) for module, names in SPARED.items()})
    words = [sys.executable, "-c", IMPORTING, asked]
    answer = subprocess.run(words, cwd=CONFIGS.parent, capture_output=True, text=True, check=True)
    return dict(map(json.loads, answer.stdout.splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("module", SPARED)
def test_a_module_does_without_the_libraries_that_its_work_does_not_need_yet(module, imported):
    assert imported[module] == []


LOADERS = """
import os, sys
from configs.schema import load
from finetune.data import TrainingBatches
from finetune.length import Length
from store.processes import single_process
from tasks.prefetch import prefetch
from tasks.load import load_split

def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]

def own(pid):
    lines = [line.split() for line in open(f"/proc/{pid}/smaps_rollup")]
    return sum(int(line[1]) for line in lines if line[0].startswith("Private_")) / 1024

if __name__ == "__main__":
    config = load("demo_tiny", f"paths.runs={sys.argv[1]}")
    images = load_split(config.task, "train")
    batches = TrainingBatches(images.stored, config, Length(len(images), 8, 4, 40), 1, single_process())
    made = prefetch(batches.__getitem__, range(40), 2)
    next(made), next(made), next(made)
    workers = [worker for server in children(os.getpid()) for worker in children(server)]
    print(*workers, *map(own, workers), flush=True)
    os.kill(os.getpid(), 9)
"""


def is_running(process):
    """Whether it still does anything; one that has ended may be listed until init notices."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_loader_process_takes_little_memory_of_its_own_and_ends_with_the_one_it_works_for(tmp_path):
    (tmp_path / "loaders.py").write_text(LOADERS)
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    command = [sys.executable, tmp_path / "loaders.py", tmp_path / "runs"]
    with (tmp_path / "printed").open("w") as printed:  # no pipe, which a worker that stays would keep open
        subprocess.run(command, env=environment, cwd=CONFIGS.parent, stdout=printed, check=False)
    first, second, *megabytes = (tmp_path / "printed").read_text().split()
    assert len(megabytes) == 2
    assert max(map(float, megabytes)) < 250
    deadline = time.monotonic() + 20
    while any(map(is_running, (first, second))):
        assert time.monotonic() < deadline, "a loader process outlives the training"
        time.sleep(0.1)
