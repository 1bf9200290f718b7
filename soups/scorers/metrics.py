"""Metrics of predicted classes."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from soups.scoring import Metric, Scored, Scorer, key_of, mean_of_answers

if TYPE_CHECKING:
    from soups.candidates import Candidate


def score(
    metric: Metric, predicted: Tensor, labels: Tensor, groups: Tensor | None = None, weights: Tensor | None = None
) -> float:
    """A number in [0, 1], of matthews in [-1, 1].

    Args:
        metric: `top1`; `macro_f1`, the mean F1 over the classes that occur among the labels, as WILDS scores iWildCam;
            `worst_group`, the smallest accuracy of a group that has images, as WILDS scores FMoW by region; `matthews`,
            the correlation of two or more classes, as GLUE scores CoLA, 0 where all labels or all predictions are one
            class; or `accuracy_and_f1`, (accuracy + F1 of class 1) / 2 of two classes, as GLUE scores MRPC.
        predicted, labels: (N,) class ids.
        groups: (N,) of worst_group; images with a negative one are left out.
        weights: (N,) how often each image counts, as a bootstrap draws it; once each where None.

    Raises:
        ValueError: no images, lengths that differ, worst_group without groups, or accuracy_and_f1 of other classes.

    Source: Koh et al. 2021, Section 4 (FMoW, iWildCam) and Appendix G.1 of the paper; Matthews 1975 and, for more
    classes, Gorodkin 2004, eq. 8; Wang et al. 2018 (GLUE) and Section 3.3 of the paper.

    >>> score("macro_f1", torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    0.6666666666666666
    """
    if not len(labels) or predicted.shape != labels.shape or labels.ndim != 1:
        raise ValueError(
            f"need (N,) predictions and labels, N > 0; got {tuple(predicted.shape)}, {tuple(labels.shape)}"
        )
    once = torch.ones(len(labels), dtype=torch.float64) if weights is None else weights.double()
    hits = once * (predicted == labels)
    match metric:
        case "top1":
            return (hits.sum() / once.sum()).item()
        case "macro_f1":
            size = int(max(predicted.max(), labels.max())) + 1
            right = torch.bincount(labels, hits, size)
            label_counts, predicted_counts = torch.bincount(labels, once, size), torch.bincount(predicted, once, size)
            occurs = label_counts > 0
            return (2 * right[occurs] / (label_counts + predicted_counts)[occurs]).mean().item()
        case "worst_group":
            if groups is None or not (groups >= 0).any():
                raise ValueError("worst_group needs the group of each image")
            known = groups >= 0
            total = torch.bincount(groups[known], once[known])
            right = torch.bincount(groups[known], hits[known])
            return (right / total)[total > 0].min().item()
        case "matthews":
            size = int(max(predicted.max(), labels.max())) + 1
            counts = torch.bincount(size * labels + predicted, once, size**2).reshape(size, size)  # (label, prediction)
            label_counts, predicted_counts, n = counts.sum(dim=1), counts.sum(dim=0), counts.sum()
            covariance = n * counts.trace() - label_counts @ predicted_counts
            spread = (n**2 - label_counts @ label_counts) * (n**2 - predicted_counts @ predicted_counts)
            return (covariance / spread.sqrt()).item() if spread > 0 else 0.0
        case "accuracy_and_f1":
            if max(int(labels.max()), int(predicted.max())) > 1:
                raise ValueError("MRPC's metric is one of two classes")
            positive = once[labels == 1].sum() + once[predicted == 1].sum()
            f1 = 2 * hits[labels == 1].sum() / positive.clamp(min=1e-300)
            return ((hits.sum() / once.sum() + f1) / 2).item()


def of_classes(
    metric: Metric, predicted: "Callable[[Candidate], Tensor]", labels: Tensor, key: str, **more: Any
) -> Scorer:
    """A metric of a candidate's (N,) predicted class ids as a scorer; `key` and `more` are fields of it."""

    def measure(candidate: "Candidate") -> Scored:
        answers = predicted(candidate)
        kept = answers == labels if metric == "top1" else answers.to(torch.int32)
        return Scored(score(metric, answers, labels), kept.numpy())

    def value(answers: NDArray[Any], times: NDArray[Any]) -> float:
        return score(metric, torch.from_numpy(answers).long(), labels, weights=torch.from_numpy(times))

    if metric == "top1":  # a mean of hits
        return Scorer(measure, "max", metric, key_of(key, "hits"), mean_of_answers, len(labels), **more)
    return Scorer(measure, "max", metric, key, value, len(labels), **more)
