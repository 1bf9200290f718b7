"""Our fine-tuning loop beside a bare one:  python -m benchmarks.training [--experiment demo] [--rounds 3] [--steps 16]

The bare loop is what one would type: forward, cross-entropy, backward, clipping, the optimiser's step. It has the same
model, optimiser, learning rate, batch size and the very same augmented batches, made by the same code; mixup is off.
So what ours takes longer is its schedule, soft labels, averages, checks, metrics and signals. The two take turns step
by step in one process on the CPU: after each of our steps the bare loop does the same one with a model of its own.

overhead_percent is the median over pairs of steps of (ours - bare) / (bare without its batch): the making of a batch
is on both sides of the difference and not in what it is divided by. The first step of a round, in which memory is
asked for, is not counted, nor is the last, after which ours writes its state: keep_seconds is what that takes, once an
epoch. Batches are made in the process itself, as with compute.loader_workers=0.

Writes results/measured/bench_training.csv, or the file named by --out.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.run import Options, benchmark
from configs.schema import Experiment, load
from finetune.data import TrainingBatches
from finetune.dist import speed_up_depthwise
from finetune.length import Length
from finetune.optim import build
from finetune.train import ONE_PROCESS, fine_tune
from models.classifier import pretrained
from store.rows import row_config
from store.workers import use_threads
from tasks.load import class_names, load_split
from tasks.split import ImageSplit

SEED = 0  # of order and augmentation


@dataclass(frozen=True)
class Step:
    """Seconds of one training step of both loops."""

    ours: float  # its batch included
    bare: float  # without the batch
    batch: float  # to make it, measured in the bare loop

    @property
    def overhead(self) -> float:
        """How much longer ours takes, as a share of the bare step without its batch."""
        return (self.ours - self.bare - self.batch) / self.bare


@dataclass(frozen=True)
class Round:
    """A training by both loops."""

    steps: list[Step]  # without the first and the last
    keep: float  # seconds in which ours writes its state
    models: tuple[nn.Module, nn.Module]  # ours and the bare loop's, trained


def settings(experiment: str, steps: int) -> Experiment:
    """Row 1 of an experiment, at a constant rate, without mixing, for so many steps."""
    config = row_config(load(experiment), 1)
    fixed = {"mixup": 0.0, "cutmix": 0.0, "schedule": "constant", "warmup_steps": 0, "steps": steps}
    optim = replace(config.optim, **fixed)  # type: ignore[type-var]  # a pydantic dataclass, which mypy does not know
    return replace(config, optim=optim)  # type: ignore[type-var]


def bare_steps(model: nn.Module, train: ImageSplit, config: Experiment) -> Callable[[int], tuple[float, float]]:
    """A bare loop over the batches that ours sees; each call is one step, and returns its seconds and its batch's."""
    optim = config.optim
    length = Length.of(optim, len(train))
    batches = TrainingBatches(train.stored, config, length, SEED, ONE_PROCESS)
    speed_up_depthwise(model)  # ours has it too: what is compared is the loop
    optimizer = build(optim, model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()

    def step(number: int) -> tuple[float, float]:
        started = time.perf_counter()
        images = batches[number]
        made = time.perf_counter()
        labels = train.labels[batches.indices(number)]
        loss = F.cross_entropy(model(images), labels, label_smoothing=optim.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm)
        optimizer.step()
        return time.perf_counter() - made, made - started

    return step


def one_round(config: Experiment, train: ImageSplit) -> Round:
    """Train twice from the same weights, ours and the bare loop in turns."""
    names, compute = class_names(config.task), config.compute
    ours, bare = (pretrained(config.model, names).channels_last(compute.channels_last) for _ in range(2))
    bare_step = bare_steps(bare, train, config)
    found: list[Step] = []
    started = 0.0

    def after_ours(steps: int) -> None:
        nonlocal started
        seconds = time.perf_counter() - started
        found.append(Step(seconds, *bare_step(steps - 1)))
        started = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        fine_tune(ours, train, config, run_seed=SEED, folder=Path(folder), after_step=after_ours)
    *counted, last = found[1:]
    return Round(counted, last.ours - statistics.median(step.ours for step in counted), (ours, bare))


def measured(options: Options) -> list[dict[str, Any]]:
    """One row: medians over all steps, and the quartiles of the overhead."""
    use_threads(options.threads)
    config = settings(options.experiment, options.steps)
    train = load_split(config.task, config.task.train)
    rounds = [one_round(config, train) for _ in range(options.rounds)]
    steps = [step for each in rounds for step in each.steps]
    low, middle, high = statistics.quantiles([100 * step.overhead for step in steps], n=4)
    model = rounds[0].models[0]
    row = {
        "model": " ".join(filter(None, (config.model.kind, config.model.name))),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "classes": config.task.size,
        "image_size": config.model.image_size,
        "batch_size": config.optim.batch_size,
        "optimizer": config.optim.kind,
        "augment": config.augment.kind,
        "steps": len(steps),
        "ours_seconds": round(statistics.median(step.ours for step in steps), 4),
        "bare_seconds": round(statistics.median(step.bare + step.batch for step in steps), 4),
        "batch_seconds": round(statistics.median(step.batch for step in steps), 4),
        "overhead_percent": round(middle, 2),
        "overhead_percent_lower_quartile": round(low, 2),
        "overhead_percent_upper_quartile": round(high, 2),
        "keep_seconds": round(statistics.median(each.keep for each in rounds), 3),
        "steps_per_epoch": len(train) // config.optim.batch_size,
    }
    return [row]


if __name__ == "__main__":
    benchmark(
        measured,
        shown=["ours_seconds", "bare_seconds", "batch_seconds", "overhead_percent", "keep_seconds"],
        packages=["torch", "torchvision", "timm"],
        experiment="demo",
        rounds=(3, "trainings from the start"),
        steps=(16, "of each, at least 4"),
        threads=(1, "torch threads"),
    )
