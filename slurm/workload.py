"""What a row, an evaluation or a recipe asks of a machine: FLOPs, images, bytes. Nothing is trained or downloaded."""

from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor, nn

from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import Model, Optim, Regularizer
from eval.batch_size import largest_input
from finetune.averages import Averages
from finetune.length import Length
from finetune.meter import BACKWARD_TOO, training_flops
from tasks.load import load_split

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Work:
    """What is to be done; the sum of two is what both ask."""

    trained: float = 0  # FLOPs of training steps, what is computed again for memory included
    inferred: float = 0  # FLOPs of forward passes outside of training
    augmented: int = 0  # images decoded and augmented
    fixed: int = 0  # images decoded for evaluation
    copied: int = 0  # images read from decoded copies
    read: int = 0  # bytes of weights and logits read from the file system
    again: int = 0  # bytes of weights that one task reads once more

    def __add__(self, other: "Work") -> "Work":
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)})

    def times(self, n: int) -> "Work":
        """So much n times."""
        return Work(**{f.name: n * getattr(self, f.name) for f in fields(Work)})


@dataclass(frozen=True)
class Network:
    """A network without its values."""

    parameters: int
    trainable: int
    bytes: int  # of its weights file: parameters and buffers as they are kept
    width: int  # of the features that a head gets
    forward: float  # FLOPs of a forward pass on an image of training
    inference: float  # FLOPs of a forward pass on an image of evaluation
    matrices: int  # numbers that Adafactor keeps of all trainable tensors


def images_of(task: Task) -> dict[str, int]:
    """How many images each split has: by `task.counts`, or where those are null by the data themselves.

    Of a task with some classes only, `task.counts` are scaled by their share.

    Raises:
        UserError: a split that `task.counts` leaves out; a list of held-out images, which is not read; missing data.
    """
    names = (task.train, task.held_out, *task.reported)
    if task.counts is None:
        return {name: len(load_split(task, name)) for name in names}
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
    return {name: counts[name] * task.size // task.num_classes for name in names}


def skeleton(model: Model, classes: int, options: tuple[str, ...]) -> nn.Module:
    """The network on the meta device, where tensors have shapes and no values."""
    from models.classifier import architecture  # noqa: PLC0415  # seconds that other commands need not wait for

    with torch.device("meta"):
        return architecture(model, classes, options).train()


@lru_cache(maxsize=64)
def network(model: Model, task: Task) -> Network:
    """Sizes and FLOPs of a network; texts are counted as if each had `model.max_length` tokens, the most it may have.

    Raises:
        UserError: a network that needs values to know what to do, or whose config is not here.
    """
    examples = largest_input(model, training=True), largest_input(model)
    found = described(skeleton(model, task.size, task.options), *examples)
    if found is None:
        raise UserError(f"the FLOPs of model.name={model.name} cannot be counted: it needs values, not shapes alone")
    return found


def described(built: nn.Module, seen: Tensor, evaluated: Tensor) -> Network | None:
    """Sizes and FLOPs of a network; None where it needs values to know what to do.

    Args:
        built: examples to logits, its last layer `head`, if it has one; on whatever device, since nothing is computed.
        seen: an example of training, of which shape and type count.
        evaluated: the same of evaluation.
    """
    training, evaluation = training_flops(built, seen), training_flops(built, evaluated)
    if training is None or evaluation is None:
        return None
    trainable = [parameter for parameter in built.parameters() if parameter.requires_grad]
    head = getattr(built, "head", None)
    return Network(
        parameters=sum(parameter.numel() for parameter in built.parameters()),
        trainable=sum(parameter.numel() for parameter in trainable),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in built.state_dict().values()),
        width=head.in_features if isinstance(head, nn.Linear) else 0,
        forward=training / BACKWARD_TOO,
        inference=evaluation / BACKWARD_TOO,
        matrices=sum(_adafactor(parameter) for parameter in trainable),
    )


def _adafactor(parameter: torch.Tensor) -> int:
    """Numbers that it keeps of a tensor: a mean for each row and column of a matrix, else one for each element."""
    if parameter.ndim < 2:
        return parameter.numel()
    rows, columns = parameter.shape[-2:]
    return parameter.numel() // columns + parameter.numel() // rows


def moments(optim: Optim, net: Network) -> int:
    """Bytes of an optimiser's state, but for its counts of steps."""
    match optim.kind:
        case "adamw" | "adam":
            return 2 * FLOAT32 * net.trainable
        case "rmsprop":
            return (1 + (optim.momentum > 0)) * FLOAT32 * net.trainable
        case "sgd":
            return (optim.momentum > 0) * FLOAT32 * net.trainable
        case "adafactor":
            return FLOAT32 * net.matrices


def kinds_of(regularizer: Regularizer) -> int:
    """How many kinds of weights a row ends with: raw ones and each average."""
    return 1 + len(regularizer.ema) + (regularizer.swa is not None)


@lru_cache(maxsize=256)
def averages_bytes(model: Model, task: Task, regularizer: Regularizer) -> int:
    """Bytes of the averages along a training."""
    tensors = Averages.of(skeleton(model, task.size, task.options).state_dict(), regularizer, 1).tensors()
    return sum(tensor.numel() * tensor.element_size() for kind in tensors.values() for tensor in kind.values())


def state_bytes(row: Experiment) -> int:
    """Bytes of a row's state.pt, which is there while it trains."""
    net = network(row.model, row.task)
    best = kinds_of(row.regularizer) * net.bytes if row.optim.keep == "best" else 0
    return net.bytes + moments(row.optim, net) + averages_bytes(row.model, row.task, row.regularizer) + best


def row_work(row: Experiment, images: dict[str, int]) -> Work:
    """What training a row asks, its looks at held-out during training included and its last one not.

    A step is a forward pass and a backward one, which costs two; SAM does both twice; gradient checkpointing does the
    forward pass again; distillation adds a forward pass of each teacher. Frozen parts do not count less.

    Args:
        row: the row's settings, of `finetune.rows.row_config`.
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
    looks = -(-length.steps // optim.evaluate_every) if optim.evaluate_every else 0
    look = looked(row, images[row.task.held_out]).times(looks * kinds_of(regularizer))
    return Work(trained=passes * net.forward * seen, augmented=seen) + look


def looked(config: Experiment, images: int, *, from_copies: bool = True) -> Work:
    """What a forward pass over some images of evaluation asks; they were decoded before where copies are kept."""
    net = network(config.model, config.task)
    copied = images if from_copies and config.compute.decoded is not None else 0
    return Work(inferred=net.inference * images, fixed=images - copied, copied=copied)
