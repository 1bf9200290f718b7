"""Real processes, killed at any moment or asked to end, lead to the files of an undisturbed run, to the byte."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from configs.schema import CONFIGS
from soups.chance import uniform
from soups.files.atomic import read_jsonl
from tests.commands import python

ROOT = CONFIGS.parent
KILLS = 20
SETTINGS = ["experiment=demo_tiny", "sweep.rows=1", "~sweep.draw.optim.epochs", "optim.epochs=12"]
SETTINGS += ["regularizer.ema=[0.9]", "augment=emoji_medium", "~sweep.draw.augment"]
SETTINGS += ["task.classes=10", "optim.batch_size=8"]  # short steps
FILES = ("weights.safetensors", "ema_0.9.safetensors", "metrics.jsonl")


def start(runs, row, *settings, every=1):
    """In a session of its own, so that a signal can be sent to all of its processes; saved after so many steps."""
    own = [*settings, f"compute.save_every={every}", f"paths.runs={runs}", f"sweep.index={row}"]
    call = [python(), "-m", "finetune", *SETTINGS, *own]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(call, cwd=ROOT, start_new_session=True, **pipes)


def finish(runs, row):
    process = start(runs, row, every=0)  # which saves at the end of an epoch only
    said = process.communicate()[0]
    assert process.returncode == 0, said


def folder(runs, row=1):
    return runs / "demo_tiny/ingredients" / f"{row:03d}"


def contents(runs):
    done = json.loads((folder(runs) / "done.json").read_text())
    told = {key: value for key, value in done.items() if key not in ("seconds", "provenance")}
    return [(folder(runs) / name).read_bytes() for name in FILES], told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    runs = tmp_path_factory.mktemp("undisturbed")
    finish(runs, 0)
    finish(runs, 1)
    return runs


def wait_for_state(runs, process):
    while process.poll() is None and not (folder(runs) / "state.pt").exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(undisturbed, tmp_path):
    shutil.copytree(folder(undisturbed, 0), folder(tmp_path, 0))
    killed = 0
    for attempt in range(KILLS):
        process = start(tmp_path, 1)
        if attempt % 2:  # half of them while it starts or ends, half of them while it trains
            wait_for_state(tmp_path, process)
            time.sleep(0.6 * uniform("kill", attempt))
        else:
            time.sleep(5 * uniform("kill", attempt))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (folder(tmp_path) / "done.json").exists():
            break
    assert killed > 2
    finish(tmp_path, 1)
    assert contents(tmp_path) == contents(undisturbed)
    assert not list(folder(tmp_path).glob(".*.tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_ends_a_run_with_its_state_saved_and_the_next_one_goes_on(number, undisturbed, tmp_path):
    shutil.copytree(folder(undisturbed, 0), folder(tmp_path, 0))
    process = start(tmp_path, 1)
    wait_for_state(tmp_path, process)
    process.send_signal(number)
    said = process.communicate()[0]
    assert process.returncode == 128 + number, said
    assert "run the same command again to continue" in said
    assert not (folder(tmp_path) / "done.json").exists()
    assert len(read_jsonl(folder(tmp_path) / "metrics.jsonl")) < 12
    finish(tmp_path, 1)
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_a_signal_to_all_processes_of_a_run_leaves_it_its_loaders_until_it_has_saved(number, undisturbed, tmp_path):
    shutil.copytree(folder(undisturbed, 0), folder(tmp_path, 0))
    process = start(tmp_path, 1, "compute.loader_workers=2")
    wait_for_state(tmp_path, process)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    assert said.count("interrupted by a signal, and saved") == 1
