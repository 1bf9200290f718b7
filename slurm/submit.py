"""An experiment as jobs of SLURM: what is left of it, printed, and sent where asked; what SLURM says of sent jobs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.schema import Experiment
from configs.slurm import RUNNING, WAITING, accounted
from finetune.length import LargeBatchError
from slurm.cost import Costs, costs
from slurm.jobs import TRAINING, After, Job, compact, jobs_of, sbatch_words, slurm_of
from slurm.plan import gigabytes
from soups.files.atomic import read_jsonl, write_jsonl
from store.runs import RunFolder, sole_writer
from tasks.load import check_annotations

MAX_ARRAY_SIZE = 1001  # SLURM's default of MaxArraySize
Key = tuple[str, str, int | None]  # experiment, stage, and task of an array


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
    first: int = 0  # what index 0 of its array stands for

    @property
    def ids(self) -> dict[str, int | None]:
        """What SLURM calls its parts -> which of `tasks`; without an array, itself."""
        return {f"{self.job}_{task - self.first}": task for task in self.tasks} or {self.job: None}


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


def sent_jobs(config: Experiment, name: str | None = None) -> list[Sent]:
    """What was sent so far of an experiment, or of another one with the same run folders, oldest first."""
    path = config.paths.runs / (name or config.name) / "slurm" / "sent.jsonl"
    return [Sent(**row | {"tasks": tuple(row["tasks"])}) for row in read_jsonl(path)] if path.exists() else []


def _asked(words: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What a client of SLURM prints.

    Raises:
        UserError: it is not installed here, or SLURM does not answer or refuses.
    """
    try:
        ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(
            f"{words[0]} is not installed here: run this on a login node of the cluster, or choose cluster=local"
            + ("; without submit=true it only prints" if words[0] == "sbatch" else "")
        ) from None
    if ended.returncode != 0:
        lines = (ended.stderr or ended.stdout).strip().splitlines() or ["no reason given"]
        if words[0] == "sbatch":
            raise UserError(f"sbatch refused ({lines[-1]}): {shlex.join(words)}")
        raise UserError(f"{words[0]} failed: {lines[0]}")
    return ended.stdout


def states_of(sent: Sequence[Sent]) -> dict[str, State]:
    """By id, as in 12_3, what SLURM says of jobs: the queue, and of what that has forgotten the accounts.

    Each is asked once, for all jobs. What neither knows is not there.

    Raises:
        UserError: SLURM is not here or does not answer; not where it no longer knows the ids.
    """
    if not sent:
        return {}
    words = ["squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]
    try:
        lines = _asked([*words, f"--jobs={','.join(each.job for each in sent)}"]).splitlines()
    except UserError as error:
        if "Invalid job id" not in str(error):  # said where one id is asked for, and forgotten
            raise
        lines = []
    found = {name: State(word, reason) for name, word, reason in (line.strip().split("|", 2) for line in lines)}
    forgotten = [each.job for each in sent if any(name not in found for name in each.ids)]
    if forgotten:
        ended = {name: State(word, reason) for name, (word, reason) in accounted(forgotten).items()}
        # What the accounts call running or waiting, and the queue does not know, has ended unseen.
        found = {name: state for name, state in ended.items() if state.word not in WAITING | RUNNING} | found
    return found


def active(sent: Sequence[Sent], states: Mapping[str, State]) -> dict[Key, str]:
    """What waits or runs -> its id."""
    found: dict[Key, str] = {}
    for each in sent:
        for name, task in each.ids.items():
            if name in states and (states[name].is_waiting or states[name].is_running):
                found[each.name, each.stage, task] = name
    return found


def most_tasks() -> int:
    """SLURM's MaxArraySize, which every index of an array is below; its default where SLURM is not here to be asked."""
    try:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _asked(["scontrol", "show", "config"]), re.MULTILINE)
    except UserError:
        return MAX_ARRAY_SIZE
    return int(found[1]) if found else MAX_ARRAY_SIZE


def cut(jobs: Sequence[Job], most: int) -> list[Job]:
    """The same jobs, those with an index that an array may not have as several arrays.

    Args:
        jobs: from `jobs_of`.
        most: SLURM's MaxArraySize: indices are below it.
    """
    found: list[Job] = []
    for job in jobs:
        blocks: dict[int, list[int]] = {}
        for task in job.tasks:
            blocks.setdefault(task // most, []).append(task)
        for block, tasks in blocks.items():
            at_once = job.at_once and max(1, job.at_once * len(tasks) // len(job.tasks))
            found.append(replace(job, tasks=tuple(tasks), first=block * most, at_once=at_once))
        found += [job] if not blocks else []
    return found


def environment_of(config: Experiment) -> dict[str, str]:
    """The variables that the jobs get, this process's own and the cluster file's.

    What SLURM set for this process is left out, but for where its settings are: sbatch would take it for options.
    """
    slurm = slurm_of(config)
    foreign = [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]
    found = {name: value for name, value in os.environ.items() if name not in foreign}
    if slurm.setup is not None:
        found["MODEL_SOUPS_SETUP"] = str(slurm.setup)
    return found | slurm.environment


def send(config: Experiment, jobs: Sequence[Job]) -> list[Sent]:
    """Send jobs in their order, without the tasks that are in the queue already, and record each answer at once.

    Args:
        config: of the experiment.
        jobs: from `jobs_of` and `cut`.

    Raises:
        UserError: sbatch is not here or refuses; jobs sent before it stay sent, and are recorded.
    """
    root = RunFolder.of(config).root / "slurm"
    new: list[Sent] = []
    with sole_writer(root):
        (root / "logs").mkdir(exist_ok=True)
        before = sent_jobs(config)
        others = dict.fromkeys(after.name for job in jobs for after in job.after if after.name is not None)
        known = [*before, *(each for name in others for each in sent_jobs(config, name))]
        queued = active(known, states_of(known))
        for job in jobs:
            wanted = [task for task in job.tasks or (None,) if (job.name, job.stage, task) not in queued]
            if not wanted:
                continue
            own = replace(job, tasks=tuple(task for task in wanted if task is not None))
            words = sbatch_words(own, _waits(own, new, queued))
            answer = _asked(words, environment_of(config)).strip().partition(";")[0]
            now, line = round(time.time(), 3), shlex.join(words)
            new.append(Sent(answer, job.name, job.stage, own.tasks, job.of, now, line, job.first))
            write_jsonl(root / "sent.jsonl", [asdict(each) for each in [*before, *new]])
    return new


def _waits(job: Job, new: Sequence[Sent], queued: Mapping[Key, str]) -> dict[str, list[str]]:
    """Ids that a job waits for, by how: of new calls of sbatch or single tasks of them, and of what is in the queue."""
    found: dict[str, list[str]] = {}
    for after in job.after:
        ids = found.setdefault(after.how, [])
        for each in new:
            if each.stage == after.stage and _follows(job, after, each.name):
                ids += [each.job] if after.tasks is None else [k for k, task in each.ids.items() if task in after.tasks]
        for (name, stage, task), number in queued.items():
            if stage == after.stage and _follows(job, after, name) and (after.tasks is None or task in after.tasks):
                ids.append(number)
    return found


def _follows(job: Job, after: After, name: str) -> bool:
    """Whether a job waits for those of an experiment: its own, or of all replicates where it is of the whole."""
    whole = after.name or job.name
    return name == whole or name.startswith(f"{whole}/")


@dataclass(frozen=True)
class Planned:
    """What is left of one experiment."""

    config: Experiment
    typed: tuple[str, ...]  # settings of the command line that make it
    jobs: tuple[Job, ...]
    costs: Costs | None  # of all replicates
    unknown: str  # why there are none

    @property
    def shares(self) -> dict[str, float]:
        """Stage -> the share of its jobs that is left."""
        found: dict[str, float] = {}
        for job in self.jobs:
            found[job.stage] = found.get(job.stage, 0.0) + (len(job.tasks) / job.of if job.tasks else 1)
        return {stage: share / max(1, len(self.config.replicates)) for stage, share in found.items()}

    @property
    def hours(self) -> dict[str, float]:
        """Stage -> expected GPU-hours of the jobs that are left, over all replicates."""
        stages, shares = self.costs.stages if self.costs is not None else (), self.shares
        return {part.name: part.gpu_hours * shares[part.name] for part in stages if part.name in shares}

    @property
    def bytes(self) -> float:
        """What the jobs are expected to write: what is kept, and the states of the rows that train at once."""
        if self.costs is None:
            return 0.0
        rows, shares = [job for job in self.jobs if job.stage in TRAINING], self.shares
        at_once = sum(min(len(job.tasks), job.at_once or len(job.tasks)) for job in rows)
        kept = sum(part.storage * shares.get(part.name, 0.0) for part in self.costs.stages)
        return kept + self.costs.state * at_once


def estimated(config: Experiment) -> tuple[Costs | None, str]:
    """What an experiment takes by `slurm.cost`, all replicates together; or None and why it cannot be counted.

    Raises:
        LargeBatchError: rows whose batch is larger than the training set, which no job could train.
    """
    if config.towers:
        return None, "it trains nothing"
    try:
        return costs(config), ""
    except LargeBatchError:
        raise
    except UserError as error:
        return None, str(error)


def planned(config: Experiment, typed: Sequence[str]) -> Planned:
    """The jobs that are left of an experiment, with what they ask for; raises as `estimated` and `jobs_of` do."""
    slurm_of(config)
    check_annotations(config.task)
    found, unknown = estimated(config)
    jobs = cut(jobs_of(config, typed, found), most_tasks())
    return Planned(config, tuple(typed), tuple(jobs), found, unknown)


def _job_table(plan: Planned) -> Table:
    """A line for each job: what is left of its array, and what it asks for."""
    grid = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    several = len({job.name for job in plan.jobs}) > 1
    for column in (*(["experiment"] if several else []), "stage", "jobs left", "of", "array", "each", "GPU-hours"):
        grid.add_column(column, justify="right" if column in ("jobs left", "of", "GPU-hours") else "left")
    hours, of_stage = plan.hours, dict.fromkeys((job.stage for job in plan.jobs), 0)
    for job in plan.jobs:
        of_stage[job.stage] += max(1, len(job.tasks))
    for job in plan.jobs:
        left = max(1, len(job.tasks))
        expected = f"{hours[job.stage] * left / of_stage[job.stage]:,.1f}" if job.stage in hours else ""
        cells = (job.stage, str(left), str(job.of), job.array, _asks(job), expected)
        grid.add_row(*([job.name] if several else []), *cells)
    return grid


def _asks(job: Job) -> str:
    """The resources of a job, in words."""
    values = dict(option.lstrip("-").split("=", 1) for option in job.options if "=" in option)
    nodes = f"{values['nodes']} x " if values.get("nodes", "1") != "1" else ""
    gres = values.get("gres", "none").removeprefix("gpu:").replace(":", " ")
    gpus = "no GPU" if gres == "none" else f"{nodes}{gres} GPU"
    memory = f" of {values['mem-per-cpu']}" if "mem-per-cpu" in values else ""
    return f"{gpus}, {values['cpus-per-task']} CPUs{memory}, {values['time']}"


def _show_plan(plan: Planned, console: Console) -> None:
    """What would be sent, what it is expected to take, and the sbatch lines, dependencies by the names of stages."""
    if plan.costs is None:
        line = f"hours and storage are not estimated, and jobs ask for the longest times: {plan.unknown}"
    else:
        line = f"{sum(plan.hours.values()):,.1f} GPU-hours expected on {plan.config.plan.gpu}"
        line += f", {gigabytes(plan.costs.storage)} kept when all is done"
        if plan.config.replicates:
            line = f"all {len(plan.config.replicates)} sweeps: {line}"
        line += " (python -m slurm.plan says how this is estimated)"
    console.print(_job_table(plan))
    console.print(f"\n{line}\n")
    for job in plan.jobs:
        stages = {other.stage for other in plan.jobs if other.name == job.name or other.name.startswith(f"{job.name}/")}
        waits: dict[str, list[str]] = {}
        for each in job.after:
            if each.name is not None:
                waits.setdefault(each.how, []).append(f"<{each.name}: {each.stage}>")
            elif each.stage in stages:
                waits.setdefault(each.how, []).append(f"<{each.stage}>")
        console.print(shlex.join(sbatch_words(job, waits)), soft_wrap=True, markup=False)


def free_space(folder: Path) -> tuple[Path, int]:
    """The place that a folder is in, or will be, and the bytes that its disk has left."""
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    return place, shutil.disk_usage(place).free


def reproduce(parts: Sequence[tuple[Experiment, Sequence[str]]]) -> None:
    """Print what is left of an experiment, or of all that one is made of, and send it where `submit` says so.

    Args:
        parts: experiments whose cluster is SLURM, each with the settings that make it, as on the command line.

    Raises:
        UserError: rows that were made with other settings; too little space; SLURM is not here or refuses. Nothing is
            sent before all of it is planned.
    """
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    plans = [planned(config, typed) for config, typed in parts]
    left = [plan for plan in plans if plan.jobs]
    for plan in plans:
        if not plan.jobs:
            place = RunFolder.of(plan.config).analysis
            console.print(f"{plan.config.name}: nothing is left to do; {place} has the tables")
    if not left:
        return
    place, free = free_space(left[0].config.paths.runs)
    needed = sum(plan.bytes for plan in left)
    space = f"about {gigabytes(needed)} will be written, and the disk of {place} has {gigabytes(free)} left"
    if left[0].config.submit:
        if needed > free and slurm_of(left[0].config).check_space:
            raise UserError(
                f"too little space: {space}: free some (python -m slurm.clean says what finished runs can do without), "
                "type paths.runs=FOLDER on another disk, or send it all the same by cluster.slurm.check_space=false"
            )
        for plan in left:
            _send(plan, console)
        return
    for plan in left:
        if len(plans) > 1:
            console.rule(plan.config.name)
        _show_plan(plan, console)
    if len(plans) > 1:
        console.rule("all")
        hours = sum(sum(plan.hours.values()) for plan in left)
        calls, jobs = sum(len(plan.jobs) for plan in left), sum(max(1, len(j.tasks)) for p in left for j in p.jobs)
        unknown = sum(plan.costs is None and not plan.config.towers for plan in left)
        besides = f", besides {unknown} experiments that are not estimated" if unknown else ""
        console.print(
            f"{len(left)} experiments, {jobs:,} jobs by {calls:,} calls of sbatch, {hours:,.0f} GPU-hours{besides}"
        )
    console.print(f"\n{'' if needed <= free else 'TOO LITTLE SPACE: '}{space}", soft_wrap=True)
    console.print("Nothing was sent. Next: the same with submit=true")


def _send(plan: Planned, console: Console) -> None:
    sent = send(plan.config, plan.jobs)
    for each in sent:
        tasks = f", tasks {compact(each.tasks)}" if each.tasks else ""
        console.print(f"job {each.job}: {each.name}, {each.stage}{tasks}")
    queued = (
        "" if len(sent) == len(plan.jobs) else " What was sent before and is still in the queue was not sent again."
    )
    watch = shlex.join(["python", "-m", "slurm.status", *(word for word in plan.typed if word != "submit=true")])
    console.print(f"{len(sent)} sent.{queued} Next: {watch}", soft_wrap=True)
