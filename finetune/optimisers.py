"""Optimisers and schedules: torch's, chosen by name."""

import math

import torch
from timm.optim import param_groups_weight_decay
from torch import nn

from configs.training import Optim


def build(optim: Optim, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters; biases and norms are exempt from weight decay.

    In adam, rmsprop and sgd the decay is added to the gradient; adamw and adafactor shrink the weights themselves.
    """
    groups = param_groups_weight_decay(model, optim.weight_decay)
    match optim.kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=optim.lr)
        case "adam":
            return torch.optim.Adam(groups, lr=optim.lr)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=optim.lr, momentum=optim.momentum)
        case "sgd":
            return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=optim.lr)


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Linear warm-up from lr / warmup_steps, then the schedule, which all but `constant` bring to 0 at the last step.

    Args:
        optim: peak, warm-up and schedule; cosine_restarts has `cycles` cosines of equal length, each from the peak.
        step: from 0.
        steps: of the whole training.

    Source: the authors' `cosine_lr`; Appendix J.2.1 gives the cosine, L.3 the restarts (Loshchilov and Hutter 2017).

    >>> o = Optim(lr=1.0, weight_decay=0, epochs=1, batch_size=2, warmup_steps=2, clip_norm=1, label_smoothing=0,
    ...           mixup=0)
    >>> [round(learning_rate(o, step, 6), 3) for step in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    share = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    match optim.schedule:
        case "cosine":
            return optim.lr * (1 + math.cos(math.pi * share)) / 2
        case "cosine_restarts":
            return optim.lr * (1 + math.cos(math.pi * (share * optim.cycles % 1))) / 2
        case "linear":
            return optim.lr * (1 - share)
        case "constant":
            return optim.lr
