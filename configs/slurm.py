"""What a run knows of the SLURM job that it is, how it ends early and is requeued; and what SLURM says of jobs."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from configs.errors import InterruptedBySignalError, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM sends one before it takes a job away, the other if asked
POLL_SECONDS = 5  # between two checks for a file that another task of the array writes
ASK_SECONDS = 30  # between two questions to SLURM, which all tasks ask
UNKNOWN_SECONDS = 1800  # that a task is waited for that is not in the queue, e.g. since what it made is seen late
CLIENT_SECONDS = 60  # for an answer of squeue, sacct or scontrol
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED"}
RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"}
OVER = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"}  # ends that nobody requeues
FIRST_INDEX = "MODEL_SOUPS_FIRST"  # variable of a job: what its array's index 0 stands for


@dataclass(frozen=True)
class RunningJob:
    """The job that this process belongs to."""

    job: str  # its id for scontrol: 17, or 12_3, the task 3 of the array 12
    restarts: int  # how often it was requeued, by whomever
    nodes: str  # SLURM's list of them, e.g. node[1-2]


def this_job(environment: Mapping[str, str] = os.environ) -> RunningJob | None:
    """The SLURM job of this process, or None outside of one.

    >>> this_job({"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"})
    RunningJob(job='12_3', restarts=0, nodes='')
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    name = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in environment:
        name = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    restarts = int(environment.get("SLURM_RESTART_COUNT", "0"))
    return RunningJob(name, restarts, environment.get("SLURM_JOB_NODELIST", ""))


def _interrupt(signum: int, frame: object) -> None:
    raise InterruptedBySignalError(signum)


@contextmanager
def requeueing(limit: int) -> Iterator[None]:
    """In a SLURM job, let SIGTERM and SIGUSR1 end the block by an exception; after SIGUSR1 the job is requeued.

    SIGTERM is SLURM's own: it requeues what it preempts, and does not want back what was cancelled. Outside of SLURM
    signals stay what they are.

    Raises:
        InterruptedBySignalError: a signal came; all that was done is on disk.
        UserError: the job was restarted as often as `limit`, or SLURM does not take it back.
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


def _requeue(job: RunningJob, limit: int) -> None:
    if job.restarts >= limit:
        raise UserError(
            f"job {job.job} has saved its state, but was restarted {job.restarts} times, "
            f"which is the limit of cluster.restarts={limit}: send it again to continue"
        )
    try:
        subprocess.run(["scontrol", "requeue", job.job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        answer = getattr(error, "stderr", None) or str(error)
        raise UserError(
            f"job {job.job} has saved its state, but cannot go back into the queue ({answer.strip()}): "
            "send it again to continue"
        ) from None
    print(f"job {job.job} is back in the queue, restart {job.restarts + 1} of at most {limit}", flush=True)


def wait_in_array(is_there: Callable[[], bool], task: int, what: str) -> None:
    """In a job array, wait for what another task makes, until `is_there`; elsewhere go on at once.

    SLURM forgets a task some minutes after its end (MinJobAge) and may keep no accounts, so a task that is not in the
    queue is waited for no longer than UNKNOWN_SECONDS. Tasks are counted over all arrays that a long one is cut into.

    Raises:
        UserError: that task has ended without it, or SLURM has known no such task for UNKNOWN_SECONDS.
    """
    if "SLURM_ARRAY_TASK_ID" not in os.environ or is_there():
        return
    other = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{task - int(os.environ.get(FIRST_INDEX, '0'))}"
    print(f"waiting for {what}, which task {other} makes", flush=True)
    asked, last_seen = -float(ASK_SECONDS), time.monotonic()
    while not is_there():
        if time.monotonic() - asked >= ASK_SECONDS:
            asked = time.monotonic()
            state: State | None = None
            with suppress(UserError):  # SLURM may answer the next time
                state = states_of({other: [other]}).get(other)
            if state and state.word in WAITING | RUNNING:
                last_seen = asked
            elif state and state.word in OVER and not is_there():
                raise UserError(f"{what} is not there, and task {other} has ended ({state.word}): look into its output")
            elif asked - last_seen >= UNKNOWN_SECONDS and not is_there():
                known = f"SLURM says {state.word}" if state else "neither squeue nor sacct knows it"
                raise UserError(
                    f"{what} is not there after {UNKNOWN_SECONDS / 60:.0f} minutes, and task {other}, which would make "
                    f"it, is not in the queue ({known}): make {what} first, e.g. by reproduce.py with submit=true"
                )
        time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class State:
    """The state of a job or of one task of an array."""

    word: str  # as SLURM has it: RUNNING, FAILED, ...
    reason: str

    @property
    def is_waiting(self) -> bool:
        """Whether it will run."""
        return self.word in WAITING and self.reason != "DependencyNeverSatisfied"

    @property
    def is_running(self) -> bool:
        """Whether it runs."""
        return self.word in RUNNING


def answer_of(call: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a client of SLURM prints; a `UserError` where it is not installed, does not answer or refuses."""
    client, sends = call[0], call[0] == "sbatch"
    try:
        seconds = None if sends else CLIENT_SECONDS  # what was sent must be known
        ended = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=seconds)
    except FileNotFoundError:
        raise UserError(
            f"{client} is not installed here: run this on a login node of the cluster, or choose cluster=local"
            + ("; without submit=true it only prints" if sends else "")
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{client} does not answer within {CLIENT_SECONDS} s") from None
    if ended.returncode != 0:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason given"]
        refused = f"sbatch refused ({lines[-1]}): {shlex.join(call)}"
        raise UserError(refused if sends else f"{client} failed: {lines[0]}")
    return ended.stdout


def states_of(parts: Mapping[str, Sequence[str]]) -> dict[str, State]:
    """By id, as in 12_3, what SLURM says of jobs: the queue, and of what that has forgotten the accounts.

    Each is asked once, for all jobs, which are given with the ids of their arrays' tasks, or their own. What neither
    knows is not there.
    """
    if not parts:
        return {}
    call = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={','.join(parts)}"]
    try:
        lines = answer_of(call).splitlines()
    except UserError as error:
        if "Invalid job id" not in str(error):  # said where one id is asked for, and forgotten
            raise
        lines = []
    found = {name: State(word, reason) for name, word, reason in (line.strip().split("|", 2) for line in lines)}
    forgotten = [job for job, names in parts.items() if not found.keys() >= set(names)]
    ended = accounted(forgotten) if forgotten else {}
    # What the accounts call running or waiting, and the queue does not know, has ended unseen.
    return {name: state for name, state in ended.items() if state.word not in WAITING | RUNNING} | found


def accounted(jobs: Sequence[str]) -> dict[str, State]:
    """By id, as in 12_3: what SLURM's accounts say of jobs; nothing where these do not answer.

    The reason there is what a job last waited for, which says why it was cancelled, and nothing of how it ran.
    """
    call = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State,Reason"]
    found: dict[str, State] = {}
    with suppress(UserError):
        for line in answer_of([*call, f"--jobs={','.join(jobs)}"]).splitlines():
            name, states, reason = line.split("|", 2)
            word = states.split()[0] if states.strip() else "UNKNOWN"  # the first word of: CANCELLED by 1000
            found |= dict.fromkeys(_tasks(name), State(word, reason if word == "CANCELLED" else "None"))
    return found


def _tasks(name: str) -> list[str]:
    """The ids of a job, or of the tasks of an array that never started, which have one line in the accounts.

    >>> _tasks("12_3"), _tasks("12_[0-2,5%4]")
    (['12_3'], ['12_0', '12_1', '12_2', '12_5'])
    """
    job, is_array, indices = name.partition("_[")
    if not is_array:
        return [name]
    ranges = (part.split("-") for part in indices.rstrip("]").partition("%")[0].split(","))
    return [f"{job}_{task}" for ends in ranges for task in range(int(ends[0]), int(ends[-1]) + 1)]
