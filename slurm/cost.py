"""What an experiment takes, estimated from its settings: GPU-hours, wall time and bytes of each stage.

FLOPs, images and bytes are counted; how fast a machine works is assumed in configs/plan/assumed.yaml.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from finetune.length import Length
from finetune.log import BACKWARD_TOO, PEAKS, peak_flops
from models.probe import fit_flops
from slurm.sizes import FLOAT32, network, state_bytes, weights_per_row
from soups.experiment.cook import ENSEMBLES, dishes
from store.rows import row_config
from tasks.load import count

HOUR = 3600  # seconds
GIGA = 10**9
NODE = 8  # GPUs that share a row under FSDP, where plan.gpus_per_row does not say
LEARNED_READS = 2  # times that a step of a learned soup reads each ingredient: to mix, and for the inner products


@dataclass(frozen=True)
class Work:
    """What a job has to do."""

    trained: float = 0  # FLOPs of training steps, with what gradient checkpointing computes again
    inferred: float = 0  # FLOPs of forward passes outside of training
    fitted: float = 0  # FLOPs of a linear probe's fit, in float32 whatever the precision
    augmented: int = 0  # images decoded and augmented
    fixed: int = 0  # images decoded for evaluation
    copied: int = 0  # images read from decoded copies
    read: int = 0  # bytes of weights and logits read from the file system
    again: int = 0  # bytes of weights that one job reads once more

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})

    def times(self, n: int) -> "Work":
        """The same work n times."""
        return Work(**{f.name: n * getattr(self, f.name) for f in fields(Work)})


@dataclass(frozen=True)
class Stage:
    """Jobs that may run at the same time; the next stage waits for all of them."""

    name: str
    jobs: tuple[float, ...]  # GPU-hours of each
    gpus_per_job: int
    bound: str  # what takes longest: computing, decoding or reading; empty where there is nothing to do
    storage: int  # bytes that are kept

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all jobs."""
        return sum(self.jobs)

    def wall_hours(self, gpus: int) -> float | None:
        """Hours on so many GPUs, the longest job first; None where they are too few for one job."""
        slots = gpus // self.gpus_per_job
        return makespan([job / self.gpus_per_job for job in self.jobs], slots) if slots else None


@dataclass(frozen=True)
class Costs:
    """Costs of a whole experiment; hours and bytes are those of all its replicates."""

    rows: int  # that are trained
    parameters: int
    flops: float  # of training all rows
    stages: tuple[Stage, ...]
    state: int  # bytes of the largest state.pt; each row that trains has one
    copies: int  # replicates

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all stages."""
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
    """When the last job ends if each free worker takes the longest one left; at most 4/3 of the best order's time.

    Source: Graham 1969, longest processing time first.

    >>> makespan([3, 3, 2, 2, 2], workers=2)
    7
    """
    free: list[float] = [0] * min(workers, max(1, len(jobs)))
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(free, free[0] + job)
    return max(free)


def images_of(task: Task) -> dict[str, int]:
    """The number of images of each split: from `task.counts`, or where those are null from the data themselves.

    Raises:
        UserError: a split that `task.counts` leaves out; a list of held-out images, which is not read; missing data.
    """
    names = (task.train, task.held_out, *task.reported)
    if task.counts is None:
        return {name: count(task, name) for name in names}
    if task.held_out_index is not None:
        raise UserError(
            "task.held_out_index names a file, and a plan reads none: for the plan, say how many it holds out, "
            "e.g. task.held_out_index=null task.held_out_per_class=26"
        )
    counts = dict(task.counts)
    if task.held_out_per_class is not None or task.held_out_share is not None:
        whole = counts.get(task.train, 0)
        share = round(whole * (task.held_out_share or 0))
        counts[task.held_out] = task.held_out_per_class * task.num_classes if task.held_out_per_class else share
        counts[task.train] = whole - counts[task.held_out]
    missing = [name for name in names if counts.get(name, 0) <= 0]
    if missing:
        raise UserError(f"how many images split {missing[0]!r} has is not known: type +task.counts.{missing[0]}=N")
    return {name: counts[name] * task.size // task.num_classes for name in names}  # of a task with some classes only


def forward_work(config: Experiment, images: int, *, from_copies: bool = True) -> Work:
    """One forward pass over images of evaluation, which are decoded already where copies are kept."""
    copied = images if from_copies and config.compute.decoded is not None else 0
    inferred = network(config.model, config.task).inference * images
    return Work(inferred=inferred, fixed=images - copied, copied=copied)


def row_work(row: Experiment, images: dict[str, int]) -> Work:
    """Training of a row with its evaluations on held-out on the way, without the last one.

    A step is a forward pass and a backward one, which costs two; SAM does both twice; gradient checkpointing does the
    forward pass again; distillation adds a forward pass of each teacher. Frozen parts do not count less.

    Args:
        row: the row's settings, from `store.rows.row_config`.
        images: how many each split has.

    Raises:
        UserError: as in `network`; a batch larger than the training set.
    """
    net, optim, regularizer = network(row.model, row.task), row.optim, row.regularizer
    length = Length.of(optim, images[row.task.train])
    seen = length.steps * length.batch_size
    passes = BACKWARD_TOO + row.compute.gradient_checkpointing
    passes *= 2 if regularizer.sam is not None else 1
    passes += len(regularizer.distill.rows) if regularizer.distill is not None else 0
    evaluations = -(-length.steps // optim.evaluate_every) if optim.evaluate_every else 0
    held_out = forward_work(row, images[row.task.held_out]).times(evaluations * weights_per_row(regularizer))
    return Work(trained=passes * net.forward * seen, augmented=seen) + held_out


def pool_size(config: Experiment) -> int:
    """K, the models of the pool: fine-tuned rows, and the initialisation where it is a candidate."""
    return config.sweep.size + config.cooking.initialisation


def recipe_work(config: Experiment, output: str, images: dict[str, int]) -> Work:
    """What making one output takes, at the longest for recipes that may end sooner.

    Args:
        config: of the experiment.
        output: one of `soups.experiment.cook.dishes`.
        images: how many each split has.
    """
    recipe, k, held_out = output.partition("/")[0], pool_size(config), images[config.task.held_out]
    net, evaluation, learned = (
        network(config.model, config.task),
        forward_work(config, held_out),
        config.cooking.learned,
    )
    if recipe in ENSEMBLES:
        return Work(read=k * held_out * config.task.size * FLOAT32)
    match recipe:
        case "greedy" | "greedy_random_order":
            return evaluation.times(k - 1) + Work(read=k * net.bytes)
        case "greedy_with_replacement":
            tries = config.cooking.rounds * k
            return evaluation.times(tries) + Work(read=k * net.bytes, again=(tries - k) * net.bytes)
        case "learned" | "learned_by_layer" | "learned_by_tensor":  # left in their files, all are read at every step
            steps = learned.epochs * -(-held_out // learned.batch_size) if learned.place == "stream" else 0
            trained = BACKWARD_TOO * net.inference * held_out * learned.epochs
            again = LEARNED_READS * steps * k * net.bytes
            return replace(evaluation, inferred=0, trained=trained, read=k * net.bytes, again=again)
    few = {"best": 1, "second_best": 1, "wise_ft": 2, "subset": len(config.cooking.rows)}
    return Work(read=few.get(recipe, k) * net.bytes)


def hours(config: Experiment, work: Work) -> tuple[float, float, float]:
    """Hours of computing, decoding and reading of a job, on one GPU and its share of CPU cores, as the plan assumes.

    Raises:
        UserError: a GPU that is not in the table, or one without the experiment's precision.
    """
    plan, precision = config.plan, config.compute.precision
    flops = peak_flops(plan.gpu, precision)
    if flops is None:
        names = ", ".join(" ".join(words).lower() for words in PEAKS)
        raise UserError(
            f"the peak of gpu={plan.gpu} in compute.precision={precision} is not known; known are {names}, those "
            "before the A100 without bf16 (compute.precision=fp16)"
        )
    pool = pool_size(config) * network(config.model, config.task).bytes
    again = plan.reread_gigabytes if pool <= plan.cache_gigabytes * GIGA else plan.read_gigabytes
    core_seconds = (
        work.augmented / plan.augmented_per_core + work.fixed / plan.fixed_per_core + work.copied / plan.copied_per_core
    )
    if config.task.is_text:  # nothing is decoded
        core_seconds = 0.0
    seconds = (work.trained / plan.utilisation + work.inferred / plan.inference_utilisation) / flops
    fit = work.fitted / plan.inference_utilisation / (peak_flops(plan.gpu, "fp32") or flops)
    reading = (work.read / plan.read_gigabytes + work.again / again) / GIGA
    return (seconds + fit) / HOUR, core_seconds / plan.cores_per_gpu / HOUR, reading / HOUR


def gpus_per_row(config: Experiment) -> int:
    """How many GPUs train a row together."""
    return config.plan.gpus_per_row or (NODE if config.compute.strategy == "fsdp" else 1)


def _stage(config: Experiment, name: str, works: Sequence[Work], storage: int, gpus: int = 1) -> Stage:
    each = [hours(config, work) for work in works]
    # Images are decoded while the GPU computes; weights are read before it does.
    jobs = tuple(max(compute, decode) + read for compute, decode, read in each)
    sums = dict(zip(("computing", "decoding", "reading"), map(sum, zip(*each, strict=True)), strict=False))
    bound = max(sums, key=lambda kind: sums[kind]) if any(sums.values()) else ""
    return Stage(name, jobs, gpus, bound, storage)


def initialise_work(config: Experiment, images: dict[str, int]) -> Work:
    """Row 0: a linear probe sees train and held-out once, and is fitted for each value of C; else nothing."""
    model, task = config.model, config.task
    if model.head != "linear_probe":
        return Work()
    fitted = fit_flops(images[task.train], network(model, task).width, task.size, len(model.probe_c))
    both = images[task.train] + images[task.held_out]
    return forward_work(config, both, from_copies=False) + Work(fitted=fitted)


def stages_of(config: Experiment, rows: Sequence[Experiment]) -> tuple[Stage, ...]:
    """The stages of `reproduce.py`, in their order, for rows with these settings; raises as `network` and `peak`."""
    task, model, images = config.task, config.model, images_of(config.task)
    net, held_out = network(model, task), images[task.held_out]
    logits, everything = task.size * FLOAT32, held_out + sum(images[split] for split in task.reported)
    has_zero_shot = model.templates is not None

    head = 0  # bytes of a linear probe's features and of its heads for each value of C
    if model.head == "linear_probe":
        head = (images[task.train] + held_out) * net.width + len(model.probe_c) * task.size * (net.width + 1)
    kept = (1 + has_zero_shot) * net.bytes + head * FLOAT32
    found = [_stage(config, "initialise", [initialise_work(config, images)], kept)]
    for name, is_distilled in (("fine-tune", False), ("distil", True)):
        own = [row for row in rows if (row.regularizer.distill is not None) == is_distilled]
        # Averages that are no ingredient are evaluated on held-out too, and nowhere else.
        beside = [weights_per_row(row.regularizer) - 1 for row in own]
        works = [
            row_work(row, images) + forward_work(config, held_out).times(more)
            for row, more in zip(own, beside, strict=True)
        ]
        kept = (len(own) + sum(beside)) * net.bytes + sum(beside) * held_out * logits
        found.append(_stage(config, name, works, kept, gpus_per_row(config)))

    # Each kind of a row's weights that single models are chosen from, the initialisation and the zero-shot model.
    models = 1 + has_zero_shot + config.sweep.size * max(1, len(config.cooking.individuals))
    copies = everything * 3 * model.evaluated_at**2 if config.compute.decoded is not None else 0
    evaluation = forward_work(config, everything)
    evaluations = [forward_work(config, everything, from_copies=False)] + [evaluation] * (models - 1)
    outputs = [name for recipe in config.recipes for name in dishes(config, recipe)]
    soups = [name for name in outputs if name not in ENSEMBLES]
    found += [
        _stage(config, "evaluate", evaluations, models * everything * logits + copies),
        _stage(config, "recipes", [recipe_work(config, name, images) for name in outputs], len(soups) * net.bytes),
        _stage(config, "evaluate soups", [evaluation] * len(soups), len(soups) * everything * logits),
    ]
    return tuple(stage for stage in found if stage.jobs)


def costs(config: Experiment) -> Costs:
    """What an experiment takes.

    Raises:
        UserError: something cannot be counted, and the message names the setting; or the rows are imported, and nobody
            trains them.
    """
    if config.sweep.imported is not None:
        raise UserError(f"{config.name}: its rows are imported, not trained, so there is no training to estimate")
    copies, images = max(1, len(config.replicates)), images_of(config.task)
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    return Costs(
        rows=copies * len(rows),
        parameters=network(config.model, config.task).parameters,
        flops=copies * sum(row_work(row, images).trained for row in rows),
        stages=tuple(
            replace(stage, jobs=stage.jobs * copies, storage=stage.storage * copies)
            for stage in stages_of(config, rows)
        ),
        state=max(state_bytes(row) for row in rows),
        copies=copies,
    )
