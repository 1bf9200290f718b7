"""How far an experiment is on a SLURM cluster:  python -m slurm.status experiment=table3_clip_b32 cluster=slurm_1gpu

For each stage how many jobs are done, run, wait and failed; for failures the reason and the last line that they
printed; the pace of rows, and when the last one will end. Where SLURM is not installed, what the files tell.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from configs.cli import entry_point
from configs.errors import UserError
from configs.schema import Experiment, replicate
from slurm.jobs import Job, jobs_of, left_rows, slurm_of, totals
from slurm.queue import Sent, State, active, sent_jobs, states_of
from slurm.reproduce import logs_of
from store.atomic import read_json, read_jsonl
from store.runs import RunFolder

ENDED = State("ENDED", "SLURM has forgotten why")


@dataclass(frozen=True)
class Failure:
    """A job that was sent, is not in the queue, and has not done its work."""

    name: str  # of the experiment
    stage: str
    task: int | None
    job: str  # as SLURM calls it
    why: State
    last_line: str  # of what it printed

    @property
    def told(self) -> str:
        """In one line."""
        what = self.stage if self.task is None else f"{self.stage} {self.task}"
        reason = "" if self.why.reason in ("None", "") else f", {self.why.reason}"
        return f"{self.name}: {what} (job {self.job}): {self.why.word}{reason}: {self.last_line}"


def last_line(config: Experiment, job: str, task: int | None) -> str:
    """The last line with words that a job printed; of SLURM's own lines after an error, the error."""
    lines: list[str] = []
    for log in logs_of(config, job, task):
        lines += [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    return (own or lines or ["it printed nothing"])[-1]


def failures(config: Experiment, left: Sequence[Job], sent: Sequence[Sent], states: dict[str, State]) -> list[Failure]:
    """What of the jobs that are left was sent, and will not run by itself: the latest call of each counts."""
    queued = active(sent, states)
    latest = {(each.name, each.stage, task): (name, each) for each in sent for name, task in each.ids.items()}
    found = []
    for job in left:
        for task in job.tasks or (None,):
            key = (job.name, job.stage, task)
            if key in queued or key not in latest:
                continue
            name, each = latest[key]
            why = states.get(name, ENDED)
            line = last_line(config, each.job, task)
            found.append(Failure(job.name, job.stage, task, name, why, line))
    return found


def known_states(sent: Sequence[Sent]) -> tuple[dict[str, State], str | None]:
    """What SLURM says, or nothing and why."""
    try:
        return states_of(sent), None
    except UserError as error:
        return {}, str(error)


def pace(config: Experiment) -> tuple[int, float]:
    """How many rows are done, and the mean seconds of one; restarts are not in them."""
    seconds = []
    for row in range(1, config.sweep.size + 1):
        file = RunFolder.of(config).ingredient(row) / "done.json"
        if file.exists():
            seconds.append(read_json(file)["seconds"])
    return len(seconds), sum(seconds) / len(seconds) if seconds else 0.0


def steps_of(config: Experiment, row: int) -> str:
    """How far a row is that trains, by the last point of its loss curve."""
    file = RunFolder.of(config).ingredient(row) / "metrics.jsonl"
    points = [point for point in read_jsonl(file) if "loss" in point] if file.exists() else []
    return f"step {points[-1]['step']}, loss {points[-1]['loss']:.4g}" if points else "no step on disk yet"


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def told_pace(config: Experiment, running: int) -> str:
    """The pace of rows and when the last will end, where that can be said."""
    left = len([row for row in left_rows(config) if row])
    done, mean = pace(config)
    if not done:
        return f"{config.name}: no row is done yet, {left} are left"
    said = f"{config.name}: {done} rows done, {_clock(mean)} each"
    if not left:
        return f"{said}, none left"
    at_once = running or slurm_of(config).max_parallel or left
    rate = 3600 * at_once / mean if mean else float("inf")
    guess = f"about {_clock(mean * left / min(at_once, left))} for the {left} left"
    return f"{said}; {rate:.1f} rows an hour with {at_once} at once, {guess}"


def show(config: Experiment, typed: Sequence[str]) -> None:
    """Print the state of every stage."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    left, sent = jobs_of(config, typed), sent_jobs(config)
    states, silent = known_states(sent)
    if silent:
        console.print(f"SLURM says nothing ({silent}); what follows is told by the files alone", highlight=False)
    queued = active(sent, states)
    failed = failures(config, left, sent, states) if silent is None else []
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("experiment", "stage", "done", "running", "waiting", "failed", "not sent"):
        grid.add_column(column, justify="left" if column in ("experiment", "stage") else "right")
    keys = {(job.name, job.stage): [(job.name, job.stage, task) for task in job.tasks or (None,)] for job in left}
    for name, stage, number in _every_stage(config):
        own = keys.get((name, stage), [])
        running = sum(states[queued[key]].is_running for key in own if key in queued)
        waiting = sum(states[queued[key]].is_waiting for key in own if key in queued)
        broken = sum((each.name, each.stage) == (name, stage) for each in failed)
        rest = len(own) - running - waiting - broken
        grid.add_row(name, stage, *map(str, (number - len(own), running, waiting, broken, rest)))
    console.print(grid)
    for name, stage, task in queued:
        if stage in ("fine-tune", "distil") and task is not None and states[queued[name, stage, task]].is_running:
            once = next(each for each in _sweeps(config) if each.name == name)
            console.print(f"{name}: row {task} runs, {steps_of(once, task)}", highlight=False)
    for once in _sweeps(config):
        rows = [key for key in queued if key[0] == once.name and key[1] in ("fine-tune", "distil")]
        console.print(told_pace(once, sum(states[queued[key]].is_running for key in rows)), highlight=False)
    for each in failed:
        console.print(each.told, highlight=False, markup=False, soft_wrap=True)
    if failed:
        console.print("Next: python -m slurm.retry with the same settings sends the failed rows again", highlight=False)


def _every_stage(config: Experiment) -> list[tuple[str, str, int]]:
    """Experiment, stage, and how many jobs it has in all; the analysis of several sweeps is one of the whole."""
    stages = [(once.name, stage, number) for once in _sweeps(config) for stage, number in totals(once).items()]
    return [each for each in stages if each[1] != "analysis"] + [(config.name, "analysis", 1)]


def _sweeps(config: Experiment) -> list[Experiment]:
    return [replicate(config, seed) for seed in config.replicates] or [config]


if __name__ == "__main__":
    entry_point(lambda config: show(config, sys.argv[1:]))()
