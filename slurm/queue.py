"""What SLURM says of jobs that were sent, by its own clients; and the record of what was sent."""

import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import Experiment
from slurm.jobs import Job, environment_of, sbatch_words, shown
from store.atomic import read_jsonl, write_jsonl
from store.runs import RunFolder, sole_writer

WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED"}
RUNNING = {"RUNNING", "CONFIGURING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED", "RESIZING"}


@dataclass(frozen=True)
class Sent:
    """A call of sbatch that was answered."""

    job: str  # id
    name: str  # of the experiment
    stage: str
    tasks: tuple[int, ...]  # of its array
    of: int
    time: float  # seconds since 1970
    command: str

    @property
    def ids(self) -> dict[str, int | None]:
        """What SLURM calls its parts -> the index in the array; without one, itself."""
        return {f"{self.job}_{task}": task for task in self.tasks} or {self.job: None}


@dataclass(frozen=True)
class State:
    """Of a job or of one task of an array."""

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


def record_of(config: Experiment) -> Path:
    """Where the calls of an experiment are kept."""
    return RunFolder.of(config).root / "slurm" / "sent.jsonl"


def sent_jobs(config: Experiment) -> list[Sent]:
    """What was sent so far, oldest first."""
    path = record_of(config)
    return [Sent(**row | {"tasks": tuple(row["tasks"])}) for row in read_jsonl(path)] if path.exists() else []


def _asked(words: Sequence[str]) -> str:
    """What a client of SLURM prints.

    Raises:
        UserError: it is not installed here, or SLURM does not answer.
    """
    try:
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not installed here: run this on a login node of the cluster, or choose cluster=local"
        ) from None
    if ended.returncode != 0:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"{words[0]} failed: {said[0]}")
    return ended.stdout


def states_of(sent: Sequence[Sent]) -> dict[str, State]:
    """By id, as in 12_3, what SLURM says of jobs; what it has forgotten is not there.

    Raises:
        UserError: as `_asked`, but for ids that SLURM no longer knows.
    """
    found: dict[str, State] = {}
    for each in sent:
        words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r", f"--jobs={each.job}"]
        try:
            lines = _asked(words).splitlines()
        except UserError as error:
            if "Invalid job id" not in str(error):
                raise
            continue
        for line in lines:
            name, word, reason = (part.strip() for part in line.split("|", 2))
            found[name] = State(word, reason)
    return found


def active(sent: Sequence[Sent], states: dict[str, State]) -> dict[tuple[str, str, int | None], str]:
    """(experiment, stage, index) of what waits or runs -> its id."""
    found = {}
    for each in sent:
        for name, task in each.ids.items():
            if name in states and (states[name].is_waiting or states[name].is_running):
                found[each.name, each.stage, task] = name
    return found


def send(config: Experiment, jobs: Sequence[Job]) -> list[Sent]:
    """Send jobs in their order, without the tasks that are in the queue already, and record each answer at once.

    Args:
        config: of the experiment.
        jobs: from `slurm.jobs.jobs_of`.

    Raises:
        UserError: sbatch is not here or refuses; jobs sent before it stay sent, and are recorded.
    """
    root = RunFolder.of(config).root / "slurm"
    new: list[Sent] = []
    with sole_writer(root):
        (root / "logs").mkdir(exist_ok=True)
        before = sent_jobs(config)
        queued = active(before, states_of(before))
        for job in jobs:
            tasks = tuple(task for task in job.tasks if (job.name, job.stage, task) not in queued)
            if job.tasks and not tasks:
                continue
            if not job.tasks and (job.name, job.stage, None) in queued:
                continue
            own = Job(**{**vars(job), "tasks": tasks})
            after = [each.job for each in new if each.stage in job.after and _follows(job, each.name)]
            after += [name for (whose, stage, _), name in queued.items() if stage in job.after and _follows(job, whose)]
            words = sbatch_words(config, own, after)
            answer = _sbatch(words, environment_of(config))
            new.append(Sent(answer, job.name, job.stage, tasks, job.of, round(time.time(), 3), shown(words)))
            write_jsonl(record_of(config), [_as_row(each) for each in [*before, *new]])
    return new


def _follows(job: Job, name: str) -> bool:
    """Whether a job waits for those of an experiment: its own, or of all replicates where it is of the whole."""
    return name == job.name or name.startswith(f"{job.name}/")


def _as_row(sent: Sent) -> dict[str, Any]:
    return asdict(sent) | {"tasks": list(sent.tasks)}


def _sbatch(words: Sequence[str], environment: dict[str, str]) -> str:
    try:
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            "sbatch is not installed here: run this on a login node of the cluster; without submit=true it only prints"
        ) from None
    if ended.returncode != 0:
        said = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason given"]
        raise UserError(f"sbatch refused ({said[-1]}): {shown(words)}")
    return ended.stdout.strip().partition(";")[0]
