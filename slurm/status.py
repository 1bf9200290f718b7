"""How far an experiment is on a SLURM cluster:  python -m slurm.status experiment=table3_clip_b32 cluster=slurm_1gpu

For each stage how many jobs are done, run, wait and failed; for failures the reason and the last line that they
printed; the pace of rows, and when the last one will end. Where SLURM is not installed, what the files tell.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configs.cli import entry_point, parts_as_typed
from configs.errors import UserError
from configs.schema import Experiment, replicate
from configs.slurm import State
from slurm.jobs import ROWS, TRAINING, Job, jobs_of, left_rows, slurm_of
from slurm.plan import duration, table
from slurm.submit import Sent, active, sent_jobs, sent_states
from soups.files.atomic import read_jsonl
from store.runs import RunFolder, done_rows

UNKNOWN = State("ENDED", "SLURM has forgotten why")
BY_SLURM = ("srun:", "slurmstepd:")  # how lines of a job's output begin that SLURM wrote
ENDS = {  # what SLURM prints into a job's output when it ends one -> its word for it
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO PREEMPTION": "PREEMPTED",
    "oom_kill": "OUT_OF_MEMORY",
    "oom-kill": "OUT_OF_MEMORY",
    "CANCELLED AT": "CANCELLED",
}


@dataclass(frozen=True)
class Failure:
    """A job that was sent, is not in the queue, and has not done its work."""

    name: str  # of the experiment
    stage: str
    task: int | None
    job: str  # as SLURM calls it
    why: State
    last_line: str  # that it printed

    @property
    def line(self) -> str:
        """All of it in one line."""
        what = self.stage if self.task is None else f"{self.stage} {self.task}"
        reason = "" if self.why.reason in ("None", "") else f", {self.why.reason}"
        return f"{self.name}: {what} (job {self.job}): {self.why.word}{reason}: {self.last_line}"


def output_of(config: Experiment, job: str) -> tuple[str, State]:
    """The last line that a program printed in a job, as in 12_3, and why the job ended by what SLURM wrote there."""
    logs = sorted((RunFolder.of(config).root / "slurm" / "logs").glob(f"*-{job}.out"))
    lines = [line.strip() for log in logs for line in log.read_text(errors="replace").splitlines() if line.strip()]
    program = [line for line in lines if not line.startswith(BY_SLURM)]
    last = (program or lines or ["it printed nothing"])[-1]
    for line in reversed(lines):
        word = next((word for mark, word in ENDS.items() if mark in line), None)
        if word is not None and line.startswith(BY_SLURM):
            return last, State(word, "by its output")
    return last, UNKNOWN


def failures(config: Experiment, left: Sequence[Job], sent: Sequence[Sent], states: dict[str, State]) -> list[Failure]:
    """What of the jobs that are left was sent, and will not run by itself: the latest call of each counts.

    A job of models or recipes that ended well although something is left did what it could, and is no failure.
    """
    queued = active(sent, states)
    latest = {(each.name, each.stage, task): name for each in sent for name, task in each.ids.items()}
    found = []
    for job in left:
        for task in job.tasks or (None,):
            key = (job.name, job.stage, task)
            if key in queued or key not in latest:
                continue
            line, ended = output_of(config, latest[key])
            why = states.get(latest[key]) or ended
            if why.word != "COMPLETED" or job.stage in ROWS:
                found.append(Failure(job.name, job.stage, task, latest[key], why, line))
    return found


def pace(config: Experiment, running: int = 0) -> str:
    """How many rows are done, what one took, restarts included, and when the last will end, if that can be said."""
    left = len([row for row in left_rows(config) if row])
    seconds = [done["seconds"] for row, done in done_rows(config).items() if row]
    if not seconds:
        return f"{config.name}: no row is done yet, {left} are left"
    mean = sum(seconds) / len(seconds)
    line = f"{config.name}: {len(seconds)} rows done, {duration(mean / 3600)} each"
    if not left:
        return f"{line}, none left"
    at_once = running or slurm_of(config).max_parallel or left
    rate = 3600 * at_once / mean if mean else float("inf")
    rest = duration(mean * left / min(at_once, left) / 3600)
    return f"{line}; {rate:.1f} rows an hour with {at_once} at once, about {rest} for the {left} left"


def show(config: Experiment, typed: Sequence[str]) -> None:
    """Print the state of every stage."""
    left, sent = jobs_of(config, typed), sent_jobs(config)
    states: dict[str, State] = {}
    failed: list[Failure] = []
    try:
        states = sent_states(sent)
        failed = failures(config, left, sent, states)
    except UserError as error:
        print(f"SLURM says nothing ({error}); what follows is told by the files alone")
    queued = active(sent, states)
    # In a folder where nothing is done; mypy does not know pydantic's dataclasses.
    nowhere = replace(config, paths=replace(config.paths, runs=Path(os.devnull)))  # type: ignore[type-var]
    whole: Counter[tuple[str, str]] = Counter()
    for job in jobs_of(nowhere, typed):
        whole[job.name, job.stage] += job.count
    rows = []
    for stage, number in whole.items():
        keys = [(*stage, task) for job in left if (job.name, job.stage) == stage for task in job.tasks or (None,)]
        own = [states[queued[key]] for key in keys if key in queued]
        counts = [sum(state.is_running for state in own), sum(state.is_waiting for state in own)]
        counts += [sum((each.name, each.stage) == stage for each in failed)]
        rows.append([*stage, *map(str, (number - len(keys), *counts, len(keys) - sum(counts)))])
    columns = ("experiment", "stage", "done", "running", "waiting", "failed", "not sent")
    print(table(columns, rows, ("experiment", "stage")))
    for once in [replicate(config, seed) for seed in config.replicates] or ([] if config.towers else [config]):
        training = [
            task
            for (name, stage, task), job in queued.items()
            if name == once.name and stage in TRAINING and task is not None and states[job].is_running
        ]
        for row in training:
            file = RunFolder.of(once).ingredient(row) / "metrics.jsonl"
            points = [point for point in read_jsonl(file) if "loss" in point] if file.exists() else []
            last = f"step {points[-1]['step']}, loss {points[-1]['loss']:.4g}" if points else "no step on disk yet"
            print(f"{once.name}: row {row} runs, {last}")
        print(pace(once, len(training)))
    for each in failed:
        print(each.line)
    if failed:
        print("Next: python -m slurm.retry with the same settings sends the failed rows again")


def show_parts(config: Experiment) -> None:
    """The same for each experiment that one is made of."""
    for part, typed in parts_as_typed(config, sys.argv[1:]):
        show(part, typed)


if __name__ == "__main__":
    entry_point(show_parts, whole=True)()
