"""Sizes and FLOPs of a network and of its training state, counted without a single value."""

import os
import socket
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from configs.data import Task
from configs.errors import UserError
from configs.schema import Experiment
from configs.training import PROMPTED, SMALLEST_FACTORED, Model, Optim, Regularizer
from eval.batch_size import largest_input
from finetune.averages import Averages
from finetune.log import BACKWARD_TOO, training_flops

FLOAT32, BFLOAT16 = 4, 2  # bytes
HUB_KINDS = ("transformers", "text_encoder", *PROMPTED)  # of models whose configs are downloaded
HUB_SECONDS = 3  # to wait for the hub


@dataclass(frozen=True)
class Network:
    """Sizes of a network, without its values."""

    parameters: int
    trainable: int
    bytes: int  # of its weights file: parameters and buffers
    width: int  # of the features that the head gets
    forward: float  # FLOPs of a forward pass on an image of training
    inference: float  # FLOPs of a forward pass on an image of evaluation
    matrices: int  # numbers that Adafactor keeps for all trainable tensors


def network(model: Model, task: Task) -> Network:
    """Sizes and FLOPs of a network; each text counts as `model.max_length` tokens, the most it may have.

    Raises:
        UserError: a network that needs values to know what to do, or whose config is not here.
    """
    return _network(model, task.size, task.answers)


@lru_cache(maxsize=64)
def _network(model: Model, classes: int, answers: tuple[str, ...]) -> Network:
    if model.kind in HUB_KINDS and model.weights is None:
        _skip_silent_hub()
    found = measured(_skeleton(model, classes, answers), largest_input(model, training=True), largest_input(model))
    if found is None:
        raise UserError(f"the FLOPs of model.name={model.name} cannot be counted: it needs values, not shapes alone")
    return found


def _skeleton(model: Model, classes: int, answers: tuple[str, ...]) -> nn.Module:
    from models.classifier import architecture  # noqa: PLC0415  # seconds that other commands need not wait for

    with torch.device("meta"):  # where tensors have shapes and no values
        return architecture(model, classes, answers).train()


@lru_cache(maxsize=1)
def _skip_silent_hub() -> None:
    """Where the hub cannot be reached, do not ask it: its client tries for half a minute, for each network."""
    from huggingface_hub import constants  # noqa: PLC0415  # a tenth of a second that others need not wait for

    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ):
        return  # it may be reached by way of that
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


def measured(built: nn.Module, seen: Tensor, evaluated: Tensor) -> Network | None:
    """Sizes and FLOPs of a network; None where it needs values to know what to do.

    Args:
        built: examples to logits, its last layer `head`, if it has one; on any device, since nothing is computed.
        seen: an example of training, for its shape and type.
        evaluated: the same of evaluation.
    """
    training = training_flops(built, seen)
    alike = (seen.shape, seen.dtype) == (evaluated.shape, evaluated.dtype)
    evaluation = training if alike else training_flops(built, evaluated)
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
        matrices=sum(factored(parameter) for parameter in trainable),
    )


def factored(parameter: Tensor) -> int:
    """Second moments that Adafactor keeps of a tensor: means along its two largest dimensions, if both are large."""
    sizes = sorted(parameter.shape)
    if parameter.ndim < 2 or sizes[-2] < SMALLEST_FACTORED:
        return parameter.numel()
    return parameter.numel() // sizes[-1] + parameter.numel() // sizes[-2]


def moments(optim: Optim, net: Network) -> int:
    """Bytes of an optimiser's state, without its counts of steps."""
    has_momentum = optim.momentum > 0
    match optim.kind:
        case "adamw" | "adam":
            return 2 * FLOAT32 * net.trainable
        case "rmsprop":
            return (1 + has_momentum) * FLOAT32 * net.trainable
        case "sgd":
            return has_momentum * FLOAT32 * net.trainable
        case "adafactor":
            return FLOAT32 * net.matrices + has_momentum * BFLOAT16 * net.trainable


def weights_per_row(regularizer: Regularizer) -> int:
    """How many files of weights a row ends with: the raw ones and each average."""
    return 1 + len(regularizer.ema) + (regularizer.swa is not None)


def state_bytes(row: Experiment) -> int:
    """Bytes of a row's state.pt, which is there while it trains."""
    net = network(row.model, row.task)
    best = weights_per_row(row.regularizer) * net.bytes if row.optim.keep == "best" else 0
    return net.bytes + moments(row.optim, net) + _averages_bytes(row.model, row.task, row.regularizer) + best


@lru_cache(maxsize=256)
def _averages_bytes(model: Model, task: Task, regularizer: Regularizer) -> int:
    tensors = Averages(_skeleton(model, task.size, task.answers).state_dict(), regularizer, 1).tensors()
    return sum(tensor.numel() * tensor.element_size() for kind in tensors.values() for tensor in kind.values())
