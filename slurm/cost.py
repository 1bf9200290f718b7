"""What an experiment takes, estimated from its settings: GPU-hours, wall time and bytes of each stage.

FLOPs, images and bytes are counted; how fast a machine works is assumed in configs/plan/assumed.yaml.
"""

import heapq
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import PROMPTED, Model
from eval.forward import largest_input
from finetune.averages import FINEST_FLOAT32
from finetune.length import Length
from finetune.log import BACKWARD_TOO, PEAKS, peak_flops, training_flops
from models.probe import fit_flops
from soups.experiment.soups import ENSEMBLES, outputs_of
from store.rows import row_config
from tasks.load import count

Hours = NDArray[np.float64]  # (3,): of computing, of decoding while the GPU computes, of reading before it does

HOUR = 3600  # seconds
GIGA = 10**9
FLOAT32 = 4  # bytes
NODE = 8  # GPUs that share a row under FSDP, where plan.gpus_per_row does not say
LEARNED_READS = 2  # times that a step of a learned soup reads each ingredient: to mix, and for the inner products
HUB_KINDS = ("transformers", "text_encoder", *PROMPTED)  # kinds of models whose configs are downloaded
HUB_SECONDS = 3  # to wait for the hub
# Float32 numbers that an optimiser keeps for each parameter, without and with momentum. Adafactor's momentum is
# bfloat16, and the rows and columns of its second moments are too few to count.
MOMENTS: dict[str, tuple[float, float]] = {
    "adamw": (2, 2),
    "adam": (2, 2),
    "rmsprop": (1, 2),
    "sgd": (0, 1),
    "adafactor": (0, 0.5),
}


@dataclass(frozen=True)
class Network:
    """Sizes of a network, without its values."""

    parameters: int
    trainable: int
    bytes: int  # of its weights file: parameters and buffers
    width: int  # of the features that the head gets
    forward: float  # FLOPs of a forward pass on an example of training
    inference: float  # FLOPs of a forward pass on an example of evaluation


@lru_cache(maxsize=64)
def network(model: Model, task: Task) -> Network:
    """Sizes and FLOPs of a network, for the longest text there may be; a UserError where it needs values."""
    from models.classifier import architecture  # noqa: PLC0415  # seconds that other commands need not wait for

    if model.kind in HUB_KINDS and model.weights is None:
        _skip_silent_hub()
    with torch.device("meta"):  # where tensors have shapes and no values
        built = architecture(model, task.size, task.answers).train()
    seen, evaluated = largest_input(model, training=True), largest_input(model)
    training = training_flops(built, seen)
    evaluation = training if seen.shape == evaluated.shape else training_flops(built, evaluated)
    if training is None or evaluation is None:
        raise UserError(f"the FLOPs of model.name={model.name} cannot be counted: it needs values, not shapes alone")
    head = getattr(built, "head", None)
    return Network(
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        trainable=sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in built.state_dict().values()),
        width=head.in_features if isinstance(head, nn.Linear) else 0,
        forward=training / BACKWARD_TOO,
        inference=evaluation / BACKWARD_TOO,
    )


@lru_cache(maxsize=1)
def _skip_silent_hub() -> None:
    """Where the hub cannot be reached, do not ask it: its client tries for half a minute, for each network."""
    from huggingface_hub import constants  # noqa: PLC0415  # a tenth of a second that others need not wait for

    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = not getproxies()  # through a proxy it may be reached all the same


def images_of(task: Task) -> dict[str, int]:
    """The number of images of each split, from `task.counts`, or from the data; a UserError where it is not known."""
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
    # A task with some of the classes only has as large a part of the images.
    return {name: counts[name] * task.size // task.num_classes for name in names}


def state_bytes(row: Experiment) -> int:
    """Bytes of a row's state.pt: weights, moments, a copy for each EMA, a float64 sum for SWA, the best weights."""
    net, averages = network(row.model, row.task), row.regularizer
    copies = 1 + sum(1 + (1 - decay < FINEST_FLOAT32) for decay in averages.ema) + 2 * (averages.swa is not None)
    copies += len(averages.made) if row.optim.keep == "best" else 0
    return copies * net.bytes + int(FLOAT32 * net.trainable * MOMENTS[row.optim.kind][row.optim.momentum > 0])


@dataclass(frozen=True)
class Stage:
    """Jobs that may run at the same time; the next stage waits for all of them."""

    name: str
    jobs: tuple[float, ...]  # GPU-hours of each
    gpus_per_job: int
    bound: str  # what takes longest: computing, decoding or reading; empty where there is nothing to do
    storage: int  # bytes that are kept


@dataclass(frozen=True)
class Costs:
    """Costs of a whole experiment; hours and bytes are those of all its replicates."""

    rows: int  # that are trained
    parameters: int
    flops: float  # of training all rows
    stages: tuple[Stage, ...]
    state: int  # bytes of the largest state.pt; each row that trains has one


def total(stages: Sequence[Stage], gpus: Sequence[int]) -> tuple[float, list[float | None], int]:
    """GPU-hours of stages, their wall time on each number of GPUs (None where a job needs more), and bytes kept."""

    def wall(number: int) -> float | None:
        if any(each.gpus_per_job > number for each in stages):
            return None
        return sum(makespan([job / s.gpus_per_job for job in s.jobs], number // s.gpus_per_job) for s in stages)

    return sum(sum(each.jobs) for each in stages), [wall(n) for n in gpus], sum(each.storage for each in stages)


def makespan(jobs: Sequence[float], workers: int) -> float:
    """When the last job ends if each free worker takes the longest one left; at most 4/3 of the best order's time.

    Source: Graham 1969.

    >>> makespan([3, 3, 2, 2, 2], workers=2)
    7
    """
    free: list[float] = [0] * min(workers, max(1, len(jobs)))
    for job in sorted(jobs, reverse=True):
        heapq.heapreplace(free, free[0] + job)
    return max(free)


class Work:
    """Hours of the jobs of one sweep, each (3,): computing, decoding and reading, on one GPU and its share of cores."""

    def __init__(self, config: Experiment):
        self.config, self.plan, self.images = config, config.plan, images_of(config.task)
        self.net, self.held_out = network(config.model, config.task), self.images[config.task.held_out]
        self.pool = config.sweep.size + config.cooking.initialisation  # K, the models that recipes choose from
        gpu, precision = config.plan.gpu, config.compute.precision
        peak = peak_flops(gpu, precision)
        if peak is None:
            names = ", ".join(" ".join(words).lower() for words in PEAKS)
            raise UserError(
                f"the peak of gpu={gpu} in compute.precision={precision} is not known; known are {names}, those "
                "before the A100 without bf16 (compute.precision=fp16)"
            )
        self.peak = peak

    def hours(self, flops: float = 0, core_seconds: float = 0, read_seconds: float = 0) -> Hours:
        """FLOPs at the GPU's peak, decoding (texts need none) by the cores of a GPU, and reading, in hours."""
        decoding = 0 if self.config.task.is_text else core_seconds / self.plan.cores_per_gpu
        return np.array([flops / self.peak, decoding, read_seconds]) / HOUR

    def reading(self, size: int, again: int = 0) -> Hours:
        """Bytes of weights, and those that are read `again`, from a node's memory if it holds the pool."""
        fits = self.pool * self.net.bytes <= self.plan.cache_gigabytes * GIGA
        again_per_second = self.plan.reread_gigabytes if fits else self.plan.read_gigabytes
        return self.hours(read_seconds=(size / self.plan.read_gigabytes + again / again_per_second) / GIGA)

    def evaluation(self, images: int, *, from_copies: bool = True) -> Hours:
        """One forward pass over images of evaluation, which are decoded already where copies are kept."""
        copied = from_copies and self.config.compute.decoded is not None
        rate = self.plan.copied_per_core if copied else self.plan.fixed_per_core
        return self.hours(self.net.inference * images / self.plan.inference_utilisation, images / rate)

    def probe_fit(self, images: int) -> Hours:
        """The fit of a linear probe for each value of C, in float32 whatever the precision."""
        model = self.config.model
        flops = fit_flops(images, self.net.width, self.config.task.size, len(model.probe_c))
        slower = self.peak / (peak_flops(self.plan.gpu, "fp32") or self.peak)
        return self.hours(slower * flops / self.plan.inference_utilisation)

    def steps(self, row: Experiment) -> int:
        """How many steps a row takes; raises a UserError for a batch larger than the training set."""
        return Length.of(row.optim, self.images[row.task.train]).steps

    def flops(self, row: Experiment) -> float:
        """FLOPs of a row's training steps; frozen parts do not count less."""
        passes = BACKWARD_TOO + row.compute.gradient_checkpointing
        passes *= 2 if row.regularizer.sam is not None else 1
        passes += len(row.regularizer.distill.rows) if row.regularizer.distill is not None else 0
        return passes * network(row.model, row.task).forward * self.steps(row) * row.optim.batch_size

    def row(self, row: Experiment) -> Hours:
        """Training of a row, with evaluations on held-out on the way, and of averages that are no ingredient."""
        steps, every, kinds = self.steps(row), row.optim.evaluate_every, len(row.regularizer.made)
        evaluations = kinds * (-(-steps // every) if every else 0) + kinds - 1
        decoding = steps * row.optim.batch_size / self.plan.augmented_per_core
        return self.hours(self.flops(row) / self.plan.utilisation, decoding) + evaluations * self.evaluation(
            self.held_out
        )

    def recipe(self, output: str) -> Hours:
        """Making one of `soups.experiment.soups.outputs_of`, at the longest for recipes that may end sooner."""
        recipe, k, pool, cooking = output.partition("/")[0], self.pool, self.pool * self.net.bytes, self.config.cooking
        evaluation, learned = self.evaluation(self.held_out), cooking.learned
        if recipe in ENSEMBLES:  # means of logits
            return self.reading(k * self.held_out * self.config.task.size * FLOAT32)
        if recipe.startswith("learned"):
            flops = BACKWARD_TOO * self.net.inference * self.held_out * learned.epochs
            steps = learned.epochs * -(-self.held_out // learned.batch_size)
            # Left in their files, all are read at every step.
            again = LEARNED_READS * steps * pool if learned.place == "stream" else 0
            decoding = evaluation * np.array([0, 1, 0])
            return self.hours(flops / self.plan.utilisation) + decoding + self.reading(pool, again)
        if recipe == "greedy_with_replacement":
            return cooking.rounds * k * evaluation + self.reading(pool, (cooking.rounds - 1) * pool)
        if recipe.startswith("greedy"):
            return (k - 1) * evaluation + self.reading(pool)
        few = {"best": 1, "second_best": 1, "wise_ft": 2, "subset": len(cooking.rows)}
        return self.reading(few.get(recipe, k) * self.net.bytes)


def gpus_per_row(config: Experiment) -> int:
    """How many GPUs train a row together."""
    return config.plan.gpus_per_row or (NODE if config.compute.strategy == "fsdp" else 1)


def stage_of(name: str, works: Sequence[Hours], storage: int, gpus: int = 1) -> Stage:
    """A stage of jobs with these (3,) hours: images are decoded while the GPU computes, weights are read before."""
    jobs = tuple(float(max(computing, decoding) + reading) for computing, decoding, reading in works)
    sums = dict(zip(("computing", "decoding", "reading"), sum(works, np.zeros(3)), strict=True))
    return Stage(name, jobs, gpus, max(sums, key=lambda kind: sums[kind]) if any(sums.values()) else "", storage)


def stages_of(work: Work, rows: Sequence[Experiment]) -> tuple[Stage, ...]:
    """The stages of `reproduce.py`, in their order, for rows with these settings."""
    config, net, images, held_out = work.config, work.net, work.images, work.held_out
    task, model = config.task, config.model
    logits, everything = task.size * FLOAT32, held_out + sum(images[split] for split in task.reported)
    has_zero_shot, has_probe = model.templates is not None, model.head == "linear_probe"

    probed = (images[task.train] + held_out) * has_probe  # images whose features are kept
    heads = has_probe * len(model.probe_c) * task.size * (net.width + 1)
    probe = work.evaluation(probed, from_copies=False) + work.probe_fit(images[task.train]) * has_probe
    kept = (1 + has_zero_shot) * net.bytes + (probed * net.width + heads) * FLOAT32
    found = [stage_of("initialise", [probe], kept)]
    for name, is_distilled in (("fine-tune", False), ("distil", True)):
        own = [row for row in rows if (row.regularizer.distill is not None) == is_distilled]
        files = sum(len(row.regularizer.made) for row in own)
        kept = files * net.bytes + (files - len(own)) * held_out * logits
        found.append(stage_of(name, [work.row(row) for row in own], kept, gpus_per_row(config)))

    # Each kind of a row's weights that single models are chosen from, the initialisation and the zero-shot model.
    models = 1 + has_zero_shot + config.sweep.size * max(1, len(config.cooking.individuals))
    copies = everything * 3 * model.evaluated_at**2 if config.compute.decoded is not None else 0
    evaluation = work.evaluation(everything)
    evaluations = [work.evaluation(everything, from_copies=False)] + [evaluation] * (models - 1)
    outputs = [name for recipe in config.recipes for name in outputs_of(config, recipe)]
    soups = len([name for name in outputs if name not in ENSEMBLES])
    found += [
        stage_of("evaluate", evaluations, models * everything * logits + copies),
        stage_of("recipes", [work.recipe(name) for name in outputs], soups * net.bytes),
        stage_of("evaluate soups", [evaluation] * soups, soups * everything * logits),
    ]
    return tuple(stage for stage in found if stage.jobs)


def costs(config: Experiment) -> Costs:
    """What an experiment takes; a UserError names what cannot be counted, or says that rows are imported."""
    if config.sweep.imported is not None:
        raise UserError(f"{config.name}: its rows are imported, not trained, so there is no training to estimate")
    work, copies = Work(config), max(1, len(config.replicates))
    rows = [row_config(config, row) for row in range(1, config.sweep.size + 1)]
    stages = stages_of(work, rows)
    return Costs(
        rows=copies * len(rows),
        parameters=work.net.parameters,
        flops=copies * sum(map(work.flops, rows)),
        stages=tuple(replace(each, jobs=each.jobs * copies, storage=each.storage * copies) for each in stages),
        state=max(map(state_bytes, rows)),
    )
