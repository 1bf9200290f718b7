"""An experiment as jobs of SLURM: what is left of it, printed, and sent where asked."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.filesize import decimal

from configs.errors import UserError
from configs.schema import Experiment
from configs.slurm import State, answer_of, states_of
from finetune.length import LargeBatchError
from slurm.cost import Costs, costs
from slurm.jobs import TRAINING, Job, compact, jobs_of, sbatch_words, slurm_of
from slurm.plan import table
from soups.files.atomic import read_jsonl, write_jsonl
from store.runs import RunFolder, sole_writer
from tasks.load import check_annotations

MAX_ARRAY_SIZE = 1001  # SLURM's default of MaxArraySize
ASKED = ("nodes", "gres", "cpus-per-task", "mem-per-cpu", "time")  # options of sbatch that the table of jobs has
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

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"job {self.job}: {self.name}, {self.stage}" + (f", tasks {compact(self.tasks)}" if self.tasks else "")


def sent_jobs(config: Experiment, name: str | None = None) -> list[Sent]:
    """What was sent so far of an experiment, or of another one with the same run folders, oldest first."""
    path = config.paths.runs / (name or config.name) / "slurm" / "sent.jsonl"
    return [Sent(**row | {"tasks": tuple(row["tasks"])}) for row in read_jsonl(path)] if path.exists() else []


def sent_states(sent: Sequence[Sent]) -> dict[str, State]:
    """By id, as in 12_3, what SLURM says of jobs; raises as `states_of`."""
    return states_of({each.job: list(each.ids) for each in sent})


def active(sent: Sequence[Sent], states: Mapping[str, State]) -> dict[Key, str]:
    """What waits or runs -> its id."""
    return {
        (each.name, each.stage, task): name
        for each in sent
        for name, task in each.ids.items()
        if name in states and (states[name].is_waiting or states[name].is_running)
    }


def most_tasks() -> int:
    """SLURM's MaxArraySize, which every index of an array is below; its default where SLURM is not here."""
    with suppress(UserError):
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer_of(["scontrol", "show", "config"]), re.MULTILINE)
        return int(found[1]) if found else MAX_ARRAY_SIZE
    return MAX_ARRAY_SIZE


def cut(jobs: Sequence[Job], most: int) -> list[Job]:
    """The same jobs, as several arrays where an index would not be below `most`, SLURM's MaxArraySize."""
    found: list[Job] = []
    for job in jobs:
        for first in sorted({task // most * most for task in job.tasks} or {0}):
            tasks = tuple(task for task in job.tasks if first <= task < first + most)
            at_once = job.at_once and max(1, job.at_once * len(tasks) // len(job.tasks))
            found.append(replace(job, tasks=tasks, first=first, at_once=at_once))
    return found


def send(config: Experiment, jobs: Sequence[Job]) -> list[Sent]:
    """Send jobs in their order, without the tasks that are in the queue already, and record each answer at once."""
    root, slurm = RunFolder.of(config).root / "slurm", slurm_of(config)
    new: list[Sent] = []
    # The jobs get this process's variables, without what sbatch would take for options, and the cluster file's.
    kept = [name for name in os.environ if not name.startswith(("SLURM_", "SBATCH_")) or name == "SLURM_CONF"]
    setup = {} if slurm.setup is None else {"MODEL_SOUPS_SETUP": str(slurm.setup)}
    environment = {name: os.environ[name] for name in kept} | setup | slurm.environment
    with sole_writer(root):
        (root / "logs").mkdir(exist_ok=True)
        before = sent_jobs(config)
        others = dict.fromkeys(after.name for job in jobs for after in job.after if after.name is not None)
        known = [*before, *(each for name in others for each in sent_jobs(config, name))]
        queued = active(known, sent_states(known))
        for job in jobs:
            wanted = [task for task in job.tasks or (None,) if (job.name, job.stage, task) not in queued]
            if not wanted:
                continue
            own = replace(job, tasks=tuple(task for task in wanted if task is not None))
            words = sbatch_words(own, _waits(own, new, queued))
            answer = answer_of(words, environment).strip().partition(";")[0]
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
            if after.is_about(each.stage, each.name, job.name):
                ids += [each.job] if after.tasks is None else [k for k, task in each.ids.items() if task in after.tasks]
        for (name, stage, task), number in queued.items():
            if after.is_about(stage, name, job.name) and (after.tasks is None or task in after.tasks):
                ids.append(number)
    return found


@dataclass(frozen=True)
class Planned:
    """What is left of one experiment."""

    config: Experiment
    typed: tuple[str, ...]  # settings of the command line that make it
    jobs: tuple[Job, ...]
    costs: Costs | None  # of one of its replicates
    unknown: str  # why there are none

    @property
    def hours(self) -> float:
        """Expected GPU-hours of the jobs that are left."""
        return sum((job.hours or 0) * job.count for job in self.jobs)

    @property
    def bytes(self) -> float:
        """What the jobs are expected to write: what is kept, and the states of the rows that train at once."""
        at_once = sum(min(job.count, job.at_once or job.count) for job in self.jobs if job.stage in TRAINING)
        return sum(job.bytes * job.count for job in self.jobs) + at_once * (self.costs.state if self.costs else 0)


def planned(config: Experiment, typed: Sequence[str]) -> Planned:
    """The jobs that are left of an experiment, with what they ask for by `slurm.cost`, where that can be counted."""
    slurm_of(config)
    check_annotations(config.task)
    found: Costs | None = None
    unknown = "it trains nothing"
    try:
        if not config.towers:
            found = costs(replace(config, replicates=()))  # type: ignore[type-var]  # mypy does not know pydantic's
    except LargeBatchError:
        raise
    except UserError as error:
        unknown = str(error)
    return Planned(config, tuple(typed), tuple(cut(jobs_of(config, typed, found), most_tasks())), found, unknown)


def _show_plan(plan: Planned) -> None:
    columns = ("experiment", "stage", "jobs left", "of", "array", "each", "GPU-hours")
    rows = []
    for job in plan.jobs:
        each = ", ".join(option[2:] for option in job.options if option[2:].partition("=")[0] in ASKED)
        hours = "" if job.hours is None else f"{job.hours * job.count:,.1f}"
        rows.append([job.name, job.stage, str(job.count), str(job.of), job.array, each, hours])
    print(table(columns, rows, ("experiment", "stage", "array", "each")))
    if plan.costs is None:
        print(f"\nhours and storage are not estimated, and jobs ask for the longest times: {plan.unknown}\n")
    else:
        copies = max(1, len(plan.config.replicates))
        kept = copies * sum(stage.storage for stage in plan.costs.stages)
        print(
            f"\n{f'all {copies} sweeps: ' if copies > 1 else ''}{plan.hours:,.1f} GPU-hours expected on "
            f"{plan.config.plan.gpu}, {decimal(kept)} kept when all is done (python -m slurm.plan says how this is "
            "estimated)\n"
        )
    for job in plan.jobs:
        waits: dict[str, list[str]] = {}
        for after in job.after:
            if after.name is not None or any(after.is_about(each.stage, each.name, job.name) for each in plan.jobs):
                waits.setdefault(after.how, []).append(f"<{f'{after.name}: ' if after.name else ''}{after.stage}>")
        print(shlex.join(sbatch_words(job, waits)))


def free_space(folder: Path) -> tuple[Path, int]:
    """The place that a folder is in, or will be, and the bytes that its disk has left."""
    place = next(each for each in (folder.resolve(), *folder.resolve().parents) if each.exists())
    return place, shutil.disk_usage(place).free


def reproduce(parts: Sequence[tuple[Experiment, Sequence[str]]]) -> None:
    """Print what is left of experiments, each given with the settings that make it, and send it where `submit` says so.

    Raises:
        UserError: rows that were made with other settings; too little space; SLURM is not here or refuses. Nothing is
            sent before all of it is planned.
    """
    plans = [planned(config, typed) for config, typed in parts]
    left = [plan for plan in plans if plan.jobs]
    for plan in plans:
        if not plan.jobs:
            print(f"{plan.config.name}: nothing is left to do; {RunFolder.of(plan.config).analysis} has the tables")
    if not left:
        return
    place, free = free_space(left[0].config.paths.runs)
    needed = sum(plan.bytes for plan in left)
    space = f"about {decimal(int(needed))} will be written, and the disk of {place} has {decimal(free)} left"
    if left[0].config.submit:
        if needed > free and slurm_of(left[0].config).check_space:
            raise UserError(
                f"too little space: {space}: free some (python -m slurm.clean says what finished runs can do without), "
                "type paths.runs=FOLDER on another disk, or send it all the same by cluster.slurm.check_space=false"
            )
        for plan in left:
            sent = send(plan.config, plan.jobs)
            for each in sent:
                print(each.line)
            queued = "" if len(sent) == len(plan.jobs) else " What is still in the queue was not sent again."
            words = [word for word in plan.typed if word != "submit=true"]
            print(f"{len(sent)} sent.{queued} Next: {shlex.join(['python', '-m', 'slurm.status', *words])}")
        return
    for plan in left:
        if len(plans) > 1:
            print(f"\n--- {plan.config.name}")
        _show_plan(plan)
    if len(plans) > 1:
        calls, jobs = sum(len(plan.jobs) for plan in left), sum(job.count for plan in left for job in plan.jobs)
        unknown = sum(plan.costs is None and not plan.config.towers for plan in left)
        besides = f", besides {unknown} experiments that are not estimated" if unknown else ""
        hours = sum(plan.hours for plan in left)
        print(
            f"\n--- all\n{len(left)} experiments, {jobs:,} jobs by {calls:,} calls of sbatch, {hours:,.0f} "
            f"GPU-hours{besides}"
        )
    print(f"\n{'' if needed <= free else 'TOO LITTLE SPACE: '}{space}")
    print("Nothing was sent. Next: the same with submit=true")
