"""Our fine-tuning loop beside a bare one:  python -m benchmarks.training [--epochs 3] [--threads 2]

The floor is forward, backward and AdamW on batches already in memory, with the same model and the same images: what
remains is our augmentation, schedule and bookkeeping. Both are timed in turns, in one process; medians are compared.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from configs.schema import Experiment, load
from finetune.loop import fine_tune
from finetune.rows import row_config
from models.classifier import pretrained
from store.workers import use_threads
from tasks.load import class_names, load_split
from tasks.split import Split


def ours(config: Experiment, train: Split) -> float:
    """Seconds of one epoch of `finetune.loop.fine_tune`, state and metrics written as ever."""
    model = pretrained(config.model, class_names(config.task))
    optim = replace(config.optim, epochs=1)  # type: ignore[type-var]  # a pydantic dataclass, which mypy does not know
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        size = config.model.image_size
        fine_tune(model, train, optim, config.augment, size=size, run_seed=0, folder=Path(folder))
        return time.perf_counter() - started


def bare(config: Experiment, train: Split) -> float:
    """Seconds of the same number of steps of a loop that does nothing but learn."""
    model = pretrained(config.model, class_names(config.task)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = torch.arange(len(train.labels)).split(config.optim.batch_size)[:-1]
    started = time.perf_counter()
    for indices in batches:
        loss = F.cross_entropy(model(train.images[indices]), train.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    """Print the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    use_threads(arguments.threads)
    config = row_config(load("demo"), 1)
    train = load_split(config.task, config.task.train)
    pairs = [(ours(config, train), bare(config, train)) for _ in range(arguments.epochs)]
    mine, floor = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{len(train.labels)} images, {arguments.threads} threads, median of {arguments.epochs} epochs")
    print(f"ours {mine:.2f} s, bare loop {floor:.2f} s, ratio {mine / floor:.2f}")


if __name__ == "__main__":
    main()
