"""The jobs that an experiment still needs, in their order: what each waits for and asks for, and its sbatch line."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from analysis.artefacts import FORWARD, forward_artefacts
from configs.errors import UserError
from configs.schema import Experiment, replicate
from configs.slurm import FIRST_INDEX
from configs.stages import Slurm
from eval.pool import is_scored
from finetune.length import largest_world
from slurm.cost import HOUR, Costs, Stage
from soups.experiment.pool import pool_of
from soups.experiment.soups import ENSEMBLES, identity_of, outputs_of
from soups.files.atomic import read_json
from store.rows import row_config
from store.runs import RunFolder, done_rows

TRAINING = ("fine-tune", "distil")  # stages that train rows
ROWS = ("initialise", *TRAINING)  # stages that make rows
SCRIPTS = {  # stage -> its script in slurm/; rows of several processes have finetune_multi
    **dict.fromkeys(ROWS, "finetune"),
    **{"evaluate": "evaluate", "recipes": "soups", "evaluate soups": "evaluate"},
    **{"figures": "figures", "analysis": "analysis"},
}
NOT_OF_JOBS = ("submit", "sweep.index", "share.of", "share.index")  # settings that jobs do not take over
START_HOURS = 0.25  # until a job computes: imports, weights, lists of images
LEAST = HOUR  # seconds that a job asks for at least: estimates are least sure where they are short
STEP = 300  # seconds to which a job's time is rounded up


@dataclass(frozen=True)
class Shape:
    """The machines of a job."""

    nodes: int
    gpus: int  # of each node; 0: the job computes on CPUs

    @property
    def processes(self) -> int:
        """How many compute together: one for each GPU, or one on each node without."""
        return self.nodes * max(1, self.gpus)


@dataclass(frozen=True)
class After:
    """What a job waits for."""

    stage: str
    how: Literal["afterok", "afterany"]  # all of it ended well, or ended in whatever way
    tasks: tuple[int, ...] | None = None  # of the stage; None: all
    name: str | None = None  # of another experiment; None: its own

    def is_about(self, stage: str, name: str, own: str) -> bool:
        """Whether a stage of the experiment `name`, or of one of its replicates, is meant by a job of the one `own`."""
        return stage == self.stage and f"{name}/".startswith(f"{self.name or own}/")


def after(how: Literal["afterok", "afterany"], *stages: str, name: str | None = None) -> tuple[After, ...]:
    """Waiting for whole stages."""
    return tuple(After(stage, how, name=name) for stage in stages)


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    stage: str
    name: str  # of the experiment, which may be one of several replicates
    tasks: tuple[int, ...]  # which of the stage are left to do; empty: a job without an array
    of: int  # how many there are with those that are done
    after: tuple[After, ...]
    options: tuple[str, ...]  # of sbatch, without dependencies
    settings: tuple[str, ...]  # of python
    shape: Shape
    at_once: int | None = None  # tasks at the same time, at most
    hours: float | None = None  # GPU-hours of a task, the mean of those that are left; None: not estimated
    bytes: float = 0  # that a task is expected to leave
    first: int = 0  # the task that index 0 of the array stands for

    @property
    def script(self) -> str:
        """Its script in slurm/."""
        return SCRIPTS[self.stage] if self.shape.processes == 1 else "finetune_multi"

    @property
    def count(self) -> int:
        """How many jobs it is."""
        return max(1, len(self.tasks))

    @property
    def array(self) -> str:
        """The indices of its array, as sbatch takes them."""
        return compact(task - self.first for task in self.tasks)


def compact(indices: Iterable[int]) -> str:
    """Array indices as sbatch takes them.

    >>> compact([0, 1, 2, 5, 7, 8])
    '0-2,5,7-8'
    """
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][-1] + 1:
            parts[-1].append(index)
        else:
            parts.append([index])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def slurm_of(config: Experiment) -> Slurm:
    """What its jobs ask for; a UserError where its cluster is not one of SLURM."""
    if config.cluster.slurm is None:
        raise UserError(
            f"cluster.kind={config.cluster.kind} sends no jobs: choose cluster=slurm_1gpu or a file like it"
        )
    return config.cluster.slurm


def shape_of(row: Experiment, slurm: Slurm) -> Shape:
    """The machines that train a row together: as many GPUs as the cluster file says, and as can share its batch."""
    if row.sweep.imported is not None:  # read and scored, not trained
        return Shape(1, min(1, slurm.gpus))
    is_sharded = row.compute.strategy == "fsdp"
    gpus = slurm.sharded_gpus if is_sharded else slurm.gpus
    # Only GPUs share the statistics of batch norms: without them training takes one process.
    nodes = slurm.nodes if gpus or row.model.frozen_batch_norm else 1
    shapes = [Shape(n, g) for n in range(1, nodes + 1) for g in range(min(1, gpus), gpus + 1)]
    fitting = [shape for shape in shapes if largest_world(row.optim, shape.processes) == shape.processes]
    found = max(fitting, key=lambda shape: (shape.processes, -shape.nodes))  # on the fewest nodes
    if is_sharded and (found.gpus == 0 or found.processes == 1):
        raise UserError(
            f"{row.name} shards its network over several GPUs (compute.strategy=fsdp), and its rows would get "
            f"{found.nodes} node with {found.gpus} GPUs, for cluster.slurm.sharded_gpus={slurm.sharded_gpus} and "
            f"optim.batch_size={row.optim.batch_size}: type cluster.slurm.sharded_gpus=8, or cluster=slurm_8gpu"
        )
    return found


def seconds_of(limit: str) -> int:
    """A time as SLURM writes it, in seconds, as 88200 of 1-00:30:00."""
    return int(pd.Timedelta(limit.replace("-", " days ")).total_seconds())


def clock(seconds: int) -> str:
    """The inverse of `seconds_of`."""
    days, rest = divmod(seconds, 86400)
    return (f"{days}-" if days else "") + time.strftime("%H:%M:%S", time.gmtime(rest))


def time_limit(config: Experiment, hours: float | None, stage: str) -> str:
    """What a job of a stage asks for, in the words of sbatch, where it is expected to take so many hours.

    It is the estimate times `cluster.slurm.margin`, at most the cluster file's limit, which stands where nothing is
    estimated. What takes longer is requeued, and continues, up to `cluster.restarts` times.

    Raises:
        UserError: the work does not fit into all restarts together.
    """
    slurm, setting = slurm_of(config), "time" if stage in ROWS else "stage_time"
    most = getattr(slurm, setting)
    limit = seconds_of(most)
    if hours is None:
        return most
    if hours * HOUR > limit * (config.cluster.restarts + 1):
        raise UserError(
            f"{config.name}: {stage} takes about {hours:,.0f} hours, more than {most} and "
            f"cluster.restarts={config.cluster.restarts} restarts: type a longer cluster.slurm.{setting}, more "
            "cluster.restarts, or more GPUs a row (cluster.slurm.gpus, sharded_gpus, nodes)"
        )
    wanted = (slurm.margin * hours + START_HOURS) * HOUR
    return clock(min(limit, max(LEAST, math.ceil(wanted / STEP) * STEP)))


def left_rows(config: Experiment) -> tuple[int, ...]:
    """Rows without a done.json of these settings; raises as `done_rows`."""
    done = done_rows(config)
    return tuple(row for row in range(config.sweep.size + 1) if row not in done)


def jobs_of(config: Experiment, typed: Sequence[str], costs: Costs | None = None) -> list[Job]:
    """The jobs that are left to do, of all replicates, each after those that it needs; nothing is written.

    They get the typed settings too, and ask for times by the costs of one replicate, or for the cluster file's longest.
    """
    settings = tuple(word for word in typed if word.split("=")[0].lstrip("+~") not in NOT_OF_JOBS and word[:2] != "--")
    stages = {stage.name: stage for stage in costs.stages} if costs is not None else {}
    if not config.replicates:
        return _Sweep(config, settings, stages).jobs()
    jobs = []
    for sweep_seed in config.replicates:
        once = replicate(config, sweep_seed)
        own = (*settings, f"sweep.seed={sweep_seed}", f"name={once.name}", "replicates=[]")
        jobs += [job for job in _Sweep(once, own, stages).jobs() if job.stage != "analysis"]
    return [*jobs, _Sweep(config, settings, stages).analysis()]


@dataclass(frozen=True)
class _Sweep:
    """One sweep, or a figure of other experiments' models (`towers`)."""

    config: Experiment
    settings: tuple[str, ...]  # of all its jobs
    stages: Mapping[str, Stage]  # what they are expected to take; empty: not known

    def jobs(self) -> list[Job]:
        """The jobs that are left, in their order."""
        config, run, most = self.config, RunFolder.of(self.config), slurm_of(self.config).evaluate_jobs
        if config.towers:
            others = dict.fromkeys(tower.parts[-3] for tower in config.towers)
            return self.figures(tuple(each for name in others for each in after("afterok", *ROWS, name=name)))

        rows, pool = self.rows(), after("afterok", *ROWS)
        # Models are shared in the order of `eval.pool.model_folders`.
        models = [run.ingredient(row) for row in range(config.sweep.size + 1)]
        models += [run.zero_shot] if config.model.templates is not None else []
        unscored, of = [_is_unscored(config, folder) for folder in models], min(most, len(models))
        shares = [share for share in range(of) if any(unscored[share::of])]
        # A row that failed takes no other's evaluation along.
        jobs = rows + self.array("evaluate", shares, of, after("afterany", *ROWS))

        outputs = [outputs_of(config, recipe) for recipe in config.recipes]
        unmade = [i for i, names in enumerate(outputs) if rows or any(_is_unmade(config, name) for name in names)]
        jobs += self.array("recipes", unmade, len(outputs), pool + after("afterok", "evaluate"))
        soups = [run.soup(name) for names in outputs for name in names if name not in ENSEMBLES]
        of = min(most, len(soups))
        shares = list(range(of)) if unmade or any(_is_unscored(config, folder) for folder in soups) else []
        jobs += self.array("evaluate soups", shares, of, pool + after("afterany", "recipes"))

        waits = pool + after("afterany", "evaluate", "recipes", "evaluate soups")
        last = [self.analysis()] if jobs or not (run.analysis / "provenance.json").exists() else []
        return [*jobs, *self.figures(waits, anew=bool(jobs)), *last]

    def rows(self) -> list[Job]:
        """The initialisation, rows, and those that are distilled from rows; an array for each number of processes."""
        config, slurm, left = self.config, slurm_of(self.config), set(left_rows(self.config))
        rows = {row: row_config(config, row) for row in range(1, config.sweep.size + 1)}
        taught = {row: own.regularizer.distill.rows for row, own in rows.items() if own.regularizer.distill is not None}
        jobs = [self.job("initialise", [0], [0], ())] if 0 in left else []
        for stage in TRAINING:
            whole = [row for row in rows if (row in taught) == (stage == "distil")]
            missing = [row for row in whole if row in left]
            teachers = tuple(sorted({teacher for row in missing for teacher in taught.get(row, ())}))
            waits = after("afterok", "initialise") + ((After("fine-tune", "afterok", teachers),) if teachers else ())
            if config.sweep.best_of is not None:  # the search whose best settings the rows take
                waits += after("afterok", *ROWS, name=config.sweep.best_of.name)
            for head in sorted({head for row in missing if (head := rows[row].model.head_of) is not None}):
                waits += after("afterok", "initialise", name=head)
            shapes: dict[Shape, list[int]] = {}
            for row in missing:
                shapes.setdefault(shape_of(rows[row], slurm), []).append(row)
            for shape, own in shapes.items():
                at_once = slurm.max_parallel and max(1, slurm.max_parallel * len(own) // len(missing))
                jobs.append(self.job(stage, own, whole, waits, shape=shape, at_once=at_once))
        return jobs

    def figures(self, waits: tuple[After, ...], *, anew: bool = False) -> list[Job]:
        """A job for each table and figure that needs forward passes; `python -m analysis` draws the others."""
        names, folder = forward_artefacts(self.config.name), RunFolder.of(self.config).analysis
        left = [place for place, name in enumerate(names) if anew or not (folder / f"{name}_provenance.json").exists()]
        return self.array("figures", left, len(names), waits, f"artefact={FORWARD}")

    def analysis(self) -> Job:
        """Tables and figures, from what is on disk, without a GPU; figures with jobs of their own hold up nothing."""
        waits = after("afterok", *ROWS, "evaluate", "recipes", "evaluate soups")
        return self.job("analysis", [], [0], waits, shape=Shape(1, 0))

    def array(self, stage: str, left: Sequence[int], of: int, waits: tuple[After, ...], *more: str) -> list[Job]:
        """Jobs that share a stage's models, recipes or figures; none where nothing is left."""
        return [self.job(stage, left, range(of), waits, *more, f"share.of={of}")] if left else []

    def job(
        self,
        stage: str,
        left: Sequence[int],  # its tasks that are left to do; none of a job without an array
        whole: Sequence[int],  # all of its tasks, in the order of its expected hours
        waits: tuple[After, ...],
        *more: str,  # settings beside those of all jobs
        shape: Shape | None = None,  # None: one GPU, if the cluster has any
        at_once: int | None = None,
    ) -> Job:
        """A job with what it asks for."""
        config, slurm, of = self.config, slurm_of(self.config), len(whole)
        shape = shape or Shape(1, min(slurm.gpus, 1))
        hours, storage, longest = None, 0.0, None
        if stage in self.stages:
            jobs, storage = self.stages[stage].jobs, self.stages[stage].storage / of
            if stage == "recipes":  # which are several jobs where they make several soups
                made = iter(jobs)
                each = [sum(next(made) for _ in outputs_of(config, recipe)) for recipe in config.recipes]
            else:
                each = [sum(jobs[place::of]) for place in range(of)]
            expected = [each[whole.index(task)] for task in left]
            hours = sum(expected) / len(expected)
            longest = max(expected) / shape.processes if stage != "initialise" else None
        kind = f":{slurm.gpu_type}" if slurm.gpu_type else ""
        is_array, logs = stage != "analysis", RunFolder.of(config).root / "slurm" / "logs"
        values = {
            "job-name": f"{config.name.replace('/', '-')}-{stage.replace(' ', '-')}",
            "output": f"{logs}/%x-{'%A_%a' if is_array else '%j'}.out",
            "time": time_limit(config, longest, stage),
            "cpus-per-task": max(1, slurm.cpus // max(1, slurm.gpus)) * max(1, shape.gpus),
            "gres": (f"gpu{kind}:{shape.gpus}" if shape.gpus else "none") if is_array else None,
            "partition": slurm.partition if is_array else slurm.cpu_partition or slurm.partition,
            "account": slurm.account,
            "qos": slurm.qos,
            "constraint": slurm.constraint,
            "mem-per-cpu": slurm.memory,
        }
        options = (*(f"--{name}={value}" for name, value in values.items() if value is not None), *slurm.options)
        options += (f"--nodes={shape.nodes}",) if shape.processes > 1 else ()
        settings = (*self.settings, *more)
        return Job(stage, config.name, tuple(left), of, waits, options, settings, shape, at_once, hours, storage)


def _is_unmade(config: Experiment, name: str) -> bool:
    """Whether a soup or ensemble is not there, or not of these settings and this pool; all rows must be done."""
    record = RunFolder.of(config).soup(name) / "soup.json"
    if not record.exists():
        return True
    made = read_json(record)
    # With the digest of held-out that it was made with: no image is read.
    return made["identity"] != identity_of(config, name, pool_of(config, name), made["selected_on"]["digest"])


def _is_unscored(config: Experiment, folder: Path) -> bool:
    """Whether a model still has to be evaluated, or to be made first; a diverged row has nothing to be evaluated."""
    record = next((path for path in (folder / "done.json", folder / "soup.json") if path.exists()), None)
    return record is None or (read_json(record)["digest"] is not None and not is_scored(config, folder))


def sbatch_words(job: Job, waits: Mapping[str, Sequence[str]]) -> list[str]:
    """The call that sends a job, given the ids of jobs that must end before it, by how; as names in a dry run."""
    words = ["sbatch", "--parsable"]
    if job.tasks:
        words.append(f"--array={job.array}{f'%{job.at_once}' if job.at_once else ''}")
    dependencies = [":".join([how, *ids]) for how, ids in waits.items() if ids]
    if dependencies:
        words += [f"--dependency={','.join(dependencies)}", "--kill-on-invalid-dep=yes"]
    variables = [f"{FIRST_INDEX}={job.first}"] if job.first else []
    variables += [f"MODEL_SOUPS_PROCESSES={max(1, job.shape.gpus)}"] if job.script == "finetune_multi" else []
    words += [f"--export=ALL,{','.join(variables)}"] if variables else []
    return [*words, *job.options, f"slurm/{job.script}.sbatch", *job.settings]
