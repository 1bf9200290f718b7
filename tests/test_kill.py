"""Real processes, killed at any moment or asked to end, lead to the files of an undisturbed run, to the byte."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from configs.schema import CONFIGS, load
from finetune.start import initialise
from finetune.train import train_row
from soups.chance import uniform
from soups.files.atomic import read_jsonl
from tests.commands import python
from tests.pools import small_network

pytestmark = pytest.mark.slow
ROOT = CONFIGS.parent
KILLS = 6
EPOCHS = 18
SETTINGS = ["sweep.rows=1", "~sweep.draw.optim.epochs", f"optim.epochs={EPOCHS}", "model.head=random"]
SETTINGS += ["regularizer.ema=[0.9]", "augment=emoji_medium", "~sweep.draw.augment"]
SETTINGS += ["task.classes=10", "optim.batch_size=8"]  # short steps
FILES = ("weights.safetensors", "ema_0.9.safetensors", "metrics.jsonl")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return [*SETTINGS, *small_network(tmp_path_factory.mktemp("network"))]


def start(settings, runs, *more):
    """In a session of its own, so that a signal can be sent to all of its processes; saved after every step."""
    own = [*settings, *more, "compute.save_every=1", f"paths.runs={runs}", "sweep.index=1"]
    call = [python(), "-m", "finetune", "experiment=demo_tiny", *own]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(call, cwd=ROOT, start_new_session=True, **pipes)


def finish(settings, runs):
    train_row(load("demo_tiny", *settings, f"paths.runs={runs}"), 1)  # which saves at the end of an epoch only


def folder(runs, row=1):
    return runs / "demo_tiny/ingredients" / f"{row:03d}"


def contents(runs):
    done = json.loads((folder(runs) / "done.json").read_text())
    facts = {key: value for key, value in done.items() if key not in ("seconds", "provenance")}
    return [(folder(runs) / name).read_bytes() for name in FILES], facts


@pytest.fixture(scope="module")
def undisturbed(settings, tmp_path_factory):
    torch.set_num_threads(1)
    runs = tmp_path_factory.mktemp("undisturbed")
    initialise(load("demo_tiny", *settings, f"paths.runs={runs}"))
    finish(settings, runs)
    return runs


def wait_for_state(runs, process):
    while process.poll() is None and not (folder(runs) / "state.pt").exists():
        time.sleep(0.01)


def test_kills_at_random_moments_change_no_byte(settings, undisturbed, tmp_path):
    shutil.copytree(folder(undisturbed, 0), folder(tmp_path, 0))
    killed, began, to_train = 0, time.monotonic(), 0.0
    for attempt in range(KILLS):
        process = start(settings, tmp_path)
        wait_for_state(tmp_path, process)
        to_train = to_train or time.monotonic() - began  # what a start takes up to the first step
        time.sleep(2 * to_train * (attempt + uniform("kill", attempt)) / KILLS)  # half of them while it starts
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (folder(tmp_path) / "done.json").exists():
            break
    assert killed > 2
    finish(settings, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)
    assert not list(folder(tmp_path).glob(".*.tmp*"))


def test_a_signal_to_all_processes_of_a_run_saves_its_state_once_and_the_next_one_goes_on(
    settings, undisturbed, tmp_path
):
    shutil.copytree(folder(undisturbed, 0), folder(tmp_path, 0))
    process = start(settings, tmp_path, "compute.loader_workers=2")
    wait_for_state(tmp_path, process)
    os.killpg(process.pid, signal.SIGTERM)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert printed.count("interrupted by a signal, and saved: run the same command again to continue") == 1
    assert not (folder(tmp_path) / "done.json").exists()
    assert len(read_jsonl(folder(tmp_path) / "metrics.jsonl")) < EPOCHS
    finish(settings, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)
