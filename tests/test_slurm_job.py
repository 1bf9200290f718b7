"""A process in a SLURM job: signals that ask for its end, and shares of the work; tests/cluster has real jobs."""

import os
import signal
import time

import pytest

from configs.errors import InterruptedBySignalError, UserError
from configs.schema import load
from configs.slurm import requeueing, wait_in_array
from eval.pool import model_folders
from soups.cook import own_recipes
from store.atomic import write_json


@pytest.fixture
def job(monkeypatch):
    """The environment of a task that was restarted three times; signals are again what they were afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for name, value in {"JOB_ID": "15", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    yield "12_3"
    for number, handler in before.items():
        signal.signal(number, handler)


def asked_to_end(number, limit):
    with requeueing(limit):
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_a_job_at_its_limit_of_restarts_is_not_requeued_and_says_so(job):
    with pytest.raises(UserError, match=f"job {job} has saved its state, but was restarted 3 times"):
        asked_to_end(signal.SIGUSR1, limit=3)


def test_a_job_that_slurm_does_not_take_back_says_so(job, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no scontrol
    with pytest.raises(UserError, match=f"job {job} has saved its state, but cannot go back into the queue"):
        asked_to_end(signal.SIGUSR1, limit=4)


def test_a_job_that_slurm_ends_does_not_requeue_itself(job):
    with pytest.raises(InterruptedBySignalError):
        asked_to_end(signal.SIGTERM, limit=0)


def test_outside_of_slurm_nobody_waits_and_signals_stay_what_they_are(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with requeueing(20):
        wait_in_array(lambda: False, 0, "row 0")
        assert signal.getsignal(signal.SIGUSR1) is before


def test_tasks_share_the_recipes_and_an_interpolation_goes_with_its_soup():
    words = ["recipes=[best,greedy,learned,wise_ft]", "cooking.of=greedy", "share.of=3"]
    shares = [own_recipes(load("demo_tiny", *words, f"share.index={index}")) for index in range(3)]
    assert shares == [("best",), ("greedy", "wise_ft"), ("learned",)]
    assert own_recipes(load("demo_tiny", *words, "recipe=uniform")) == ("uniform",)


def test_tasks_share_the_models_so_that_a_missing_one_moves_no_other(tmp_path):
    for row in (0, 1, 3):  # row 2 is not trained
        write_json(tmp_path / f"demo_tiny/ingredients/{row:03d}/done.json", {"digest": str(row)})
    words = [f"paths.runs={tmp_path}", "sweep.rows=3", "share.of=2"]
    shares = [model_folders(load("demo_tiny", *words, f"share.index={index}")) for index in range(2)]
    assert [[folder.name for folder in share] for share in shares] == [["000"], ["001", "003"]]


def test_a_share_past_the_last_is_refused():
    with pytest.raises(UserError, match="index=3 is past the last of 2 shares"):
        load("demo_tiny", "share.index=3", "share.of=2")
