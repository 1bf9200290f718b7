"""What a run knows of the SLURM job that it is: its name, how it ends early, how it goes back into the queue."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from configs.errors import InterruptedBySignalError, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends before it takes a job away, and what it can be told to
POLL_SECONDS = 5  # between two looks for a file that another task of the array writes
ASK_SECONDS = 30  # between two questions to SLURM, which all tasks ask
OVER = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}  # ends that nobody requeues


@dataclass(frozen=True)
class Job:
    """The job that this process belongs to."""

    job: str  # as scontrol calls it: 17, or 12_3, the task 3 of the array 12
    restarts: int  # how often it was requeued, by whomever
    nodes: str  # as SLURM lists them, e.g. node[1-2]


def this_job(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The SLURM job of this process, or None outside of one.

    >>> this_job({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"})
    Job(job='12_3', restarts=0, nodes='')
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    name = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        name = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return Job(name, restarts, environment.get("SLURM_JOB_NODELIST", ""))


def _interrupt(signum: int, frame: object) -> None:
    raise InterruptedBySignalError(signum)


@contextmanager
def requeueing(limit: int) -> Iterator[None]:
    """In a SLURM job, let SIGTERM and SIGUSR1 end the block by an exception; after SIGUSR1 the job is requeued.

    SIGTERM is SLURM's own: it requeues what it preempts, and does not want back what was cancelled. Outside of SLURM
    signals stay what they are.

    Args:
        limit: a job that was restarted as often is not requeued again.

    Raises:
        InterruptedBySignalError: a signal came; all that was done is on disk.
        UserError: the limit is reached, or SLURM does not take the job back.
    """
    job = this_job()
    if job is None:
        yield
        return
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    try:
        yield
    except InterruptedBySignalError as error:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # SLURM repeats itself while a job ends
        if error.signum == signal.SIGUSR1 and os.environ.get("RANK", "0") == "0":
            _requeue(job, limit)
        raise


def _requeue(job: Job, limit: int) -> None:
    if job.restarts >= limit:
        raise UserError(
            f"job {job.job} has saved its state, but was restarted {job.restarts} times, "
            f"which is the limit of cluster.restarts={limit}: send it again to continue"
        )
    try:
        subprocess.run(["scontrol", "requeue", job.job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"job {job.job} has saved its state, but cannot go back into the queue ({said.strip()}): "
            "send it again to continue"
        ) from None
    print(f"job {job.job} is back in the queue, restart {job.restarts + 1} of at most {limit}", flush=True)


def wait_in_array(is_there: Callable[[], bool], task: int, what: str) -> None:
    """In a job array, wait for what another task makes; elsewhere, and where it is there, go on at once.

    Args:
        is_there: looks for it.
        task: of this array, which makes it.
        what: in a word or two, for the line that is printed.

    Raises:
        UserError: that task has ended without it.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ or is_there():
        return
    other = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task}"
    print(f"waiting for {what}, which task {other} makes", flush=True)
    asked = -float(ASK_SECONDS)
    while not is_there():
        if time.monotonic() - asked >= ASK_SECONDS:
            asked = time.monotonic()
            state = _state(other)
            if state in OVER and not is_there():
                raise UserError(f"{what} is not there, and task {other} has ended ({state}): look into its output")
        time.sleep(POLL_SECONDS)


def _state(job: str) -> str | None:
    """What SLURM says of a job; None where it says nothing, since the job is not known or SLURM is busy."""
    call = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        words = subprocess.run(call, capture_output=True, text=True, check=False).stdout.split()
    except OSError:
        return None
    return words[0] if words else None
