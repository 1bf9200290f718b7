"""The training loop, and all that a restart needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor

from configs.chance import seed, seed_globals
from configs.errors import UserError
from configs.training import Augment, Optim
from finetune.augment import augmentation, augmented_batch
from models.classifier import Classifier
from store.atomic import replacing, write_jsonl
from tasks.split import Split


@dataclass
class Progress:
    """What a restart needs beside weights and optimiser: chance is keyed, so there is no generator state."""

    epoch: int = 0  # epochs finished
    metrics: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up from lr / warmup_steps, then a cosine to 0 at the last step.

    Source: the authors' `cosine_lr`; Appendix J.2.1 gives the cosine.

    >>> o = Optim(lr=1.0, weight_decay=0, epochs=1, batch_size=2, warmup_steps=2, clip_norm=1, label_smoothing=0,
    ...           mixup=0)
    >>> [round(learning_rate(o, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.lr * (1 + math.cos(math.pi * share)) / 2


def epoch_order(n: int, run_seed: int, epoch: int) -> Tensor:
    """(n,) the order of the training images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed(run_seed, "order", epoch)))


def save_state(path: Path, model: Classifier, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write all that a restart needs, whole or not at all."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path, model: Classifier, optimizer: torch.optim.Optimizer) -> Progress:
    """Continue from a saved state, or from the beginning where there is none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return Progress()
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to UnpicklingError for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"training state {path} is damaged ({reason}): delete the file to start this row anew"
        ) from None
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def fine_tune(
    model: Classifier,
    train: Split,
    optim: Optim,
    augment: Augment,
    *,
    size: int,
    run_seed: int,
    folder: Path,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> bool:
    """Train `model` in place, from folder/state.pt where there is one.

    Args:
        model: with its initial weights; parameters without gradient stay as they are.
        train: the training images; the last incomplete batch of an epoch is dropped.
        optim: optimiser, schedule, loss.
        augment: of the training images.
        size: side of the augmented images, pixels.
        run_seed: of the data order, augmentation and mixup.
        folder: state.pt and metrics.jsonl are written there after every epoch, whole or not at all.
        after_epoch: called when an epoch is safely on disk.

    Returns:
        False if the loss stopped being a finite number, which ends training at once.

    Raises:
        UserError: damaged state, full disk, or a batch larger than the training set.
    """
    steps_per_epoch = len(train.labels) // optim.batch_size
    if steps_per_epoch == 0:
        raise UserError(f"optim.batch_size={optim.batch_size} is more than the {len(train.labels)} training images")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(param_groups_weight_decay(model, optim.weight_decay), lr=optim.lr)
    progress = load_state(folder / "state.pt", model, optimizer)
    transform = augmentation(augment, size)
    classes = model.head.out_features
    mixup = Mixup(  # with alpha 0 it only smooths the labels
        optim.mixup, prob=float(optim.mixup > 0), label_smoothing=optim.label_smoothing, num_classes=classes
    )

    model.train()
    for epoch in range(progress.epoch, optim.epochs):
        order = epoch_order(len(train.labels), run_seed, epoch)
        total = torch.zeros((), dtype=torch.float64)
        for i, indices in enumerate(order.split(optim.batch_size)[:steps_per_epoch]):
            step = epoch * steps_per_epoch + i
            lr = learning_rate(optim, step, optim.epochs * steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = augmented_batch(train.images, indices, transform, run_seed, "image", epoch).float()
            seed_globals(run_seed, "mixup", step)
            images, targets = mixup(images, train.labels[indices])
            loss = F.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, optim.clip_norm or math.inf)
            optimizer.step()
            total += loss.detach()
            if not math.isfinite(loss.item()):
                return False
        progress.epoch = epoch + 1
        progress.metrics.append({"epoch": epoch + 1, "loss": total.item() / steps_per_epoch, "lr": lr})
        save_state(folder / "state.pt", model, optimizer, progress)
        write_jsonl(folder / "metrics.jsonl", progress.metrics)
        after_epoch(epoch + 1)
    return True
