"""GPU-hours, wall time and storage of an experiment, stage by stage: estimates from its settings."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from configs.errors import UserError
from configs.schema import Experiment
from finetune.meter import PEAKS, peak_flops
from finetune.rows import row_config
from slurm.recipes import dish_work, members
from slurm.workload import (
    FLOAT32,
    Work,
    images_of,
    kinds_of,
    looked,
    network,
    row_work,
    state_bytes,
)
from soups.cook import ENSEMBLES, dishes

HOUR = 3600  # seconds
GIGA = 10**9
NODE = 8  # GPUs that share a row under FSDP, where plan.gpus_per_row does not say


@dataclass(frozen=True)
class Stage:
    """Jobs that may run at the same time; those of the next stage wait for them."""

    name: str
    jobs: tuple[float, ...]  # GPU-hours of each
    gpus_per_job: int
    compute: float  # GPU-hours of all jobs, were there no images to decode and nothing to read
    decode: float  # GPU-hours of all jobs, were there only images to decode
    read: float  # GPU-hours that they wait for files of weights and logits
    storage: int  # bytes that are kept

    @property
    def gpu_hours(self) -> float:
        """Of all jobs."""
        return sum(self.jobs)

    @property
    def bound(self) -> str:
        """What takes longest: computing, decoding or reading; empty where there is nothing to do."""
        times = {"computing": self.compute, "decoding": self.decode, "reading": self.read}
        return max(times, key=lambda name: times[name]) if any(times.values()) else ""

    def wall_hours(self, gpus: int) -> float | None:
        """Hours on so many GPUs, the longest job first; None where they are too few for one job."""
        slots = gpus // self.gpus_per_job
        return makespan([job / self.gpus_per_job for job in self.jobs], slots) if slots else None


@dataclass(frozen=True)
class Costs:
    """Of a whole experiment."""

    name: str
    rows: int  # that are trained
    parameters: int
    flops: float  # of training all rows, without looks
    stages: tuple[Stage, ...]
    state: int  # bytes of the largest state.pt; one is there for every row that trains
    copies: int  # how often the whole experiment is repeated (`replicates`); times and bytes are of all of them

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return sum(stage.gpu_hours for stage in self.stages)

    @property
    def storage(self) -> int:
        """Bytes that are kept."""
        return sum(stage.storage for stage in self.stages)

    def wall_hours(self, gpus: int) -> float | None:
        """Hours on so many GPUs, one stage after the other; None where a job needs more."""
        hours = [stage.wall_hours(gpus) for stage in self.stages]
        return None if None in hours else sum(hour for hour in hours if hour is not None)


def makespan(jobs: Sequence[float], workers: int) -> float:
    """When the last job ends if each free worker takes the longest one left; at most 4/3 of the best order's.

    Args:
        jobs: how long each takes.
        workers: that work at the same time.

    Raises:
        ValueError: no workers.

    Source: Graham 1969, longest processing time first.

    >>> makespan([3, 3, 2, 2, 2], workers=2)
    7
    """
    if workers < 1:
        raise ValueError(f"jobs need at least one worker, got {workers}")
    free: list[float] = [0] * min(workers, max(1, len(jobs)))
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def peak(config: Experiment) -> float:
    """FLOP/s of the plan's GPU in the experiment's precision.

    Raises:
        UserError: a GPU that is not in the table, or one without that precision.
    """
    gpu, precision = config.plan.gpu, config.compute.precision
    known = peak_flops(gpu, precision)
    if known is None:
        names = ", ".join(" ".join(words).lower() for words in PEAKS)
        raise UserError(
            f"the peak of gpu={gpu} in compute.precision={precision} is not known; known are {names}, those before "
            "the A100 without bf16 (compute.precision=fp16)"
        )
    return known


@dataclass(frozen=True)
class Hours:
    """GPU-hours of a job by what takes them."""

    compute: float
    decode: float
    read: float

    @property
    def all(self) -> float:
        """Images are decoded while the GPU computes; weights are read before it does."""
        return max(self.compute, self.decode) + self.read


def hours(config: Experiment, work: Work) -> Hours:
    """How long a job takes on one GPU and its share of CPU cores, under the plan's assumptions.

    Raises:
        UserError: as in `peak`.
    """
    plan, flops = config.plan, peak(config)
    pool = members(config) * network(config.model, config.task).bytes
    again = plan.reread_gigabytes if pool <= plan.cache_gigabytes * GIGA else plan.read_gigabytes
    core_seconds = (
        work.augmented / plan.augmented_per_core + work.fixed / plan.fixed_per_core + work.copied / plan.copied_per_core
    )
    if config.task.is_text:  # nothing is decoded
        core_seconds = 0.0
    return Hours(
        compute=(work.trained / plan.utilisation + work.inferred / plan.inference_utilisation) / flops / HOUR,
        decode=core_seconds / plan.cores_per_gpu / HOUR,
        read=(work.read / plan.read_gigabytes + work.again / again) / GIGA / HOUR,
    )


def trained_rows(config: Experiment) -> list[Experiment]:
    """The settings of every row but the initialisation."""
    return [row_config(config, row) for row in range(1, members(config))]


def gpus_per_row(config: Experiment) -> int:
    """How many GPUs train a row together."""
    return config.plan.gpus_per_row or (NODE if config.compute.strategy == "fsdp" else 1)


def stage(config: Experiment, name: str, works: Sequence[Work], storage: int, gpus: int = 1) -> Stage:
    """The stage with a job for each piece of work."""
    each = [hours(config, work) for work in works]
    return Stage(
        name=name,
        jobs=tuple(job.all for job in each),
        gpus_per_job=gpus,
        compute=sum(job.compute for job in each),
        decode=sum(job.decode for job in each),
        read=sum(job.read for job in each),
        storage=storage,
    )


def stages_of(config: Experiment) -> tuple[Stage, ...]:
    """The stages of `reproduce.py`, in their order.

    Raises:
        UserError: something cannot be counted; the message names the setting.
    """
    images, task, k = images_of(config.task), config.task, members(config)
    net = network(config.model, task)
    logits, everything = task.size * FLOAT32, sum(images[split] for split in (task.held_out, *task.reported))
    has_zero_shot = config.model.templates is not None
    models = k + has_zero_shot

    rows = trained_rows(config)
    plain = [row for row in rows if row.regularizer.distill is None]
    distilled = [row for row in rows if row.regularizer.distill is not None]

    cooked = [name for recipe in config.recipes for name in dishes(config, recipe)]
    soups = [name for name in cooked if name not in ENSEMBLES]
    every_split = looked(config, everything)
    copies = everything * 3 * config.model.evaluated_at**2 if config.compute.decoded is not None else 0
    decoded_first = looked(config, everything, from_copies=False)
    found = [
        stage(
            config,
            "initialise",
            [_initialise(config, images)],
            (1 + has_zero_shot) * net.bytes + _features(config, images),
        ),
        _trained(config, "fine-tune", plain, images),
        _trained(config, "distil", distilled, images),
        stage(
            config, "evaluate", [decoded_first] + [every_split] * (models - 1), models * everything * logits + copies
        ),
        stage(config, "recipes", [dish_work(config, name, images) for name in cooked], len(soups) * net.bytes),
        stage(config, "evaluate soups", [every_split] * len(soups), len(soups) * everything * logits),
    ]
    return tuple(part for part in found if part.jobs)


def _trained(config: Experiment, name: str, rows: Sequence[Experiment], images: dict[str, int]) -> Stage:
    """Rows; averages that are no ingredient are looked at on held-out too, and nowhere else."""
    held_out = images[config.task.held_out]
    size = network(config.model, config.task).bytes
    beside = [kinds_of(row.regularizer) - 1 for row in rows]
    works = [
        row_work(row, images) + looked(config, held_out).times(more) for row, more in zip(rows, beside, strict=True)
    ]
    weights = (len(rows) + sum(beside)) * size
    return stage(
        config, name, works, weights + sum(beside) * held_out * config.task.size * FLOAT32, gpus_per_row(config)
    )


def _initialise(config: Experiment, images: dict[str, int]) -> Work:
    """A linear probe looks at train and held-out once; the fit itself is not counted."""
    if config.model.head != "linear_probe":
        return Work()
    both = images[config.task.train] + images[config.task.held_out]
    return looked(config, both, from_copies=False)


def _features(config: Experiment, images: dict[str, int]) -> int:
    """Bytes of the features that a linear probe is fitted to."""
    if config.model.head != "linear_probe":
        return 0
    both = images[config.task.train] + images[config.task.held_out]
    return both * network(config.model, config.task).width * FLOAT32


def costs(config: Experiment) -> Costs:
    """What an experiment takes.

    Raises:
        UserError: as in `stages_of`; or the rows are imported, and nobody trains them.
    """
    if config.sweep.imported is not None:
        raise UserError(f"{config.name}: its rows are imported, not trained, so there is no training to estimate")
    copies = max(1, len(config.replicates))
    once = stages_of(config)
    images, rows = images_of(config.task), trained_rows(config)
    return Costs(
        name=config.name,
        rows=copies * len(rows),
        parameters=network(config.model, config.task).parameters,
        flops=copies * sum(row_work(row, images).trained for row in rows),
        stages=tuple(_repeated(part, copies) for part in once),
        state=max(state_bytes(row) for row in rows),
        copies=copies,
    )


def _repeated(part: Stage, copies: int) -> Stage:
    many = {name: getattr(part, name) * copies for name in ("jobs", "compute", "decode", "read", "storage")}
    return replace(part, **many)
