"""A whole experiment as jobs of SLURM: what is left of it, printed, and sent where asked."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.schema import Experiment, replicate
from slurm.costs import costs
from slurm.jobs import Job, compact, jobs_of, sbatch_words, shown, slurm_of
from slurm.plan import gigabytes
from slurm.queue import send
from store.runs import RunFolder


def hours_of(config: Experiment, jobs: Sequence[Job]) -> dict[str, float]:
    """Stage -> expected GPU-hours of one experiment's share of jobs that is left, by `slurm.costs`.

    Raises:
        UserError: something cannot be counted.
    """
    stages = {part.name: part for part in costs(config).stages}
    found: dict[str, float] = {}
    for job in jobs:
        if job.stage in stages:
            share = len(job.tasks) / job.of if job.tasks else 1
            found[job.stage] = stages[job.stage].gpu_hours * share
    return found


def job_table(config: Experiment, jobs: Sequence[Job], hours: dict[str, float]) -> Table:
    """A line for each job: what is left of its array, and what it asks for."""
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    several = len({job.name for job in jobs}) > 1
    columns = (["experiment"] if several else []) + ["stage", "jobs left", "of", "array", "each", "GPU-hours"]
    for column in columns:
        grid.add_column(column, justify="right" if column in ("jobs left", "of", "GPU-hours") else "left")
    for job in jobs:
        expected = f"{hours[job.stage]:,.1f}" if job.stage in hours else ""
        cells = [job.stage, str(max(1, len(job.tasks))), str(job.of), compact(job.tasks), _asks(job), expected]
        grid.add_row(*([job.name] if several else []), *cells)
    return grid


def _asks(job: Job) -> str:
    """The resources of a job, in words."""
    values = dict(option.lstrip("-").split("=", 1) for option in job.options if "=" in option)
    nodes = f"{values['nodes']} x " if values.get("nodes", "1") != "1" else ""
    gres = values["gres"].removeprefix("gpu:").replace(":", " ")
    gpus = "no GPU" if gres == "none" else f"{nodes}{gres} GPU"
    memory = f" of {values['mem-per-cpu']}" if "mem-per-cpu" in values else ""
    return f"{gpus}, {values['cpus-per-task']} CPUs{memory}, {values['time']}"


def show_lines(config: Experiment, jobs: Sequence[Job], console: Console) -> None:
    """The sbatch line of each job, dependencies by the names of stages."""
    stages = {(job.name, job.stage) for job in jobs}
    for job in jobs:
        names = {name for name, _ in stages if name == job.name or name.startswith(f"{job.name}/")}
        after = [f"<{stage}>" for stage in job.after if any((name, stage) in stages for name in names)]
        console.print(shown(sbatch_words(config, job, after)), soft_wrap=True, highlight=False, markup=False)


def show_plan(config: Experiment, jobs: Sequence[Job], console: Console) -> None:
    """What would be sent, and what it is expected to take."""
    once = replicate(config, config.replicates[0]) if config.replicates else config
    own = [job for job in jobs if job.name == once.name]
    try:
        hours, kept = hours_of(once, own), costs(once)
        said = f"{sum(hours.values()):,.1f} GPU-hours expected on {config.plan.gpu}"
        said += f", {gigabytes(kept.storage * max(1, len(config.replicates)))} kept when all is done"
        if config.replicates:
            said = f"of each of {len(config.replicates)} sweeps: {said}"
        said += " (python -m slurm.plan says how this is estimated)"
    except UserError as error:
        hours, said = {}, f"hours and storage are not estimated: {error}"
    console.print(job_table(config, jobs, hours))
    console.print()
    console.print(said, highlight=False)
    console.print()
    show_lines(config, jobs, console)


def reproduce(config: Experiment, typed: Sequence[str]) -> None:
    """Print what is left of an experiment, and send it where `submit` says so.

    Args:
        config: whose cluster is SLURM.
        typed: the settings of the command line.

    Raises:
        UserError: rows that were made with other settings; SLURM is not here or refuses.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    slurm_of(config)
    jobs = jobs_of(config, typed)
    if not jobs:
        console.print(f"{config.name}: nothing is left to do; {RunFolder.of(config).analysis} has the tables")
        return
    if not config.submit:
        show_plan(config, jobs, console)
        console.print("\nNothing was sent. Next: the same with submit=true", highlight=False)
        return
    sent = send(config, jobs)
    for each in sent:
        tasks = f", tasks {compact(each.tasks)}" if each.tasks else ""
        console.print(f"job {each.job}: {each.name}, {each.stage}{tasks}", highlight=False)
    waiting = "" if len(sent) == len(jobs) else " What was sent before and is still in the queue was not sent again."
    console.print(f"{len(sent)} sent.{waiting} Next: {_watch(typed)}", highlight=False, soft_wrap=True)


def _watch(typed: Sequence[str]) -> str:
    return shown(["python", "-m", "slurm.status", *(word for word in typed if word != "submit=true")])


def logs_of(config: Experiment, job: str, task: int | None) -> list[Path]:
    """The files that a job, or a task of its array, prints into."""
    name = f"*-{job}.out" if task is None else f"*-{job}_{task}.out"
    return sorted((RunFolder.of(config).root / "slurm" / "logs").glob(name))
