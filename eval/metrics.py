"""Metrics as pure functions of logits and labels; those of predicted classes are in soups/scorers/metrics.py.

Everywhere logits are (N, C) of any float dtype, and labels (N,) class ids in [0, C).
"""

import torch
from torch import Tensor


def check(logits: Tensor, labels: Tensor) -> None:
    """Raise a ValueError for no examples, shapes that do not agree, NaN, or labels that are no class ids."""
    _check_labels(logits, labels)
    _refuse_nan(logits.amax(dim=1))  # the largest of some numbers is NaN where one of them is


def _check_labels(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need (N, C) logits, (N,) labels, N > 0; got {tuple(logits.shape)}, {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if labels.is_floating_point() or low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels are class ids in [0, {logits.shape[1]}); got {labels.dtype} between {low} and {high}, "
            "which no prediction could match"
        )


def _refuse_nan(largest: Tensor) -> None:
    if largest.isnan().any():
        raise ValueError("the logits hold NaN, which argmax would count as a prediction")


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether each example's largest logit is its label's (the first of equals counts); raises as `check`.

    >>> correct(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    tensor([ True, False])
    """
    _check_labels(logits, labels)
    if logits.device.type == "cpu" and logits.dtype == torch.float32:  # numpy's is five times as fast, of the same bits
        predicted = torch.from_numpy(logits.detach().numpy().argmax(axis=1))
    else:
        predicted = logits.argmax(dim=1)
    _refuse_nan(logits.gather(1, predicted.unsqueeze(1)))  # both take a NaN for the largest
    return predicted == labels


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of examples, in [0, 1], whose largest logit is their label's; raises as `check`."""
    return correct(logits, labels).double().mean().item()


def topk(logits: Tensor, labels: Tensor, k: int = 5) -> float:
    """The share of examples, in [0, 1], whose label is among the k largest logits; raises as `check`.

    Of equal logits the smaller class id comes first, so that k = 1 is `top1`.
    """
    check(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-k of {logits.shape[1]} classes needs k between 1 and that, got {k}")
    label = labels.long().unsqueeze(1)  # (N, 1)
    at_label = logits.gather(1, label)  # (N, 1)
    smaller_id = torch.arange(logits.shape[1], device=logits.device) < label  # (N, C)
    before = (logits > at_label) | ((logits == at_label) & smaller_id)
    return (before.sum(dim=1) < k).double().mean().item()


def log_probabilities(logits: Tensor) -> Tensor:
    """(N, C) float64 log-softmax; -inf masks a class out, and a ValueError tells a row that has no softmax."""
    found = logits.double().log_softmax(dim=1)
    if torch.isnan(found).any():
        raise ValueError("some logits have no softmax: a row holds +inf, or -inf for every class")
    return found


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy of the labels in nats, >= 0; inf where a label is masked out; raises as `check`."""
    check(logits, labels)
    return -log_probabilities(logits).gather(1, labels.long().unsqueeze(1)).mean().item()


def correct_in_sets(logits: Tensor, sets: Tensor) -> Tensor:
    """(M,) bool: whether each prediction is among the image's labels, (N, C) bool; images without any are left out.

    Source: Beyer et al. 2020, Section 3: images on which the raters agreed on no label are not counted.
    """
    if sets.dtype != torch.bool or logits.ndim != 2 or sets.shape != logits.shape:
        raise ValueError(f"need (N, C) logits and bool label sets; got {tuple(logits.shape)}, {tuple(sets.shape)}")
    labelled = sets.any(dim=1)
    predicted = logits.argmax(dim=1)
    check(logits, predicted)
    if not labelled.any():
        raise ValueError("no image has a label, so there is no accuracy")
    return sets.to(logits.device).gather(1, predicted.unsqueeze(1)).squeeze(1)[labelled]


def mean_by_group(values: Tensor, groups: Tensor) -> Tensor:
    """(G,) float64: the mean of (N,) values in each group that occurs in (N,) groups, by rising group id."""
    _, which = groups.unique(return_inverse=True)
    return torch.bincount(which, weights=values.double()) / torch.bincount(which)
