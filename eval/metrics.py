"""Metrics as pure functions of logits and labels."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.scores import score


def check(logits: Tensor, labels: Tensor) -> None:
    """Refuse logits and labels that have no metric.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).

    Raises:
        ValueError: N is 0, the shapes do not agree, a logit is not a number, or a label is not a class id.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"need (N, C) logits, (N,) labels, N > 0; got {tuple(logits.shape)}, {tuple(labels.shape)}")
    if torch.isnan(logits).any():
        raise ValueError("the logits hold NaN, which argmax would count as a prediction")
    low, high = int(labels.min()), int(labels.max())
    if labels.is_floating_point() or low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels are class ids in [0, {logits.shape[1]}); got {labels.dtype} between {low} and {high}, "
            "which no prediction could match"
        )


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(N,) bool: whether each example's largest logit is its label's (the first of equals counts).

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).

    Raises:
        ValueError: as `check`.

    >>> correct(torch.tensor([[2.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1]))
    tensor([ True, False])
    """
    check(logits, labels)
    return logits.argmax(dim=1) == labels


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of examples, in [0, 1], whose largest logit is their label's; raises as `check`."""
    return correct(logits, labels).double().mean().item()


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """(N,) bool: whether fewer than k classes come before each example's label.

    Larger logits come first, of equal ones the smaller class id, so that k = 1 is `correct`.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).
        k: in [1, C].

    Raises:
        ValueError: as `check`, or k is out of range.
    """
    check(logits, labels)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"top-k of {logits.shape[1]} classes needs k between 1 and that, got {k}")
    label = labels.long().unsqueeze(1)  # (N, 1)
    own = logits.gather(1, label)  # (N, 1)
    smaller_id = torch.arange(logits.shape[1], device=logits.device) < label  # (N, C)
    before = (logits > own) | ((logits == own) & smaller_id)
    return before.sum(dim=1) < k


def topk(logits: Tensor, labels: Tensor, k: int = 5) -> float:
    """The share of examples, in [0, 1], whose label is among the k largest logits; raises as `correct_in_top`."""
    return correct_in_top(logits, labels, k).double().mean().item()


def log_probabilities(logits: Tensor) -> Tensor:
    """(N, C) float64 log-softmax of (N, C) logits of any float dtype; -inf is a class that is masked out.

    Raises:
        ValueError: a row has +inf, or nothing but -inf, and hence no softmax.
    """
    found = logits.double().log_softmax(dim=1)
    if torch.isnan(found).any():
        raise ValueError("some logits have no softmax: a row holds +inf, or -inf for every class")
    return found


def nll(logits: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood of the labels: the mean cross-entropy in nats, >= 0.

    Args:
        logits: (N, C), any float dtype; the softmax is taken in float64.
        labels: (N,) class ids in [0, C).

    Returns:
        inf where a label's class is masked out with -inf.

    Raises:
        ValueError: as `check` and `log_probabilities`.
    """
    check(logits, labels)
    return -log_probabilities(logits).gather(1, labels.long().unsqueeze(1)).mean().item()


def label_sets(sets: Tensor | Sequence[Sequence[int]], classes: int) -> Tensor:
    """(N, C) bool: which classes are right for each image, from lists of class ids or from such a tensor itself.

    Raises:
        ValueError: there are no images, a tensor is not (N, C) bool, or an id is out of range.

    >>> label_sets([[0, 2], []], classes=3)
    tensor([[ True, False,  True],
            [False, False, False]])
    """
    if not len(sets):
        raise ValueError("need the label sets of N > 0 images, got none")
    if isinstance(sets, Tensor):
        if sets.dtype != torch.bool or sets.ndim != 2 or sets.shape[1] != classes:
            raise ValueError(f"need (N, {classes}) bool label sets, got {tuple(sets.shape)} {sets.dtype}")
        return sets
    found = torch.zeros(len(sets), classes, dtype=torch.bool)
    for i, ids in enumerate(sets):
        for label in ids:
            if not 0 <= label < classes:  # a negative one would count from the end
                raise ValueError(f"image {i} has label {label}, which is not in [0, {classes})")
            found[i, label] = True
    return found


def _right_and_labelled(logits: Tensor, sets: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """(N,) bool each: whether the prediction is in the image's set, and whether that set has a label at all."""
    if logits.ndim != 2 or len(logits) != len(sets) or not len(sets):
        raise ValueError(f"need (N, C) logits and N > 0 label sets; got {tuple(logits.shape)} and {len(sets)}")
    right = label_sets(sets, logits.shape[1]).to(logits.device)
    labelled = right.any(dim=1)
    if not labelled.any():
        raise ValueError("no image has a label, so there is no accuracy")
    prediction = logits.argmax(dim=1)
    check(logits, prediction)
    return right.gather(1, prediction.unsqueeze(1)).squeeze(1), labelled


def correct_in_sets(logits: Tensor, sets: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """(M,) bool: whether each prediction is one of the image's labels; the N - M images without labels are left out.

    Two models leave out the same images, so their results stay paired.

    Args:
        logits: (N, C), any float dtype.
        sets: (N, C) bool, or N lists of class ids; an empty one is an image without labels.

    Raises:
        ValueError: N is 0, the shapes do not agree, a logit is not a number, or no image has a label.
    """
    right, labelled = _right_and_labelled(logits, sets)
    return right[labelled]


def real_accuracy(logits: Tensor, sets: Tensor | Sequence[Sequence[int]]) -> float:
    """ReaL accuracy in [0, 1]: the share of images with labels whose prediction is one of them.

    Args and errors as `correct_in_sets`.

    Source: Beyer et al. 2020, Section 3: images on which the raters agreed on no label are not counted.
    """
    return correct_in_sets(logits, sets).double().mean().item()


def multilabel_accuracy(logits: Tensor, sets: Tensor | Sequence[Sequence[int]], labels: Tensor) -> float:
    """Multi-label accuracy in [0, 1]: the share of right predictions in each ImageNet class, averaged over classes.

    Args:
        logits: (N, C), any float dtype.
        sets: (N, C) bool, or N lists of class ids. For the published labels: those marked correct and those marked
            unclear, and an empty set for a problematic image, which is left out.
        labels: (N,) the original class id of each image, in [0, C), by which images are grouped.

    Raises:
        ValueError: as `correct_in_sets` and `check`.

    Source: Shankar et al. 2020 and the evaluation that comes with their labels (TensorFlow Datasets'
    imagenet2012_multilabel), which averages over classes since their subset does not hold equally many images of
    each. The soups paper does not say how it averages; the mean over images is `real_accuracy` of the same sets.
    """
    check(logits, labels)
    right, labelled = _right_and_labelled(logits, sets)
    return right_by_group(right[labelled], labels[labelled]).mean().item()


def right_by_group(right: Tensor, groups: Tensor) -> Tensor:
    """(G,) float64: the share of (N,) right ones in each group that occurs in (N,) groups, by rising group id."""
    _, which = groups.unique(return_inverse=True)
    return torch.bincount(which, weights=right.double()) / torch.bincount(which)


@dataclass(frozen=True)
class GroupAccuracy:
    """Accuracy in [0, 1] on the n > 0 images of one group."""

    group: int
    n: int
    accuracy: float


def accuracy_by_group(logits: Tensor, labels: Tensor, groups: Tensor) -> tuple[GroupAccuracy, ...]:
    """Accuracy on each group that has images, by rising group id.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).
        groups: (N,) integer group ids, e.g. regions.

    Raises:
        ValueError: as `check`, or groups are not (N,) integers.
    """
    right = correct(logits, labels)
    if groups.shape != labels.shape or groups.is_floating_point():
        raise ValueError(f"need {tuple(labels.shape)} integer groups, got {tuple(groups.shape)} {groups.dtype}")
    ids, counts = groups.unique(return_counts=True)
    rows = zip(ids.tolist(), counts.tolist(), right_by_group(right, groups).tolist(), strict=True)
    return tuple(GroupAccuracy(*row) for row in rows)


def worst_group(logits: Tensor, labels: Tensor, groups: Tensor, *, leave_out: Collection[int] = ()) -> GroupAccuracy:
    """The group with the lowest accuracy, of equals the smaller id.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).
        groups: (N,) integer group ids; those without images are left out.
        leave_out: groups that do not count, such as FMoW's region "Other".

    Raises:
        ValueError: as `accuracy_by_group`, or no group is left.

    Source: Koh et al. 2021, FMoW's worst-region accuracy; their evaluation ignores empty regions and "Other".
    """
    found = [row for row in accuracy_by_group(logits, labels, groups) if row.group not in leave_out]
    if not found:
        raise ValueError(f"all groups with images are left out ({sorted(leave_out)}), so none is the worst")
    return min(found, key=lambda row: (row.accuracy, row.group))


def macro_f1(logits: Tensor, labels: Tensor) -> float:
    """The mean F1 score, in [0, 1], of the classes that occur in the labels.

    A class that is only predicted has no score of its own; its predictions lower the recall of the true classes.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).

    Raises:
        ValueError: as `check`.

    Source: Koh et al. 2021 (WILDS), iWildCam; scikit-learn's f1_score(average="macro", labels=unique(y_true)).
    """
    check(logits, labels)
    return score("macro_f1", logits.argmax(dim=1), labels.long())


def matthews(logits: Tensor, labels: Tensor) -> float:
    """Matthews correlation in [-1, 1], of two or more classes; 0 where all labels or all predictions are one class.

    Args:
        logits: (N, C), any float dtype.
        labels: (N,) class ids in [0, C).

    Raises:
        ValueError: as `check`.

    Source: Matthews 1975; for more classes Gorodkin 2004, eq. 8. CoLA's metric in GLUE.
    """
    check(logits, labels)
    return score("matthews", logits.argmax(dim=1), labels.long())


def accuracy_and_f1(logits: Tensor, labels: Tensor) -> float:
    """(accuracy + F1 of class 1) / 2, in [0, 1].

    Args:
        logits: (N, 2), any float dtype.
        labels: (N,) 0 or 1; 1 is a paraphrase.

    Raises:
        ValueError: as `check`, or C is not 2.

    Source: MRPC's metric in GLUE (Wang et al. 2018). F1 is 0 where class 1 neither occurs nor is predicted.
    """
    check(logits, labels)
    if logits.shape[1] != 2:
        raise ValueError(f"MRPC's metric is one of two classes, got logits of {logits.shape[1]}")
    return score("accuracy_and_f1", logits.argmax(dim=1), labels.long())
