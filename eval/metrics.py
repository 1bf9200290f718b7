"""Metrics as pure functions of logits and labels."""

import torch
from torch import Tensor


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether each example's largest logit is its label's (the first of equals counts).

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).

    Raises:
        ValueError: N is 0, the shapes do not agree, or a logit is not a number.

    >>> correct(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    tensor([ True, False])
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need (N, C) logits, (N,) labels, N > 0; got {tuple(logits.shape)}, {tuple(labels.shape)}")
    if torch.isnan(logits).any():
        raise ValueError("the logits hold NaN, which argmax would count as a prediction")
    return logits.argmax(dim=1) == labels


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of examples, in [0, 1], whose largest logit is their label's; raises as `correct`."""
    return correct(logits, labels).double().mean().item()
