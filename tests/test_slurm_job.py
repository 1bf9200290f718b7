"""A process in a SLURM job: signals that ask for its end, and shares of the work; tests/cluster has real jobs."""

import os
import signal
import time

import pytest

from configs.cli import parts_of
from configs.errors import InterruptedBySignalError, UserError
from configs.schema import load
from configs.slurm import requeueing, wait_in_array
from eval.pool import model_folders
from soups.experiment.soups import job_recipes
from tests.pools import record


@pytest.fixture
def job(monkeypatch):
    """The environment of a task that was restarted three times; signals are again what they were afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    for name, value in {"JOB_ID": "15", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize(
    ("number", "limit", "message"),
    [
        (signal.SIGUSR1, 3, "job 12_3 has saved its state, but was restarted 3 times"),
        (signal.SIGUSR1, 4, "job 12_3 has saved its state, but cannot go back into the queue"),  # without scontrol
        (signal.SIGTERM, 0, ""),  # a job that SLURM ends does not requeue itself
    ],
)
def test_a_job_that_is_asked_to_end_is_requeued_or_says_why_not(monkeypatch, tmp_path, number, limit, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError if message else InterruptedBySignalError, match=message or None), requeueing(limit):
        os.kill(os.getpid(), number)
        time.sleep(5)


def test_outside_of_slurm_nobody_waits_and_signals_stay_what_they_are(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with requeueing(20):
        wait_in_array(lambda: False, 0, "row 0")
        assert signal.getsignal(signal.SIGUSR1) is before


def client(folder, name, says, status=0):
    """A client of SLURM that prints something and notes that it was called."""
    file = folder / name
    file.write_text(f"#!/bin/sh\necho \"$@\" >> {folder}/{name}.calls\nprintf '{says}'\nexit {status}\n")
    file.chmod(0o755)


@pytest.fixture
def waiting(job, monkeypatch, tmp_path):
    """A task whose clients of SLURM are those of a test, asked without a pause."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("POLL_SECONDS", "ASK_SECONDS"):
        monkeypatch.setattr(f"configs.slurm.{name}", 0.01)
    monkeypatch.setattr("configs.slurm.UNKNOWN_SECONDS", 0.2)
    client(tmp_path, "squeue", "slurm_load_jobs error: Invalid job id specified", status=1)
    return tmp_path


def test_a_task_that_the_queue_has_forgotten_is_looked_up_in_the_accounts(waiting):
    client(waiting, "sacct", "12_0|CANCELLED by 1000|None\\n")
    with pytest.raises(UserError, match=r"row 0 is not there, and task 12_0 has ended \(CANCELLED\)"):
        wait_in_array(lambda: False, 0, "row 0")


@pytest.mark.parametrize(
    ("accounts", "known"),
    [("", "neither squeue nor sacct knows it"), ("12_0|COMPLETED|None\\n", "SLURM says COMPLETED")],
)
@pytest.mark.parametrize("stale", ["", "12_7|RUNNING|None\\n"])
def test_a_task_of_which_nothing_is_known_is_not_waited_for_without_end(waiting, accounts, known, stale):
    client(waiting, "sacct", accounts + stale)
    with pytest.raises(UserError, match=f"task 12_0, which would make it, is not in the queue .{known}.: make row 0 "):
        wait_in_array(lambda: False, 0, "row 0")


def test_a_task_that_is_in_the_queue_is_waited_for_and_the_accounts_are_not_asked(waiting):
    client(waiting, "squeue", "12_0|PENDING|None\\n")
    client(waiting, "sacct", "")
    until = time.monotonic() + 0.5  # longer than what is unknown is waited for
    wait_in_array(lambda: time.monotonic() > until, 0, "row 0")
    assert not (waiting / "sacct.calls").exists()


def test_the_index_of_a_task_is_counted_from_where_its_array_begins(waiting, monkeypatch):
    monkeypatch.setenv("MODEL_SOUPS_FIRST", "1001")
    client(waiting, "squeue", "12_7|FAILED|None\\n")
    with pytest.raises(UserError, match="task 12_7 has ended"):
        wait_in_array(lambda: False, 1008, "row 1008")


def test_tasks_share_the_recipes_and_an_interpolation_goes_with_its_soup():
    words = ["recipes=[best,greedy,learned,wise_ft]", "cooking.of=greedy", "share.of=3"]
    shares = [job_recipes(load("demo_tiny", *words, f"share.index={index}")) for index in range(3)]
    assert shares == [("best",), ("greedy", "wise_ft"), ("learned",)]
    assert job_recipes(load("demo_tiny", *words, "recipe=uniform")) == ("uniform",)


def test_tasks_share_the_models_so_that_a_missing_one_moves_no_other(tmp_path):
    words = [f"paths.runs={tmp_path}", "sweep.rows=3", "share.of=2"]
    for row in (0, 1, 3):  # row 2 is not trained
        record(load("demo_tiny", *words), row, str(row))
    shares = [model_folders(load("demo_tiny", *words, f"share.index={index}")) for index in range(2)]
    assert [[folder.name for folder in share] for share in shares] == [["000"], ["001", "003"]]
    with pytest.raises(UserError, match="index=2 is past the last of 2 shares"):
        load("demo_tiny", *words, "share.index=2")


def test_an_experiment_made_of_others_takes_no_name_that_they_would_share():
    whole = load("table5", "name=mine")
    with pytest.raises(UserError, match=r"is made of 8 experiments, which keep their own names.*paths\.runs=runs/mine"):
        parts_of(whole, ["experiment=table5", "name=mine"])
    assert [part.name for part in parts_of(load("demo", "name=mine"), ["name=mine"])] == ["mine"]
