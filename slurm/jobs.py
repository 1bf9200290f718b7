"""The jobs that an experiment still needs, in their order: what each waits for and asks for, and its sbatch line."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from analysis.artefacts import FORWARD, forward_artefacts
from configs.clusters import Slurm
from configs.errors import UserError
from configs.schema import Experiment, replicate
from configs.slurm import FIRST_INDEX
from eval.pool import is_scored
from finetune.length import largest_world
from slurm.cost import HOUR, Costs
from soups.experiment.cook import ENSEMBLES, dishes, identity_of
from soups.experiment.pool import pool_of
from soups.files.atomic import read_json
from store.rows import row_config, teachers
from store.runs import RunFolder, done_rows

TRAINING = ("fine-tune", "distil")  # stages that train rows
ROWS = ("initialise", *TRAINING)  # stages that make rows
OF_COMMAND = ("submit", "sweep.index", "share.of", "share.index")  # settings that jobs do not take over
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


def after(how: Literal["afterok", "afterany"], *stages: str, name: str | None = None) -> tuple[After, ...]:
    """Waiting for whole stages."""
    return tuple(After(stage, how, name=name) for stage in stages)


@dataclass(frozen=True)
class Job:
    """One call of sbatch."""

    stage: str
    script: str  # of slurm/
    name: str  # of the experiment, which may be one of several replicates
    tasks: tuple[int, ...]  # which of the stage are left to do; empty: a job without an array
    of: int  # how many there are with those that are done
    after: tuple[After, ...]
    options: tuple[str, ...]  # of sbatch, without dependencies
    settings: tuple[str, ...]  # of python
    shape: Shape
    at_once: int | None = None  # tasks at the same time, at most
    first: int = 0  # the task that index 0 of the array stands for

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
    """What its jobs ask for.

    Raises:
        UserError: the experiment's cluster is not one of SLURM.
    """
    if config.cluster.slurm is None:
        raise UserError(
            f"cluster.kind={config.cluster.kind} sends no jobs: choose cluster=slurm_1gpu or a file like it"
        )
    return config.cluster.slurm


def shape_of(row: Experiment, slurm: Slurm) -> Shape:
    """The machines that train a row together: as many GPUs as the cluster file says, and as can share the row's batch.

    Raises:
        UserError: a network that is sharded over GPUs, of which the cluster or the batch allows one only.
    """
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


def seconds_of(time: str) -> int:
    """A time as SLURM writes it, in seconds.

    >>> seconds_of("08:00:00"), seconds_of("1-00:30:00")
    (28800, 88200)
    """
    days, _, clock = time.rpartition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


def clock(seconds: int) -> str:
    """The inverse of `seconds_of`.

    >>> clock(300), clock(88200)
    ('00:05:00', '1-00:30:00')
    """
    days, rest = divmod(seconds, 86400)
    time = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{time}" if days else time


def time_limit(config: Experiment, hours: float | None, stage: str) -> str:
    """What a job asks for: the estimate times `cluster.slurm.margin`, and no more than the cluster file's limit.

    What takes longer goes back into the queue when its time is over, and continues, up to `cluster.restarts` times.

    Args:
        config: of the experiment.
        hours: wall time by the cost model; None where it cannot be estimated, and the limit is asked for.
        stage: of the job.

    Raises:
        UserError: the work does not fit into all restarts together.
    """
    slurm, setting = slurm_of(config), "time" if stage in ROWS else "stage_time"
    most = slurm.time if stage in ROWS else slurm.stage_time
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


def _options(config: Experiment, stage: str, shape: Shape, hours: float | None) -> tuple[str, ...]:
    slurm, logs = slurm_of(config), RunFolder.of(config).root / "slurm" / "logs"
    kind = f":{slurm.gpu_type}" if slurm.gpu_type else ""
    needs_gpu = is_array = stage != "analysis"
    found = [
        f"--job-name={config.name.replace('/', '-')}-{stage.replace(' ', '-')}",
        f"--output={logs}/%x-{'%A_%a' if is_array else '%j'}.out",
        f"--time={time_limit(config, hours, stage)}",
        f"--cpus-per-task={max(1, slurm.cpus // max(1, slurm.gpus)) * max(1, shape.gpus)}",
    ]
    if needs_gpu:
        found.append(f"--gres=gpu{kind}:{shape.gpus}" if shape.gpus else "--gres=none")
    values = {
        "partition": slurm.partition if needs_gpu else slurm.cpu_partition or slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "mem-per-cpu": slurm.memory,
    }
    return (*found, *(f"--{name}={value}" for name, value in values.items() if value is not None), *slurm.options)


def left_rows(config: Experiment) -> tuple[int, ...]:
    """Rows without a done.json of these settings; raises as `done_rows`."""
    done = done_rows(config)
    return tuple(row for row in range(config.sweep.size + 1) if row not in done)


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


def _expected(costs: Costs | None, stage: str) -> tuple[float, ...] | None:
    """GPU-hours of a stage's jobs, of one replicate; None where they are not known."""
    jobs = next((part.jobs for part in costs.stages if part.name == stage), None) if costs is not None else None
    return None if costs is None or jobs is None else jobs[: len(jobs) // costs.copies]


def _longest(config: Experiment, costs: Costs | None, stage: str, of: int) -> float | None:
    """Hours of the longest of the `of` jobs that share a stage's models; or of the longest recipe."""
    jobs = _expected(costs, stage)
    if jobs is None:
        return None
    if stage != "recipes":
        return max(sum(jobs[index::of]) for index in range(of))
    left = iter(jobs)
    each = {recipe: sum(next(left) for _ in dishes(config, recipe)) for recipe in config.recipes}
    return max(each.values()) + (each.get("wise_ft", 0.0) if config.cooking.of in each else 0.0)


def _trainings(config: Experiment, settings: tuple[str, ...], costs: Costs | None) -> list[Job]:
    """The initialisation by one GPU, then rows, then those that are distilled from rows.

    Rows of one stage whose batches are shared by different numbers of processes are arrays of their own.
    """
    slurm, left = slurm_of(config), set(left_rows(config))
    rows = {row: row_config(config, row) for row in range(1, config.sweep.size + 1)}
    taught = {row: own.regularizer.distill.rows for row, own in rows.items() if own.regularizer.distill is not None}
    jobs = []
    if 0 in left:
        one = Shape(1, min(slurm.gpus, 1))
        options = _options(config, "initialise", one, None)
        jobs.append(Job("initialise", "finetune", config.name, (0,), 1, (), options, settings, one))
    for stage in TRAINING:
        whole = sorted(row for row in rows if (row in taught) == (stage == "distil"))
        some = [row for row in whole if row in left]
        shapes: dict[Shape, list[int]] = {}
        for row in some:
            shapes.setdefault(shape_of(rows[row], slurm), []).append(row)
        awaited = tuple(sorted({teacher for row in some for teacher in taught.get(row, ())}))
        waits = after("afterok", "initialise") + ((After("fine-tune", "afterok", awaited),) if awaited else ())
        if config.sweep.best_of is not None:  # the search whose best settings the rows take
            waits += after("afterok", *ROWS, name=config.sweep.best_of.name)
        for head in sorted({head for row in some if (head := rows[row].model.head_of) is not None}):
            waits += after("afterok", "initialise", name=head)
        expected = _expected(costs, stage)
        hours = dict(zip(whole, expected, strict=True)) if expected is not None else None
        for shape, own in shapes.items():
            longest = max(hours[row] for row in own) / shape.processes if hours is not None else None
            options = _options(config, stage, shape, longest)
            several = shape.processes > 1
            options += (f"--nodes={shape.nodes}",) if several else ()
            script = "finetune_multi" if several else "finetune"
            at_once = slurm.max_parallel and max(1, slurm.max_parallel * len(own) // len(some))
            jobs.append(
                Job(stage, script, config.name, tuple(own), len(whole), waits, options, settings, shape, at_once)
            )
    return jobs


def soups_of(config: Experiment) -> list[str]:
    """What recipes make that has weights of its own."""
    return [name for recipe in config.recipes for name in dishes(config, recipe) if name not in ENSEMBLES]


def totals(config: Experiment) -> dict[str, int]:
    """How many jobs each stage of one sweep has in all, with those that are done."""
    figures = len(forward_artefacts(config.name))
    if config.towers:
        return {"figures": figures}
    size, slurm = config.sweep.size, slurm_of(config)
    distilled = sum(bool(teachers(config, row)) for row in range(1, size + 1))
    models = size + 1 + (config.model.templates is not None)
    found = {"initialise": 1, "fine-tune": size - distilled, "distil": distilled}
    found |= {"evaluate": min(slurm.evaluate_jobs, models), "recipes": len(config.recipes)}
    found |= {"evaluate soups": min(slurm.evaluate_jobs, len(soups_of(config))), "figures": figures, "analysis": 1}
    return {stage: number for stage, number in found.items() if number}


def jobs_of(config: Experiment, typed: Sequence[str], costs: Costs | None = None) -> list[Job]:
    """The jobs that are left to do, each after those that it needs; nothing is written, no image is read.

    Args:
        config: of the experiment; with `replicates`, of all of them.
        typed: the settings of the command line, which the jobs get too.
        costs: of the experiment, or of one replicate; without, jobs ask for the cluster file's longest times.

    Raises:
        UserError: a cluster that is not SLURM; rows that were made with other settings, that this cluster cannot train,
            or that would not end within all restarts.
    """
    settings = tuple(word for word in typed if word.split("=")[0].lstrip("+~") not in OF_COMMAND and word[:2] != "--")
    if not config.replicates:
        return _once(config, settings, costs)
    jobs = []
    for sweep_seed in config.replicates:
        once = replicate(config, sweep_seed)
        own = (*settings, f"sweep.seed={sweep_seed}", f"name={once.name}", "replicates=[]")
        jobs += [job for job in _once(once, own, costs) if job.stage != "analysis"]
    return [*jobs, _analysis(config, settings)]


def _once(config: Experiment, settings: tuple[str, ...], costs: Costs | None) -> list[Job]:
    """The jobs of one sweep, or of a figure of other experiments' models (`towers`), which waits for their rows."""
    slurm, run, number = slurm_of(config), RunFolder.of(config), totals(config)

    def array(stage: str, script: str, tasks: Iterable[int], waits: tuple[After, ...], *more: str) -> list[Job]:
        """An array of jobs with one GPU, if the cluster has any; none where nothing is left."""
        left, of, shape = tuple(tasks), number.get(stage, 0), Shape(1, min(slurm.gpus, 1))
        if not left:
            return []
        options = _options(config, stage, shape, _longest(config, costs, stage, of))
        return [Job(stage, script, config.name, left, of, waits, options, (*settings, *more, f"share.of={of}"), shape)]

    def figures(anew: bool, waits: tuple[After, ...]) -> list[Job]:
        """A job for each table and figure that needs forward passes; `python -m analysis` draws the others."""
        records = [run.analysis / f"{name}_provenance.json" for name in forward_artefacts(config.name)]
        left = [place for place, record in enumerate(records) if anew or not record.exists()]
        return array("figures", "figures", left, waits, f"artefact={FORWARD}")

    if config.towers:
        others = dict.fromkeys(tower.parts[-3] for tower in config.towers)
        return figures(False, tuple(each for name in others for each in after("afterok", *ROWS, name=name)))

    jobs, pool, every = _trainings(config, settings, costs), after("afterok", *ROWS), after("afterany", *ROWS)
    rows_left = any(job.stage in ROWS for job in jobs)
    # Models are shared in the order of `eval.pool.model_folders`; a row that failed takes no other's evaluation along.
    models = [run.ingredient(row) for row in range(config.sweep.size + 1)]
    models += [run.zero_shot] if config.model.templates is not None else []
    unscored, of = [_is_unscored(config, folder) for folder in models], number["evaluate"]
    jobs += array("evaluate", "evaluate", (share for share in range(of) if any(unscored[share::of])), every)

    recipes = [
        place
        for place, recipe in enumerate(config.recipes)
        if rows_left or any(_is_unmade(config, name) for name in dishes(config, recipe))
    ]
    jobs += array("recipes", "soups", recipes, pool + after("afterok", "evaluate"))
    soups_left = recipes or any(_is_unscored(config, run.soup(name)) for name in soups_of(config))
    shares = range(number.get("evaluate soups", 0) if soups_left else 0)
    jobs += array("evaluate soups", "evaluate", shares, pool + after("afterany", "recipes"))

    is_drawn = (run.analysis / "provenance.json").exists()
    last = [_analysis(config, settings)] if jobs or not is_drawn else []
    waits = pool + after("afterany", "evaluate", "recipes", "evaluate soups")
    return [*jobs, *figures(bool(jobs), waits), *last]


def _analysis(config: Experiment, settings: tuple[str, ...]) -> Job:
    """Tables and figures, from what is on disk, without a GPU; figures that have jobs of their own hold up nothing."""
    shape = Shape(1, 0)
    waits = after("afterok", *ROWS, "evaluate", "recipes", "evaluate soups")
    options = _options(config, "analysis", shape, None)
    return Job("analysis", "analysis", config.name, (), 1, waits, options, settings, shape)


def sbatch_words(job: Job, waits: Mapping[str, Sequence[str]]) -> list[str]:
    """The call that sends a job.

    Args:
        job: one of `jobs_of`, whose indices an array may have (`cut`).
        waits: ids of jobs that must end before it, by how; as names in a dry run.
    """
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
